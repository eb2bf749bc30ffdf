"""Closed-form networks, read as they are and in every way in which a network is read wrongly."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fewstep.backbones.base import Denoiser
from fewstep.backbones.toy import Gaussian, Mixture
from fewstep.core.schedule import EDM, VP, Flow, Schedule
from fewstep.evaluation.process import check_process

from .exact import Exact

RING, THIN = Mixture.ring(radius=0.8, std=0.02), Mixture.ring(radius=0.8, std=0.005)
TABLE = VP((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))
LINEAR = VP((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))


def stated(schedule: Schedule = TABLE, prediction: str = "eps", data: Mixture | Gaussian = RING) -> Denoiser:
    return Denoiser(Exact(data, schedule, prediction), schedule, (2,), prediction)


def found(backbone: Denoiser, real: Tensor) -> tuple[str, ...]:
    return check_process(backbone, real, {}).suspected


def drawn(data: Mixture | Gaussian = RING, n: int = 512) -> Tensor:
    return data.draw(n, torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("schedule", "prediction"), [(TABLE, "eps"), (TABLE, "v"), (LINEAR, "x0"), (Flow(), "flow"), (EDM(), "edm")]
)
def test_a_right_reading_is_not_suspected(schedule: Schedule, prediction: str) -> None:
    result = check_process(stated(schedule, prediction), drawn(), {})
    assert result.suspected == ()
    assert all(at.error <= 1.05 * at.bound for at in result.times)
    assert "nothing is suspected" in str(result)


def test_nor_is_one_of_plain_gaussians() -> None:
    """Of which a linear estimate knows all: errors are the bound itself."""
    data = Gaussian(torch.tensor([0.3, -0.2], dtype=torch.float64), torch.tensor([0.25, 0.01], dtype=torch.float64))
    result = check_process(stated(data=data), drawn(data), {})
    assert result.suspected == ()
    assert all(at.error == pytest.approx(at.bound, rel=0.25) for at in result.times)


@pytest.mark.parametrize(("trained", "said"), [("x0", "eps"), ("eps", "x0"), ("v", "eps"), ("eps", "v")])
def test_another_prediction(trained: str, said: str) -> None:
    (line,) = found(replace(stated(prediction=trained), prediction=said), drawn())
    assert f"prediction is '{trained}'" in line


class Flawed(Exact):
    """The best network but for an error of 1 % of its output's mean square, with the scale that regression finds."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        m = super().forward(x, t)
        return (m + 0.15 * (7 * x.flip(1)).sin()) / 1.01


@pytest.mark.parametrize(("schedule", "prediction"), [(TABLE, "eps"), (LINEAR, "eps"), (LINEAR, "v"), (Flow(), "flow")])
def test_a_network_that_fits_only_well_enough_is_not_suspected(schedule: Schedule, prediction: str) -> None:
    """No network is exact: an eps network's clean estimate is far off where there is little but noise."""
    network = Flawed(RING, schedule, prediction)
    assert found(Denoiser(network, schedule, (2,), prediction), drawn()) == ()


@pytest.mark.parametrize("said", ["v", "x0", "flow"])
def test_nor_does_it_hide_another_prediction(said: str) -> None:
    (line,) = found(Denoiser(Flawed(RING, LINEAR, "eps"), LINEAR, (2,), said), drawn())
    assert "prediction is 'eps'" in line


def test_flow_said_of_a_v_network() -> None:
    (line,) = found(replace(stated(Flow(), "flow"), prediction="v"), drawn())
    assert "prediction is 'flow'" in line


@pytest.mark.parametrize(
    ("given", "cure"),
    [
        (lambda x: (x + 1) / 2, "2 x - 1"),
        (lambda x: 2 * x - 1, r"(x + 1) / 2"),
        (lambda x: (x + 1) * 127.5, "x / 127.5 - 1"),
    ],
)
def test_another_range(given: Callable[[Tensor], Tensor], cure: str) -> None:
    (line,) = found(stated(), given(drawn()))
    assert f"pass {cure} of these" in line


@pytest.mark.parametrize(("data", "prediction", "off"), [(THIN, "eps", -1), (THIN, "v", 1), (RING, "x0", -1)])
def test_times_off_by_one(data: Mixture, prediction: str, off: int) -> None:
    """A network that knows its times as 1 ... T, or as -1 ... T - 2, and is asked with 0 ... T - 1."""
    network = Exact(data, TABLE, prediction, lambda t: (t + off).clamp(0, 999))
    (line,) = found(Denoiser(network, TABLE, (2,), prediction), drawn(data))
    assert "off by one" in line and f"as that of t {'+' if off < 0 else '-'} 1" in line


def test_a_table_that_is_one_longer() -> None:
    """With clean data as its first level, as those who count it have it."""
    longer = VP(torch.cat([torch.ones(1, dtype=torch.float64), LINEAR.alpha_bar])[:1000].clamp(max=1 - 1e-9))
    (line,) = found(replace(stated(LINEAR, data=THIN), schedule=longer), drawn(THIN))
    assert "betas linear from 0.0001" in line


@pytest.mark.parametrize(
    ("trained", "said", "named"),
    [
        (LINEAR, TABLE, "betas linear from 0.0001"),
        (TABLE, LINEAR, "betas scaled linear"),
        (VP(TABLE.alpha_bar), VP(TABLE.alpha_bar**2), "betas scaled linear"),
        (VP(TABLE.alpha_bar**1.7), TABLE, "finds too little noise"),
    ],
)
def test_another_schedule(trained: VP, said: VP, named: str) -> None:
    (line,) = found(replace(stated(trained), schedule=said), drawn())
    assert "the schedule" in line and named in line


def test_time_that_runs_the_other_way_or_on_another_scale() -> None:
    backward = Denoiser(Exact(RING, Flow(), "flow", lambda t: 1 - t), Flow(), (2,), "flow")
    assert "time runs the other way" in found(backward, drawn())[0]
    thousand = Denoiser(Exact(RING, Flow(), "flow", lambda t: (t / 1000).clamp(1e-6, 1)), Flow(), (2,), "flow")
    assert "the network wants 1000 t" in found(thousand, drawn())[0]


def test_a_network_that_knows_nothing_is_worse_than_a_linear_estimate() -> None:
    class Nothing(Exact):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return x.roll(1, 1)

    (line,) = found(Denoiser(Nothing(RING, TABLE, "eps"), TABLE, (2,), "eps"), drawn())
    assert "times as far off as a linear one" in line or "suspected:" in line


def test_edms_preconditioning_done_twice_is_seen() -> None:
    assert found(replace(stated(EDM(), "edm"), precondition=True), drawn())
