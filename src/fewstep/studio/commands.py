"""Child processes of the studio.

Every action of the studio is a command that a terminal takes, too."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ..atomic import append_text, write_json
from ..names import quoted, visible
from ..training.lock import holder_of
from .folders import LOG, STARTED, facts_of

MOST = 60_000  # characters of output that are shown


@dataclass(frozen=True)
class Output:
    """What a command has printed by now.

    `code` is its exit code, None while it runs."""

    said: str
    code: int | None = None

    @property
    def error(self) -> str:
        """The line with which the command failed; empty where it did not."""
        if not self.code:
            return ""
        said = [line for line in self.said.splitlines() if line.strip()]
        return next((line for line in reversed(said) if line.startswith("error:")), said[-1] if said else "it failed")


def shown(arguments: Sequence[str]) -> str:
    """Return the same command for a shell."""
    return quoted("fewstep", *arguments)


def program(arguments: Sequence[str]) -> list[str]:
    """Return what runs the command in this Python."""
    return [sys.executable, "-m", "fewstep.cli.main", *arguments]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "COLUMNS": "100"}


def stream(arguments: Sequence[str]) -> Iterator[Output]:
    """Run a command, and yield what it has printed so far."""
    said = f"$ {shown(arguments)}\n"
    yield Output(said)
    with subprocess.Popen(
        program(arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        encoding="utf-8", errors="replace", env=_environment(),
    ) as child:  # fmt: skip
        try:
            assert child.stdout is not None
            for line in child.stdout:
                said = (said + line)[-MOST:]
                yield Output(visible(said))
            code = child.wait()
        finally:
            if child.poll() is None:  # nobody looks any more
                child.terminate()
    yield Output(visible(said), code)


def run_apart(argv: Sequence[str], run: Path) -> None:
    """Start a training that survives the studio.

    What it prints goes to the run's folder, and so does who it is.
    """
    run.mkdir(parents=True, exist_ok=True)
    append_text(run / LOG, f"$ {shlex.join(argv[3:])}\n")
    with (run / LOG).open("ab") as log:
        child = subprocess.Popen(
            list(argv), stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=_environment(),
            start_new_session=True,
        )  # fmt: skip
    write_json(run / STARTED, asdict(holder_of(child.pid)))
    threading.Thread(target=child.wait, daemon=True).start()  # an ended child that nobody waits for stays


def stop(run: Path) -> str:
    """Ask the process of a run to save and end.

    Returns what was done.

    Raises ValueError where there is no such process on this machine.
    """
    facts = facts_of(run)
    if facts.held is None or not facts.alive:
        raise ValueError("no process works on this run; there is nothing to stop")
    if sys.platform == "win32" or facts.held.host != socket.gethostname():
        raise ValueError(f"it trains on {facts.held.host}; stop it there with Ctrl-C")
    try:
        os.kill(facts.held.pid, signal.SIGTERM)
    except (ProcessLookupError, PermissionError) as error:
        raise ValueError(f"process {facts.held.pid} could not be told to stop ({error.strerror})") from error
    return "It finishes its iteration, saves a checkpoint and ends."


def resumed(command: str, run: Path) -> list[str]:
    """Return what goes on with a run that another command began.

    The run's folder takes the place of `--out`. Raises ValueError for what is no command of fewstep.
    """
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise ValueError("its command in run.json cannot be read; run it again in a terminal") from error
    several = words[:1] == ["torchrun"]
    start = words.index("fewstep.cli.main") + 1 if several and "fewstep.cli.main" in words else 1
    if not (several or words[:1] == ["fewstep"]) or words[start : start + 1] != ["distill"]:
        raise ValueError("its command in run.json is no training from the command line; run it again where it began")
    own = without_out(words[start:])
    launch = [sys.executable, "-m", "torch.distributed.run", *words[1:start]] if several else program([])
    return [*launch, *own, "--out", str(run)]


def without_out(words: Sequence[str]) -> list[str]:
    """Return a command's words without the folder of its run."""
    kept, skip = [], False
    for word in words:
        if not skip and word != "--out" and not word.startswith("--out="):
            kept.append(word)
        skip = word == "--out" and not skip
    return kept
