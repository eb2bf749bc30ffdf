"""What takes long says so: a live line on a terminal, plain lines in a log, nothing when asked to be quiet."""

import json
import re
import time
from pathlib import Path

import pytest

from fewstep.cli import progress
from fewstep.cli.loading import hashed, loaded
from fewstep.cli.progress import Meter, console, meter, put_result, set_output, working
from fewstep.cli.sample import rows_told
from fewstep.runs.sampling import sample

from .. import tiny
from .common import COMMANDS, fewstep

BUNDLED = "emoji"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    monkeypatch.setattr(progress, "BETWEEN", 0.02)
    monkeypatch.setattr(progress, "MOST_BETWEEN", 0.1)
    set_output(quiet=False, as_json=False)


def until(capsys: pytest.CaptureFixture[str], pattern: str, said: str = "") -> str:
    """What has been printed once it has this pattern, however slow the machine is."""
    end = time.monotonic() + 60
    while not re.search(pattern, said, re.MULTILINE):
        assert time.monotonic() < end, said
        time.sleep(0.02)
        said += capsys.readouterr().out
    return said


def test_a_log_has_a_line_at_first_and_then_the_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "MOST_BETWEEN", 60.0)
    with working("hashing", 100) as tell:
        said = until(capsys, r"^hashing: 0:\d\d so far$")
        tell(50)
        said = until(capsys, r"^hashing: 50 %, 0:\d\d left$", said)
    assert said.splitlines()[0] == "hashing ..." and len(said.splitlines()) < 16, "the time between lines grows"


def test_a_log_says_no_time_left_before_anything_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with meter("evaluating, NFE", 23552) as bar:
        bar.advance(0, {})
        assert "left" not in until(capsys, r"^evaluating, NFE 0/23552 ")
        time.sleep(0.2)
        bar.advance(3200, {})
        until(capsys, r"^evaluating, NFE 3200/23552 .*left 0:0\d$")


def test_what_is_quick_says_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 30.0)
    with working("hashing"):
        pass
    assert capsys.readouterr().out == ""


def test_a_terminal_has_one_live_line_that_goes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "_force_terminal", True)
    monkeypatch.setattr(console, "is_interactive", True)
    with working("loading [red]x"):
        until(capsys, r"loading \[red\]x: 0:\d\d so far")
    assert capsys.readouterr().out.endswith("\x1b[2K")


def test_quiet_shows_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    set_output(quiet=True)
    with working("hashing"), meter("training", 2) as bar:
        bar.advance(2, {})
        time.sleep(0.1)
    assert capsys.readouterr().out == ""


def test_an_error_ends_the_line(capsys: pytest.CaptureFixture[str]) -> None:
    def fails() -> None:
        with working("hashing"):
            until(capsys, "^hashing ...$")
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fails()
    capsys.readouterr()
    time.sleep(0.2)
    assert capsys.readouterr().out == ""


def test_the_lines_of_a_bar_become_rarer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr(progress, "MOST_BETWEEN", 60.0)
    bar = Meter("training", 10_000)
    for done in range(1, 3601):
        now[0] += 1.0
        bar.advance(done, {})
    assert 60 <= len(capsys.readouterr().out.splitlines()) <= 66  # of an hour


def test_the_teacher_is_loaded_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(progress.Working, "__call__", lambda self, done: told.append((done, self.total)))
    teacher = loaded(BUNDLED)
    assert told[0][0] == 0 and sorted(told) == told and all(total == told[0][1] > told[-1][0] for _, total in told)
    told.clear()
    assert len(hashed(teacher.module)) == 16
    assert told[-1][0] == told[-1][1] > 0


def test_json_is_the_only_line_of_the_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fewstep(monkeypatch, "recipes", "cifar10", "--json") == 0
    said = capsys.readouterr()
    assert "cifar10-trajpl" in json.loads(said.out)["recipes"] and "cifar10-trajpl" in said.err
    assert fewstep(monkeypatch, "recipes", "cifar10") == 0
    assert "\ncifar10-trajpl " in capsys.readouterr().out
    assert fewstep(monkeypatch, "inspect", "nowhere", "--json") == 2
    assert capsys.readouterr().out == ""


def test_json_holds_what_json_has(capsys: pytest.CaptureFixture[str]) -> None:
    set_output(as_json=True)
    put_result({"a": float("nan"), "b": [Path("x"), (1, None)], "d": True, "c": "\u2028é"})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": ["x", [1, None]], "d": True, "c": "\u2028é"}
    set_output(as_json=False)
    put_result({"a": 1})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "studio"])
def test_every_command_can_be_quiet_and_speak_json(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fewstep(monkeypatch, command, "--help") == 0
    said = capsys.readouterr().out
    assert "--quiet" in said and "--json" in said


def test_a_network_that_is_called_counts_its_rows() -> None:
    told: list[int] = []
    model = tiny.pixels()
    with rows_told(model.module, told.append):
        sample(model, ["cat", "dog"], steps=3)
    assert told[-1] == 2 * 3  # two images in three steps
