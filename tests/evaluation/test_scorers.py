"""Scores equal those of the packages that define them, on tiny random networks.

Each reference is compared where its package is installed, and skipped elsewhere.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from fewstep.backbones import miniature
from fewstep.cli.extra import extra_of
from fewstep.evaluation import scorers
from fewstep.evaluation.distances import frechet_distance, kernel_distance, kernel_reference, moments
from fewstep.evaluation.inception import Inception, clean_resize, load_inception, read_statistics, torch_resize
from fewstep.evaluation.scorer import Extra, require_extra
from fewstep.evaluation.scorers import (
    AestheticHead,
    AestheticScorer,
    ClipScorer,
    clip_pixels,
    from_open_clip,
    pil_images,
)
from fewstep.evaluation.weights import PLACE, Weights

PROMPTS = ["red cat", "blue dog", "red dog red"]
SIZE, WIDTH = 32, 16


def images(height: int = 48, width: int = 48) -> Tensor:
    """Three images of smooth colours, on 8-bit values."""
    rng = torch.Generator().manual_seed(0)
    coarse = torch.rand((3, 3, 6, 6), generator=rng)
    fine = nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (fine * 255).round() / 255


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return miniature.word_tokenizer(["red cat", "blue dog"], 600, 12)


@pytest.fixture(scope="module")
def clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    torch.manual_seed(0)
    common = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = CLIPTextConfig(
        **common,
        vocab_size=len(tokenizer),
        max_position_embeddings=12,
        projection_dim=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(**common, image_size=SIZE, patch_size=8, projection_dim=8)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)
    model = CLIPModel(config).eval()
    for parameter in model.parameters():  # the default ones are near zero
        nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return model


def need(module: str) -> Any:
    """Return a module of a package that defines a score; skip the test where it is not installed."""
    return pytest.importorskip(module, exc_type=ImportError)


@contextmanager
def plain_features(clip: CLIPModel) -> Iterator[None]:
    """Let a model return features as tensors, as transformers 4 did: what the packages that define a score expect."""

    def tensor(name: str) -> Callable[..., Tensor]:
        whole = getattr(clip, name)

        def features(*args: Any, **options: Any) -> Tensor:
            found = whole(*args, **options)
            return found if isinstance(found, Tensor) else found.pooler_output

        return features

    names = ("get_image_features", "get_text_features")
    for name in names:
        setattr(clip, name, tensor(name))
    try:
        yield
    finally:
        for name in names:
            delattr(clip, name)


def pil_processor() -> Any:
    """CLIP's processor as it was defined, by PIL: that of torchvision, where it is installed, rounds otherwise."""
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    return kind(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})


def test_inputs_are_those_of_clips_own_processor() -> None:
    processor = pil_processor()
    for shape in ((48, 48), (40, 64), (64, 40), (32, 32), (20, 20)):
        seen = images(*shape)
        theirs = processor(pil_images(seen), return_tensors="pt")["pixel_values"]
        assert (clip_pixels(seen, SIZE) - theirs).abs().max() <= 1e-5, shape


def test_clip_score_is_torchmetrics(clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    torchmetrics = need("torchmetrics.multimodal.clip_score")
    processor = transformers.CLIPProcessor(image_processor=pil_processor(), tokenizer=tokenizer)
    reference = torchmetrics.CLIPScore(model_name_or_path=lambda: (clip, processor))
    ours = ClipScorer("clip_score", clip, tokenizer, scorers._clip_score).score(images(), PROMPTS)
    for image, prompt, score in zip(images(), PROMPTS, ours, strict=True):
        reference.reset()
        with plain_features(clip):
            reference.update((image * 255).round().byte(), prompt)
        assert float(reference.compute()) == pytest.approx(max(float(score), 0.0), rel=1e-5, abs=1e-5)


def test_scores_of_a_prompt_do_not_depend_on_the_batch(clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    scorer = ClipScorer("pickscore", clip, tokenizer, scorers._logit)
    together = scorer.score(images(), PROMPTS)
    alone = torch.cat([scorer.score(images()[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    assert (together - alone).abs().max() <= 1e-5 and together.std() > 1e-3
    with torch.no_grad():
        seen = clip_pixels(images(), SIZE)
        tokens = tokenizer(PROMPTS, padding=True, return_tensors="pt")
        theirs = clip(pixel_values=seen, **tokens).logits_per_image.diagonal()
    assert (together - theirs).abs().max() <= 1e-4


def test_pickscore_is_imscores(clip: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    scorer = need("imscore.pickscore.model").PickScorer
    theirs = scorer.__new__(scorer)
    nn.Module.__init__(theirs)
    theirs.model, theirs.processor = clip, lambda text, **options: tokenizer(text, padding=True, return_tensors="pt")
    theirs._process = lambda pixels: clip_pixels(pixels, SIZE)
    own = ClipScorer("pickscore", clip, tokenizer, scorers._logit).score(images(), PROMPTS)
    with plain_features(clip), torch.no_grad():
        assert (theirs.score(images(), PROMPTS) - own).abs().max() <= 1e-5 * own.abs().max()


def test_hpsv2_is_open_clips_network(tokenizer: CLIPTokenizer) -> None:
    open_clip = need("open_clip")
    torch.manual_seed(0)
    vision = {"image_size": SIZE, "layers": 2, "width": 32, "head_width": 8, "patch_size": 8}
    text = {"context_length": 12, "vocab_size": len(tokenizer), "width": 16, "heads": 2, "layers": 2}
    theirs = open_clip.CLIP(8, vision, text).eval()
    config = CLIPConfig(
        text_config=CLIPTextConfig(
            hidden_size=16,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=8,
            hidden_act="gelu",
            vocab_size=len(tokenizer),
            max_position_embeddings=12,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ).to_dict(),
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            projection_dim=8,
            hidden_act="gelu",
            image_size=SIZE,
            patch_size=8,
        ).to_dict(),
        projection_dim=8,
    )
    ours = CLIPModel(config).eval()
    renamed = from_open_clip(theirs.state_dict())
    known = {k for k in ours.state_dict() if not k.endswith("position_ids")}
    assert renamed.keys() == known
    ours.load_state_dict(renamed, strict=False)
    scorer = ClipScorer("hpsv21", ours, tokenizer, scorers._percent, "pad")
    seen = images(40, 48)
    with torch.no_grad():
        tokens = tokenizer(PROMPTS, padding="max_length", max_length=12, return_tensors="pt")["input_ids"]
        first = theirs.encode_image(clip_pixels(seen, SIZE, "pad"), normalize=True)
        # open_clip reads a text at its largest token, which is the end in CLIP's vocabulary; here at the end itself.
        x = theirs.token_embedding(tokens) + theirs.positional_embedding
        x = theirs.ln_final(theirs.transformer(x, attn_mask=theirs.attn_mask))
        ends = (tokens == tokenizer.eos_token_id).int().argmax(1)
        second = nn.functional.normalize(x[torch.arange(3), ends] @ theirs.text_projection, dim=-1)
        expected = 100 * (first * second).sum(1)
    assert (scorer.score(seen, PROMPTS) - expected).abs().max() <= 1e-4  # of 100


def test_padding_is_hpsv2s() -> None:
    """That of its own transform, which scales tensors and does not round."""
    imscore = need("imscore.hps.model")
    theirs = imscore.HPSv2.__new__(imscore.HPSv2)
    nn.Module.__init__(theirs)
    theirs.resize = imscore.ResizeMaxSize(SIZE)
    theirs.normalize = need("torchvision.transforms").Normalize(scorers.MEAN, scorers.STD)
    for shape in ((40, 48), (48, 40), (48, 48), (20, 30), (32, 32), (100, 33)):
        seen = images(*shape)
        assert (clip_pixels(seen, SIZE, "pad") - theirs._process(seen)).abs().max() <= 1e-5, shape


def hpsv2_checkpoint() -> dict[str, tuple[int, ...]]:
    """The names and shapes in HPSv2's checkpoint: a ViT-H-14 of open_clip."""
    width, text, layers, words = 1280, 1024, (32, 24), 49408
    found: dict[str, tuple[int, ...]] = {
        "positional_embedding": (77, text),
        "text_projection": (text, 1024),
        "logit_scale": (),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (257, width),
        "visual.proj": (width, 1024),
        "visual.conv1.weight": (width, 3, 14, 14),
        "token_embedding.weight": (words, text),
    }
    norms = {"visual.ln_pre": width, "visual.ln_post": width, "ln_final": text}
    for tower, side, count in (("visual.", width, layers[0]), ("", text, layers[1])):
        for i in range(count):
            block = f"{tower}transformer.resblocks.{i}"
            norms |= {f"{block}.ln_1": side, f"{block}.ln_2": side}
            for name, rows, columns in (
                ("attn.in_proj_", 3 * side, side),
                ("attn.out_proj.", side, side),
                ("mlp.c_fc.", 4 * side, side),
                ("mlp.c_proj.", side, 4 * side),
            ):
                found |= {f"{block}.{name}weight": (rows, columns), f"{block}.{name}bias": (rows,)}
    return found | {f"{name}.{kind}": (side,) for name, side in norms.items() for kind in ("weight", "bias")}


def test_hpsv2s_checkpoint_fills_every_weight_of_the_network() -> None:
    """Of its full size, without memory: each name of the checkpoint has one place, of its shape."""
    with torch.device("meta"):
        whole = {name: torch.empty(shape) for name, shape in hpsv2_checkpoint().items()}
        model = CLIPModel(scorers.vit_h())
    renamed = from_open_clip(whole)
    wanted = {k: v.shape for k, v in model.state_dict().items() if not k.endswith("position_ids")}
    assert {k: v.shape for k, v in renamed.items()} == wanted
    assert sum(v.numel() for v in renamed.values()) == sum(v.numel() for v in whole.values())
    config = model.config
    assert config.text_config.layer_norm_eps == config.vision_config.layer_norm_eps == 1e-5
    assert config.text_config.eos_token_id == 49407 == config.text_config.vocab_size - 1


def test_that_layout_is_open_clips() -> None:
    open_clip = need("open_clip")
    settings = open_clip.get_model_config("ViT-H-14")
    with torch.device("meta"):
        theirs = open_clip.CLIP(**settings).state_dict()
    assert {k: tuple(v.shape) for k, v in theirs.items()} == hpsv2_checkpoint()


def test_the_aesthetic_head_is_imscores(clip: CLIPModel) -> None:
    torch.manual_seed(0)
    config = CLIPVisionConfig(**{**clip.config.vision_config.to_dict(), "projection_dim": 768})
    model, head = CLIPVisionModelWithProjection(config).eval(), AestheticHead().eval()
    own = AestheticScorer("aesthetic", model, head).score(images(), PROMPTS)
    assert own.shape == (3,)
    imscore = need("imscore.aesthetic.model")
    theirs = imscore.LAIONAestheticScorer.__new__(imscore.LAIONAestheticScorer)
    nn.Module.__init__(theirs)
    theirs.clip, theirs.mlp = model, imscore.MLP().eval()
    theirs.mlp.load_state_dict(head.state_dict())
    theirs.resize = theirs.crop = nn.Identity()
    theirs.normalize = lambda pixels: clip_pixels(pixels, SIZE)
    with torch.no_grad():
        assert (theirs.score(images()) - own).abs().max() <= 1e-5


def test_the_resize_is_clean_fids() -> None:
    cleanfid = need("cleanfid.resize")
    ours = clean_resize(images(40, 48))
    assert ours.shape == (3, 3, 299, 299)
    resize = cleanfid.build_resizer("clean")
    for image, own in zip(pil_images(images(40, 48)), ours, strict=True):
        theirs = torch.from_numpy(resize(np.asarray(image))).permute(2, 0, 1)
        assert (theirs - own).abs().max() <= 1e-5 * 255


def test_the_other_resize_is_torch_fidelitys() -> None:
    theirs = need("torch_fidelity.interpolate_compat_tensorflow").interpolate_bilinear_2d_like_tensorflow1x
    for shape in ((40, 48), (299, 299), (512, 300)):
        seen = images(*shape)
        expected = theirs((seen * 255).round(), size=(299, 299), align_corners=False)
        assert (torch_resize(seen) - expected).abs().max() <= 1e-5 * 255, shape


def test_the_other_resize_is_its_formula() -> None:
    """Each pixel lies at i in / out; where the sizes are equal nothing changes."""
    x = torch.arange(4.0)[None, None, None] / 255 * 60
    assert torch_resize(x.expand(1, 3, 2, 4), 8)[0, 0, 0].tolist() == pytest.approx([0, 30, 60, 90, 120, 150, 180, 180])
    same = images(16, 16)
    assert torch.equal(torch_resize(same, 16), (same * 255).round())


class Rough(nn.Module):
    """Features of 24 numbers: means over a grid, in Inception's place."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x.float(), (2, 4)).flatten(1)


def test_fid_and_kid_are_those_of_the_reference_packages() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.rand((60, 3, 16, 16), generator=rng), torch.rand((60, 3, 16, 16), generator=rng) ** 1.2
    network = Inception(Rough(), clean_resize)
    x, y = network.features(a), network.features(b)
    assert x.shape == (60, 24)
    fid = frechet_distance(moments(x), moments(y))
    sqrtm = need("scipy.linalg").sqrtm
    m, n = moments(x), moments(y)
    root = sqrtm(m.covariance.numpy() @ n.covariance.numpy()).real
    plain = float((m.mean - n.mean).square().sum() + np.trace(m.covariance.numpy() + n.covariance.numpy() - 2 * root))
    assert fid == pytest.approx(plain, rel=1e-5, abs=1e-5)
    theirs = float(need("torchmetrics.image.kid").poly_mmd(x.double(), y.double()))
    assert kernel_distance(kernel_reference(x), y) == pytest.approx(theirs, rel=1e-5, abs=1e-8)


def test_statistics_of_a_file_are_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 4))
    np.savez(tmp_path / "s.npz", mu=x.mean(0), sigma=np.cov(x, rowvar=False))
    own = moments(torch.from_numpy(x))
    assert frechet_distance(read_statistics(tmp_path / "s.npz"), own) == pytest.approx(0, abs=1e-9)
    np.savez(tmp_path / "odd.npz", mu=x.mean(0))
    with pytest.raises(ValueError, match=r"reference .*odd\.npz .*; pass an npz with mu and sigma"):
        read_statistics(tmp_path / "odd.npz")


def test_fid_of_few_images_is_refused() -> None:
    extra = Extra(fid=True)
    with pytest.raises(ValueError, match=r"^--metrics fid: protocol own-quick has 64 images, FID takes at least 2,000"):
        require_extra(extra, "own-quick", 64, True)
    with pytest.raises(ValueError, match=r"^--metrics fid: there is nothing to compare with; pass --real FOLDER or"):
        require_extra(extra, "parti", 3264, False)
    require_extra(extra, "parti", 3264, True)
    with pytest.raises(
        ValueError, match=r"^--metrics fid_torch: protocol own has 512 images, FID takes at least 2,000"
    ):
        require_extra(Extra(fid_torch=True), "own", 512, True)
    with pytest.raises(ValueError, match=r"^--metrics: got fid_torch with fid or kid, whose images are resized other"):
        extra_of(["kid", "fid_torch"], None)


@pytest.mark.parametrize("name", list(scorers.SCORERS))
def test_missing_weights_are_named_in_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path))
    with pytest.raises(ValueError, match=rf"^--metrics {name}: its weights cannot be had here; put .*model") as error:
        scorers.SCORERS[name]()
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value) and "hf download" in str(error.value)
    with pytest.raises(ValueError, match=r"^--metrics fid: its network is not here; put https://.* into "):
        load_inception("fid")


def test_weights_in_their_place_are_read_and_hashed(
    clip: CLIPModel, tokenizer: CLIPTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path))
    folder = tmp_path / "openai--clip-vit-large-patch14"
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    files = ("config.json", "model.safetensors", *(p.name for p in folder.glob("tokenizer*")))
    monkeypatch.setattr(scorers, "CLIP_L", Weights("openai/clip-vit-large-patch14", files))
    scorer = scorers.SCORERS["clip_score"]()
    expected = ClipScorer("clip_score", clip, tokenizer, scorers._clip_score).score(images(), PROMPTS)
    assert (scorer.score(images(), PROMPTS) - expected).abs().max() <= 1e-5
    assert set(scorer.weights) == {f"openai/clip-vit-large-patch14/{name}" for name in files}
    assert all(len(digest) == 64 for digest in scorer.weights.values())
