"""Measuring on the command line: at the end beside the teacher, and along the way for the report's curves."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fewstep.api import LoadedStudent
from fewstep.cli.evaluate import measuring, rows_of
from fewstep.evaluation import protocols
from fewstep.evaluation.plan import EmojiProtocol
from fewstep.roles.student import Student
from tests import tiny
from tests.cli.test_distill import error_of, recipe, teacher
from tests.cli.test_distill import fewstep as command
from tests.export.card import CARD

__all__ = ["recipe", "teacher"]  # fixtures

SMALL = EmojiProtocol("small", names=6, repeated=2, seeds=2, toned=2, held_out=2, reference=protocols.REFERENCE)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocols, "PROTOCOLS", (SMALL,))
    monkeypatch.setattr("fewstep.cli.evaluate.TEACHER_STEPS", 3)


@pytest.mark.usefixtures("small")
def test_a_run_is_measured_along_the_way_and_at_its_end(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ("--set", "evaluate=small", "--set", "preview.measure=small", "--set", "method.steps=[2, 1]", "--set", "method.name=tdm-unify")
    assert command(monkeypatch, "distill", recipe, *how) == 0
    run = Path("runs/tiny")
    rows = json.loads((run / "final" / "eval.json").read_text())["rows"]
    assert [(r["model"], r["steps"], r["nfe"]) for r in rows] == [
        ("teacher", 3, 6), ("teacher", 2, 4), ("teacher", 2, 2), ("student", 2, 2), ("teacher", 1, 2), ("teacher", 1, 1), ("student", 1, 1)
    ]  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    points = {line["iteration"]: line["quality"] for line in lines if "quality" in line}
    assert list(points) == [0, 5]
    assert set(points[5]) == {"fd_real", "retrieval_top1", "retrieval_top5", "diversity"}
    assert points[5]["fd_real"] == pytest.approx(rows[3]["fd_real"], rel=1e-3)  # the student of two steps, as it was exported
    page = (run / "report.html").read_text()
    assert "Told and taken" in page
    printed = capsys.readouterr().out
    assert f"{rows[3]['fd_real']:.1f} in 2 network calls" in printed


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize(("guidance", "conditional", "costs"), [(2.0, True, [6, 4, 2, 2]), (1.0, True, [3, 2, 2]), (2.0, False, [3, 2, 2])])
def test_a_row_costs_what_the_network_is_asked(
    guidance: float, conditional: bool, costs: list[int], free: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guided and unguided are two rows where they are two things; a free first step is none."""
    monkeypatch.setattr("fewstep.cli.evaluate.TEACHER_STEPS", 3)
    backbone, asked = tiny.denoiser(conditional=conditional), []
    backbone.module.register_forward_pre_hook(lambda _, args: asked.append(len(args[0])))
    card = replace(CARD, steps=(2,), timesteps={"2": [999, 499, -1]}, solver={"2": "ddim"}, teacher_guidance=guidance, free_first=free)
    rows = rows_of(LoadedStudent(Student(backbone, backbone.module, (), "student", free=free), card))
    assert [r.nfe for r in rows] == [*costs[:-1], costs[-1] - free]
    assert [r.model for r in rows] == ["teacher"] * (len(costs) - 1) + ["student"]
    assert len({(r.model, r.steps, r.guidance) for r in rows}) == len(rows)
    for row in rows:
        asked.clear()
        row.sampler(["red cat"], [0])
        assert sum(asked) == row.nfe


@pytest.mark.parametrize("option", ["evaluate", "preview.measure"])
def test_an_unknown_protocol_is_found_before_the_training(
    recipe: Path, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "distill", recipe, "--set", f"{option}=nothing") == 2
    assert "protocol: got 'nothing'; choose one of emoji-quick" in error_of(capsys)
    assert not Path("runs").exists()


def test_a_teacher_is_measured_by_the_protocols_of_its_kind() -> None:
    asked = tiny.stable_diffusion()
    assert measuring(asked, None, None)[0].name == "emoji-full"
    assert measuring(tiny.pixels(), None, None)[0].name == "pictures"
    with pytest.raises(ValueError, match=r"^--protocol: got pictures, tiny is no pixel model; choose one of emoji-quick, "):
        measuring(asked, "pictures", None)
    with pytest.raises(ValueError, match=r"^data\.real: got x, protocol emoji-quick has real pictures of its own; leave it out$"):
        measuring(asked, "emoji-quick", "x", "evaluate")
