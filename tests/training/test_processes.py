"""Two processes train one student on one machine.

Each has its own draws; both have one set of weights, one checkpoint and one recipe. Neither waits for ever.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fewstep.data.prompts import embed
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.roles.roles import TRAINED, RolesConfig, make_roles
from fewstep.training.loop import TrainConfig, distill

from .. import tiny
from ..project import ROOT

SCRIPT = """
import sys
from dataclasses import replace
from accelerate import debug_launcher
from safetensors.torch import save_file
from tests import tiny
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.roles.roles import TRAINED, RolesConfig, make_roles
from fewstep.training.loop import TrainConfig, distill
from fewstep.data.prompts import embed

def work(folder):
    import torch
    torch.set_num_threads(1)
    backbone = tiny.denoiser()
    roles = make_roles(backbone, RolesConfig(rank=2))
    data = embed(backbone, tiny.WORDS, None, "tiny")
    config = TrainConfig(iterations=4, batch=4, lr=1e-3, fake_lr=1e-2, checkpoint_every=2)
    steps = list(distill(roles, DistributionMatching(steps=(2, 1), warmup=1), data, config, \
__import__("pathlib").Path(folder)))
    rank = torch.distributed.get_rank()
    found = {f"{r}/{n}": p.detach().clone() for r in TRAINED for n, p in roles.trained[r].items()}
    found["loss"] = torch.tensor([s.metrics["fake_loss"] for s in steps])
    save_file(found, f"{folder}/rank{rank}.safetensors")

debug_launcher(work, args=(sys.argv[1],), num_processes=2)
"""


@pytest.mark.slow
def test_ranks_see_different_draws_and_keep_the_same_weights(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (load_file(tmp_path / f"rank{i}.safetensors") for i in (0, 1))
    assert bool((one.pop("loss") != two.pop("loss")).all())
    assert all(bool((tensor == two[name]).all()) for name, tensor in one.items())
    assert sorted(p.name for p in tmp_path.glob("*checkpoint*")) == ["checkpoint-000002", "checkpoint-000004"]
    saved = load_file(tmp_path / "checkpoint-000004" / "fake.safetensors")
    assert all(bool((tensor == one[f"fake/{name}"]).all()) for name, tensor in saved.items())


def alone(folder: Path, accumulate: int) -> None:
    """One process with the settings of the script's two, and as many batches."""
    backbone = tiny.denoiser()
    roles = make_roles(backbone, RolesConfig(rank=2))
    data = embed(backbone, tiny.WORDS, None, "tiny")
    config = TrainConfig(iterations=4, batch=4, accumulate=accumulate, lr=1e-3, fake_lr=1e-2, checkpoint_every=2)
    list(distill(roles, DistributionMatching(steps=(2, 1), warmup=1), data, config, folder))


@pytest.mark.slow
def test_two_processes_are_one_that_takes_both_batches(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    two = load_file(tmp_path / "rank0.safetensors")
    for accumulate, same in ((2, True), (1, False)):
        alone(tmp_path / f"alone-{accumulate}", accumulate)
        for role in TRAINED:
            one = load_file(tmp_path / f"alone-{accumulate}" / "checkpoint-000004" / f"{role}.safetensors")
            apart = max(float((tensor - two[f"{role}/{name}"]).abs().max()) for name, tensor in one.items())
            assert (apart < 1e-5) == same


APART = """
import datetime, os, signal, sys, time
from pathlib import Path
import torch
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.roles.roles import RolesConfig, make_roles
from fewstep import processes
from fewstep.training.loop import TrainConfig, distill
from fewstep.data.prompts import embed
from tests import tiny
torch.set_num_threads(1)
processes.TRAINING = datetime.timedelta(seconds=4)
rank, what, run = int(os.environ["RANK"]), sys.argv[1], Path(sys.argv[2])
backbone = tiny.denoiser()
roles = make_roles(backbone, RolesConfig(rank=2))
words = [*tiny.WORDS, "one more"] if (rank, what) == (1, "prompts") else tiny.WORDS
data = embed(backbone, words, None, "tiny")
count = {(1, "iterations"): 5, (0, "stop"): 400, (1, "stop"): 400}.get((rank, what), 4)
config = TrainConfig(iterations=count, batch=4, lr=2e-3 if (rank, what) == (1, "lr") else 1e-3, fake_lr=1e-2)
if (rank, what) == (1, "late"):
    time.sleep(7)
try:
    for step in distill(roles, DistributionMatching(steps=(2, 1), warmup=1), data, config, run):
        if what == "stop" and step.iteration == 3 and rank == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGSTOP)
    print("finished", flush=True)
except (ValueError, ConnectionError) as error:
    print(type(error).__name__, error, flush=True)
    os._exit(2)
"""


def two(what: str, run: Path, *more: str) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", APART, what, str(run), *more],
            env=shared | {"RANK": str(i), "LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("lr", "train.lr is another (0.002 and not 0.001) here than in process 0"),
        ("iterations", "train.iterations is another (5 and not 4) here than in process 0"),
        ("prompts", "conditions.label.says is another ("),
    ],
)
def test_processes_of_other_settings_do_not_train_together(what: str, said: str, tmp_path: Path) -> None:
    both = two(what, tmp_path)
    ends = [p.communicate(timeout=120)[0] for p in both]
    assert [p.returncode for p in both] == [2, 2]
    assert ends[0] == (
        "ValueError process 0 of 2: other settings in another process than in process 0; "
        "start all of them with the same command and files\n"
    )
    assert said in ends[1] and not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.slow
def test_one_that_starts_late_is_waited_for_longer_than_one_within_an_iteration(tmp_path: Path) -> None:
    both = two("late", tmp_path)
    said = [p.communicate(timeout=300)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0] and all("finished" in text for text in said), said


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_one_that_stands_still_is_missed_within_the_patience_of_an_iteration(stopped: int, tmp_path: Path) -> None:
    both = two("stop", tmp_path, str(stopped))
    try:
        other, began = both[1 - stopped], time.monotonic()
        if stopped == 0:  # the first may draw and measure between two iterations: it is waited for
            with pytest.raises(subprocess.TimeoutExpired):
                other.communicate(timeout=25)
            return
        said = other.communicate(timeout=90)[0]
        assert other.returncode == 2 and said.startswith(
            "ConnectionError another process of this run has ended or stands still"
        )
        assert time.monotonic() - began < 80
    finally:
        for process in both:
            process.send_signal(signal.SIGKILL)
            process.wait()
