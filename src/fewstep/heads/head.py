"""Heads that correct the direction of a step.

Each head is a `core.solvers.Correction` and predicts zero before training.

A direction is the noise `eps` of the split that a step uses. With the state held fixed, a change of the clean
estimate by `delta` is a change of `eps` by `-(alpha/sigma) delta`. Heads predict `delta`, which has the scale
of data at every time. The past directions of a trajectory and the trajectory's starting point span the same
space as the past clean estimates and the starting noise (PAS, arXiv 2411.06503); the span head predicts
weights on these.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.prediction import Split
from ..core.schedule import Schedule, expand
from ..core.solvers import SolverHistory
from .curve import TERMS, Curve, coordinates, fit_curve

SMALL = 1e-4  # lengths below this share of the data's spread count as zero


@dataclass(frozen=True)
class Facts:
    """What heads know about the data and the student.

    `curve` is the shape of trajectories, `centre` the mean of clean states, `spread` the standard deviation
    of clean states around the mean, and `grids` are the student's time grids.
    """

    curve: Curve
    centre: Tensor
    spread: float
    grids: tuple[Tensor, ...]


def facts_of(schedule: Schedule, whole: Tensor, grid: Tensor, clean: Tensor, grids: Sequence[Tensor]) -> Facts:
    """Return the facts of a teacher's trajectories.

    `whole [n, F, ...]` are trajectories at all times of the teacher's `grid [F]`; `clean` are clean states
    [m, ...].
    """
    c, _ = coordinates(whole.flatten(2))
    centre = clean.double().mean(0)
    spread = (clean.double() - centre).square().mean().sqrt()
    return Facts(
        fit_curve(1 - schedule.fraction(grid), c), centre.float(), float(spread), tuple(g.double() for g in grids)
    )


def unknown(shape: Sequence[int], grids: Sequence[Tensor]) -> Facts:
    """Return placeholder facts for data of this shape."""
    flat = Curve(
        torch.ones(3, TERMS, dtype=torch.float64),
        torch.ones(3, 3, dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
    )
    return Facts(flat, torch.zeros(*shape), 1.0, tuple(grids))


class Tokens(NamedTuple):
    """Vectors in state space, each scaled to the data's spread.

    The tokens are x0 minus the centre, the starting noise, and x0 minus each earlier clean estimate.
    """

    values: Tensor  # [B, N, ...]
    there: Tensor  # [B, N] bool; False for a past step that does not count for the sample
    lengths: Tensor  # [B, N] before scaling, in units of the spread
    times: Sequence[Tensor]  # N x [B]


class Head(nn.Module, ABC):
    """Base class of heads.

    All heads share the tokens, the position on the curve, and the conversion of a corrected estimate into a
    prediction.
    """

    centre: Tensor
    curve_weights: Tensor  # the curve on the head's device; files have it from the facts
    curve_shape: Tensor
    curve_size: Tensor

    def __init__(self, schedule: Schedule, facts: Facts) -> None:
        super().__init__()
        self.schedule, self.facts = schedule, facts
        self.register_buffer("centre", facts.centre.float())
        for name in ("weights", "shape", "size"):
            self.register_buffer(f"curve_{name}", getattr(facts.curve, name), persistent=False)

    @property
    def counts(self) -> tuple[int, ...]:
        """Step counts that the head was made for."""
        return tuple(len(g) - 1 for g in self.facts.grids)

    def forward(self, pred: Split, t: Tensor, t_next: Tensor, history: SolverHistory) -> Split:
        """Return the corrected prediction.

        The state stays the same and the clean estimate changes. All predictions are [B, ...]; t, t_next [B].
        """
        delta = self.delta(self.tokens(pred, t, history), t, t_next).to(pred.x0)
        ratio = self.schedule.alpha(t) / self.schedule.sigma(t)
        return Split(pred.x0 + delta, pred.eps - expand(ratio, delta) * delta)

    @abstractmethod
    def delta(self, tokens: Tokens, t: Tensor, t_next: Tensor) -> Tensor:
        """Return the change of the clean estimate, [B, ...]."""

    def tokens(self, pred: Split, t: Tensor, history: SolverHistory) -> Tokens:
        """Return the tokens of a step."""
        seen = [s.t > t for s in history.steps]
        earlier = [expand(there, pred.x0) * (pred.x0 - s.used.x0) for there, s in zip(seen, history.steps, strict=True)]
        raw = torch.stack([pred.x0 - self.centre.to(pred.x0), history.noise.to(pred.x0), *earlier], 1)
        # Lengths are constants to the gradient: the gradient of a zero length is NaN.
        lengths = raw.detach().flatten(2).float().square().mean(2).sqrt() / self.facts.spread
        values = raw / (lengths + SMALL).to(raw).reshape(lengths.shape + (1,) * (raw.ndim - 2))
        always = torch.ones_like(t, dtype=torch.bool)
        times = [t, t, *(torch.where(there, s.t, t) for there, s in zip(seen, history.steps, strict=True))]
        return Tokens(values, torch.stack([always, always, *seen], 1), lengths, times)

    def place(self, t: Tensor) -> Tensor:
        """Return the curve's coordinates [B, 3] at times t.

        Each coordinate is divided by the coordinate's largest value.
        """
        curve = replace(self.facts.curve, weights=self.curve_weights, shape=self.curve_shape)
        return (curve.at(1 - self.schedule.fraction(t)) / self.curve_size.to(t.device)).float()

    def places(self, t: Tensor, t_next: Tensor) -> Tensor:
        """Return the curve's coordinates at both ends of a step, [B, 6]."""
        return torch.cat([self.place(t), self.place(t_next)], 1)


class Rows(nn.Module):
    """Weights for every step of the student's grids.

    The weights are zero at first. They are PAS's coordinates (arXiv 2411.06503).
    """

    def __init__(self, grids: Sequence[Tensor]) -> None:
        super().__init__()
        self.register_buffer("steps", torch.cat([torch.stack([g[:-1], g[1:]], 1) for g in grids]), persistent=False)
        self.weights = nn.Parameter(torch.zeros(sum(len(g) - 1 for g in grids), max(len(g) for g in grids)))

    def forward(self, t: Tensor, t_next: Tensor, count: int) -> Tensor:
        """Return the first `count` weights of each step, [B, count].

        A step that is in no grid gets the weights of the nearest step.
        """
        steps = self.get_buffer("steps").to(t)
        row = (steps[None] - torch.stack([t, t_next], 1)[:, None]).abs().sum(2).argmin(1)
        return self.weights[row, :count]


class NetworkHead(Head):
    """Base class of heads whose network predicts weights on the tokens.

    The network over the set of tokens sees lengths, cosines and the curve. The weights do not change when the data are
    moved or rotated, and the head works for data of any size.
    """

    def __init__(self, schedule: Schedule, facts: Facts, width: int = 64) -> None:
        super().__init__(schedule, facts)
        self.each = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.mix = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.out = _zero(nn.Linear(width, 1))

    def weights(self, tokens: Tokens, t: Tensor, t_next: Tensor) -> Tensor:
        """Return the weights of each sample's tokens, [B, N]."""
        values, there, lengths, times = tokens
        unit = values.flatten(2).float() / (self.facts.spread * values[0, 0].numel() ** 0.5)
        cosines = nn.functional.pad(torch.einsum("bnd,bmd->bnm", unit, unit[:, :3]), (0, max(0, 3 - unit.shape[1])))
        # Centred x0, starting noise, or an earlier estimate. `one_hot` would ask some devices for the largest class.
        place = torch.arange(values.shape[1], device=t.device).clamp(max=2)[:, None]
        kind = (place == torch.arange(3, device=t.device)).float().expand(len(t), -1, -1)
        step = self.places(t, t_next)[:, None].expand(-1, values.shape[1], -1)
        visited = torch.stack([self.place(s) for s in times], 1)
        h = self.each(torch.cat([torch.log(lengths + SMALL)[..., None], cosines, kind, step, visited], 2).detach())
        mask = there.to(h)[..., None]
        pooled = (h * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        return self.out(self.mix(torch.cat([h, pooled.expand_as(h)], 2)))[..., 0]

    def delta(self, tokens: Tokens, t: Tensor, t_next: Tensor) -> Tensor:
        weights = self.weights(tokens, t, t_next) * tokens.there
        return torch.einsum("bn,bn...->b...", weights.to(tokens.values), tokens.values)


class SpanHead(NetworkHead):
    """Head that predicts weights on the tokens, per step and per sample.

    Each step has weights shared by all samples, to which the network adds weights per sample.
    """

    def __init__(self, schedule: Schedule, facts: Facts, width: int = 64) -> None:
        super().__init__(schedule, facts, width)
        self.rows = Rows(facts.grids)

    def weights(self, tokens: Tokens, t: Tensor, t_next: Tensor) -> Tensor:
        return super().weights(tokens, t, t_next) + self.rows(t, t_next, tokens.values.shape[1])


class CurveHead(NetworkHead):
    """Head that knows a step by its place on the curve alone.

    It has no weights of single steps, so it serves steps of any length, trained or not.
    """


class SharedHead(Head):
    """Head with the same token weights for every sample.

    The head has a few weights per step (the idea of PAS).
    """

    def __init__(self, schedule: Schedule, facts: Facts) -> None:
        super().__init__(schedule, facts)
        self.rows = Rows(facts.grids)

    def delta(self, tokens: Tokens, t: Tensor, t_next: Tensor) -> Tensor:
        weights = self.rows(t, t_next, tokens.values.shape[1]) * tokens.there
        return torch.einsum("bn,bn...->b...", weights.to(tokens.values), tokens.values)


def _zero(layer: nn.Module) -> nn.Module:
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


KINDS: dict[str, type[SpanHead] | type[CurveHead] | type[SharedHead]] = {
    "span": SpanHead,
    "curve": CurveHead,
    "shared": SharedHead,
}
SERVE_ANY = ("curve",)  # kinds without weights of single steps


def make_head(kind: str, schedule: Schedule, facts: Facts, seed: int = 0) -> Head:
    """Return a head that changes nothing before training.

    Raises ValueError that lists the known kinds for an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"method.head: got {kind!r}, allowed are none, {', '.join(KINDS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KINDS[kind](schedule, facts)


def kind_of(head: nn.Module) -> str:
    """Return the kind of a head, the inverse of `make_head`."""
    return next(name for name, kind in KINDS.items() if isinstance(head, kind))


def require_steps(kind: str, counts: Iterable[int], steps: int, option: str, cure: str) -> None:
    """Check that a head serves this number of steps.

    A head has weights for every step of the grids that it was made for: `counts` are their step counts, and
    `kind` is the kind of head; one that knows steps by the curve alone serves any number. Raises ValueError with the
    `cure` where some of the steps have no weights.
    """
    if kind not in SERVE_ANY and steps > (most := max(counts)):
        raise ValueError(f"{option}: got {steps}, the student's {kind} head serves up to {most} steps; {cure}")
