"""A student with weights of its own for each step: its folder, its files and its pipelines."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewstep
from fewstep.backbones.base import Backbone
from fewstep.backbones.few_step import drawn as drawn_by
from fewstep.backbones.load import fingerprint
from fewstep.backbones.step_switch import times_told
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.roles.roles import Roles, RolesConfig
from fewstep.runs.init import roles_for
from fewstep.student.card import StudentCard, require_sound
from fewstep.student.folder import FILE, LORA_FILE, files_for_others, read_card, step_folders
from fewstep.student.formats import export
from fewstep.student.pipeline import load
from fewstep.student.student import Origin, Student, base_of, size_of
from tests import pipelines

from .. import tiny
from .card import CARD

METHOD = DistributionMatching(steps=3, warmup=0)
PROMPTS, SEEDS = ["red cat", "blue dog"], [0, 1]
COPIES = pytest.mark.parametrize("lora", [True, False])


def trained(backbone: Backbone, lora: bool = True, size: float = 0.05, alpha: float | None = None) -> Roles:
    roles = roles_for(backbone, METHOD, RolesConfig(lora=lora, rank=2, alpha=alpha, per_step=True))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in roles.trained["student"].values():
            p.add_(size * torch.randn(p.shape, generator=rng))
    return roles


def student_of(roles: Roles, base: str = "tiny") -> Student:
    return Student.of(
        roles, METHOD, Origin(base, fingerprint(roles.backbone.module), 1, 1.0, "tdm", size=size_of(roles.backbone))
    )


def teacher_of(kind: str, tmp_path: Path) -> Backbone:
    return (
        tiny.denoiser()
        if kind == "own"
        else fewstep.load_teacher(pipelines.save(kind, tmp_path / kind), size=pipelines.SIZES.get(kind))
    )


def drawn(model: Student, count: int = 3) -> Tensor:
    return fewstep.sample(model, PROMPTS, SEEDS, steps=count)


@COPIES
@pytest.mark.parametrize("kind", ["own", "sd", "pixart"])
def test_a_folder_holds_every_step(kind: str, lora: bool, tmp_path: Path) -> None:
    backbone = teacher_of(kind, tmp_path)
    own = student_of(trained(backbone, lora, alpha=1.0 if lora else None), base_of(backbone))
    wanted, folder = drawn(own), own.write(tmp_path / "final")
    card = read_card(folder)
    assert card.per_step and card.steps == (3,)
    places = step_folders(folder, card)
    assert [p.name for p in places] == ["step_1", "step_2", "step_3"] and all(p.is_dir() for p in places)
    assert not (folder / LORA_FILE).exists()  # of which other programs would take one step's for all
    assert all(any(name.startswith(f"{p.name}/") for name in card.files) for p in places)
    again = fewstep.load_student(folder, base=backbone)
    torch.testing.assert_close(drawn(again), wanted, rtol=0, atol=1e-5)
    files = [next(p for p in sorted(place.rglob("*.safetensors"))) for place in places]
    first, second = (load_file(f) for f in files[:2])
    assert [*first] == [*second] and any(not torch.equal(first[n], second[n]) for n in first)
    page = (folder / "README.md").read_text()
    assert "for each step" in page and "`step_1` to `step_3`" in page
    assert ("whole network" in page) == (not lora and kind != "own")
    assert "for each step" in repr(again)


def test_steps_are_not_exchanged_and_each_counts(tmp_path: Path) -> None:
    backbone = tiny.denoiser()
    own = student_of(trained(backbone))
    folder = own.write(tmp_path / "final")
    state = json.loads((folder / FILE).read_text())
    for k in range(3):
        changed = tmp_path / f"changed_{k}"
        own.write(changed)
        file = next((changed / f"step_{k + 1}").glob(LORA_FILE))
        save_file({n: torch.zeros_like(v) for n, v in load_file(file).items()}, file)
        (changed / FILE).write_text(json.dumps({**state, "files": {}}))
        found = fewstep.load_student(changed, base=backbone)
        x = torch.randn((2, *backbone.shape), generator=torch.Generator().manual_seed(0))
        cond = backbone.encode(PROMPTS)
        for i in range(3):
            t = own.times(3)[i].expand(2)
            with torch.no_grad():
                a, b = found.denoise(cond)(x, t).x0, own.denoise(cond)(x, t).x0
            assert torch.allclose(a, b, atol=1e-5) == (i != k)


@COPIES
def test_a_snapshot_stays_as_it_is(lora: bool) -> None:
    roles = trained(tiny.denoiser(), lora)
    student = student_of(roles)
    kept, wanted = student.snapshot(tiny.denoiser()), drawn(student)
    with torch.no_grad():
        for p in roles.trained["student"].values():
            p.add_(0.1)
    torch.testing.assert_close(drawn(kept), wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(drawn(student), wanted, atol=1e-4)


def test_another_step_count_is_served_by_time() -> None:
    """At a time between two steps, the weights of the step whose segment has it."""
    student = student_of(trained(tiny.denoiser()))
    with pytest.warns(UserWarning, match="trained for 3"):
        found = fewstep.sample(student, PROMPTS, SEEDS, steps=6)
    assert bool(torch.isfinite(found).all())


@COPIES
def test_a_damaged_or_missing_step_is_one_clear_error(lora: bool, tmp_path: Path) -> None:
    backbone = tiny.denoiser()
    folder = student_of(trained(backbone, lora)).write(tmp_path / "final")
    file = next((folder / "step_2").glob("*.safetensors"))
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"^student: .*step_2.* is damaged or was changed"):
        fewstep.load_student(folder, base=backbone)
    file.unlink()
    with pytest.raises(ValueError, match=r"^student: .*step_2.* is missing"):
        fewstep.load_student(folder, base=backbone)


@COPIES
def test_half_precision_bases_are_served(lora: bool, tmp_path: Path) -> None:
    """A LoRA on a base in bfloat16; copies are trained in single precision and computed in bfloat16."""
    backbone = tiny.denoiser(conditional=False)
    if lora:
        backbone.module.to(torch.bfloat16)
    student = student_of(trained(backbone, lora))
    folder = replace(student, card=replace(student.card, dtype="bfloat16" if lora else "float32")).write(tmp_path / "f")
    again = fewstep.load_student(folder, base=backbone)
    with torch.autocast("cpu", torch.bfloat16, enabled=not lora):
        torch.testing.assert_close(drawn(again), drawn(student), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd", "pixart", "flux", "zimage"])
def test_a_pipeline_changes_the_weights_from_step_to_step(kind: str, tmp_path: Path) -> None:
    backbone = teacher_of(kind, tmp_path)
    student = student_of(trained(backbone, size=0.1), base_of(backbone))
    wanted, folder = drawn(student)[:1], student.write(tmp_path / "final")
    told = times_told(backbone, backbone.module, student.times(3)[:-1])
    assert len(set(told)) == 3
    pipe = load(tmp_path / kind, folder)
    found = drawn_by(pipe, PROMPTS[:1], 3, size=student.card.size)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


def test_a_pipeline_of_whole_networks_is_refused(tmp_path: Path) -> None:
    backbone = teacher_of("sd", tmp_path)
    folder = student_of(trained(backbone, lora=False), base_of(backbone)).write(tmp_path / "final")
    with pytest.raises(ValueError, match=r"a whole network for each of its 3 steps.*fewstep\.sample"):
        load(tmp_path / "sd", folder)


def test_kohyas_files_say_their_step_and_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = teacher_of("sd", tmp_path)
    student = student_of(trained(backbone), base_of(backbone))
    monkeypatch.setattr("fewstep.student.formats.CLOSE", 5e-4)  # three steps of this base alone differ by 1.2e-4
    export(student.single(3), tmp_path / "kohya", "kohya")
    names = sorted(p.name for p in (tmp_path / "kohya").glob("*-kohya.safetensors"))
    assert [n.rsplit("-", 2)[1] for n in names] == ["step1of3", "step2of3", "step3of3"]
    page = (tmp_path / "kohya" / "README.md").read_text()
    assert all(name in page for name in (names[0], names[-1]))
    assert not (tmp_path / "kohya" / "comfyui-workflow.json").exists()
    monkeypatch.setattr("fewstep.student.formats.switch_by_time", lambda *_: None)  # one step's for all
    with pytest.raises(ValueError, match="export: the files differ from the student"):
        export(student.single(3), tmp_path / "again", "kohya")


@pytest.mark.parametrize(("kind", "form"), [("own", "merged"), ("sd", "merged"), ("sd", "pipeline")])
def test_formats_of_one_network_are_refused(kind: str, form: str, tmp_path: Path) -> None:
    backbone = teacher_of(kind, tmp_path)
    student = student_of(trained(backbone), base_of(backbone))
    left = "student" if kind == "own" else "student or kohya"
    with pytest.raises(ValueError, match=rf"--format: got {form}, .*; choose {left}$") as error:
        export(student.single(3), tmp_path / "out", form)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="no one network"):
        student.merged()


@pytest.mark.parametrize("kind", ["own", "sd", "flux"])
def test_the_student_format_is_compared(kind: str, tmp_path: Path) -> None:
    backbone = teacher_of(kind, tmp_path)
    assert export(student_of(trained(backbone), base_of(backbone)), tmp_path / "out", "student").difference < 1e-4
    if kind == "flux":
        assert len([*(tmp_path / "out").glob("*-step?of3-lora.safetensors")]) == 3


def test_others_get_every_step(tmp_path: Path) -> None:
    folder = student_of(trained(teacher_of("sd", tmp_path))).write(tmp_path / "final")
    files, left = files_for_others(folder, read_card(folder), "page")
    assert {f"step_{k}/{LORA_FILE}" for k in (1, 2, 3)} <= set(files) and not left
    assert sum("-kohya" in name for name in files) == 3


@COPIES
def test_a_student_goes_on_step_by_step(lora: bool, tmp_path: Path) -> None:
    """`init_from`: from its own steps, or all steps from one student's weights."""
    roles = trained(tiny.denoiser(), lora)
    folder = student_of(roles).write(tmp_path / "final")
    config = RolesConfig(lora=lora, rank=2, per_step=True)
    again = roles_for(tiny.denoiser(), METHOD, config, init_from=folder)
    for k in range(3):
        for name, wanted in roles.student_state(k).items():
            torch.testing.assert_close(again.student_state(k)[name], wanted)
    assert all(torch.equal(again.average[n], p) for n, p in again.trained["student"].items())
    with pytest.raises(ValueError, match=r"init_from: .*weights for 3 steps.*set method\.steps=3"):
        roles_for(tiny.denoiser(), DistributionMatching(steps=4), config, init_from=folder)
    with pytest.raises(ValueError, match=r"init_from: .*set roles\.per_step=true"):
        roles_for(tiny.denoiser(), METHOD, replace(config, per_step=False), init_from=folder)
    single = roles_for(tiny.denoiser(), METHOD, replace(config, per_step=False))
    with torch.no_grad():
        for p in single.trained["student"].values():
            p.add_(0.1)
    one = Student.of(single, METHOD, Origin("tiny", "", 1, 1.0, "tdm")).write(tmp_path / "one")
    spread = roles_for(tiny.denoiser(), METHOD, config, init_from=one)
    for k in range(3):
        for name, wanted in single.student_state().items():
            torch.testing.assert_close(spread.student_state(k)[name], wanted)


@pytest.mark.parametrize("change", [
    {"steps": (4, 2), "timesteps": CARD.timesteps | {"2": [999, 499, -1]}, "solver": {"4": "ddim", "2": "ddim"}},
    {"head": "span"},
    {"analytic_first_step": True},
    {"time_layer": "time"},
])  # fmt: skip
def test_a_card_of_steps_with_more_is_no_card(change: dict[str, object]) -> None:
    require_sound(replace(CARD, per_step=True))
    card: StudentCard = replace(CARD, per_step=True, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="its per_step is 'True'"):
        require_sound(card)


def test_a_pair_of_networks_is_refused(tmp_path: Path) -> None:
    backbone = teacher_of("wan-a14b", tmp_path)
    with pytest.raises(ValueError, match=r"per_step: got true, but .* has two networks already"):
        roles_for(backbone, METHOD, RolesConfig(rank=2, per_step=True))
