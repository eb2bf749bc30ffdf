"""One recipe in two processes, as torchrun starts them: one run folder, one voice, and an end when one of them ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from .. import pipelines
from ..project import ROOT
from .test_families import elsewhere, recipe  # noqa: F401 - a fixture

TRAIN = {"iterations": 4, "batch": 2, "lr": 1e-3, "fake_lr": 1e-3, "checkpoint_every": 2}


def start(path: Path, count: int, *options: str) -> list[subprocess.Popen[str]]:
    """The command in so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT / "src")}  # fmt: skip
    command = [sys.executable, "-m", "fewstep.cli.main", "distill", str(path), *options]
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {"OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            command,
            env=alone if count == 1 else shared | {"RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in range(count)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Exit status, stdout and stderr of each."""
    said = [p.communicate(timeout=100) for p in processes]
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, said, strict=True)]


def wait_for_iteration(number: int) -> None:
    log, until = Path("runs/tiny/metrics.jsonl"), time.monotonic() + 100
    while time.monotonic() < until:
        if log.exists() and f'"iteration": {number},' in log.read_text():
            return
        time.sleep(0.02)
    raise AssertionError("the run did not get there")


@pytest.mark.slow
def test_two_processes_are_one_run_and_one_that_takes_both_batches(tmp_path: Path) -> None:
    path = recipe(pipelines.save("sd", tmp_path / "sd"), train=TRAIN, method={"steps": 2, "warmup": 1})
    first, second = ended(start(path, 2))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "student  runs/tiny/final" in first[1] and second[1] == ""
    records = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records if "fake_loss" in r] == [1, 2, 3, 4]
    assert json.loads(Path("runs/tiny/final/fewstep.json").read_text())["hardware"] == "2 x 1 CPU threads"
    (alone,) = ended(start(path, 1, "--out", "runs/alone", "--set", "train.accumulate=2"))
    assert alone[0] == 0, alone[2]
    one, two = (load_file(f"runs/{name}/final/pytorch_lora_weights.safetensors") for name in ("alone", "tiny"))
    assert max(float((one[n] - two[n]).abs().max()) for n in one) < 1e-5


@pytest.mark.slow
def test_one_that_dies_ends_the_run_with_one_line_and_the_same_command_resumes(tmp_path: Path) -> None:
    path = recipe(pipelines.save("sd", tmp_path / "sd"), train=TRAIN | {"iterations": 2000}, method={"steps": 2, "warmup": 1})
    processes = start(path, 2)
    wait_for_iteration(5)
    processes[1].kill()
    status, _, err = ended(processes)[0]
    assert status == 2
    assert [line for line in err.splitlines() if "error" in line.lower()] == [
        "error: another process of this run has ended, see what it said; the last checkpoint is intact, the same command resumes"
    ]
    assert "Traceback" not in err
    again = start(path, 2)
    wait_for_iteration(12)
    again[1].send_signal(signal.SIGINT)  # either of them may be asked to stop
    stopped = ended(again)
    assert [s for s, _, _ in stopped] == [130, 130]
    assert "resuming runs/tiny at iteration" in stopped[0][1] and "torchrun --nproc_per_node 2" in stopped[0][1]
