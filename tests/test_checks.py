"""Every objective of the package passes the public check, and what the check is for is found by it."""

from collections.abc import Callable, Sequence
from importlib import import_module
from inspect import isfunction
from pkgutil import iter_modules

import pytest
import torch
from torch import Tensor, nn

from fewstep import objectives
from fewstep.backbones.base import Cond, Denoiser
from fewstep.checks import Inputs, check_backbone, check_objective
from fewstep.objectives.adversarial import GAN_LOSSES, gradient_penalty
from fewstep.objectives.denoising import denoising, martingale
from fewstep.objectives.fisher import fisher
from fewstep.objectives.regression import REGRESSION_LOSSES
from fewstep.objectives.reverse_kl import SURROGATE_LOSSES
from fewstep.objectives.rewards import group_preference

from . import tiny

Objective = Callable[..., Tensor]


def states(*kinds: str) -> Inputs:
    """`x`: [B, 2, 3]; `n`: positive [B]; `d`: logits [B, 5]."""

    def draw(batch: int, rng: torch.Generator) -> tuple[Tensor, ...]:
        made = {"x": (batch, 2, 3), "n": (batch,), "d": (batch, 5)}
        return tuple(
            torch.rand(made[k], generator=rng) + 0.5 if k == "n" else torch.randn(made[k], generator=rng) for k in kinds
        )

    return draw


def penalty(x: Tensor, y: Tensor) -> Tensor:
    return gradient_penalty([x, y])


OBJECTIVES: dict[str, tuple[Objective, Inputs, tuple[int, ...]]] = {
    **{f"reverse-kl {name}": (loss, states("x", "x", "n"), (0,)) for name, loss in SURROGATE_LOSSES.items()},
    **{f"regression {name}": (metric, states("x", "x"), (0, 1)) for name, metric in REGRESSION_LOSSES.items()},
    **{
        f"{name} {side}": (getattr(game, side), states("d"), (0,))
        for name, game in GAN_LOSSES.items()
        for side in ("real", "fake", "student")
    },
    "denoising": (denoising, states("x", "x", "n"), (0,)),
    "fisher": (fisher, states("x", "x", "x", "n"), (0, 1, 2)),
    "martingale": (martingale, states("x", "x", "x"), (0, 1, 2)),
    "group preference": (lambda e, r, a: group_preference(e, r, a, 1, 1.0), states("n", "n", "n"), (0,)),
    "r1": (penalty, states("x", "x"), (0, 1)),
}


HELPERS = {
    "ratio_weight",  # of all samples of a batch, whose mean it makes 1
    "density_ratio",  # a weight without gradient
    "advantages",  # of a group of rewards, which it compares
    "group_preference",  # above, with groups of one
    "fisher_loss",  # of a `MatchedState`: made of the objectives above
    "reverse_kl_loss",
    "GAN_LOSSES",
    "loss_named",
    "metric_named",
    "dmd_normaliser",
    "transition_target",
    "consistency_function",
    "landing_target",
    "gradient_penalty",
}


def test_all_objectives_are_here() -> None:
    """Every public function of `fewstep.objectives` is checked, or makes something that an objective takes."""
    modules = [import_module(f"fewstep.objectives.{m.name}") for m in iter_modules(objectives.__path__)]
    public = {
        n
        for m in modules
        for n, f in vars(m).items()
        if isfunction(f) and f.__module__ == m.__name__ and not n.startswith("_")
    }
    assert public - HELPERS == {
        f.__name__ for f, *_ in OBJECTIVES.values() if f.__module__ != __name__ and f.__name__.isidentifier()
    }


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_of_the_package_passes(name: str) -> None:
    objective, inputs, trained = OBJECTIVES[name]
    check_objective(objective, inputs, trained)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        (lambda x, y: (x - y).square().mean(), r"returned \[\]; return one loss per sample, \[6\]"),
        (lambda x, y: (x - y).square().flatten(1).mean(1).double(), "keep the dtype"),
        (lambda x, y: (x - y).square().flatten(1).mean(1) / (x - y).abs().mean().detach(), "mixes samples"),
        (
            lambda x, y: (x - y.detach()).square().flatten(1).mean(1) + torch.rand(len(x)),
            "another value the second time",
        ),
        (lambda x, y: (x - y).square().flatten(1).mean(1), "gives argument 1 a gradient"),
        (
            lambda x, y: (x.detach() - y.detach()).square().flatten(1).mean(1) + 0 * x.flatten(1).sum(1),
            "gives argument 0 no gradient",
        ),
        (
            lambda x, y: (x - y.detach()).square().flatten(1).sum(1).sqrt(),
            "gradient that is not finite where everything is equal",
        ),
        (lambda x, y: (x - y.detach()).flatten(1).exp().sum(1), "is not finite on inputs of size 10,000"),
        (lambda x, y: (x - y.detach()).square().flatten(1).mean(1) * torch.arange(len(x)), "depends on the order"),
        (lambda x, y: (x - y.detach()).flatten(1).sum(1).log(), "is not finite on ordinary inputs"),
    ],
)
def test_what_it_is_for_is_found(objective: Objective, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_objective(objective, states("x", "x"), (0,))


class Changed(Denoiser):
    """A sound backbone with one thing done wrong."""

    def __init__(self, fault: str) -> None:
        sound = tiny.denoiser()
        super().__init__(sound.module, sound.schedule, sound.shape, "v", sound.conditions, time_layer="time")
        object.__setattr__(self, "fault", fault)

    fault: str

    def predict(self, module: nn.Module, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        if self.fault == "timeless":
            t = torch.full_like(t, 500)
        if self.fault == "unconditional":
            cond = {"label": torch.zeros_like(cond["label"])}
        m = super().predict(module, x.detach() if self.fault == "detached" else x, t, cond)
        if self.fault == "mixing":
            m = m - m.mean(0)
        return m[:, :1] if self.fault == "shape" else m.half() if self.fault == "dtype" else m

    def encode(self, prompts: Sequence[str]) -> Cond:
        cond = super().encode(prompts)
        return {"label": cond["label"][0]} if self.fault == "flat" else cond

    def decode(self, x: Tensor) -> Tensor:
        return x[..., :2] if self.fault == "cropped" else x


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("timeless", "predict does not look at t"),
        ("unconditional", "predict does not look at the conditions"),
        ("detached", "lets no gradient through to its states"),
        ("mixing", "depends on the others of its batch"),
        ("shape", r"predict gives \[2, 1, 4, 4\] for states \[2, 2, 4, 4\]"),
        ("dtype", r"predict gives torch\.float16; give float32"),
        ("flat", "conditions are not batch first"),
        ("cropped", r"decode gives \[2, 2, 4, 2\], images are"),
    ],
)
def test_a_faulty_backbone_is_told_what_is_wrong(fault: str, expected: str) -> None:
    check_backbone(Changed(""))
    with pytest.raises(ValueError, match=f"^backbone own-network: .*{expected}"):
        check_backbone(Changed(fault))
