"""Rows of emoji, measured against the real emoji."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .alignment import diversity, name_ranks, nearest_colours
from .distances import Moments, frechet_distance, moments
from .measure import Measured
from .plan import EmojiProtocol, Plan
from .reference import Reference, without_tone


@dataclass(frozen=True)
class Row:
    """A row of emoji as metrics see it; see `metric.Measurement`.

    Distances are in units in which the real emoji's variance is 100.
    """

    real: Moments
    teacher: Moments | None
    own: Moments
    gallery: Tensor
    embeddings: Tensor
    ranks: Tensor
    held_out_ranks: Tensor
    tones: tuple[float, float]
    diversity: float
    teacher_diversity: float | None
    seconds: float


class MetricSuite:
    """Measures rows of one plan against one reference."""

    def __init__(self, protocol: EmojiProtocol, plan: Plan, reference: Reference) -> None:
        self.protocol, self.plan, self.reference = protocol, plan, reference
        self.gallery = reference.halfway_white(reference.gallery)
        self.real = self._moments(reference.gallery)
        self.spread = float(torch.pdist(reference.gallery).mean())

    def floor(self) -> float:
        """Return the distance of real emoji to real emoji.

        The real emoji of the plan's names are compared with all real emoji, which shows the effect of the
        number of images alone.
        """
        first = {name: i for i, name in reversed(list(enumerate(self.reference.names)))}
        rows = [first[name] for name in self.plan.prompts[self.plan.plain]]
        return frechet_distance(self.real, self._moments(self.reference.gallery[rows]))

    def measurement(self, row: Measured, teacher: Measured | None) -> Row:
        """Return the inputs of metrics for one row.

        `teacher` is the row to compare with; a teacher is not compared with itself.
        """
        plain, prompts = row.embeddings[self.plan.plain], self.plan.prompts
        compared = None if teacher is None or teacher is row else self._moments(teacher.embeddings[self.plan.plain])
        held_out = [without_tone(p)[0] for p in prompts[self.plan.held_out]]
        return Row(
            real=self.real,
            teacher=compared,
            own=self._moments(plain),
            gallery=self.reference.gallery,
            embeddings=plain,
            ranks=self._ranks(plain, prompts[self.plan.plain]),
            held_out_ranks=self._ranks(row.embeddings[self.plan.held_out], held_out),
            tones=(self._tone(row, self.plan.toned), self._tone(row, self.plan.held_out)),
            diversity=self._diversity(row),
            teacher_diversity=None if teacher is None else self._diversity(teacher),
            seconds=row.fastest(self.protocol.batch),
        )

    def _moments(self, x: Tensor) -> Moments:
        return moments(x[:, : self.protocol.components])

    def _ranks(self, embeddings: Tensor, names: list[str] | tuple[str, ...]) -> Tensor:
        queries = self.reference.halfway_white(embeddings)
        return name_ranks(queries, self.gallery, self.reference.labels, self.reference.label_of(names))

    def _tone(self, row: Measured, part: slice) -> float:
        pairs = [without_tone(p) for p in self.plan.prompts[part]]
        candidates = self.reference.colours[[self.reference.toned.index(name) for name, _ in pairs]]
        asked = torch.tensor([self.reference.tones.index(tone) for _, tone in pairs])
        return float((nearest_colours(row.colours[part], candidates) == asked).double().mean())

    def _diversity(self, row: Measured) -> float:
        firsts, again = row.embeddings[self.plan.plain][: self.protocol.repeated], row.embeddings[self.plan.again]
        together = torch.cat([firsts[:, None], again.unflatten(0, (self.protocol.repeated, -1))], 1)
        return float(diversity(together).mean()) / self.spread
