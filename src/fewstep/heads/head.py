"""Heads that correct the direction of a step, zero at first. Each is a `core.solvers.Correction`.

A direction is the noise `eps` of the split that a step is taken along; with the state held fixed, a change of the clean estimate by
`delta` is a change of `eps` by `-(alpha/sigma) delta`. Heads answer with `delta`, which is of the size of data at every time. The
directions that a trajectory has met, and its starting point, span the same space as its clean estimates and its starting noise (PAS,
arXiv 2411.06503); the span head answers with weights on these.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..core.prediction import Split
from ..core.schedule import Schedule, expand
from ..core.solvers import SolverHistory
from .curve import TERMS, Curve, coordinates, fit_curve

SMALL = 1e-4  # lengths below this share of the data's spread count as nothing


@dataclass(frozen=True)
class Facts:
    """What heads know of the data and the student: the curve, the mean `centre` of clean states, their standard deviation `spread` around it, the grids walked."""

    curve: Curve
    centre: Tensor
    spread: float
    grids: tuple[Tensor, ...]


def facts_of(schedule: Schedule, whole: Tensor, grid: Tensor, clean: Tensor, grids: Sequence[Tensor]) -> Facts:
    """The facts of a teacher's trajectories: `whole [n, F, ...]` at all times of its `grid [F]`, and clean states [m, ...]."""
    c, _ = coordinates(whole.flatten(2))
    centre = clean.double().mean(0)
    spread = (clean.double() - centre).square().mean().sqrt()
    return Facts(
        fit_curve(1 - schedule.fraction(grid), c), centre.float(), float(spread), tuple(g.double() for g in grids)
    )


def unknown(shape: Sequence[int], grids: Sequence[Tensor]) -> Facts:
    """The facts of data of this shape that nobody has seen yet."""
    flat = Curve(
        torch.ones(3, TERMS, dtype=torch.float64),
        torch.ones(3, 3, dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
    )
    return Facts(flat, torch.zeros(*shape), 1.0, tuple(grids))


class Tokens(NamedTuple):
    """Distances in state space, each scaled to the data's spread: x0 from the centre, the noise, x0 from each earlier estimate."""

    values: Tensor  # [B, N, ...]
    there: Tensor  # [B, N] bool; a visit that is none of the sample's is not there
    lengths: Tensor  # [B, N] before scaling, in units of the spread
    times: Sequence[Tensor]  # N x [B]


class Head(nn.Module, ABC):
    """What the heads have in common: tokens, places on the curve, and how a corrected estimate becomes a way."""

    by_step: ClassVar[bool] = (
        False  # whether every step has weights of its own: then there are no more steps than the longest grid has
    )
    centre: Tensor

    def __init__(self, schedule: Schedule, facts: Facts) -> None:
        super().__init__()
        self.schedule, self.facts = schedule, facts
        self.register_buffer("centre", facts.centre.float())

    @property
    def counts(self) -> tuple[int, ...]:
        """The step counts that it was made for."""
        return tuple(len(g) - 1 for g in self.facts.grids)

    def forward(self, pred: Split, t: Tensor, t_next: Tensor, history: SolverHistory) -> Split:
        """The corrected way: the same state, another clean estimate. All [B, ...]; t, t_next [B]."""
        delta = self.delta(self.tokens(pred, t, history), t, t_next).to(pred.x0)
        ratio = self.schedule.alpha(t) / self.schedule.sigma(t)
        return Split(pred.x0 + delta, pred.eps - expand(ratio, delta) * delta)

    @abstractmethod
    def delta(self, tokens: Tokens, t: Tensor, t_next: Tensor) -> Tensor:
        """Change of the clean estimate, [B, ...]."""

    def tokens(self, pred: Split, t: Tensor, history: SolverHistory) -> Tokens:
        """The tokens of a step."""
        seen = [s.t > t for s in history.steps]
        earlier = [expand(there, pred.x0) * (pred.x0 - s.used.x0) for there, s in zip(seen, history.steps, strict=True)]
        raw = torch.stack([pred.x0 - self.centre.to(pred.x0), history.noise.to(pred.x0), *earlier], 1)
        # Constants to the gradient: that of the length of nothing is not a number.
        lengths = raw.detach().flatten(2).float().square().mean(2).sqrt() / self.facts.spread
        values = raw / (lengths + SMALL).to(raw).reshape(lengths.shape + (1,) * (raw.ndim - 2))
        always = torch.ones_like(t, dtype=torch.bool)
        times = [t, t, *(torch.where(there, s.t, t) for there, s in zip(seen, history.steps, strict=True))]
        return Tokens(values, torch.stack([always, always, *seen], 1), lengths, times)

    def place(self, t: Tensor) -> Tensor:
        """Coordinates [B, 3] of the curve at these times, each in units of its largest value."""
        curve = self.facts.curve
        return (curve.at(1 - self.schedule.fraction(t)) / curve.size.to(t.device)).float()

    def places(self, t: Tensor, t_next: Tensor) -> Tensor:
        """Of both ends of a step, [B, 6]."""
        return torch.cat([self.place(t), self.place(t_next)], 1)


class Rows(nn.Module):
    """A few numbers for every step of the student's grids, zero at first: PAS's coordinates (arXiv 2411.06503)."""

    def __init__(self, grids: Sequence[Tensor]) -> None:
        super().__init__()
        self.register_buffer("steps", torch.cat([torch.stack([g[:-1], g[1:]], 1) for g in grids]), persistent=False)
        self.weights = nn.Parameter(torch.zeros(sum(len(g) - 1 for g in grids), max(len(g) for g in grids)))

    def forward(self, t: Tensor, t_next: Tensor, count: int) -> Tensor:
        """The first `count` numbers of each step, [B, count]; of a step that is not there, those of the nearest."""
        steps = self.get_buffer("steps").to(t)
        row = (steps[None] - torch.stack([t, t_next], 1)[:, None]).abs().sum(2).argmin(1)
        return self.weights[row, :count]


class SpanHead(Head):
    """Weights on the tokens: some that a step has for every sample, and from a network over their set, which sees lengths, cosines and the curve.

    It gives the same weights for data that are moved or rotated, of any size.
    """

    by_step = True

    def __init__(self, schedule: Schedule, facts: Facts, width: int = 64) -> None:
        super().__init__(schedule, facts)
        self.each = nn.Sequential(nn.Linear(16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.mix = nn.Sequential(nn.Linear(2 * width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.out = _zero(nn.Linear(width, 1))
        self.rows = Rows(facts.grids)

    def delta(self, tokens: Tokens, t: Tensor, t_next: Tensor) -> Tensor:
        values, there, lengths, times = tokens
        unit = values.flatten(2).float() / (self.facts.spread * values[0, 0].numel() ** 0.5)
        cosines = nn.functional.pad(torch.einsum("bnd,bmd->bnm", unit, unit[:, :3]), (0, max(0, 3 - unit.shape[1])))
        kind = (
            nn.functional.one_hot(torch.arange(values.shape[1], device=t.device).clamp(max=2), 3)
            .float()
            .expand(len(t), -1, -1)
        )
        step = self.places(t, t_next)[:, None].expand(-1, values.shape[1], -1)
        visited = torch.stack([self.place(s) for s in times], 1)
        h = self.each(torch.cat([torch.log(lengths + SMALL)[..., None], cosines, kind, step, visited], 2).detach())
        mask = there.to(h)[..., None]
        pooled = (h * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        own = self.out(self.mix(torch.cat([h, pooled.expand_as(h)], 2)))[..., 0]
        weights = (own + self.rows(t, t_next, values.shape[1])) * there
        return torch.einsum("bn,bn...->b...", weights.to(values), values)


class SharedHead(Head):
    """Weights on the tokens that are the same for every sample, a few numbers per step (the idea of PAS)."""

    by_step = True

    def __init__(self, schedule: Schedule, facts: Facts) -> None:
        super().__init__(schedule, facts)
        self.rows = Rows(facts.grids)

    def delta(self, tokens: Tokens, t: Tensor, t_next: Tensor) -> Tensor:
        weights = self.rows(t, t_next, tokens.values.shape[1]) * tokens.there
        return torch.einsum("bn,bn...->b...", weights.to(tokens.values), tokens.values)


class FilmHead(Head):
    """A small convolution network over the tokens' first three, modulated by the curve. For states [C, H, W]; raises ValueError for others."""

    def __init__(self, schedule: Schedule, facts: Facts, width: int = 32) -> None:
        super().__init__(schedule, facts)
        if facts.centre.ndim != 3:
            raise ValueError(
                f"method.head: film is for states [C, H, W], these are {list(facts.centre.shape)}; choose span"
            )
        channels = len(facts.centre)
        self.into = nn.Conv2d(3 * channels, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.film = nn.Sequential(nn.Linear(6 + 3, 2 * width), nn.SiLU(), nn.Linear(2 * width, 4 * width))
        self.out = _zero(nn.Conv2d(width, channels, 3, padding=1))

    def delta(self, tokens: Tokens, t: Tensor, t_next: Tensor) -> Tensor:
        values, there, lengths = (_three(part) for part in tokens[:3])
        known = torch.cat([self.places(t, t_next), (torch.log(lengths + SMALL) * there).detach()], 1)
        scale_1, shift_1, scale_2, shift_2 = (f[..., None, None] for f in self.film(known).chunk(4, 1))
        h = self.into((values / self.facts.spread).flatten(1, 2).float())
        h = nn.functional.silu(h * (1 + scale_1) + shift_1)
        h = nn.functional.silu(self.middle(h) * (1 + scale_2) + shift_2)
        return self.facts.spread * self.out(h)


def _three(x: Tensor) -> Tensor:
    """The first three tokens; zero where there are fewer."""
    return torch.cat([x, x.new_zeros((x.shape[0], max(0, 3 - x.shape[1]), *x.shape[2:]))], 1)[:, :3]


def _zero(layer: nn.Module) -> nn.Module:
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


KINDS: dict[str, type[SpanHead] | type[SharedHead] | type[FilmHead]] = {
    "span": SpanHead,
    "shared": SharedHead,
    "film": FilmHead,
}


def make_head(kind: str, schedule: Schedule, facts: Facts, seed: int = 0) -> Head:
    """A head that changes nothing yet. Raises ValueError listing the known kinds."""
    if kind not in KINDS:
        raise ValueError(f"method.head: got {kind!r}, allowed are none, {', '.join(KINDS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return KINDS[kind](schedule, facts)


def kind_of(head: nn.Module) -> str:
    """Inverse of `make_head`."""
    return next(name for name, kind in KINDS.items() if isinstance(head, kind))


def require_steps(kind: str, counts: Iterable[int], steps: int, option: str, cure: str) -> None:
    """Raises ValueError with the `cure` where a head of this kind, made for these counts, has nothing to say on some of so many steps."""
    if KINDS[kind].by_step and steps > (most := max(counts)):
        raise ValueError(f"{option}: got {steps}, the student's {kind} head serves up to {most} steps; {cure}")
