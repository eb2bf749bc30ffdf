"""Measuring on the command line: at the end beside the teacher, and along the way for the report's curves."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.api import Student
from fewstep.backbones.base import Denoiser
from fewstep.backbones.load import load_teacher
from fewstep.backbones.sd import StableDiffusion
from fewstep.cli.evaluate import draws_emoji, listed_prompts, measuring, rows_of
from fewstep.cli.finish import quality_of
from fewstep.core.guidance import Guidance
from fewstep.data.prompts import split_prompts_of
from fewstep.evaluation import protocols
from fewstep.evaluation.images import LISTED, ImageProtocol
from fewstep.evaluation.plan import EmojiProtocol, digest
from fewstep.evaluation.prompt_lists import LISTS, checked, shipped_prompts
from tests import tiny
from tests.student.card import CARD

from .common import error_of
from .common import fewstep as command

pytestmark = pytest.mark.usefixtures("few_draws")
SMALL = EmojiProtocol("small", names=6, repeated=2, seeds=2, toned=2, held_out=2, reference=protocols.REFERENCE)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one protocol there is, for teachers of every kind."""
    monkeypatch.setattr(protocols, "PROTOCOLS", (SMALL,))
    monkeypatch.setattr("fewstep.cli.evaluate.draws_emoji", lambda teacher: True)
    monkeypatch.setattr("fewstep.cli.evaluate.TEACHER_STEPS", 3)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
def test_a_run_is_measured_along_the_way_and_at_its_end(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    how = (
        "--set",
        "evaluate=small",
        "--set",
        "preview.protocol=small",
        "--set",
        "method.steps=[2, 1]",
        "--set",
        "method.name=tdm-unify",
    )
    assert command(monkeypatch, "distill", recipe, *how) == 0
    run = Path("runs/tiny")
    rows = json.loads((run / "final" / "eval.json").read_text())["rows"]
    assert [(r["model"], r["steps"], r["nfe"]) for r in rows] == [
        ("teacher", 3, 6), ("teacher", 2, 4), ("teacher", 2, 2), ("teacher", 1, 2), ("student", 2, 2),
        ("teacher", 1, 1), ("student", 1, 1)
    ]  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    points = {line["iteration"]: line["quality"] for line in lines if "quality" in line}
    assert list(points) == [0, 5]
    numbers = {"fd_real", "retrieval_top1", "retrieval_top5", "diversity"}
    assert set(points[5]) == {f"{key}{end}" for key in numbers for end in ("", "_low", "_high")}
    assert points[5]["fd_real_low"] < points[5]["fd_real"] < points[5]["fd_real_high"]
    assert points[5]["fd_real"] == pytest.approx(
        rows[4]["fd_real"], rel=1e-3
    )  # the student of two steps, as it was exported
    page = (run / "report.html").read_text()
    assert "Condition and steps" in page
    printed = capsys.readouterr().out
    assert f"{rows[4]['fd_real']:.1f} in 2 NFE" in printed


@pytest.mark.parametrize(
    ("guidance", "conditional", "free", "costs"),
    [
        (2.0, True, False, [6, 4, 2, 2, 2]), (1.0, True, False, [3, 2, 2]), (2.0, False, False, [3, 2, 2]),
        (2.0, True, True, [6, 4, 2, 1, 1]), (1.0, True, True, [3, 2, 1, 1]), (2.0, False, True, [3, 2, 1, 1]),
    ],
)  # fmt: skip
def test_a_row_costs_what_the_network_is_asked(
    guidance: float, conditional: bool, costs: list[int], free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each row's NFE is the number of calls that its network got.

    Guided and unguided are two rows where they differ, a free first step costs nothing, and the teacher is measured
    at the student's cost.
    """
    monkeypatch.setattr("fewstep.cli.evaluate.TEACHER_STEPS", 3)
    backbone, asked = tiny.denoiser(conditional=conditional), []
    backbone.module.register_forward_pre_hook(lambda _, args: asked.append(len(args[0])))
    card = replace(
        CARD,
        steps=(2,),
        timesteps={"2": [999, 499, -1]},
        solver={"2": "ddim"},
        guidance=Guidance(scale=guidance),
        analytic_first_step=free,
    )
    rows = rows_of(Student(card, backbone, backbone.module))
    assert [r.nfe for r in rows] == costs
    assert any(r.model == "teacher" and r.nfe == rows[-1].nfe for r in rows)
    assert [r.model for r in rows] == ["teacher"] * (len(costs) - 1) + ["student"]
    assert len({(r.model, r.steps, r.guidance) for r in rows}) == len(rows)
    for row in rows:
        asked.clear()
        row.sampler(["red cat"], [0])
        assert sum(asked) == row.nfe


def test_what_a_run_says_of_quality_names_the_best_teacher_at_its_cost() -> None:
    teacher = {"model": "teacher", "steps": 50, "guidance": 4.5, "nfe": 100, "fd_real": 12.8, "fd_teacher": None}
    unguided = {"model": "teacher", "steps": 4, "guidance": 1.0, "nfe": 4, "fd_real": 17.1, "fd_teacher": 9.0}
    guided = {"model": "teacher", "steps": 2, "guidance": 4.5, "nfe": 4, "fd_real": 24.1, "fd_teacher": 8.0}
    student = {"model": "student", "steps": 4, "guidance": 1.0, "nfe": 4, "fd_real": 13.1, "fd_teacher": 2.0, "n": 128}
    said = quality_of(student, teacher, [teacher, guided, unguided, student])
    assert said == "FD to real 13.1 in 4 NFE, teacher 12.8 in 100, 17.1 at the student's cost (4 unguided steps)"
    imitated = [row | {"fd_real": None} for row in (student, teacher, guided, unguided)]
    said = quality_of(imitated[0], imitated[1], imitated)
    assert said.endswith("2.0 in 4 NFE, the teacher 8.0 at the student's cost (2 guided steps), 128 images")


@pytest.mark.parametrize("option", ["evaluate", "preview.protocol"])
def test_an_unknown_protocol_is_found_before_the_training(
    recipe: Path, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "distill", recipe, "--set", f"{option}=nothing") == 2
    assert "protocol: got 'nothing'; choose one of emoji-quick" in error_of(capsys)
    assert not Path("runs").exists()


def test_a_teacher_is_measured_by_the_protocols_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """What draws no emoji is not asked for them, whatever else it draws."""
    emoji, other = load_teacher("emoji"), tiny.stable_diffusion()
    assert draws_emoji(emoji) and not draws_emoji(other)
    assert [measuring(t, None, None)[0].name for t in (emoji, tiny.pixels(), other)] == [
        "emoji-full",
        "own-quick",
        "own-quick",
    ]
    for size, names in (
        ("quick", ["emoji-quick", "own-quick"]),
        ("medium", ["emoji-medium", "own"]),
        ("full", ["emoji-full", "images-full"]),
    ):
        assert [measuring(t, size, None)[0].name for t in (emoji, other)] == names
    assert measuring(other, "images-12", None)[0].total(1) == 12
    with pytest.raises(
        ValueError, match=r"^--protocol: got images-12, emoji samples emoji; choose one of emoji-quick, [^N]+$"
    ):
        measuring(emoji, "images-12", None)
    with pytest.raises(
        ValueError,
        match=r"^--protocol: got emoji-full, tiny knows no emoji by name; choose one of own-quick, own, images-",
    ):
        measuring(other, "emoji-full", None)
    with pytest.raises(ValueError, match=r"^--protocol: got images, emoji samples emoji; choose one of emoji-quick, "):
        measuring(emoji, "images", None)
    with pytest.raises(
        ValueError, match=r"^data\.real: got x, protocol emoji-quick has real images of its own; leave it out$"
    ):
        measuring(emoji, "emoji-quick", "x", "evaluate")
    with pytest.raises(
        ValueError, match=r"^evaluate: own-network samples no images; leave it out, and call fewstep.evaluate in Python"
    ):
        measuring(Denoiser(torch.nn.Linear(2, 2), tiny.TABLE, (2,)), "medium", None, "evaluate")


def test_a_text_to_image_student_is_measured_by_its_own_prompts(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A student is measured with its run's prompts or with passed ones.

    It is measured along the way beside its teacher, at the run's end, later from its run, and anywhere with prompts.
    """
    monkeypatch.setattr(
        "fewstep.evaluation.images.OWN", (ImageProtocol("own-quick", 6, components=3, batch=4, seeds=3),)
    )
    monkeypatch.setattr("fewstep.cli.evaluate.TEACHER_STEPS", 5)
    sizes = ("--set", "evaluate=quick", "--set", "preview.protocol=quick")
    assert command(monkeypatch, "distill", recipe, *sizes) == 0
    result = json.loads(Path("runs/tiny/final/eval.json").read_text())
    assert result["protocol"] == "own-quick" and "retrieval_top1" not in result["rows"][0]
    student, best = result["rows"][-1], result["rows"][0]
    lines = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    points = {line["iteration"]: line["quality"] for line in lines if "quality" in line}
    assert list(points) == [0, 5] and points[5]["fd_teacher"] == pytest.approx(student["fd_teacher"], rel=1e-3)
    assert points[0]["saturation_ratio_low"] < points[0]["saturation_ratio_high"]
    assert result["prompts"] == {"count": 2, "source": "trained on: there were too few to keep some out"}
    assert student["fd_teacher"] > 0 and best["fd_teacher"] is None and best["diversity_ratio"] == 1
    assert student["diversity_ratio"] == pytest.approx(student["diversity"] / best["diversity"])
    assert command(monkeypatch, "evaluate", "runs/tiny") == 0
    assert json.loads(Path("runs/tiny/final/eval.json").read_text())["prompts_sha256"] == result["prompts_sha256"]
    shutil.copytree("runs/tiny/final", "alone")
    capsys.readouterr()
    assert command(monkeypatch, "evaluate", "alone") == 2
    assert (
        "error: --prompts: there is no run around . that says what tiny was asked for; pass a prompt file"
        in error_of(capsys)
    )
    Path("other.txt").write_text("red cat\n")
    assert command(monkeypatch, "evaluate", "alone", "--prompts", "other.txt") == 0
    assert json.loads(Path("alone/eval.json").read_text())["prompts_sha256"] != result["prompts_sha256"]
    Path("prompts.txt").unlink()
    capsys.readouterr()
    assert command(monkeypatch, "evaluate", "runs/tiny") == 2
    assert "or pass --prompts FILE" in error_of(capsys)


@pytest.mark.usefixtures("uncounted")
def test_emoji_are_not_asked_of_another_teacher(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for how in ((), ("--dry-run",)):
        capsys.readouterr()
        assert command(monkeypatch, "distill", recipe, "--set", "evaluate=emoji-medium", *how) == 2
        assert "evaluate: got emoji-medium, tiny knows no emoji by name; choose one of own-quick" in error_of(capsys)
        assert not Path("runs").exists()


def test_a_share_of_the_prompts_is_kept_out_and_measured_with(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a student was not trained on is what it is measured by, at the end and later; the report says so."""
    monkeypatch.setattr("fewstep.evaluation.images.OWN", (ImageProtocol("own-quick", 8, 3, batch=8, seeds=2),))
    monkeypatch.setattr("fewstep.cli.evaluate.TEACHER_STEPS", 2)
    Path("prompts.txt").write_text("".join(f"red cat {i}\n" for i in range(100)))
    asked = set[str]()
    whole = StableDiffusion.encode

    def encode(self: StableDiffusion, prompts: Sequence[str]) -> Any:
        asked.update(prompts)
        return whole(self, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "encode", encode)
        how = ("--set", "prompts.held_out=0.2", "--set", "train.iterations=2")
        assert command(patch, "distill", recipe, *how) == 0
    assert len(asked - {""}) == 80 + 2  # and two of the previews
    assert "prompts: 80 to train on, 20 kept out to evaluate with (prompts.held_out)" in capsys.readouterr().out
    assert command(monkeypatch, "evaluate", "runs/tiny") == 0
    result = json.loads(Path("runs/tiny/final/eval.json").read_text())
    assert result["prompts"] == {"count": 4, "source": "kept out of the training"}
    split = split_prompts_of([f"red cat {i}" for i in range(100)], 0.2)
    assert not asked & set(split.held_out) and len(split.held_out) == 20
    kept = tuple(sorted(split.held_out, key=digest)[:4])
    assert result["prompts_sha256"] == digest(kept * 2)
    assert command(monkeypatch, "report", "runs/tiny") == 0
    assert "Prompts: 4, kept out of the training." in Path("runs/tiny/report.html").read_text()


def test_a_published_list_is_asked_by_name(
    final: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Shipped lists come with the package, others as a file, which is compared with their hash."""
    monkeypatch.setattr("fewstep.cli.evaluate.TEACHER_STEPS", 2)
    monkeypatch.setattr("fewstep.evaluation.images.LISTED", tuple(replace(p, count=6, components=2) for p in LISTED))
    assert command(monkeypatch, "evaluate", final, "--protocol", "parti-quick") == 0
    result = json.loads((final / "eval.json").read_text())
    assert result["protocol"] == "parti-quick"
    assert result["prompts"] == {"count": 3, "source": "the list parti"}
    capsys.readouterr()
    Path("wrong.txt").write_text("a cat\n")
    assert command(monkeypatch, "evaluate", final, "--protocol", "drawbench", "--prompts", "wrong.txt") == 2
    assert (
        "got 1 with SHA-256" in (said := error_of(capsys)) and "protocol drawbench is of 200 with f72659132fd6" in said
    )
    assert command(monkeypatch, "evaluate", final, "--protocol", "coco2014-10k") == 2
    assert "the list coco2014-10k does not ship; pass --prompts FILE with its 10,000 prompts" in error_of(capsys)


def test_a_list_in_several_files_is_fetched_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """HPSv2's data set holds its training too: the four styles are asked for by name."""
    known = next(known for known in LISTS if known.name == "hpsv2")
    asked: list[tuple[str, str]] = []

    def fetch(repo: str, name: str, repo_type: str) -> str:
        asked.append((repo, name))
        file = tmp_path / Path(name).name
        file.write_text(json.dumps([f"{Path(name).stem} {i}" for i in range(800 if len(asked) != 6 else 799)]))
        return str(file)

    monkeypatch.setattr("fewstep.evaluation.prompt_lists.hf_hub_download", fetch)
    prompts = listed_prompts(known, None)
    assert len(prompts) == 3200 and {p.split()[0] for p in prompts} == {"anime", "concept-art", "paintings", "photo"}
    assert asked[1] == ("zhwang/HPDv2", "benchmark/concept-art.json")
    with pytest.raises(
        ValueError, match=r"ships with no package \(zhwang/HPDv2 has 3199 prompts, expected 3200\); pass"
    ):
        listed_prompts(known, None)
    with pytest.raises(ValueError, match=r"^prompts: got 4000 with SHA-256 .*, protocol hpsv2 is of 3200 with any"):
        checked(known, [str(i) for i in range(4000)])
    coco = next(known for known in LISTS if known.name == "coco2014-10k")
    assert len(checked(coco, [str(i) for i in range(12_000)])) == 10_000


@pytest.mark.parametrize("name", [known.name for known in LISTS if known.shipped])
def test_shipped_lists_are_those_of_their_hash(name: str) -> None:
    known = next(known for known in LISTS if known.name == name)
    prompts = shipped_prompts(known)
    assert len(set(prompts)) == known.count
    with pytest.raises(ValueError, match=rf"^prompts: got {known.count - 1} with SHA-256 .*, protocol {name} is of"):
        checked(known, prompts[1:])
