"""The files of a student change the weights alike in every format.

Other programs find them whether they read headers or not.
"""

import hashlib
import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewstep
from fewstep.api import Student, load_student
from fewstep.cli.export import run_export
from fewstep.cli.inspect import safetensors_summary
from fewstep.core import timegrid
from fewstep.roles import adapters
from fewstep.roles.roles import RolesConfig
from fewstep.student.folder import LORA_FILE, Parts, read_lora, require_change, write_parts
from fewstep.student.formats import FORMATS
from fewstep.student.headers import public_base
from fewstep.student.kohya import layers_of
from tests import pipelines

from .card import CARD

PROMPTS = ["red cat", "blue dog"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family's tiny teacher, saved once."""
    place = tmp_path_factory.mktemp("teachers")

    def of(family: str) -> Path:
        return place / family if (place / family).exists() else pipelines.save(family, place / family)

    return of


def lora_of(network: torch.nn.Module, rank: int) -> dict[str, Tensor]:
    """A LoRA that is seen, on all layers that one is trained on by default."""
    rng, state = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for name in adapters.targets(network, "all", RolesConfig().exclude):
        weight = network.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        small = weight.shape[2:] if weight.ndim == 4 else ()
        state[f"{name}.lora_A.weight"] = torch.randn(rank, weight.shape[1], *small, generator=rng) / 5
        state[f"{name}.lora_B.weight"] = torch.randn(weight.shape[0], rank, *(1 for _ in small), generator=rng) / 20
    return state


def delta(down: Tensor, up: Tensor, scale: float = 1.0) -> Tensor:
    """`scale B A` in the shape of the weight."""
    return scale * (up.flatten(1).double() @ down.flatten(1).double()).reshape(len(up), *down.shape[1:])


def student(
    folder: Path, out: Path, rank: int, alpha: float, dtype: str = "float32"
) -> tuple[Student, dict[str, Tensor]]:
    """A student folder whose card names this alpha, loaded; and what its LoRA changes, by layer."""
    teacher = fewstep.load_teacher(folder)
    state = lora_of(teacher.module, rank)
    grid = timegrid.uniform(teacher.schedule, 4).tolist()
    card = replace(CARD, base=str(folder), timesteps={"4": grid}, rank=rank, alpha=alpha, dtype=dtype)
    card = replace(card, prediction=teacher.scheduler_config["prediction_type"])
    write_parts(out, teacher, Parts(card, state, {"r": rank, "lora_alpha": alpha, "target_modules": layers_of(state)}))
    return load_student(out, folder), {
        n: delta(state[f"{n}.lora_A.weight"], state[f"{n}.lora_B.weight"], alpha / rank) for n in layers_of(state)
    }


def stripped(path: Path) -> None:
    """As tools leave a file that keep tensors alone."""
    save_file(load_file(path), path)


def weights(pipe: DiffusionPipeline) -> dict[str, Tensor]:
    network = pipe.unet if "unet" in pipe.components else pipe.transformer
    return {n.removesuffix(".weight"): v.double() for n, v in network.state_dict().items() if n.endswith(".weight")}


@pytest.mark.parametrize(
    ("family", "rank", "alpha"),
    [
        pytest.param("sd", 4, 4.0, marks=pytest.mark.slow),
        ("sd", 8, 1.0),
        pytest.param("sdxl", 4, 16.0, marks=pytest.mark.slow),
    ],
)
def test_every_format_changes_the_weights_alike_without_headers(
    folders: Callable[[str], Path], tmp_path: Path, family: str, rank: int, alpha: float
) -> None:
    loaded, wanted = student(folders(family), tmp_path / "final", rank, alpha)
    base = weights(DiffusionPipeline.from_pretrained(folders(family)))
    found = dict[str, dict[str, Tensor]]()
    forms = (
        "kohya",
        "merged",
        *(["pipeline"] if alpha < rank else []),
    )  # a pipeline has the merged network in it: once is enough
    for form in forms:
        FORMATS[form].write(loaded.single(4), tmp_path / form, torch.float32)
    (kohya,) = (tmp_path / "kohya").glob("*-kohya.safetensors")
    for name, file in (("kohya", kohya), ("student", tmp_path / "kohya" / LORA_FILE)):
        stripped(file)
        pipe = DiffusionPipeline.from_pretrained(folders(family))
        pipe.load_lora_weights(file.parent, weight_name=file.name)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        found[name] = {n: v - base[n] for n, v in weights(pipe).items()}
    if "pipeline" in forms:
        again = DiffusionPipeline.from_pretrained(tmp_path / "pipeline")
        found["pipeline"] = {n: v - base[n] for n, v in weights(again).items()}
    merged = load_student(tmp_path / "merged", folders(family)).network.state_dict()
    found["merged"] = {n: merged[f"{n}.weight"].double() - base[n] for n in base}
    size = max(float(v.abs().max()) for v in wanted.values())
    assert size > 0.01
    for form, changed in found.items():
        for layer in base:
            expected = wanted.get(layer, torch.zeros(()))
            assert float((changed[layer] - expected).abs().max()) <= 1e-6 * max(1.0, size), (form, layer)
    state = load_file(kohya)
    assert {v.item() for k, v in state.items() if k.endswith(".alpha")} == {rank}
    assert len(state) == 3 * len(wanted)


def test_a_student_of_several_step_counts_says_one_without_headers(
    folders: Callable[[str], Path], tmp_path: Path
) -> None:
    """The layer that says it is in kohya's file, too."""

    loaded, _ = student(folders("sd"), tmp_path / "final", 4, 16.0)
    teacher = loaded.backbone
    width = teacher.module.get_submodule(teacher.time_layer).out_features
    assert isinstance(width, int)
    grids = {k: timegrid.uniform(teacher.schedule, k).tolist() for k in (4, 2)}
    card = replace(
        loaded.card,
        steps=(4, 2),
        timesteps={str(k): times for k, times in grids.items()},
        solver={"4": "ddim", "2": "ddim"},
        time_layer=teacher.time_layer,
    )
    vectors = {4.0: torch.full((width,), 0.5), 2.0: torch.zeros(width)}
    assert loaded.base is not None
    told = Student.from_parts(Parts(card, read_lora(tmp_path / "final"), vectors=vectors), loaded.base)
    told.write(tmp_path / "told")
    with safe_open(tmp_path / "told" / LORA_FILE, "pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    assert settings["unet.lora_alpha"] == settings["unet.r"] == 4
    again = load_student(tmp_path / "told", folders("sd"))
    assert again.card.alpha == 4
    for k in (4, 2):
        wanted, found = (fewstep.sample(model, PROMPTS[:1], [0], steps=k) for model in (told, again))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    (file,) = (tmp_path / "told").glob("*-kohya.safetensors")
    assert f"lora_unet_{teacher.time_layer.replace('.', '_')}.lora_up.weight" in load_file(file)
    said = (tmp_path / "told" / "README.md").read_text()
    assert "1 of its " in said and "(time_embedding.linear_2); time_embedding.linear_2 says its step count" in said


def test_headers_say_how_a_student_is_called(folders: Callable[[str], Path], tmp_path: Path) -> None:
    student(folders("sd"), tmp_path / "final", 4, 4.0)
    (kohya,) = (tmp_path / "final").glob("*-kohya.safetensors")
    for file, names in ((kohya, "kohya's"), (tmp_path / "final" / LORA_FILE, "diffusers'")):
        told = safetensors_summary(file)
        assert (told["kind"], told["rank"], told["alpha"]) == (f"LoRA, {names} names", "4", "4")
        assert (told["base"], told["steps"], told["method"]) == ("sd", [4], "tdm")
        assert told["timesteps"] == {"4": [999, 749, 499, 249, -1]}
        assert str(folders("sd")) not in json.dumps(
            {k: v for k, v in told.items() if k != "file"}
        )  # no one's folders go round the world
        stripped(file)
        told = safetensors_summary(file)
        assert (told["kind"], told["rank"]) == (f"LoRA, {names} names", "4")
        assert told["alpha"] == ("4" if names == "kohya's" else "not said: read as the rank")


def test_kohyas_file_carries_what_other_programs_look_for(folders: Callable[[str], Path], tmp_path: Path) -> None:
    student(folders("sdxl"), tmp_path / "final", 4, 4.0)
    (file,) = (tmp_path / "final").glob("*-kohya.safetensors")
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    data = file.read_bytes()
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert said["ss_base_model_version"] == "sdxl_base_v1-0" and said["ss_v2"] == "False"
    assert (said["ss_network_module"], said["ss_network_dim"], said["ss_network_alpha"]) == ("networks.lora", "4", "4")
    assert (said["sshs_model_hash"], said["modelspec.hash_sha256"]) == (digest, f"0x{digest}")
    assert said["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert said["modelspec.implementation"] == "https://github.com/Stability-AI/generative-models"
    assert (said["modelspec.prediction_type"], said["modelspec.resolution"]) == ("epsilon", "32x32")
    assert (said["modelspec.sai_model_spec"], said["modelspec.title"]) == ("1.0.0", "x-tdm-4step")
    assert "4 steps" in said["modelspec.usage_hint"] and all(isinstance(v, str) and v for v in said.values())


def test_diffusers_header_says_what_every_peft_knows(folders: Callable[[str], Path], tmp_path: Path) -> None:
    loaded, wanted = student(folders("sd"), tmp_path / "final", 8, 1.0)
    with safe_open(tmp_path / "final" / LORA_FILE, "pt") as opened:
        settings = json.loads(opened.metadata()["lora_adapter_metadata"])
    known = {"r": 8, "lora_alpha": 1.0, "target_modules": sorted(wanted), "rank_pattern": {}, "alpha_pattern": {}}
    assert settings == {f"unet.{k}": v for k, v in known.items()}
    FORMATS["student"].write(loaded.single(4), tmp_path / "again", torch.float32)
    assert load_student(tmp_path / "again", folders("sd")).card.alpha == 8
    assert layers_of(read_lora(tmp_path / "again")) == sorted(wanted)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({}, "its LoRA has no layers"),
        (
            {"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.zeros(3, 1)},
            "its LoRA is zero in all of its 1 layers",
        ),
        (
            {"a.lora_A.weight": torch.zeros(1, 2), "a.lora_B.weight": torch.ones(3, 1)},
            "its LoRA is zero in all of its 1 layers",
        ),
        (
            {"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.full((3, 1), math.nan)},
            "are not finite .a.lora_B.weight",
        ),
    ],
)
def test_a_lora_that_is_its_teacher_is_refused(
    lora: dict[str, Tensor], said: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=f"^student: .*{said}"):
        require_change(lora)
    teacher = fewstep.load_teacher(folders("sd"))
    with pytest.raises(ValueError, match=said):
        write_parts(tmp_path / "final", teacher, Parts(replace(CARD, base="sd"), lora))
    assert not any(tmp_path.iterdir())
    require_change({"a.lora_A.weight": torch.ones(1, 2), "a.lora_B.weight": torch.ones(3, 1)})


def test_a_whole_pipeline_needs_no_base_and_its_card_says_how_it_is_called(
    folders: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded, _ = student(folders("sd"), tmp_path / "final", 4, 4.0, dtype="bfloat16")
    wanted = fewstep.sample(load_student(tmp_path / "final", dtype=torch.float32), PROMPTS[:1], [0])
    run_export(str(tmp_path / "final"), tmp_path / "half", "pipeline", None, None)
    assert re.search(
        r"compared: largest difference of a pixel \S+; rounded to bfloat16, \S+",
        capsys.readouterr().out,
    )
    run_export(str(tmp_path / "final"), tmp_path / "whole", "pipeline", None, None, dtype="float32")
    run_export(str(tmp_path / "final"), tmp_path / "merged", "merged", None, None, dtype="float16")
    kinds = {
        folder: {
            v.dtype
            for f in (tmp_path / folder).rglob("*.safetensors")
            for v in load_file(f).values()
            if v.is_floating_point()
        }
        for folder in ("half", "whole", "merged")
    }
    assert kinds == {"half": {torch.bfloat16}, "whole": {torch.float32}, "merged": {torch.float16}}
    shutil.rmtree(tmp_path / "final")
    monkeypatch.chdir(tmp_path)
    page = Path("whole/README.md").read_text()
    snippet = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert snippet is not None and str(folders("sd")) not in snippet[1]
    assert (
        "num_inference_steps=4, guidance_scale=1.0" in snippet[1]
        and "by itself diffusers takes 50 guided steps" in page
    )
    names: dict[str, StableDiffusionPipeline] = {}
    exec(snippet[1].replace("a prompt", PROMPTS[0]), names)
    drawn = names["pipe"](
        PROMPTS[0],
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    torch.testing.assert_close(drawn, wanted, rtol=0, atol=1e-4)
    torch.testing.assert_close(
        fewstep.load("whole", "whole")(PROMPTS[0], generator=torch.Generator().manual_seed(0), output_type="pt").images,
        wanted,
        rtol=0,
        atol=1e-4,
    )
    vocabulary = json.loads(Path("whole/tokenizer/vocab.json").read_text())
    assert vocabulary == loaded.backbone.pipe.tokenizer.get_vocab()  # type: ignore[attr-defined]
    assert Path("whole/tokenizer/merges.txt").is_file()
    assert all(
        k.startswith("text_model.") for k in load_file("whole/text_encoder/model.safetensors")
    )  # as in published models


@pytest.mark.parametrize(
    ("form", "dtype", "said"),
    [
        ("merged", "half", "--dtype: got 'half', allowed are float32, bfloat16, float16"),
        (
            "student",
            "float16",
            "--dtype: got float16 with --format student, whose LoRA stays as it was trained; "
            "it is for merged and pipeline",
        ),
    ],
)
def test_dtypes_that_are_none_are_refused(
    form: str, dtype: str, said: str, folders: Callable[[str], Path], tmp_path: Path
) -> None:
    student(folders("sd"), tmp_path / "final", 4, 4.0)
    with pytest.raises(ValueError, match=re.escape(said)):
        run_export(str(tmp_path / "final"), tmp_path / "out", form, None, None, dtype=dtype)


@pytest.mark.parametrize(
    ("base", "shown"),
    [
        ("owner/name", "owner/name"),
        ("/home/me/secret/mix.safetensors", "mix"),
        ("../models/mix", "mix"),
        ("~/mix", "mix"),
        ("emoji", "emoji"),
        ("owner/name + /home/me/style.safetensors@0.5", "owner/name + style"),
    ],
)
def test_headers_name_a_base_without_its_folder(base: str, shown: str) -> None:
    assert public_base(base) == shown
