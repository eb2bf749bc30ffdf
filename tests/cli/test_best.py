"""The best student so far stays, whatever comes after it, and it is said when nothing better comes."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewstep.cli.best import PATIENCE, Best, keep_best, read_best

from .common import fewstep as command

KEY = "preview.distance"


def run_of(folder: Path, values: list[float | None]) -> list[list[str]]:
    """Judge a run whose previews have these values; return what was said.

    There is one preview an iteration, and it is logged before it is judged.
    """
    said = []
    for i, value in enumerate(values):
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"iteration": i, "preview": {"distance": value}}) + "\n")
        said.append(
            keep_best(folder, Best(i, float("nan") if value is None else value, KEY), partial(written, iteration=i))
            if i
            else []
        )
    return said


def written(folder: Path, iteration: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "student").write_text(str(iteration))


def test_the_best_stays_when_it_gets_worse(tmp_path: Path) -> None:
    run_of(tmp_path, [0.9, 0.5, 0.3, 0.4, 0.6])
    assert (tmp_path / "best" / "student").read_text() == "2"
    assert read_best(tmp_path, KEY) == Best(2, 0.3, KEY)
    assert read_best(tmp_path, "quality.fd_real") is None  # another measure says nothing of this one


@pytest.mark.parametrize("broken", [None, float("inf")])
def test_what_is_no_number_is_never_the_best(tmp_path: Path, broken: float | None) -> None:
    run_of(tmp_path, [0.9, broken])
    assert not (tmp_path / "best").exists()
    run_of(tmp_path, [0.9, 0.5, broken])
    assert read_best(tmp_path, KEY) == Best(1, 0.5, KEY)


def test_it_is_said_when_previews_get_no_better_and_where_the_best_is(tmp_path: Path) -> None:
    said = run_of(tmp_path, [0.9, 0.3, *[0.4] * 2 * PATIENCE])
    assert [i for i, lines in enumerate(said) if lines] == [1 + PATIENCE, 1 + 2 * PATIENCE]
    assert "3 previews in a row no better than iteration 1's, preview.distance 0.4 against 0.3" in said[1 + PATIENCE][0]
    assert f"{tmp_path / 'best'} has the student of iteration 1" in said[1 + PATIENCE][0]


def test_a_training_that_only_gets_worse_is_told_so(tmp_path: Path) -> None:
    said = run_of(tmp_path, [0.3, 0.4, 0.5, 0.6])
    assert "no better than iteration 0's" in said[3][0] and "the student as it began" in said[3][0]


def test_a_better_preview_is_not_complained_of(tmp_path: Path) -> None:
    assert run_of(tmp_path, [0.9, 0.8, 0.7, 0.6, 0.5]) == [[]] * 5


def test_previews_of_the_warm_up_are_no_student_s(tmp_path: Path) -> None:
    """Nothing of it is trained yet, so that it is neither the best nor no better."""
    values = [0.9, 0.9, 0.9, 0.9, 0.95, 0.94, 0.93]
    for i, value in enumerate(values):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"iteration": i, "preview": {"distance": value}}) + "\n")
        said = keep_best(tmp_path, Best(i, value, KEY), partial(written, iteration=i), warmup=3) if i else []
        assert (tmp_path / "best").exists() == (i > 3) and bool(said) == (i == 6)


def test_a_resumed_run_keeps_what_a_later_preview_than_its_checkpoint_had(tmp_path: Path) -> None:
    """The best student outlives a log that goes back.

    The run is killed after the preview of iteration 3 and resumed from iteration 2.
    """
    run_of(tmp_path, [0.9, 0.5, 0.4, 0.3])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()[:3]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert keep_best(tmp_path, Best(3, 0.3, KEY), lambda at: written(at, 33)) == []
    assert (tmp_path / "best" / "student").read_text() == "3"
    assert keep_best(tmp_path, Best(4, 0.2, KEY), lambda at: written(at, 4)) == []
    assert read_best(tmp_path, KEY) == Best(4, 0.2, KEY)


def test_a_kill_between_the_student_and_its_note_loses_nothing(tmp_path: Path) -> None:
    """A folder without its note is that of no preview: the next one that is measured replaces it."""
    run_of(tmp_path, [0.9, 0.5])
    (tmp_path / "best" / "preview.json").unlink()
    assert read_best(tmp_path, KEY) is None
    keep_best(tmp_path, Best(2, 0.6, KEY), lambda at: written(at, 2))
    assert (tmp_path / "best" / "student").read_text() == "2"


def test_a_run_that_gets_worse_leaves_its_best_student(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best student can be sampled; it is not the last. A line on the screen and in the report names it."""
    distances = iter([0.9, 0.5, 0.3, 0.4, 0.5, 0.6])
    monkeypatch.setattr("fewstep.runs.preview.paired_distance", lambda *_: next(distances))
    assert command(monkeypatch, "distill", recipe, "--set", "preview.every=1") == 0
    run, said = Path("runs/tiny"), capsys.readouterr().out
    assert "best     runs/tiny/best: the student of iteration 2, preview.distance 0.3 where the last has 0.6" in said
    assert json.loads((run / "best" / "fewstep.json").read_text())["iterations"] == 2
    best, last = (load_file(run / name / "pytorch_lora_weights.safetensors") for name in ("best", "final"))
    assert best.keys() == last.keys() and any(not torch.equal(best[k], last[k]) for k in best)
    assert command(monkeypatch, "sample", run / "best", "-p", "red cat") == 0
    assert "iteration 2, kept in runs/tiny/best (preview.distance 0.3)" in (run / "report.html").read_text()


def test_a_run_that_gets_no_better_ends_early_and_its_best_student_is_the_runs(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After `patience` previews without improvement; the same command does not train on."""
    distances = iter([0.9, 0.5, 0.3, 0.4, 0.5])
    monkeypatch.setattr("fewstep.runs.preview.paired_distance", lambda *_: next(distances))
    how = ("preview.every=1", "preview.patience=2", "preview.final=best", "train.iterations=9")
    settings = [word for setting in how for word in ("--set", setting)]
    assert command(monkeypatch, "distill", recipe, *settings) == 0
    run, said = Path("runs/tiny"), capsys.readouterr().out
    assert "iteration 4: 2 previews in a row are no better than one before; the training ends here" in said
    assert "final    the student of iteration 2 of 4, preview.distance 0.3" in said
    best, last = (load_file(run / name / "pytorch_lora_weights.safetensors") for name in ("best", "final"))
    assert best.keys() == last.keys() and all(torch.equal(best[k], last[k]) for k in best)
    assert json.loads((run / "final" / "fewstep.json").read_text())["iterations"] == 2
    assert not (run / "final" / "preview.json").exists()
    assert "iteration 2 of 4, the best preview" in (run / "report.html").read_text()
    before = (run / "metrics.jsonl").read_text()
    assert command(monkeypatch, "distill", recipe, *settings) == 0  # `distances` has no more
    assert (run / "metrics.jsonl").read_text() == before


def test_a_new_training_in_the_folder_is_not_held_against_an_old_best(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stale = Path("runs/tiny/best")
    stale.mkdir(parents=True)
    (stale / "preview.json").write_text(json.dumps({"iteration": 5, "value": 0.0, "measured": KEY}))
    assert command(monkeypatch, "distill", recipe, "--set", "train.iterations=2", "--set", "preview.every=2") == 0
    assert read_best(stale.parent, KEY) != Best(5, 0.0, KEY) and (stale / "fewstep.json").is_file()


def test_it_is_kept_only_where_it_is_wanted(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (
        command(monkeypatch, "distill", recipe, "--set", "train.iterations=2", "--set", "preview.keep_best=false") == 0
    )
    assert not Path("runs/tiny/best").exists() and Path("runs/tiny/final").is_dir()
