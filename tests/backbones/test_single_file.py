"""Teachers in one file: they are the pipelines that they were made from, and what is none is said so in one line."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.api import sample
from fewstep.backbones.load import Source, fingerprint, load_teacher, pipeline_of, source_of
from fewstep.backbones.meta import meta_teacher
from fewstep.backbones.parts import networks
from fewstep.backbones.single_file import FIRST, POOLED, SD1, SD2_EPS, SD2_V, SDXL, read_checkpoint
from fewstep.checks import check_backbone

from .. import single_file

PROMPTS = ["red cat", "a photo of a green house"]
KEYS = "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight"
TEXT, SECOND = "cond_stage_model.x", "conditioner.embedders.1.model.x"


@pytest.fixture(scope="module", params=single_file.PIPELINES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def saved(family: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return single_file.save(family, tmp_path_factory.mktemp("single"))


def configured(file: Path) -> str:
    return f"{file}@{file.parent / 'configs'}"


def test_a_file_is_the_pipeline_it_was_made_from(saved: tuple[Path, Path]) -> None:
    whole, file = saved
    theirs, ours = load_teacher(whole), load_teacher(configured(file))
    assert ours.name == "model"
    assert fingerprint(ours.module, *ours.encoders) == fingerprint(theirs.module, *theirs.encoders)
    x, t = torch.randn(2, *theirs.shape), torch.tensor([999.0, 100.0])
    with torch.no_grad():
        (theirs_said, theirs_seen), (ours_said, ours_seen) = (
            (cond := b.encode(PROMPTS), b.predict(b.module, x, t, cond)) for b in (theirs, ours)
        )
    assert theirs_said.keys() == ours_said.keys()
    assert all(torch.equal(theirs_said[k], ours_said[k]) for k in theirs_said)
    assert torch.equal(theirs_seen, ours_seen)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(ours.encode_images(images), theirs.encode_images(images))
    assert torch.equal(sample(ours, PROMPTS, steps=2, guidance=3.0), sample(theirs, PROMPTS, steps=2, guidance=3.0))
    assert not [p for network in networks(pipeline_of(ours)) for p in network.parameters() if p.requires_grad]


def test_a_file_keeps_the_protocol(saved: tuple[Path, Path]) -> None:
    check_backbone(load_teacher(configured(saved[1])), PROMPTS)


def test_a_plan_reads_no_weights(saved: tuple[Path, Path], tmp_path: Path) -> None:
    """The header alone: the file's tensors are cut off."""
    whole, file = saved
    cut = tmp_path / "model.safetensors"
    cut.write_bytes(file.read_bytes()[: 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    with cut.open("ab") as opened:
        opened.truncate(file.stat().st_size)  # as long as before, all zeros
    hollow, folder = meta_teacher(f"{cut}@{file.parent / 'configs'}"), meta_teacher(whole)
    assert {n: p.shape for n, p in hollow.module.named_parameters()} == {
        n: p.shape for n, p in folder.module.named_parameters()
    }
    assert hollow.scheduler_config == folder.scheduler_config


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_what_the_file_says_it_predicts_goes_before_the_configuration(saved: tuple[Path, Path], tmp_path: Path) -> None:
    """`v_pred` and `ztsnr` mean v-prediction down to pure noise. Both hold for a plan as for a training."""
    whole, file = saved
    marked = tmp_path / "marked.safetensors"
    save_file(load_file(file) | {"v_pred": torch.tensor([]), "ztsnr": torch.tensor([])}, marked)
    plain = load_teacher(whole)
    for teacher in (
        load_teacher(f"{marked}@{file.parent / 'configs'}"),
        meta_teacher(f"{marked}@{file.parent / 'configs'}"),
    ):
        config = teacher.scheduler_config
        assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", True)
        assert config["beta_end"] == plain.scheduler_config["beta_end"]
        last = torch.tensor([999.0], dtype=torch.float64)
        assert teacher.schedule.alpha(last) < 1e-6 < plain.schedule.alpha(last)
        assert teacher.row(torch.tensor(0.8), torch.tensor(0.6)) == (torch.tensor(-0.6), torch.tensor(0.8))


@pytest.mark.parametrize(
    ("width", "names", "said", "reading", "config", "prediction"),
    [
        (768, [TEXT], {}, "", SD1, None),
        (768, [TEXT], {}, "v", SD1, "v_prediction"),
        (1024, [TEXT], {}, "", SD2_V, None),  # the configuration says v
        (1024, [TEXT], {}, "eps", SD2_EPS, "epsilon"),
        (1024, [TEXT], {"modelspec.prediction_type": "epsilon"}, "", SD2_EPS, "epsilon"),
        (1024, [TEXT], {"modelspec.prediction_type": "epsilon"}, "v", SD2_V, "v_prediction"),
        (1024, [TEXT], {"modelspec.prediction_type": "epsilon"}, "my/own", "my/own", None),
        (2048, [POOLED, SECOND], {}, "", SDXL, None),
        (2048, [POOLED, SECOND], {"modelspec.prediction_type": "v"}, "my/own", "my/own", "v_prediction"),
        (2048, [POOLED, SECOND, "v_pred"], {}, "", SDXL, "v_prediction"),
        (2048, [POOLED, SECOND, "v_pred"], {}, "eps", SDXL, "epsilon"),
    ],
)
def test_what_a_file_is_is_read_from_its_header(
    width: int,
    names: list[str],
    said: dict[str, str],
    reading: str,
    config: str,
    prediction: str | None,
    tmp_path: Path,
) -> None:
    file = header(tmp_path / "x.safetensors", 4, {KEYS: (8, width), **dict.fromkeys(names, (1,))}, said)
    found = read_checkpoint(file, reading)
    assert (found.config, found.scheduler.get("prediction_type")) == (config, prediction)
    assert found.pipeline.__name__ == ("StableDiffusionXLPipeline" if width == 2048 else "StableDiffusionPipeline")


def header(file: Path, channels: int, shapes: dict[str, tuple[int, ...]], said: dict[str, str] | None = None) -> Path:
    """A file of zeros with these tensors and that of a network of so many channels."""
    save_file({FIRST: torch.zeros(8, channels, 3, 3)} | {k: torch.zeros(s) for k, s in shapes.items()}, file, said)
    return file


@pytest.mark.parametrize("family", ["sd", "sdxl"], indirect=True)
@pytest.mark.parametrize("parts", [["vae"], ["text_encoder"], ["vae", "text_encoder"]])
def test_parts_that_a_file_leaves_out_come_from_the_folder(
    saved: tuple[Path, Path], parts: list[str], tmp_path: Path
) -> None:
    whole, file = saved
    begins = {"vae": ("first_stage_model.",), "text_encoder": ("cond_stage_model.", "conditioner.embedders.0.")}
    left_out = tuple(b for p in parts for b in begins[p])
    less = tmp_path / "less.safetensors"
    save_file({k: v for k, v in load_file(file).items() if not k.startswith(left_out)}, less)
    assert read_checkpoint(less).absent == tuple(parts)
    assert torch.equal(
        sample(load_teacher(f"{less}@{whole}"), PROMPTS, steps=2), sample(load_teacher(whole), PROMPTS, steps=2)
    )
    with pytest.raises(ValueError, match=rf"it has no {parts[0]}, nor has .*configs .*; pass FILE@FOLDER"):
        load_teacher(f"{less}@{file.parent / 'configs'}")


@pytest.mark.parametrize("family", ["sd"], indirect=True)
def test_without_a_folder_the_configuration_comes_from_the_hubs_cache(
    saved: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, file = saved
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError,
        match=rf"^teacher: the configuration of \S+ is not to be had from {SD1} .*@FOLDER.*hf download {SD1} --include",
    ) as error:
        load_teacher(file)
    assert "\n" not in str(error.value)
    cached = tmp_path / f"models--{SD1.replace('/', '--')}"
    shutil.copytree(file.parent / "configs", cached / "snapshots" / "0")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0")
    assert fingerprint(load_teacher(file).module) == fingerprint(load_teacher(whole).module)


@pytest.mark.parametrize(
    ("channels", "names", "said"),
    [
        (9, [TEXT], "takes 9 channels"),
        (4, [POOLED, SECOND, "edm_mean"], "was trained on EDM's noise levels"),
        (4, [POOLED, "conditioner.embedders.0.model.x"], "is SDXL's refiner"),
        (4, [POOLED, TEXT], "makes variations of images"),
    ],
)
def test_checkpoints_of_another_kind(channels: int, names: list[str], said: str, tmp_path: Path) -> None:
    file = header(tmp_path / "x.safetensors", channels, dict.fromkeys(names, (1,)))
    with pytest.raises(ValueError, match=rf"^teacher: \S+ {said}"):
        load_teacher(file)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not a file")
    (tmp_path / "old.ckpt").write_bytes(b"")
    for name, said in {
        "lora.safetensors": "is no checkpoint of Stable Diffusion 1, 2 or XL in its original layout; "
        "pass a LoRA by --fuse-lora",
        "broken.safetensors": "is missing or damaged",
        "nowhere.safetensors": "is missing or damaged",
        "old.ckpt": "is a pickle, which may run any code when it is read; "
        "pass the model's .safetensors, or convert it as docs/checkpoints.md says",
    }.items():
        with pytest.raises(ValueError, match=rf"^teacher: \S+{name} {said}") as error:
            load_teacher(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", ["sdxl"], indirect=True)
def test_a_file_with_what_does_not_belong_to_it(saved: tuple[Path, Path], tmp_path: Path) -> None:
    """A folder of another kind or of other shapes, and a tensor that is not there."""
    other, _ = single_file.save("sd", tmp_path)
    with pytest.raises(
        ValueError, match=r"is a StableDiffusionXLPipeline, .* configures a StableDiffusionPipeline; pass .*@FOLDER"
    ):
        load_teacher(f"{saved[1]}@{other}")
    configs = shutil.copytree(saved[1].parent / "configs", tmp_path / "bigger")
    config = configs / "unet" / "config.json"
    config.write_text(re.sub(r'("block_out_channels": \[\s*)32', r"\g<1>64", config.read_text()))
    with pytest.raises(ValueError, match=rf"model.safetensors with the configuration of {configs} cannot be loaded"):
        load_teacher(f"{saved[1]}@{configs}")
    encoders = [
        f"conditioner.embedders.{e}"
        for e in ("0.transformer.text_model.final_layer_norm.bias", "1.model.ln_final.bias")
    ]
    for name in (
        "model.diffusion_model.middle_block.0.in_layers.2.weight",
        "first_stage_model.decoder.norm_out.bias",
        *encoders,
    ):
        save_file({k: v for k, v in load_file(saved[1]).items() if k != name}, tmp_path / "less.safetensors")
        with pytest.raises(ValueError, match=r"less.safetensors lacks '\S+'.*; download it again$"):
            load_teacher(f"{tmp_path / 'less.safetensors'}@{saved[1].parent / 'configs'}")


@pytest.mark.parametrize("family", ["sd", "sd2", "sdxl"], indirect=True)
def test_what_is_left_over_or_not_finite(saved: tuple[Path, Path], tmp_path: Path) -> None:
    """A tensor of no network or with a NaN is refused.

    So is a second copy of a tensor. Marks, tables and averages are left alone.
    """
    _, file = saved
    state, changed = load_file(file), tmp_path / "changed.safetensors"
    some = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    for extra, said in (
        (
            {"model.diffusion_model.input_blocks.99.0.weight": torch.ones(3, 5)},
            "has 'model.diffusion_model.input_blocks.99.0.weight' (1 tensor is left over",
        ),
        (
            {"model.diffusion_model.zzz.weight": state[some].clone()},
            "has 'model.diffusion_model.zzz.weight' (1 tensor is left over",
        ),
        (
            {"control_model.input_blocks.0.0.weight": torch.ones(3, 5)},
            "has 'control_model.input_blocks.0.0.weight' (1 tensor is left over",
        ),
        ({some: state[some] * float("nan")}, "that are not finite"),
    ):
        save_file(state | extra, changed)
        with pytest.raises(ValueError, match=r"changed.safetensors ") as error:
            load_teacher(f"{changed}@{file.parent / 'configs'}")
        assert said in str(error.value) and "\n" not in str(error.value)
    encoder = (
        "cond_stage_model.transformer.text_model."
        if "cond_stage_model.transformer.text_model.final_layer_norm.bias" in state
        else ""
    )
    harmless = {
        "alphas_cumprod": torch.ones(1000),
        "model_ema.decay": torch.ones(()),
        "model_ema.diffusion_modelx": torch.ones(3, 5),
    }
    harmless |= {f"{encoder}embeddings.position_ids": torch.arange(16)[None]} if encoder else {}
    save_file(state | harmless, changed)
    assert fingerprint(load_teacher(f"{changed}@{file.parent / 'configs'}").module) == fingerprint(
        load_teacher(configured(file)).module
    )


@pytest.mark.parametrize("family", ["sd"], indirect=True)
def test_eight_bits(saved: tuple[Path, Path], tmp_path: Path) -> None:
    """Plain 8-bit weights are read as numbers; weights with scales are refused.

    The refusal holds for plans too, whatever the scales are called.
    """
    _, file = saved
    state, changed, configs = load_file(file), tmp_path / "small.safetensors", file.parent / "configs"
    name = "model.diffusion_model.middle_block.0.in_layers.2.weight"
    save_file(state | {name: state[name].to(torch.float8_e4m3fn)}, changed)
    teacher = load_teacher(f"{changed}@{configs}")
    read = dict(teacher.module.named_parameters())["mid_block.resnets.0.conv1.weight"]
    assert torch.equal(read, state[name].to(torch.float8_e4m3fn).float())
    for mark in (
        "model.diffusion_model.scaled_fp8",
        f"{name.removesuffix('weight')}scale_weight",
        f"{name}_scale",
        f"{name}.quant_state.bitsandbytes__nf4",
        f"{name.removesuffix('weight')}comfy_quant",
    ):
        save_file(state | {mark: torch.ones(1)}, changed)
        for load in (load_teacher, meta_teacher):
            with pytest.raises(ValueError, match="keeps its weights in 8 bits or fewer, with scales next to them"):
                load(f"{changed}@{configs}")


def test_what_a_file_says_of_its_prediction_and_nobody_knows(tmp_path: Path) -> None:
    names = {KEYS: (8, 768), TEXT: (1,)}
    file = header(tmp_path / "x.safetensors", 4, names, {"modelspec.prediction_type": "rectified flow"})
    with pytest.raises(
        ValueError, match=r"says modelspec.prediction_type 'rectified flow', allowed are v, .*; pass \S+@v or \S+@eps"
    ):
        read_checkpoint(file)
    assert read_checkpoint(file, "eps").scheduler == {"prediction_type": "epsilon"}
    assert read_checkpoint(file, "my/own").scheduler == {}
    for told, read in {"V": "v_prediction", " epsilon ": "epsilon", "v-prediction": "v_prediction", "": None}.items():
        file = header(tmp_path / "x.safetensors", 4, names, {"modelspec.prediction_type": told})
        assert read_checkpoint(file).scheduler.get("prediction_type") == read
    file = header(tmp_path / "x.safetensors", 4, names | {"ztsnr": (1,)})
    with pytest.raises(ValueError, match="is marked ztsnr, trained down to pure noise, and not as v-prediction"):
        read_checkpoint(file)
    assert read_checkpoint(file, "v").scheduler["rescale_betas_zero_snr"]
    assert "rescale_betas_zero_snr" not in read_checkpoint(file, "eps").scheduler


def test_a_pipe_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="there is no regular file of this name"):
        load_teacher(tmp_path / "x.safetensors")


def test_sources() -> None:
    assert source_of("a/b.safetensors") == ("a/b.safetensors", (), "")
    assert source_of("a/b.safetensors@v") == ("a/b.safetensors", (), "v")
    given = source_of("a/b.safetensors@my/folder + style.safetensors@0.8")
    assert given == Source("a/b.safetensors", (("style.safetensors", 0.8),), "my/folder")
    assert source_of("a/b.safetensors@my/folder + style.safetensors@0.8").names == ["b", "style"]


@pytest.mark.parametrize("family", ["sd2", "sdxl"], indirect=True)
@pytest.mark.parametrize(
    ("kept", "wanted"),
    [("float16", "float32"), ("float16", "bfloat16"), ("float32", "float16"), ("bfloat16", "float16")],
)
def test_files_and_teachers_of_other_types(saved: tuple[Path, Path], kept: str, wanted: str, tmp_path: Path) -> None:
    """What a file holds is known in any type that it is read in."""
    _, file = saved
    save_file(
        {k: v.to(getattr(torch, kept)) if v.is_floating_point() else v for k, v in load_file(file).items()},
        tmp_path / "x.safetensors",
    )
    teacher = load_teacher(f"{tmp_path / 'x.safetensors'}@{file.parent / 'configs'}", getattr(torch, wanted))
    assert {p.dtype for p in teacher.module.parameters()} == {getattr(torch, wanted)}
