"""Targets of imitation: the step that they describe lands there. The consistency function is the identity on data."""

import pytest
import torch

from fewstep.core.prediction import Split
from fewstep.core.schedule import EDM, VP, Flow, Schedule, expand
from fewstep.core.solvers import ddim_step
from fewstep.methods.consistency import ConsistencyDistillation
from fewstep.objectives.regression import REGRESSION_LOSSES, consistency_function, landing_target

TABLE = VP(torch.linspace(0.999, 0.005, 1000, dtype=torch.float64))


@pytest.mark.parametrize(
    ("schedule", "t", "s"),
    [(TABLE, 749.0, 499.0), (TABLE, 249.0, -1.0), (Flow(), 1.0, 0.5), (EDM(), 3.0, 0.5)],
    ids=["vp", "clean", "flow", "edm"],
)
def test_a_ddim_step_with_the_target_lands_there(schedule: Schedule, t: float, s: float) -> None:
    x_t, x_s = torch.randn((2, 3, 4), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start, end = (torch.full((3,), u, dtype=torch.float64) for u in (t, s))
    x0 = landing_target(schedule, x_t, x_s, start, end)
    alpha, sigma = (expand(f(start), x_t) for f in (schedule.alpha, schedule.sigma))
    torch.testing.assert_close(ddim_step(schedule, Split(x0, (x_t - alpha * x0) / sigma), end), x_s)


def test_consistency_function_is_the_identity_on_clean_data_and_x0_far_from_it() -> None:
    x, x0 = torch.randn((2, 2, 3), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([-1.0, 499.0], dtype=torch.float64)
    found = consistency_function(x, x0, t, clean=-1.0)
    assert torch.equal(found[0], x[0])
    torch.testing.assert_close(found[1], x0[1], atol=1e-4, rtol=0)


def test_metrics() -> None:
    a, b = torch.randn((2, 2, 3, 4), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(REGRESSION_LOSSES["l1"](a, b), (a - b).abs().mean((1, 2)))
    torch.testing.assert_close(REGRESSION_LOSSES["l2"](a, b), (a - b).square().mean((1, 2)))
    torch.testing.assert_close(REGRESSION_LOSSES["huber"](a, b), ((a - b).square() + 1e-6).sqrt().mean((1, 2)) - 1e-3)
    assert all(not bool(m(a, a).any()) for m in REGRESSION_LOSSES.values())
    with pytest.raises(ValueError, match=r"^loss: got 'l3', allowed are l1, l2, huber$"):
        ConsistencyDistillation(loss="l3")
