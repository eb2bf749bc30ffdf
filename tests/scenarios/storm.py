"""What a storm needs: a run of two stages in a process of its own, what phase it is in, and writes that fail.

The server imports everything once and forks for every command, so that a storm is of runs and not of imports.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from fewstep.atomic import LEFT, read_hashed
from fewstep.backbones import miniature
from fewstep.hashes import bytes_of

from ..project import ROOT

WORDS = ["red cat", "blue dog", "green house", "a photo of a red dog"]
TRAJECTORIES = {"source": "trajectories", "count": 6, "steps": 3, "seed": 0}
TRAIN = {"batch": 2, "lr": 1.0e-3, "fake_lr": 1.0e-2, "checkpoint_every": 2}
RECIPE: dict[str, Any] = {
    "kind": "distill",
    "name": "storm",
    "teacher": "teacher",
    "prompts": {"source": "prompts.txt"},
    "warm_start": {
        "method": {"name": "trajp-l", "steps": 2, "head": "none", "guidance": 2.0},
        "data": TRAJECTORIES,
        "train": {**TRAIN, "iterations": 3},
    },
    "method": {"steps": 2, "guidance": 2.0, "warmup": 1, "regression_weight": 1.0},
    "data": TRAJECTORIES,
    "roles": {"rank": 2, "targets": "attention"},
    "train": {**TRAIN, "iterations": 5, "seed": 1},
    "preview": {"every": 2, "prompts": ["red cat", "blue dog"], "teacher_steps": 2},
    "evaluate": "images-8",
}
PHASES = {  # of a command, in the order in which it enters them, and the functions that are them
    "embedding": ["fewstep.runs.prepare.embed"],
    "trajectories": ["fewstep.runs.prepare.generate"],
    "training": ["fewstep.cli.distill.training"],
    "checkpoint": ["fewstep.training.saving.save_checkpoint"],
    "preview": ["fewstep.cli.distill.judge"],
    "export": ["fewstep.student.student.write_parts"],
    "evaluation": ["fewstep.cli.finish.evaluate_student"],
    "report": ["fewstep.cli.finish.render_run"],
}
SERVER = """
import json, os, signal, sys, time
import fewstep.api, fewstep.cli.distill, fewstep.cli.finish, fewstep.cli.evaluate, fewstep.report.html
from fewstep.cli import main
from matplotlib import pyplot
from matplotlib.figure import Figure
Figure().savefig(os.devnull, format="svg")  # reads the fonts; nothing of torch's has run before the fork
from tests.scenarios import failing_writes, storm
for line in sys.stdin:
    job = json.loads(line)
    began, pid = time.monotonic(), os.fork()
    if not pid:
        os.chdir(job["folder"])
        storm.print_to(job["log"])
        storm.mark_phases(job["mark"])
        if job["fault"]:
            failing_writes.fail_writes(job["fault"], job["mark"])
        sys.argv, code = ["fewstep", *job["arguments"]], 70
        try:
            main.run()
        except SystemExit as left:
            code = int(left.code or 0)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    status = storm.watched(pid, job)
    print(json.dumps([status, time.monotonic() - began]), flush=True)
"""


@dataclass(frozen=True)
class Ended:
    """A command that has ended.

    It has its exit code, negative where a signal ended it, its seconds, what it printed, and its last phase.
    """

    code: int
    seconds: float
    said: str
    phase: str


class Server:
    """A process that has everything imported and runs commands in children of its own."""

    def __init__(self) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
        }
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=pipe, stdout=pipe, text=True, env=environment, cwd=ROOT
        )

    def run(self, folder: Path, kill: Mapping[str, Any] | None = None, fault: Mapping[str, Any] | None = None) -> Ended:
        """Run the storm's command in a folder.

        It is killed `after` so many seconds of the `nth` time that it is in a `phase`, or its writes fail.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        log, mark = folder.parent / f"{folder.name}-said.txt", folder.parent / f"{folder.name}-mark.txt"
        job = {
            "folder": str(folder),
            "log": str(log),
            "mark": str(mark),
            "arguments": ["distill", "storm.yaml"],
            "kill": kill,
            "fault": fault,
        }
        mark.write_text("")
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        code, seconds = json.loads(self.process.stdout.readline())
        return Ended(code, seconds, log.read_text(encoding="utf-8", errors="replace"), seen_phases(mark)[-1])


@contextmanager
def serving() -> Iterator[Server]:
    """A server while the block runs."""
    server = Server()
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


def watched(pid: int, job: Mapping[str, Any]) -> int:
    """Wait for a child, kill it where that is asked for; its exit code."""
    kill, due = job["kill"], None
    mark = Path(job["mark"])
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if kill is not None and due is None and seen_phases(mark).count(kill["phase"]) >= kill["nth"]:
            due = time.monotonic() + kill["after"]
        if due is not None and time.monotonic() >= due:
            os.kill(pid, signal.SIGKILL)
            due = float("inf")
        time.sleep(0.001)
    return os.waitstatus_to_exitcode(done[1])


def print_to(file: str) -> None:
    """Let what this process prints go to a file."""
    log = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)


def seen_phases(mark: Path) -> list[str]:
    """The phases that a process has been in, one after the other."""
    return ["loading", *mark.read_text().splitlines()]


def mark_phases(file: str) -> None:
    """Write down in a file what phase this process enters, and which it is back in."""
    handle, stack = os.open(file, os.O_WRONLY | os.O_APPEND), ["loading"]

    def entered(phase: str) -> None:
        stack.append(phase)
        os.write(handle, f"{phase}\n".encode())

    def left() -> None:
        stack.pop()
        os.write(handle, f"{stack[-1]}\n".encode())

    def marking(phase: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*arguments: Any, **options: Any) -> Any:
            entered(phase)
            try:
                return inner(*arguments, **options)
            finally:
                left()

        return marked

    for phase, names in PHASES.items():
        for name in names:
            module, _, function = name.rpartition(".")
            setattr(import_module(module), function, marking(phase, getattr(import_module(module), function)))


def place(folder: Path) -> Path:
    """A folder with a teacher, prompts and the storm's recipe."""
    folder.mkdir()
    torch.manual_seed(0)
    tokenizer = miniature.word_tokenizer(WORDS, 600, 8)
    vae, text = miniature.autoencoder([8, 16], 4, 16), miniature.text_encoder(tokenizer, 16, 1, 2)
    miniature.pipeline(vae, text, tokenizer, miniature.unet([16], [True], 4, 8, 16)).save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    (folder / "storm.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return folder


def fresh(folder: Path) -> Path:
    """The same folder as before any run."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    return folder


TIMES = re.compile(r"seconds|started|state_sha256")  # keys of what depends on how long something took, or when it was
SPANS = re.compile(
    r"""\d+(?:\.\d+)?(?:\ss\b|\sminutes|×)|(?<=<data value=")[\d.e-]+"""
    r"""|\sclass="best"|<span class="hidden">\s\(best\)</span>"""
)


def left(folder: Path) -> dict[str, Any]:
    """What a run has made, without what says how long it took: every file by its name, tensors by theirs."""
    run, found = folder / "runs" / "storm", dict[str, Any]()
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = str(path.relative_to(run))
        if path.suffix == ".safetensors":
            tensors, about = read_hashed(path)
            timed = any(TIMES.search(key) for key in tensors)
            found[name] = {k: v for k, v in about.items() if not (timed and k == "sha256")}
            found |= {
                f"{name}/{key}": (t.dtype, t.shape, bytes(bytes_of(t)))
                for key, t in tensors.items()
                if not TIMES.search(key)
            }
        elif path.suffix == ".png":
            found[name] = path.read_bytes()
        elif path.suffix == ".jsonl":
            found[name] = [_timeless(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        elif path.suffix == ".json":
            found[name] = _timeless(json.loads(path.read_text(encoding="utf-8")))
        else:
            found[name] = SPANS.sub("", path.read_text(encoding="utf-8"))
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _timeless(v) for k, v in value.items() if not TIMES.search(k)}
    return [_timeless(v) for v in value] if isinstance(value, list) else value


def assert_same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Nothing is missing, nothing is there too many, and all of it is the same."""
    missing, more = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    other = [
        f"{k}: {found[k]!r:.2000}\ninstead of {expected[k]!r:.2000}"
        for k in expected.keys() & found.keys()
        if found[k] != expected[k]
    ]
    assert not missing and not more and not other, (
        f"missing {missing}, too many {more}, other {len(other)}:\n" + "\n".join(other)
    )


def half_written(runs: Path, before: Path | None = None) -> list[str]:
    """List the files of runs that are not whole.

    They are temporary files, and files that cannot be read. A file that lies unchanged in the folder `before` is left
    out.
    """
    odd = []
    for path in sorted(runs.rglob("*")):
        name = path.relative_to(runs)
        if before is not None and path.is_file() and (before / name).is_file() and path.samefile(before / name):
            continue
        if LEFT.fullmatch(path.name) or (path.is_file() and not readable(path)):
            odd.append(str(name))
    return odd


def readable(path: Path) -> bool:
    """Whether a file is what it is called, from its first byte to its last."""
    try:
        if path.suffix == ".safetensors":
            read_hashed(path)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, SafetensorError):
        return False
    return True
