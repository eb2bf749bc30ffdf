"""Two and four processes train what one trains: each with all weights, sharded, and sharded within two replicas."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ..project import ROOT
from . import several
from . import test_sharding as common


@lru_cache
def alone(method: str, lora: bool) -> dict[str, Tensor]:
    """What one process trains that takes all batches."""
    return common.weights(several.trained(several.Case(method, lora, False)))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_train_what_one_does(count: int, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.several", str(count), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for case in several.cases(count):
        found = load_file(tmp_path / f"{case.name}.safetensors")
        expected = alone(case.method, case.lora)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=lambda m: f"{case.name}: {m}")  # noqa: B023


def test_other_batches_train_something_else() -> None:
    """The comparison above would see a process that takes the batches of another."""
    one = several.trained(several.Case("unify", True, False), replace(several.CONFIG, global_batch=2))
    apart = [float((t - common.weights(one)[n]).abs().max()) for n, t in alone("unify", True).items()]
    assert max(apart) > 1e-4
