"""`examples/tdm_in_100_lines.py` is short, needs torch alone, and is right.

Its gradients are the library's, and its student is better than its teacher's few steps.
"""

import ast
import copy
import runpy
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.backbones.base import Denoiser
from fewstep.core.guidance import Guidance
from fewstep.core.schedule import Flow
from fewstep.methods.distribution_matching import DistributionMatching, draw, matching_losses
from fewstep.methods.method import TrainBatch
from fewstep.roles.roles import RolesConfig, make_roles
from tests.project import ROOT

FILE = ROOT / "examples" / "tdm_in_100_lines.py"
BATCH = 12


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(FILE))


def test_it_needs_torch_alone_and_a_hundred_lines() -> None:
    tree = ast.parse(FILE.read_text(encoding="utf-8"))
    names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert names == {"copy", "math", "torch"}
    code = {
        n.lineno
        for n in ast.walk(tree)
        if isinstance(n, ast.stmt) and not isinstance(n, ast.Expr | ast.Import | ast.ImportFrom)
    }
    assert len(code) <= 100


def test_its_gradients_are_the_librarys(example: dict[str, Any]) -> None:
    torch.manual_seed(0)
    teacher, student, fake = (example["Velocity"](16) for _ in range(3))
    roles = make_roles(Denoiser(copy.deepcopy(teacher), Flow(), (2,), "flow"), RolesConfig(lora=False))
    roles.networks["student"].load_state_dict(student.state_dict())
    roles.networks["fake"].load_state_dict(fake.state_dict())
    method = DistributionMatching(steps=3, guidance=Guidance(), warmup=0)
    batch = TrainBatch(0, 1, BATCH, {}, {}, None, torch.Generator().manual_seed(5))
    wanted: dict[str, list[torch.Tensor]] = {}
    for loss in matching_losses(method, roles, batch):
        parameters = list(roles.trained[loss.role].values())
        wanted[loss.role] = list(torch.autograd.grad(loss.value, parameters, retain_graph=True))
    rng = torch.Generator().manual_seed(5)
    x = torch.randn((BATCH, 2), generator=rng)
    d = draw(method, roles, {}, BATCH, torch.Generator().manual_seed(5), with_gradient=False)
    times = method.times(Flow())
    fake_loss, student_loss = example["tdm_losses"](student, fake, teacher, x, times, d.segment, d.tau, d.e)
    for role, net, value in (("fake", fake, fake_loss), ("student", student, student_loss)):
        found = torch.autograd.grad(value, list(net.parameters()), retain_graph=True)
        assert any(bool(g.any()) for g in found)
        for own, other in zip(found, wanted[role], strict=True):
            torch.testing.assert_close(own, other, rtol=2e-4, atol=1e-6)


def test_the_fake_score_carries_the_difference(example: dict[str, Any]) -> None:
    """With the teacher as the fake score there is nothing to learn."""
    torch.manual_seed(0)
    teacher: nn.Module = example["Velocity"](16)
    student = copy.deepcopy(teacher)
    times, rng = torch.linspace(1, 0, 3, dtype=torch.float64), torch.Generator().manual_seed(0)
    x, e = torch.randn((2, BATCH, 2), generator=rng)
    segment = torch.arange(BATCH) * 2 // BATCH
    tau = times[segment] - 0.2
    _, loss = example["tdm_losses"](student, copy.deepcopy(teacher), teacher, x, times, segment, tau, e)
    assert all(not g.any() for g in torch.autograd.grad(loss, list(student.parameters())))


@pytest.mark.slow
def test_two_steps_of_the_student_are_near_the_data(example: dict[str, Any]) -> None:
    found = example["main"]()
    assert found["student, 2 steps"] < 0.2 * found["teacher, 2 steps"]
