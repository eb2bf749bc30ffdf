"""The bundled teachers' own training runs on data of a few images.

It covers data, checksum, stages, resuming, and the folder that results.
"""

import hashlib
import io
import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

import fewstep
from fewstep.training.fit import FitConfig
from fewstep.zoo import emoji_data
from fewstep.zoo.teacher import TeacherConfig, train_teacher, v_loss

from ..archives import pack


def png(colour: tuple[int, int, int, int]) -> bytes:
    file = io.BytesIO()
    Image.new("RGBA", (64, 64), colour).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Three emoji, one of them in five skin tones and one couple in two tones, laid out as the npm package is."""
    tones = {code: {"image": f"hand-{code}.png", "has_img_google": True} for code in emoji_data.TONES}
    couple = {"1F3FB-1F3FF": {"image": "couple-x.png", "has_img_google": True}}
    about = {"category": "People & Body", "subcategory": "hands"}
    entries = [
        {"name": "RED CIRCLE", "image": "red.png", "has_img_google": True},
        {"name": "WAVING  HAND", "image": "hand.png", "has_img_google": True, "skin_variations": tones},
        {"name": "COUPLE", "image": "couple.png", "has_img_google": True, "skin_variations": couple},
        {"name": "OTHER FONT ONLY", "image": "none.png", "has_img_google": False},
    ]
    entries = [{**about, **entry} for entry in entries]
    files = {"package/emoji.json": json.dumps(entries).encode()}
    names = ["red.png", "hand.png", "couple.png", "couple-x.png", *(v["image"] for v in tones.values())]
    files |= {f"package/img/google/64/{n}": png((20 * i, 100, 50, 255 if i else 0)) for i, n in enumerate(names)}
    return pack(tmp_path / "tiny-emoji-1.0.0.tgz", files)


def test_captions_and_images(archive: Path) -> None:
    emoji, images = emoji_data.load(archive, 0.0)
    captions = [e.caption for e in emoji]
    assert captions[:2] == ["red circle", "waving hand"]
    assert "waving hand, medium-dark skin tone" in captions
    assert captions[-1] == "couple, light skin tone and dark skin tone"
    assert emoji[-1].tone == ""  # two tones are no single one
    assert images.shape == (9, 3, 64, 64)
    assert (images[0] == 255).all()  # a transparent image is white
    assert images[1][:, 0, 0].tolist() == [20, 100, 50]


def test_a_placed_image_is_the_image_at_another_place() -> None:
    """A placed image is the image, smaller and at another place.

    A black square's area shrinks with the square of the scale, and it changes sides only where it may.
    """
    square = torch.full((200, 3, 64, 64), 255, dtype=torch.uint8)
    square[:, :, 20:40, 8:28] = 0
    mirrors = torch.arange(200) < 100
    found = emoji_data.placed(square, mirrors, 0.7, torch.Generator().manual_seed(0))
    assert found.dtype == torch.uint8
    ink = (255 - found.float()).mean(1) / 255
    scale = (ink.sum((1, 2)) / 400).sqrt()
    assert 0.69 < scale.min() < 0.75
    assert 0.95 < scale.max() < 1.01
    centre = (ink.sum(1) * torch.arange(64)).sum(1) / ink.sum((1, 2))
    on_the_right = centre > 34
    assert 30 < on_the_right[:100].sum() < 70
    assert not on_the_right[100:].any()
    assert centre[100:].std() > 1  # moved about
    assert torch.equal(
        emoji_data.placed(square, mirrors, 1.0, torch.Generator())[100:], square[100:]
    )  # no room, no change
    again = emoji_data.placed(square, mirrors, 0.7, torch.Generator().manual_seed(0))
    assert torch.equal(found, again)


def test_what_has_a_side_is_not_mirrored(archive: Path) -> None:
    hand = {
        "name": "POINTING HAND",
        "image": "",
        "has_img_google": True,
        "category": "People & Body",
        "subcategory": "hands",
    }
    changed: list[dict[str, object]] = [
        {},
        {"name": "LEFT POINTING HAND"},
        {"category": "Flags"},
        {"subcategory": "time"},
    ]
    assert [emoji_data.catalogue([{**hand, **c}], 0.0)[0].mirrors for c in changed] == [True, False, False, False]
    emoji, images = emoji_data.with_places(*emoji_data.load(archive, 0.0), copies=2)
    assert len(emoji) == len(images) == 9 + 2 * 3
    assert [e.caption for e in emoji[9:12]] == ["red circle", "waving hand", "couple"]


def test_held_out_is_a_matter_of_the_caption_alone(archive: Path) -> None:
    first, second = emoji_data.load(archive, 0.5)[0], emoji_data.load(archive, 0.5)[0]
    held = {e.caption for e in first if e.held_out}
    assert held == {e.caption for e in second if e.held_out}
    assert held
    assert all(e.tone for e in first if e.held_out)
    assert not any(e.held_out for e in emoji_data.load(archive, 0.0)[0])


def test_a_wrong_checksum_is_an_error(archive: Path) -> None:
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    assert emoji_data.fetch("tiny-emoji", "1.0.0", digest, archive.parent) == archive
    with pytest.raises(ValueError, match=r"data.sha256: .*expected 0000"):
        emoji_data.fetch("tiny-emoji", "1.0.0", "0000", archive.parent)


def config(archive: Path, steps: int = 4) -> TeacherConfig:
    fit = {"steps": steps, "batch": 4, "lr": 1e-3, "warmup": 1, "decay": 1, "checkpoint_every": 2}
    return TeacherConfig.model_validate(
        {
            "kind": "teacher",
            "seed": 0,
            "data": {
                "package": "tiny-emoji",
                "version": "1.0.0",
                "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
                "folder": str(archive.parent),
                "hold_out": 0.3,
                "variants": 3,
            },
            "codec": {"channels": [8, 8, 8, 8], "latent": 4, "kl": 1e-4, "fit": fit, "decoder": fit},
            "text": {"width": 32, "layers": 1, "heads": 4, "vocabulary": 600, "length": 16},
            "denoiser": {"channels": [16, 16], "attention": [False, True], "drop_caption": 0.1, "fit": fit},
        }
    )


def test_the_decoder_alone_is_fitted_on(archive: Path, tmp_path: Path) -> None:
    stages = train_teacher(config(archive), tmp_path)
    codec: dict[str, torch.Tensor] = {}
    for stage, _ in stages:
        if stage == "decoder" and not codec:
            codec = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
        if stage == "denoiser":
            stages.close()
    after = load_file(tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    changed = {k.split(".")[0] for k, v in codec.items() if not torch.equal(v, after[k])}
    assert changed == {"post_quant_conv", "decoder"}


def test_the_emoji_teacher_trains_resumes_and_is_a_pipeline(archive: Path, tmp_path: Path) -> None:
    straight = list(train_teacher(config(archive), tmp_path / "straight"))
    assert [(stage, s.step) for stage, s in straight] == [
        (stage, i) for stage in ("codec", "decoder", "denoiser") for i in (1, 2, 3, 4)
    ]
    stopped = train_teacher(config(archive), tmp_path / "stopped")
    for stage, step in stopped:
        if (stage, step.step) == ("denoiser", 3):
            stopped.close()
    resumed = list(train_teacher(config(archive), tmp_path / "stopped"))
    assert [(stage, s.step, s.loss) for stage, s in resumed] == [("denoiser", 4, straight[-1][1].loss)]
    weights = [
        load_file(next((tmp_path / run / "teacher" / "unet").glob("*.safetensors"))) for run in ("straight", "stopped")
    ]
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())
    teacher = fewstep.load_teacher(tmp_path / "straight" / "teacher")
    assert teacher.shape == (4, 8, 8)
    assert fewstep.sample(teacher, ["red circle"], steps=2, guidance=2.0).shape == (1, 3, 64, 64)
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "straight" / "teacher")
    assert plain.text_encoder.dtype == plain.unet.dtype == torch.float32
    prompts = (tmp_path / "straight" / "teacher" / "prompts.txt").read_text().splitlines()
    held = {e.caption for e in emoji_data.load(archive, 0.3)[0] if e.held_out}
    assert held
    assert not held & set(prompts)


def test_the_last_time_of_a_batch_stays_on_the_table(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """127 + the largest number below 1 is 128 in single precision, which made a time 1000 of 0 .. 999."""
    emoji, seen = emoji_data.load(archive, 0.0)[0], list[int]()

    class Net(torch.nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor, captions: torch.Tensor) -> torch.Tensor:
            seen.append(int(t.max()))
            return x

    words, fit = torch.zeros(len(emoji), 3, dtype=torch.long), FitConfig(steps=1, batch=128, lr=1e-3)
    loss_at = v_loss(
        Net(), emoji, torch.zeros(len(emoji), 1, 1, 2, 2), words, words[0], torch.linspace(0.9, 0.1, 1000), fit, 0.1, 0
    )
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), 1 - 2**-24))
    assert loss_at(0).isfinite()
    assert seen == [999]
