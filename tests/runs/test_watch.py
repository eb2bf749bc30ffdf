"""What a monitor is for is told, and what goes well is not."""

import math
import warnings

import pytest
import torch

import fewstep
from fewstep.backbones.base import Denoiser
from fewstep.backbones.toy import Mixture
from fewstep.core.schedule import Flow
from fewstep.evaluation.states import cells, energy_distance, energy_noise, shares, shifted
from fewstep.runs.watch import Trend, Watch, affordable
from fewstep.training.loop import TrainConfig
from fewstep.words import python_words

from ..evaluation.exact import Exact

RING = Mixture.ring()


def teacher() -> Denoiser:
    """The best denoiser of a ring, with one weight on its answer for a training to spoil."""

    class Scaled(Exact):
        def __init__(self) -> None:
            super().__init__(RING, Flow(), "x0")
            self.gain = torch.nn.Linear(2, 2)
            with torch.no_grad():
                self.gain.weight.copy_(torch.eye(2))
                self.gain.bias.zero_()

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.gain(super().forward(x, t).float())

    return Denoiser(Scaled(), Flow(), (2,), "x0", name="ring")


@pytest.mark.parametrize(("growth", "told"), [(1.0, 0), (3.0, 0), (12.0, 1), (40.0, 3)])
def test_a_loss_that_grows_is_told_each_time_it_has_doubled(growth: float, told: int) -> None:
    trend, found = Trend(), []
    for i in range(60):
        value = growth ** min(1.0, i / 50) * (1 + 0.3 * math.sin(i))
        found += trend.add({"student_loss": value, "student_grad": 1e3 * value, "fake_loss": math.nan})
    assert len(found) == told
    assert all(line.startswith("LOSS: student_loss is ") and "lower train.lr" in line for line in found)


def test_a_gap_is_told_earlier_than_a_loss() -> None:
    trend, found = Trend(), []
    for i in range(40):
        found += trend.add({"gap_0": 0.5 + 0.08 * max(0, i - 10), "student_loss": 1 + 0.03 * i})
    assert [line.split(",")[0] for line in found][:1] == ["GAP: the fake score no longer follows the student"]


def test_a_collapsed_student_is_told() -> None:
    """A collapsed student is told.

    A full-weight training at a rate that throws it away gives every kind of line, in Python's words, each once as
    Python's warning.
    """
    method = fewstep.TDM(steps=2, warmup=2, loss="l2", guidance=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps = list(
            fewstep.distill(
                teacher(),
                method,
                train=fewstep.TrainConfig(iterations=80, batch=64, lr=0.1, fake_lr=1e-4, ema=0.0),
                roles=fewstep.RolesConfig(lora=False),
            )
        )
    said = [line for step in steps for line in step.warnings]
    assert any(line.startswith(("WORSE", "DRIFT", "MODES")) for line in said)
    assert not any("train." in line or "method." in line for line in said)
    own = [w for w in caught if w.category is fewstep.DistillationWarning]
    assert own and len({str(w.message).split(": ")[1] for w in own}) <= len(own) <= len(said)
    assert own[0].filename == __file__


def test_a_student_that_stays_well_is_not() -> None:
    method = fewstep.TDM(steps=8, warmup=2, loss="l2", guidance=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fewstep.DistillationWarning)
        steps = list(
            fewstep.distill(
                teacher(),
                method,
                train=fewstep.TrainConfig(iterations=40, batch=64, lr=1e-5, fake_lr=1e-4),
                roles=fewstep.RolesConfig(lora=False),
            )
        )
    assert all(step.warnings == () for step in steps)


def test_shares_of_modes_that_are_no_chance() -> None:
    """145 of 600 where 60 are expected."""
    rng = torch.Generator().manual_seed(0)
    ten = Mixture.ring(10, radius=2.0, std=0.05)
    reference, fair = ten.draw(600, rng), ten.draw(600, rng)
    centres = cells(reference, 10)
    expected = shares(reference, centres)
    assert shifted(shares(fair, centres), expected, 600) is None
    lopsided = torch.cat([fair[:455], ten.means[:1] + 0.05 * torch.randn((145, 2), generator=rng, dtype=torch.float64)])
    found = shifted(shares(lopsided, centres), expected, 600)
    assert found is not None and found[0] > 0.25 and found[1] < 0.15


def test_energy_distance_is_its_formula_and_its_noise_is_none() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = RING.draw(256, rng), RING.draw(256, rng)
    assert abs(energy_distance(a, b)) <= energy_noise(a, b) * 1.5
    assert energy_distance(a, b + 1) > 10 * energy_noise(a, b)
    points = torch.tensor([[0.0], [2.0]])
    assert energy_distance(points, points + 5) == pytest.approx(2 * 5 - 2 - 2)


def test_watching_costs_no_more_than_its_share() -> None:
    config, method = TrainConfig(iterations=1000, batch=16, lr=1e-4, fake_lr=1e-3), fewstep.TDM(guidance=1.0)
    assert affordable(Watch(), method, {}, config, 512, 32) == 512
    assert affordable(Watch(), method, {}, TrainConfig(iterations=10, batch=16, lr=1, fake_lr=1), 512, 32) == 0
    assert affordable(Watch(count=7), method, {}, config, 512, 32) == 7
    with pytest.raises(ValueError, match=r"^every: got 0"):
        Watch(every=0)


@pytest.mark.parametrize(
    ("recipe", "python"),
    [
        ("train.lr: got -1, allowed are numbers above 0", "lr: got -1, allowed are numbers above 0"),
        (
            "roles.quantize: got int8; set roles.lora=true, or roles.quantize=null",
            "quantize: got int8; set lora=True, or quantize=None",
        ),
        ("data.folder: the trajectories", "trajectories.folder: the trajectories"),
        ("data.from_student: x leads", "trajectories.student: x leads"),
        (
            "data.source: method lcm needs images; leave data out",
            "images: method lcm needs images; leave images out",
        ),
        ("x: choose another --out", "x: choose another out"),
        (
            "method.analytic_first_step: got true with method.solver=renoise",
            "analytic_first_step: got True with solver=renoise",
        ),
        ("read runs/train.log and train.", "read runs/train.log and train."),
    ],
)
def test_recipes_words_become_pythons(recipe: str, python: str) -> None:
    assert python_words(recipe) == python
