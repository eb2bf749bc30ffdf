"""Rows of emoji, measured against the real emoji."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .alignment import diversity, name_ranks, nearest_colours
from .bootstrap import draws
from .distances import KernelReference, Moments, frechet_distance, kernel_reference, moments
from .lpips import perceptual_diversity
from .measure import Measured
from .plan import EmojiProtocol, Plan
from .reference import Reference, without_tone
from .scorer import NO_EXTRA, Extra


@dataclass(frozen=True)
class Row:
    """A row of emoji as metrics see it; see `metric.Measurement`.

    Distances are in units in which the real emoji's variance is 100.
    """

    real: Moments
    teacher: Moments | None
    own: Moments
    gallery: KernelReference
    embeddings: Tensor
    ranks: Tensor
    held_out_ranks: Tensor
    tones: tuple[Tensor, Tensor]
    diversity: float
    teacher_diversity: float | None
    variety: float
    teacher_variety: float | None
    looks: Tensor
    teacher_looks: Tensor | None
    apart: Tensor | None
    seconds: float
    memory: float | None
    scores: Mapping[str, Tensor]
    deep: Tensor | None = None
    deep_real: KernelReference | None = None
    deep_moments: Moments | None = None
    torch_moments: Moments | None = None
    perceptual: Tensor | None = None


@dataclass(frozen=True)
class Drawn:
    """Indices of prompts of each part of a plan.

    All of them, or drawn with replacement.
    """

    plain: Tensor
    repeated: Tensor
    toned: Tensor
    held_out: Tensor


class MetricSuite:
    """Measures rows of one plan against one reference."""

    def __init__(self, protocol: EmojiProtocol, plan: Plan, reference: Reference, extra: Extra = NO_EXTRA) -> None:
        self.scorers, self.pairs = [scorer.key for scorer in extra.scorers], extra.pairs
        self.protocol, self.plan, self.reference = protocol, plan, reference
        self.gallery = reference.halfway_white(reference.gallery)
        self.real, self.kernel = self._moments(reference.gallery), kernel_reference(reference.gallery)
        self.spread = float(torch.pdist(reference.gallery).mean())

    def floor(self) -> float:
        """Return the distance of real emoji to real emoji.

        The real emoji of the plan's names are compared with all real emoji, which shows the effect of the
        number of images alone.
        """
        first = {name: i for i, name in reversed(list(enumerate(self.reference.names)))}
        rows = [first[name] for name in self.plan.prompts[self.plan.plain]]
        return frechet_distance(self.real, self._moments(self.reference.gallery[rows]))

    def all(self) -> Drawn:
        """Return every prompt once."""
        return Drawn(*(torch.arange(count) for count in self._counts()))

    def draws(self) -> Iterator[Drawn]:
        """Draw prompts of every part with replacement, for intervals."""
        return (Drawn(*indices) for indices in draws(self._counts()))

    def _counts(self) -> tuple[int, ...]:
        held_out = self.plan.held_out
        return (
            self.protocol.names,
            self.protocol.repeated,
            self.plan.toned.stop - self.plan.toned.start,
            held_out.stop - held_out.start,
        )

    def measured(self, row: Measured, teacher: Measured | None) -> Callable[[Drawn], Row]:
        """Return the inputs of metrics as a function of the prompts.

        `teacher` is the row to compare with; a teacher is not compared with itself.
        """
        plan, prompts = self.plan, self.plan.prompts
        plain, looks = row.embeddings[plan.plain], row.looks[plan.plain]
        ranks = self._ranks(plain, prompts[plan.plain])
        held_out = self._ranks(row.embeddings[plan.held_out], [without_tone(p)[0] for p in prompts[plan.held_out]])
        tones = self._tone(row, plan.toned), self._tone(row, plan.held_out)
        within, compared = self._diversities(row), None if teacher is None or teacher is row else teacher
        theirs = None if teacher is None else teacher.embeddings[plan.plain]
        their_looks = None if teacher is None else teacher.looks[plan.plain]
        their_within = None if teacher is None else self._diversities(teacher)
        apart = None
        if compared is not None and theirs is not None and their_within is not None:
            unit = float(their_within.mean()) or 1.0
            apart = (plain - theirs).norm(dim=1) / unit
        seen = None if self.pairs is None else perceptual_diversity(self.pairs, row.thumbnails, self._repeated())
        others, their_others = _others(plain), None if theirs is None else _others(theirs)

        def at(drawn: Drawn) -> Row:
            return Row(
                real=self.real,
                teacher=None if compared is None or theirs is None else self._moments(theirs[drawn.plain]),
                own=self._moments(plain[drawn.plain]),
                gallery=self.kernel,
                embeddings=plain[drawn.plain],
                ranks=ranks[drawn.plain],
                held_out_ranks=held_out[drawn.held_out],
                tones=(tones[0][drawn.toned], tones[1][drawn.held_out]),
                diversity=float(within[drawn.repeated].mean()) / self.spread,
                teacher_diversity=None
                if their_within is None
                else float(their_within[drawn.repeated].mean()) / self.spread,
                variety=float(others[drawn.plain].mean()),
                teacher_variety=None if their_others is None else float(their_others[drawn.plain].mean()),
                looks=looks[drawn.plain],
                teacher_looks=None if their_looks is None else their_looks[drawn.plain],
                apart=None if apart is None else apart[drawn.plain],
                seconds=row.fastest(self.protocol.batch),
                memory=row.peak(),
                scores={key: scores[plan.plain][drawn.plain] for key, scores in row.named(self.scorers).items()},
                perceptual=None if seen is None else seen[drawn.repeated],
            )

        return at

    def _moments(self, x: Tensor) -> Moments:
        return moments(x[:, : self.protocol.components])

    def _ranks(self, embeddings: Tensor, names: list[str] | tuple[str, ...]) -> Tensor:
        queries = self.reference.halfway_white(embeddings)
        return name_ranks(queries, self.gallery, self.reference.labels, self.reference.label_of(names))

    def _tone(self, row: Measured, part: slice) -> Tensor:
        pairs = [without_tone(p) for p in self.plan.prompts[part]]
        candidates = self.reference.colours[[self.reference.toned.index(name) for name, _ in pairs]]
        asked = torch.tensor([self.reference.tones.index(tone) for _, tone in pairs])
        return nearest_colours(row.colours[part], candidates) == asked

    def _diversities(self, row: Measured) -> Tensor:
        return diversity(row.embeddings[self._repeated()])

    def _repeated(self) -> Tensor:
        """Return the indices [R, S] of the images of each repeated prompt."""
        count = self.protocol.repeated
        every = torch.arange(len(self.plan.prompts))
        return torch.cat([every[self.plan.plain][:count, None], every[self.plan.again].unflatten(0, (count, -1))], 1)


def _others(x: Tensor) -> Tensor:
    """Return the mean distance [N] of each embedding to all others."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").sum(1) / max(len(x) - 1, 1)
