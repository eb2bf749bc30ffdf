"""The best student so far stays, whatever comes after it, and it is said when nothing better comes."""

import json
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file

from fewstep.cli.best import PATIENCE, Best, keep_best, read_best, stalled
from fewstep.cli.evaluate import check_curves
from fewstep.evaluation.images import ImageProtocol
from fewstep.evaluation.metrics import METRICS
from fewstep.runs.recipe import DistillRecipe, read_recipe

from .common import fewstep as command

KEY = "preview.distance"


def run_of(folder: Path, values: list[float | None], key: str = KEY) -> list[list[str]]:
    """Judge a run whose previews have these values under a key; return what was said.

    There is one preview an iteration, and it is logged before it is judged.
    """
    kind, _, name = key.partition(".")
    said = []
    for i, value in enumerate(values):
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"iteration": i, kind: {name: value}}) + "\n")
        said.append(
            keep_best(folder, Best(i, float("nan") if value is None else value, key), partial(written, iteration=i))
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


@pytest.mark.parametrize("metric", ["pickscore", "geneval", "retrieval_top1", "fd_teacher", "teacher_distance"])
def test_the_best_is_the_highest_or_lowest_as_the_metric_goes(metric: str, tmp_path: Path) -> None:
    """Of higher-is-better metrics the highest; training ends after two previews that are no better."""
    high = METRICS[metric].better == "high"
    values = [v if high else -v for v in (1.0, 3.0, 5.0, 4.0, 2.0)]
    said, key = run_of(tmp_path, [*values], f"quality.{metric}"), f"quality.{metric}"
    assert read_best(tmp_path, key) == Best(2, values[2], key)
    assert (tmp_path / "best" / "student").read_text() == "2" and said == [[]] * 5
    assert "no better than iteration 2's" in run_of(tmp_path, [*values, values[4]], key)[5][0]
    for patience, ended in ((2, True), (3, False)):
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()[:5]
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
        how = [f"preview.patience={patience}", f"preview.best_by={metric}", "preview.protocol=own-quick"]
        assert stalled(tmp_path, read_recipe("emoji-tdm4", [*how, "method.warmup=0"], DistillRecipe)) is ended


class Falling:
    """A scorer whose numbers rise, and then fall, preview by preview."""

    key, clips, of = "pickscore", False, ""
    weights: ClassVar = {"a/model.safetensors": "0" * 64}

    def __init__(self) -> None:
        self.at, self.closed = iter([0.0, 20.0, 21.0, 23.0, 22.0, 21.5]), 0  # the teacher's, then the students'

    def score(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return torch.full(
            (len(images),), next(self.at) if len(images) > 1 else 0.0
        )  # one image: whether it is the same

    def close(self) -> None:
        self.closed += 1


@pytest.mark.slow
def test_a_metric_of_another_package_decides_in_previews(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """PickScore at every preview: the student of the highest is kept and exported, and training ends after it."""
    scorer = Falling()
    rules = ImageProtocol("own-quick", 4, 2, seeds=2, batch=4)
    monkeypatch.setattr("fewstep.evaluation.images.OWN", (rules,))
    monkeypatch.setattr("fewstep.evaluation.scorers.SCORERS", {"pickscore": lambda: scorer})
    monkeypatch.setattr("fewstep.evaluation.bootstrap.DRAWS", 20)
    monkeypatch.setattr("fewstep.cli.evaluate.TEACHER_STEPS", 2)
    how = (
        "preview.every=1", "preview.patience=2", "preview.final=best", "train.iterations=9",
        "preview.protocol=own-quick", "preview.metrics=[pickscore]", "preview.best_by=pickscore",
    )  # fmt: skip
    settings = [word for setting in how for word in ("--set", setting)]
    assert command(monkeypatch, "distill", recipe, *settings) == 0
    run, said = Path("runs/tiny"), capsys.readouterr().out
    assert "iteration 4: 2 previews in a row are no better than one before; the training ends here" in said
    assert "final    the student of iteration 2 of 4, quality.pickscore 23" in said
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["quality"]["pickscore"] for line in lines if "quality" in line] == [20, 21, 23, 22, 21.5]
    assert json.loads((run / "final" / "fewstep.json").read_text())["iterations"] == 2 and scorer.closed == 1
    assert "PickScore" in (run / "report.html").read_text()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["preview.metrics=[pickscore]"], "preview.metrics: is a number of a protocol; set preview.protocol, such"),
        (["preview.best_by=fd_teacher"], "preview.best_by: is a number of a protocol; set preview.protocol, such"),
        (["preview.protocol=own-quick", "preview.metrics=[fid]"], "preview.metrics: got fid; choose from clip_score"),
        (["preview.protocol=own-quick", "preview.metrics=[pick]"], "preview.metrics: got pick; choose from clip_sc"),
        (["preview.protocol=own-quick", "preview.best_by=diversity"], "preview.best_by: got diversity; choose one of"),
        (
            ["preview.protocol=own-quick", "preview.best_by=pickscore"],
            "preview.best_by: got pickscore, which is not measured; set preview.metrics=[pickscore] too",
        ),
    ],
)  # fmt: skip
def test_what_previews_cannot_measure_is_refused(settings: list[str], said: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(said)):
        check_curves(read_recipe("emoji-tdm4", settings, DistillRecipe))


def test_what_previews_can_measure_is_not() -> None:
    for best in ("fd_real", "retrieval_top1"):
        check_curves(read_recipe("emoji-tdm4", ["preview.protocol=quick", f"preview.best_by={best}"], DistillRecipe))
    of = ["preview.protocol=geneval-quick", "preview.metrics=[geneval, pickscore]", "preview.best_by=geneval"]
    check_curves(read_recipe("emoji-tdm4", of, DistillRecipe))


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
