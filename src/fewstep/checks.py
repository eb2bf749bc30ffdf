"""Conformance checks for your own objective or backbone.

Run a check in your tests: the objective or backbone is done when the check raises nothing.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .backbones.apart import apart
from .backbones.base import Backbone, Cond, denoiser, guided, rows
from .backbones.modules import dtype_of
from .core.guidance import Guidance
from .core.schedule import expand
from .roles.adapters import remove_adapters
from .roles.discriminator import features
from .roles.roles import CONDITION, TRAINED, RolesConfig, make_roles

# (batch, generator) -> the objective's arguments, batch first
Inputs = Callable[[int, torch.Generator], tuple[Tensor, ...]]


def check_objective(objective: Callable[..., Tensor], inputs: Inputs, trained: Sequence[int], batch: int = 6) -> None:
    """Check that `objective` is a pure function with the right gradients.

    The function maps a batch to one loss per sample, [B]. `inputs(batch, generator)` samples the arguments,
    each tensor [B, ...] float32. `trained` are the positions of the arguments that carry a gradient; all
    others are constants to the objective. Raises ValueError that says what is wrong.
    """
    name = getattr(objective, "__name__", repr(objective))
    drawn = inputs(batch, torch.Generator().manual_seed(0))
    arguments = tuple(a.detach().clone().requires_grad_() for a in drawn)
    before = [a.detach().clone() for a in arguments]
    value = objective(*arguments)

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"objective {name}: {what}")

    require(value.shape == (batch,), f"returned {list(value.shape)}; return one loss per sample, [{batch}]")
    require(
        value.dtype == drawn[trained[0]].dtype,
        f"returned {value.dtype} for {drawn[trained[0]].dtype}; keep the dtype of what is trained",
    )
    require(bool(value.isfinite().all()), "is not finite on ordinary inputs")
    require(
        torch.equal(objective(*arguments).detach(), value.detach()),
        "gives another value the second time; take randomness as an argument",
    )
    require(all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True)), "changes its arguments")

    order = torch.arange(batch).flip(0)
    turned = objective(*(a[order] for a in arguments))
    require(torch.allclose(turned, value[order], rtol=1e-4, atol=1e-6), "depends on the order of the samples")
    alone = torch.cat([objective(*(a[i : i + 1] for a in arguments)) for i in range(batch)])
    require(torch.allclose(alone, value, rtol=1e-4, atol=1e-6), "mixes samples of a batch: normalise per sample")

    gradients = torch.autograd.grad(value.sum(), arguments, allow_unused=True)
    for i, gradient in enumerate(gradients):
        reached = gradient is not None and bool(gradient.any())
        require(i not in trained or reached, f"gives argument {i} no gradient")
        require(i in trained or not reached, f"gives argument {i} a gradient, which is a constant to it: detach it")
    reaching = [g for g in gradients if g is not None]
    require(all(bool(g.isfinite().all()) for g in reaching), "has a gradient that is not finite")

    for scale, when in ((0.0, "where everything is equal"), (1e4, "on inputs of size 10,000")):
        far = tuple((a.detach() * scale if a.ndim > 1 else a.detach()).requires_grad_() for a in arguments)
        loss = objective(*far)
        slopes = torch.autograd.grad(loss.sum(), [far[i] for i in trained], allow_unused=True)
        require(bool(loss.isfinite().all()), f"is not finite {when}")
        require(all(g is None or bool(g.isfinite().all()) for g in slopes), f"has a gradient that is not finite {when}")


def check_backbone(backbone: Backbone, prompts: Sequence[str] = ("a red cat", "two blue dogs on the grass")) -> None:
    """Check that `backbone` keeps what the protocol promises.

    Every method, role and file of fewstep then works with the backbone. `prompts` are two that the backbone
    understands. The network runs a few dozen times at its own size, and its weights stay as they were. Raises
    ValueError that says what is wrong.
    """

    def require(holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"backbone {backbone.name}: {what}")

    backbone = apart(backbone)  # the networks of an earlier training on the backbone stay as they are
    module = backbone.module
    remove_adapters(module, TRAINED)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    _check_schedule(backbone, require)
    case = _case(backbone, prompts, require)
    _check_predictions(backbone, case, require)
    _check_images(backbone, case, require)
    _check_gradients(backbone, case, require)
    _check_roles(backbone, case, require)
    remove_adapters(module, TRAINED)
    require(all(torch.equal(p, before[n]) for n, p in module.named_parameters()), "its weights have changed")


Require = Callable[[bool, str], None]


class _Case(NamedTuple):
    """Two states with their times and conditions, on the backbone's device."""

    x: Tensor
    t: Tensor
    cond: Cond
    null: Cond


def _case(backbone: Backbone, prompts: Sequence[str], require: Require) -> _Case:
    device = next(backbone.module.parameters()).device
    x = torch.randn((2, *backbone.shape), generator=torch.Generator().manual_seed(0)).to(device)
    t = backbone.schedule.at(torch.tensor([0.75, 0.375], dtype=torch.float64)).to(device)
    cond, null = backbone.encode(list(prompts)), backbone.encode([""])
    require(cond.keys() == null.keys(), f"conditions are {sorted(cond)}, those of the empty prompt {sorted(null)}")
    require(
        all(len(v) == 2 for v in cond.values()) and all(len(v) == 1 for v in null.values()),
        "conditions are not batch first",
    )
    require(
        all(cond[k].shape[1:] == null[k].shape[1:] for k in cond), "the empty prompt's conditions have another shape"
    )
    return _Case(x, t.round() if backbone.schedule.resolution else t, cond, null)


def _check_schedule(backbone: Backbone, require: Require) -> None:
    schedule, u = backbone.schedule, torch.linspace(0, 1, 9, dtype=torch.float64)
    times, clean = schedule.at(u), torch.tensor([schedule.t_clean], dtype=torch.float64)
    require(
        torch.allclose(schedule.fraction(times), u, atol=1e-6), "schedule.fraction is not the inverse of schedule.at"
    )
    require(bool((times.diff() > 0).all()) and float(times[-1]) == schedule.t_max, "schedule.at does not rise to t_max")
    require(
        float(schedule.alpha(clean)) == 1 and float(schedule.sigma(clean)) == 0, "its data are not clean at t_clean"
    )
    require(
        bool((schedule.sigma(times) / schedule.alpha(times).clamp(min=1e-12)).diff().min() > 0),
        "noise does not grow with time",
    )


@torch.no_grad()
def _check_predictions(backbone: Backbone, case: _Case, require: Require) -> None:
    module, (x, t, cond, null) = backbone.module, case
    m = backbone.predict(module, x, t, cond)
    require(m.shape == x.shape, f"predict gives {list(m.shape)} for states {list(x.shape)}")
    require(m.dtype == torch.float32, f"predict gives {m.dtype}; give float32, in which solvers and losses calculate")
    require(bool(m.isfinite().all()), "predict is not finite on ordinary states")
    close = 1e-4 if dtype_of(module) == torch.float32 else 2e-2

    def same(a: Tensor, b: Tensor) -> bool:
        return float((a - b).abs().max()) <= close * max(1.0, float(b.abs().max()))

    alone = torch.cat(
        [backbone.predict(module, x[i : i + 1], t[i : i + 1], rows(cond, slice(i, i + 1))) for i in range(2)]
    )
    require(same(alone, m), "a sample's prediction depends on the others of its batch")
    require(not torch.equal(backbone.predict(module, x, t.flip(0), cond), m), "predict does not look at t")
    own = denoiser(backbone, module, cond)(x, t)
    if cond:
        away = denoiser(backbone, module, {k: v.expand_as(cond[k]) for k, v in null.items()})(x, t)
        require(not torch.equal(away.x0, own.x0), "predict does not look at the conditions")
        mixed = guided(backbone, module, cond, null, Guidance(scale=3.0))(x, t)
        require(same(mixed.x0, away.x0 + 3 * (own.x0 - away.x0)), "guidance in one batched call is not guidance in two")
    again = expand(backbone.schedule.alpha(t), x) * own.x0 + expand(backbone.schedule.sigma(t), x) * own.eps
    require(same(again, x), "x0 and eps do not make up the state: wrong row or schedule")


@torch.no_grad()
def _check_images(backbone: Backbone, case: _Case, require: Require) -> None:
    shown, side = backbone.decode(case.x), backbone.image_size
    require(len(shown) == 2, "decode does not keep the batch")
    if side:
        require(
            shown.shape[-2:] == (side, side), f"decode gives {list(shown.shape)}, images are [2, 3, {side}, {side}]"
        )
        states = backbone.encode_images(
            torch.rand((2, shown.shape[1], side, side), generator=torch.Generator().manual_seed(1)).to(case.x)
        )
        require(
            states.shape == case.x.shape,
            f"encode_images gives {list(states.shape)} for two images, states are {list(case.x.shape)}",
        )


def _check_gradients(backbone: Backbone, case: _Case, require: Require) -> None:
    x = case.x.clone().requires_grad_()
    m = backbone.predict(backbone.module, x, case.t, case.cond)
    require(m.requires_grad, "predict lets no gradient through to its states")
    (slope,) = torch.autograd.grad(m.square().mean(), x)
    require(bool(slope.isfinite().all()) and bool(slope.any()), "the gradient to its states is zero or not finite")
    if backbone.feature_layers:
        found = features(backbone, backbone.module, x, case.t, case.cond)
        require(
            all(f.ndim == 3 and len(f) == 2 for f in found),
            "a feature layer's output is neither [B, C, ...] nor [B, N, C]",
        )
        (slope,) = torch.autograd.grad(torch.stack([f.square().mean() for f in found]).sum(), x)
        require(bool(slope.any()), "features do not depend on the states")


def _check_roles(backbone: Backbone, case: _Case, require: Require) -> None:
    (x, t, cond, _), layer = case, backbone.time_layer
    with torch.no_grad():
        teacher = denoiser(backbone, backbone.module, cond)(x, t).x0
    roles = make_roles(backbone, RolesConfig(rank=2), condition_values=(4, 2) if layer else ())
    with torch.no_grad():
        for role in TRAINED:
            require(
                torch.equal(roles.denoise(role, cond)(x, t).x0, teacher),
                f"with LoRA that does nothing the {role} is not the teacher",
            )
    names, own = zip(*roles.trained["student"].items(), strict=True)
    gradients = torch.autograd.grad(roles.denoise("student", cond)(x, t).x0.square().mean(), own, allow_unused=True)
    reached = {n for n, g in zip(names, gradients, strict=True) if g is not None and bool(g.any())}
    require(bool(reached - {CONDITION}), "no gradient reaches the student's LoRA")
    if layer:
        require(CONDITION in reached, f"no gradient reaches the step condition at {layer}")
        with torch.no_grad():
            roles.trained["student"][CONDITION][0].fill_(0.1)
            require(
                torch.equal(roles.denoise("student", cond, 2)(x, t).x0, teacher),
                "conditioning on one step count changes another",
            )
            require(
                not torch.equal(roles.denoise("student", cond, 4)(x, t).x0, teacher),
                f"the network ignores the step count of {layer} is told",
            )
