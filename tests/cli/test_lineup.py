"""`fewstep compare` and `fewstep study` on the command line: the same prompts, the same noise, and resumed."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from fewstep.api import load_student, sample
from fewstep.backbones.load import load_teacher
from fewstep.cli import lineup as command_lineup
from fewstep.evaluation.distances import paired_distance
from fewstep.evaluation.features import feature_network, features
from fewstep.evaluation.plan import seed_of
from fewstep.report.grids import read_grid
from fewstep.report.images import to_uint8
from fewstep.runs import lineup
from fewstep.study.key import read_key

from .. import pipelines
from . import families
from .common import error_of
from .common import fewstep as command


@pytest.fixture
def runs(final: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """Two runs of one student, the second with a step count of its own; the teacher takes three steps."""
    monkeypatch.setattr(command_lineup, "TEACHER_STEPS", 3)
    other = Path(shutil.copytree(final.parent, "runs/other"))
    card = json.loads((other / "final" / "fewstep.json").read_text())
    card["steps"], card["timesteps"], card["solver"] = [2], {"2": [999, 499, -1]}, {"2": "ddim"}
    (other / "final" / "fewstep.json").write_text(json.dumps(card))
    return "runs/tiny", "runs/other"


def test_students_are_compared_on_the_same_noise(
    runs: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, "compare", *runs, "-p", "red cat", "-p", "blue dog") == 0
    printed = capsys.readouterr().out
    values = json.loads(Path("comparison/comparison.json").read_text())
    teacher = load_teacher(str(json.loads(Path("runs/tiny/final/fewstep.json").read_text())["base"]))
    prompts, seeds = ["red cat", "blue dog"], [seed_of("red cat", 0), seed_of("blue dog", 0)]
    assert (values["prompts"], values["seeds"]) == (prompts, seeds)
    names = ["tiny, 4 steps", "other, 2 steps", "teacher tiny, 3 steps, guidance 2"]
    assert [m["model"] for m in values["models"]] == names
    assert [m["nfe"] for m in values["models"]] == [4, 2, 6]
    theirs = sample(teacher, prompts, seeds, steps=3, guidance=2.0)
    ours = [sample(load_student(run), prompts, seeds) for run in runs]
    bytes_of = [to_uint8(x).float() / 255 for x in (*ours, theirs)]
    seen = [features(feature_network(), x) for x in bytes_of]
    for row, own in zip(values["models"], seen[:2], strict=False):
        assert row["to_teacher"] == pytest.approx(paired_distance(own, seen[2]), rel=1e-4)
    assert values["models"][2]["to_teacher"] is None
    assert values["between"][0]["distance"] == pytest.approx(paired_distance(seen[0], seen[1]), rel=1e-4)
    grid = read_grid(Path("comparison/comparison.png").read_bytes())
    assert grid is not None and grid.prompts == tuple(prompts) and len(grid.labels) == 3
    table = Path("comparison/comparison.md").read_text()
    assert "| tiny, 4 steps | 4 |" in table and f"{values['models'][0]['to_teacher']:.3f}" in table
    assert "Distance to the teacher" in printed and "comparison.html" in printed


def test_an_interrupted_comparison_goes_on_where_it_was(runs: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sampled is not sampled again; another student of the same name is."""
    asked, stop = list[int](), 3

    def counting(*arguments: object, **options: object) -> torch.Tensor:
        asked.append(1)
        if len(asked) == stop:
            raise KeyboardInterrupt
        return sample(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(command_lineup, "sample", counting)
    monkeypatch.setattr(lineup, "BATCH", 2)
    how = ("compare", *runs, "--prompts", "4", "--no-teacher")
    assert command(monkeypatch, *how) != 0
    assert len(asked) == 3 and not Path("comparison/comparison.json").exists()
    asked.clear()
    stop = 100
    assert command(monkeypatch, *how) == 0
    assert len(asked) == 2
    first = json.loads(Path("comparison/comparison.json").read_text())
    asked.clear()
    assert command(monkeypatch, *how) == 0
    assert not asked and json.loads(Path("comparison/comparison.json").read_text()) == first
    card = json.loads(Path("runs/other/final/fewstep.json").read_text())
    card["timesteps"] = {"2": [999, 599, -1]}
    Path("runs/other/final/fewstep.json").write_text(json.dumps(card))
    assert command(monkeypatch, *how) == 0
    assert len(asked) == 2
    for path in Path("comparison/drawn").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert command(monkeypatch, *how) == 2


def test_a_study_is_made_again_as_it_was_and_never_replaced_by_another(
    runs: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """People may have answered it; the page alone says nothing of whose the images are."""
    assert command(monkeypatch, "study", *runs, "--prompts", "3") == 0
    page, key = Path("study/study.html").read_text(), read_key(Path("study"))
    assert "6 pairs" not in capsys.readouterr().out  # three models, three prompts: nine
    assert len(key.pairs) == 9 and key.models[:2] == ("tiny, 4 steps", "other, 2 steps")
    assert key.prompts.count("red cat") + key.prompts.count("blue dog") == 3
    told = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert not re.search(r"tiny|other,|teacher|guided|steps|" + key.salt, told)
    assert command(monkeypatch, "study", *runs, "--prompts", "3") == 0
    assert Path("study/study.html").read_text() == page
    capsys.readouterr()
    for how in (("study", "runs/tiny", "--prompts", "3"), ("study", *runs, "--prompts", "2")):
        assert command(monkeypatch, *how) == 2
        assert "--out: study has a study of other images, whose answers need its key.json; choose" in error_of(capsys)
    assert Path("study/study.html").read_text() == page
    answers = {"format": 1, "study": key.study, "rater": "r", "name": "", "saved": "", "answers": []}
    answers["answers"] = [{"pair": i, "left": "first", "better": "first", "follows": "tie"} for i in range(9)]
    Path("a.json").write_text(json.dumps(answers))
    assert command(monkeypatch, "study", "--count", "a.json") == 0
    assert "9 of 9 votes, 1 rater, 3 prompts" in capsys.readouterr().out
    result = json.loads(Path("study/result.json").read_text())
    assert all(p["ties"] == 3 for p in result["questions"]["follows"]["pairs"])
    Path("b.json").write_text(json.dumps(answers | {"study": "0" * 16}))
    assert command(monkeypatch, "study", "--count", "b.json") == 2
    assert "b.json answers study 0000000000000000, the key is that of" in error_of(capsys)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (("study",), "RUN: got none; name the runs of students"),
        (("compare",), "RUN: name two students or more, or one beside its teacher"),
        (("study", "runs/tiny", "--no-teacher"), "RUN: got one student and --no-teacher"),
        (("compare", "runs/tiny", "--no-teacher"), "RUN: name two students or more"),
        (("compare", "runs/tiny", "runs/tiny/final"), "RUN: got runs/tiny/final twice; name each student once"),
        (("compare", "runs/tiny@3"), "RUN: got runs/tiny@3, this student serves 4 steps; choose one"),
        (("compare", "nowhere"), "RUN: nowhere is no student folder; pass a run or its final/ folder"),
        (("compare", "runs/tiny", "--prompts", "0"), "--prompts: got 0, allowed are 1 to 200, or a prompt file"),
        (("compare", "runs/tiny", "--prompts", "no.txt"), "--prompts: cannot read no.txt"),
        (("compare", "runs/tiny", "-p", " "), "--prompt: got ' ', an empty prompt"),
        (("study", "--count"), "--count: got no answers; name the files that the page saved"),
        (("study", "--count", "x.json"), "--out: study/key.json is missing or damaged"),
        (("study", "runs/tiny", "-o", "tiny.yaml"), "--out: got tiny.yaml/study.html"),
    ],
)
@pytest.mark.usefixtures("final")
def test_a_mistake_is_one_line(
    how: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(monkeypatch, *how) == 2
    assert said in error_of(capsys)
    assert not Path("study").exists() and not Path("comparison").exists()


def test_students_of_other_teachers_are_told(
    runs: tuple[str, str], teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card = json.loads(Path("runs/other/final/fewstep.json").read_text())
    again = str(shutil.copytree(teacher, "again"))
    Path("runs/other/final/fewstep.json").write_text(json.dumps(card | {"base": again}))
    assert command(monkeypatch, "study", *runs) == 2
    assert "these students have different teachers" in error_of(capsys)
    assert command(monkeypatch, "compare", *runs, "--prompts", "2") == 0
    assert "note: These students have different bases:" in capsys.readouterr().out
    values = json.loads(Path("comparison/comparison.json").read_text())
    assert [m["role"] for m in values["models"]] == ["student", "student", "teacher"]
    assert "different bases" in Path("comparison/comparison.html").read_text()


@pytest.mark.slow
def test_a_student_of_clips_is_compared_and_voted_on_as_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command_lineup, "TEACHER_STEPS", 2)
    assert command(monkeypatch, "distill", families.recipe(pipelines.save("cogvideox", tmp_path / "video"))) == 0
    assert command(monkeypatch, "compare", "runs/tiny", "runs/tiny@1", "--prompts", "2") == 0
    values = json.loads(Path("comparison/comparison.json").read_text())
    assert len(values["models"]) == 3 and all(m["motion"] > 0 for m in values["models"])
    assert Path("comparison/comparison.html").read_text().count('<script type="text/plain">data:image/webp') == 6
    assert command(monkeypatch, "study", "runs/tiny", "--prompts", "2") == 0
    assert Path("study/study.html").read_text().count('<script type="text/plain">data:image/webp') == 4
