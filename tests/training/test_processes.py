"""Two processes on one machine: each its own draws, one set of weights, one checkpoint."""

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fewstep.methods.matching import Matching
from fewstep.roles.roles import TRAINED, RolesConfig, make_roles
from fewstep.training.loop import TrainConfig, distill
from fewstep.training.prompts import embed

from .. import tiny
from ..project import ROOT

SCRIPT = """
import sys
from dataclasses import replace
from accelerate import debug_launcher
from safetensors.torch import save_file
from tests import tiny
from fewstep.methods.matching import Matching
from fewstep.roles.roles import TRAINED, RolesConfig, make_roles
from fewstep.training.loop import TrainConfig, distill
from fewstep.training.prompts import embed

def work(folder):
    import torch
    torch.set_num_threads(1)
    backbone = tiny.denoiser()
    roles = make_roles(backbone, RolesConfig(rank=2))
    data = embed(backbone, tiny.WORDS, None, "tiny")
    config = TrainConfig(iterations=4, batch=4, lr=1e-3, fake_lr=1e-2, checkpoint_every=2)
    steps = list(distill(roles, Matching(steps=(2, 1), warmup=1), data, config, __import__("pathlib").Path(folder)))
    rank = torch.distributed.get_rank()
    found = {f"{r}/{n}": p.detach().clone() for r in TRAINED for n, p in roles.trained[r].items()}
    found["loss"] = torch.tensor([s.metrics["fake_loss"] for s in steps])
    save_file(found, f"{folder}/rank{rank}.safetensors")

debug_launcher(work, args=(sys.argv[1],), num_processes=2)
"""


@pytest.mark.slow
def test_ranks_see_different_draws_and_keep_the_same_weights(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300)
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
    list(distill(roles, Matching(steps=(2, 1), warmup=1), data, config, folder))


@pytest.mark.slow
def test_two_processes_are_one_that_takes_both_batches(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    two = load_file(tmp_path / "rank0.safetensors")
    for accumulate, same in ((2, True), (1, False)):
        alone(tmp_path / f"alone-{accumulate}", accumulate)
        for role in TRAINED:
            one = load_file(tmp_path / f"alone-{accumulate}" / "checkpoint-000004" / f"{role}.safetensors")
            apart = max(float((tensor - two[f"{role}/{name}"]).abs().max()) for name, tensor in one.items())
            assert (apart < 1e-5) == same
