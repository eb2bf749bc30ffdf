"""A storm on a run of two stages: killed at random moments, writes that fail, and the same command again ends as if nothing had been."""

import errno
import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fewstep.backbones import miniature

from ..project import ROOT

KILLS = 30
WORDS = ["red cat", "blue dog", "green house", "a photo of a red dog"]
TRAJECTORIES = {"source": "trajectories", "count": 12, "steps": 4, "seed": 0}
TRAIN = {"batch": 4, "lr": 1.0e-3, "fake_lr": 1.0e-2, "checkpoint_every": 2}
RECIPE: dict[str, Any] = {
    "kind": "distill",
    "name": "storm",
    "teacher": "teacher",
    "prompts": {"source": "prompts.txt"},
    "first": {
        "method": {"name": "trajp-l", "steps": 2, "head": "none", "guidance": 2.0},
        "data": TRAJECTORIES,
        "train": {**TRAIN, "iterations": 5},
    },
    "method": {"steps": 2, "guidance": 2.0, "warmup": 1, "anchor": 1.0},
    "data": TRAJECTORIES,
    "roles": {"rank": 2},
    "train": {**TRAIN, "iterations": 7, "seed": 1},
    "preview": {"every": 3, "prompts": ["red cat", "blue dog"], "teacher_steps": 3},
    "evaluate": "pictures-quick",
}

# Imports once and forks for every command, so that a storm is of runs and not of imports. Nothing of torch's has run in it.
SERVER = """
import json, os, signal, sys, time
import fewstep.api, fewstep.cli.distill, fewstep.cli.ending, fewstep.cli.evaluate, fewstep.report.html
from fewstep.cli import main
for line in sys.stdin:
    job = json.loads(line)
    began, pid = time.monotonic(), os.fork()
    if not pid:
        os.chdir(job["folder"])
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        if job["fault"]:
            from tests.scenarios.test_storm import fail_at
            fail_at(*job["fault"])
        sys.argv, code = ["fewstep", *job["arguments"]], 70
        try:
            main.run()
        except SystemExit as left:
            code = int(left.code or 0)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if job["after"] is not None and time.monotonic() - began > job["after"]:
            os.kill(pid, signal.SIGKILL)
            done = os.waitpid(pid, 0)
            break
        time.sleep(0.002)
    print(json.dumps([os.waitstatus_to_exitcode(done[1]), time.monotonic() - began]), flush=True)
"""


class Server:
    """A process that has everything imported and runs commands in children of its own."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=pipe, stdout=pipe, text=True, env=environment, cwd=ROOT)

    def run(self, folder: Path, after: float | None = None, fault: tuple[str, int] | None = None) -> tuple[int, float, str]:
        """(exit code, seconds, what was printed) of the storm's command in a folder; killed after so many seconds, or with a failing write."""
        assert self.process.stdin is not None and self.process.stdout is not None
        log = folder / "said.txt"
        job = {"folder": str(folder), "log": str(log), "arguments": ["distill", "storm.yaml"], "after": after, "fault": fault}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        code, seconds = json.loads(self.process.stdout.readline())
        return code, seconds, log.read_text(encoding="utf-8", errors="replace")


def fail_at(kind: str, number: int) -> None:
    """Let the `number`-th write of a file in this process fail, and all after it: a full disk, or a folder that may not be written."""
    counted, code = [0], {"full": errno.ENOSPC, "read-only": errno.EROFS}[kind]
    replace, mkdir = os.replace, os.mkdir

    def failing() -> None:
        counted[0] += 1
        if counted[0] >= number:
            raise OSError(code, os.strerror(code))

    def failing_replace(source: Any, target: Any, **options: Any) -> None:
        failing()
        replace(source, target, **options)

    def failing_mkdir(path: Any, *arguments: Any, **options: Any) -> None:
        failing()
        mkdir(path, *arguments, **options)

    os.replace, os.mkdir = failing_replace, failing_mkdir  # type: ignore[assignment]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.process.kill()


def place(folder: Path) -> Path:
    """A folder with a teacher, prompts and the storm's recipe."""
    folder.mkdir()
    torch.manual_seed(0)
    tokenizer = miniature.word_tokenizer(WORDS, 600, 8)
    vae, text = miniature.autoencoder([8, 16], 4, 16), miniature.text_encoder(tokenizer, 32, 1, 4)
    miniature.pipeline(vae, text, tokenizer, miniature.unet([32, 32], [False, True], 4, 8, 32)).save_pretrained(folder / "teacher")
    (folder / "prompts.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    (folder / "storm.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return folder


TIMES = re.compile(r"seconds|minutes| s\b|updated|date|created")


def left(folder: Path) -> dict[str, Any]:
    """What a run has made, without what says how long it took."""
    run, found = folder / "runs" / "storm", dict[str, Any]()
    for path in sorted(p for p in run.rglob("*") if p.is_file()):
        name = str(path.relative_to(run))
        if path.suffix == ".safetensors":
            found |= {f"{name}/{key}": tensor.tolist() for key, tensor in load_file(path).items() if "seconds" not in key}
        elif path.suffix == ".png":
            found[name] = path.read_bytes()
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            found[name] = [{k: v for k, v in row.items() if not TIMES.search(k)} for row in rows]
        elif path.name == "fewstep.json":
            found[name] = json.loads(path.read_text(encoding="utf-8"))
        else:
            found[name] = ""  # that it is there
    return found


@pytest.fixture(scope="module")
def straight(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], float]:
    """What an undisturbed run leaves, and how long it takes."""
    folder = place(tmp_path_factory.mktemp("storm") / "straight")
    code, seconds, said = server.run(folder)
    assert code == 0, said
    return left(folder), seconds


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


@pytest.mark.slow
def test_kills_at_random_moments_leave_no_trace(server: Server, straight: tuple[dict[str, Any], float], tmp_path: Path) -> None:
    expected, whole = straight
    rng, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        folder, runs = place(tmp_path / str(runs)), runs + 1
        for _ in range(100):
            code, _, said = server.run(folder, after=rng.uniform(0.02, 0.8 * whole))
            assert code in (0, -9), said
            kills += code == -9
            if code == 0:
                break
        assert code == 0
        assert_same(left(folder), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_every_write_may_fail_and_the_same_command_goes_on(
    kind: str, server: Server, straight: tuple[dict[str, Any], float], tmp_path: Path
) -> None:
    """At each place of writing in its turn: one line, exit code 2, nothing lost."""
    expected, number, rng = straight[0], 1, random.Random(1)
    folder = place(tmp_path / "run")
    while True:
        code, _, said = server.run(folder, fault=(kind, number))
        if code == 0:
            break
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(lines) == 1 and "Traceback" not in said, said
        assert re.search("no space left|read-only", lines[0], re.IGNORECASE), lines[0]
        number += rng.randint(1, 3)  # from where it went on: each time a little further
    assert number > 3
    assert_same(left(folder), expected)
