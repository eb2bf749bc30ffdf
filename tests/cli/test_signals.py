"""Signals and closed pipes end a command with one line.

Nothing is lost. A signal that the shell told the command to ignore is ignored.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.cli import plan
from fewstep.cli.progress import CLOSED
from fewstep.cli.signals import Interrupted, interruptible, stop_request

from ..project import ROOT
from .common import fewstep

SIGNALS = [signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if sys.platform != "win32" else [])]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_the_set_up_is_one_line(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "read_recipe", lambda *_: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    assert fewstep(monkeypatch, "plan", "demo") == 128 + number
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        f"interrupted by {number.name}; the same command goes on: a training from its last checkpoint"
    ]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_training_is_asked_by_any_of_them_and_ended_by_a_second(number: signal.Signals) -> None:
    with interruptible(), stop_request() as request:
        assert not request.asked
        os.kill(os.getpid(), number)
        assert request.asked
        os.kill(os.getpid(), number)  # within a second: the same one, by way of a launcher
        request.when -= 2
        with pytest.raises(Interrupted, match=str(int(number))):
            os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_what_is_ignored_stays_so(number: signal.Signals) -> None:
    """As under nohup, and in a shell's background jobs."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with interruptible(), stop_request() as request:
            os.kill(os.getpid(), number)
            assert not request.asked and signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


PRINTING = """
from fewstep.cli.progress import console
try:
    for i in range(100000):
        console.print("[bold]line[/bold] :smile:")
finally:
    open("saved", "w").close()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_a_reader_that_has_gone_is_said_and_what_is_trained_is_saved(tmp_path: Path) -> None:
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTING],
        cwd=tmp_path,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == "[bold]line[/bold] :smile:\n"
    process.stdout.close()
    said = process.stderr.read()
    process.stderr.close()
    assert process.wait() == CLOSED and (tmp_path / "saved").exists()
    assert said == "stopped: what this was printed to is closed; the same command goes on\n"


@pytest.mark.parametrize("run", ["runs/[draft] one", "[/x]", "[red]", ":smile:", "a\x1b[31mb", "it's #1"])
def test_names_are_printed_as_they_are(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fewstep(monkeypatch, "report", run) == 2
    shown = run.replace("\x1b", "\\x1b")
    assert capsys.readouterr().err.startswith(f"error: run {shown}: there is no such folder")
