"""From the measured pictures of a row to its numbers."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from .alignment import COLLAPSED, diversity, name_ranks, nearest_colours, top
from .distances import Moments, frechet_distance, kernel_distance, moments
from .measure import Measured
from .plan import EmojiProtocol, Plan
from .reference import Reference, without_tone


@dataclass(frozen=True)
class Quality:
    """Distances in units in which the real emoji's variance is 100; shares in 0..1; None where there is no teacher to compare with.

    `kid_real`: kernel distance, unbiased for few pictures. `retrieval_top1`: the nearest real emoji is the prompt's own. `tone`: of the
    name's skin tones, the one asked for has the most alike colours. `diversity`: mean distance of two seeds of a prompt, where 1 is that of
    two real emoji; `collapsed`: less than half of the teacher's. `seconds_per_image`: of the fastest batch.
    """

    fd_real: float
    fd_teacher: float | None
    kid_real: float
    retrieval_top1: float
    retrieval_top5: float
    tone: float
    held_out_top1: float
    held_out_top5: float
    held_out_tone: float
    diversity: float
    diversity_ratio: float | None
    collapsed: bool | None
    seconds_per_image: float

    def as_dict(self) -> dict[str, float | bool | None]:
        return asdict(self)


class MetricSuite:
    """Measures rows of one plan against one reference."""

    def __init__(self, protocol: EmojiProtocol, plan: Plan, reference: Reference) -> None:
        self.protocol, self.plan, self.reference = protocol, plan, reference
        self.gallery = reference.halfway_white(reference.gallery)
        self.real = self._moments(reference.gallery)
        self.spread = float(torch.pdist(reference.gallery).mean())

    def floor(self) -> float:
        """The distance of the real emoji of the plan's names to all of them: what the number of pictures alone does."""
        first = {name: i for i, name in reversed(list(enumerate(self.reference.names)))}
        rows = [first[name] for name in self.plan.prompts[self.plan.plain]]
        return frechet_distance(self.real, self._moments(self.reference.gallery[rows]))

    def quality(self, row: Measured, teacher: Measured | None) -> Quality:
        """`teacher` is the row that is compared with; it is not compared with itself."""
        plain, prompts = row.embeddings[self.plan.plain], self.plan.prompts
        ranks = self._ranks(plain, prompts[self.plan.plain])
        held_out = self._ranks(row.embeddings[self.plan.held_out], [without_tone(p)[0] for p in prompts[self.plan.held_out]])
        ours, theirs = self._diversity(row), None if teacher is None else self._diversity(teacher)
        compared = None if teacher is None or teacher is row else self._moments(teacher.embeddings[self.plan.plain])
        return Quality(
            fd_real=frechet_distance(self.real, self._moments(plain)),
            fd_teacher=None if compared is None else frechet_distance(compared, self._moments(plain)),
            kid_real=kernel_distance(self.reference.gallery, plain),
            retrieval_top1=top(ranks, 1),
            retrieval_top5=top(ranks, 5),
            tone=self._tone(row, self.plan.toned),
            held_out_top1=top(held_out, 1),
            held_out_top5=top(held_out, 5),
            held_out_tone=self._tone(row, self.plan.held_out),
            diversity=ours,
            diversity_ratio=ours / theirs if theirs else None,
            collapsed=ours < COLLAPSED * theirs if theirs else None,
            seconds_per_image=row.fastest(self.protocol.batch),
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
