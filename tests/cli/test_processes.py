"""One recipe in two processes, as torchrun starts them: one run folder, one voice, and an end when one of them ends.

Their weights are whole in each of them, or spread over both.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from .. import pipelines
from ..project import ROOT
from .families import recipe

pytestmark = pytest.mark.usefixtures("elsewhere")

TRAIN = {"iterations": 4, "batch": 2, "lr": 1e-4, "fake_lr": 1e-4, "checkpoint_every": 2}
ENGINES = [(), ("--set", "train.shard=true")]


def start(path: Path, count: int, *options: str) -> list[subprocess.Popen[str]]:
    """The command in so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": str(ROOT / "src"),
    }
    command = [sys.executable, "-m", "fewstep.cli.main", "distill", str(path), *options]
    alone = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
        "OMP_NUM_THREADS": "1"
    }
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
    said = [p.communicate(timeout=300) for p in processes]
    return [(p.returncode, out, err) for p, (out, err) in zip(processes, said, strict=True)]


def wait_for_iteration(number: int) -> None:
    log, until = Path("runs/tiny/metrics.jsonl"), time.monotonic() + 300
    while time.monotonic() < until:
        if log.exists() and f'"iteration": {number},' in log.read_text():
            return
        time.sleep(0.02)
    raise AssertionError("the run did not get there")


def weights(run: str) -> dict[str, Tensor]:
    """Of the finished student."""
    lora = Path(run, "final/pytorch_lora_weights.safetensors")
    return load_file(lora if lora.exists() else Path(run, "final/unet/diffusion_pytorch_model.safetensors"))


@pytest.mark.slow
def test_two_processes_walk_what_one_walks(tmp_path: Path) -> None:
    """Trajectories, a share each, are those of one process, and both train on all of them."""
    method, data = (
        {"name": "trajp-l", "steps": 2, "guidance": 2.0, "head": "none"},
        {"source": "trajectories", "count": 70, "steps": 4},
    )
    path = recipe(pipelines.save("sd", tmp_path / "sd"), train=TRAIN, method=method, data=data)
    both = ended(start(path, 2))
    assert [code for code, _, _ in both] == [0, 0], both
    assert both[1][1] == ""
    ((code, _, said),) = ended(start(path, 1, "--out", "runs/alone"))
    assert code == 0, said
    shards = [sorted(Path(run, "trajectories").glob("*.safetensors")) for run in ("runs/tiny", "runs/alone")]
    assert [len(s) for s in shards] == [3, 3]
    for one, other in zip(*shards, strict=True):
        assert torch.equal(load_file(one)["states"], load_file(other)["states"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("roles", [{"rank": 2}, {"lora": False, "checkpointing": True}])
def test_two_processes_are_one_run_and_one_that_takes_both_batches(
    engine: tuple[str, ...], roles: dict[str, object], tmp_path: Path
) -> None:
    path = recipe(pipelines.save("sd", tmp_path / "sd"), train=TRAIN, method={"steps": 2, "warmup": 1}, roles=roles)
    first, second = ended(start(path, 2, *engine))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "student  runs/tiny/final" in first[1] and second[1] == ""
    records = [json.loads(line) for line in Path("runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records if "fake_loss" in r] == [1, 2, 3, 4]
    assert json.loads(Path("runs/tiny/final/fewstep.json").read_text())["hardware"] == "2 x 1 CPU thread"
    (alone,) = ended(start(path, 1, "--out", "runs/alone", "--set", "train.accumulate=2"))
    assert alone[0] == 0, alone[2]
    one, two = weights("runs/alone"), weights("runs/tiny")
    apart = torch.cat([(one[n] - two[n]).abs().flatten() for n in one])
    # AdamW makes whole steps of the rounding where a full network has no gradient;
    # tests/training/test_sharding.py is in double precision.
    assert one.keys() == two.keys() and float(apart.quantile(0.99) if "lora" in roles else apart.max()) < 1e-5
    left: list[set[str]] = [
        # Each process writes its part of the embeddings.
        {re.sub(r"-\d{3}-of-\d{3}", "", str(f.relative_to(run))) for f in run.rglob("*") if f.is_file()}
        for run in (Path("runs/tiny"), Path("runs/alone"))
    ]
    best = {f for f in left[1] if f.startswith("best/")}  # whose weights no process has whole while they are spread
    if engine and "lora" in roles:  # whole copies are spread over a checkpoint's parts, too
        left = [{f for f in files if not f.startswith("checkpoint-")} for files in left]
    assert best and left[0] == (left[1] - best if engine else left[1])


@pytest.mark.slow
def test_a_killed_sharded_run_goes_on_bit_for_bit_and_in_one_process_with_the_same_next_loss(tmp_path: Path) -> None:
    train, quiet = (
        TRAIN | {"iterations": 16, "checkpoint_every": 4},
        {"every": 100, "teacher_steps": 2, "prompts": ["red cat"]},
    )
    path = recipe(pipelines.save("sd", tmp_path / "sd"), train=train, method={"steps": 4, "warmup": 1}, preview=quiet)
    sharded = (
        "--set",
        "train.shard=true",
        "--set",
        "train.batch=1",
    )  # fewer samples than segments: the processes need unlike many calls
    assert [s for s, _, _ in ended(start(path, 2, *sharded, "--out", "runs/straight"))] == [0, 0]
    killed = start(path, 2, *sharded)
    wait_for_iteration(6)
    for process in killed:
        process.kill()
    ended(killed)
    assert not Path("runs/tiny/checkpoint-000016").exists()
    kept = max(int(p.name[-6:]) for p in Path("runs/tiny").glob("checkpoint-*"))
    shutil.copytree("runs/tiny", "runs/one")
    again = ended(start(path, 2, *sharded))
    assert [s for s, _, _ in again] == [0, 0] and f"resuming runs/tiny at iteration {kept} of" in again[0][1]
    written = sorted(Path("runs/straight/checkpoint-000016").rglob("*.safetensors"))
    assert written
    for file in written:
        expected, found = load_file(file), load_file(f"runs/tiny/checkpoint-000016/parts/{file.name}")
        assert all(torch.equal(tensor, found[n]) for n, tensor in expected.items())
    refused = ended(start(path, 1, "--set", "train.batch=1", "--out", "runs/one"))[0]
    assert refused[0] == 2 and "takes 2 batches of 1 an iteration, here it is 1; set it to 2" in refused[2]
    alone = ended(start(path, 1, "--set", "train.batch=1", "--set", "train.global_batch=2", "--out", "runs/one"))[0]
    assert alone[0] == 0, alone[2]
    logs = [
        [json.loads(r) for r in Path(f"runs/{run}/metrics.jsonl").read_text().splitlines()]
        for run in ("straight", "one")
    ]
    (straight,), (after,) = ([r for r in log if r["iteration"] == kept + 1 and "fake_grad" in r] for log in logs)
    assert after["fake_grad"] == pytest.approx(straight["fake_grad"], rel=1e-4)  # of the mean over both batches


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_one_that_dies_ends_the_run_with_one_line_and_the_same_command_resumes(
    engine: tuple[str, ...], tmp_path: Path
) -> None:
    path = recipe(
        pipelines.save("sd", tmp_path / "sd"), train=TRAIN | {"iterations": 2000}, method={"steps": 2, "warmup": 1}
    )
    processes = start(path, 2, *engine)
    wait_for_iteration(5)
    processes[1].kill()
    status, _, err = ended(processes)[0]
    assert status == 2
    assert [line for line in err.splitlines() if "error" in line.lower()] == [
        "error: another process of this run has ended or stands still, see what it said; "
        "the last checkpoint is intact, the same command resumes"
    ]
    assert "Traceback" not in err
    again = start(path, 2, *engine)
    wait_for_iteration(12)
    again[1].send_signal(signal.SIGINT)  # either of them may be asked to stop
    stopped = ended(again)
    assert [s for s, _, _ in stopped] == [130, 130]
    assert "resuming runs/tiny at iteration" in stopped[0][1] and "torchrun --nproc_per_node 2" in stopped[0][1]
