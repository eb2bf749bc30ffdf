"""What one iteration hands to whoever distils in Python: its numbers, its warnings, and a student that can be kept."""

import copy
from dataclasses import dataclass, field
from pathlib import Path

from ..backbones.base import Backbone
from ..roles.roles import copied
from ..training import loop
from .students import LoadedStudent, Made, put_together, student_card


@dataclass(frozen=True)
class Step(loop.Step):
    """One iteration of `fewstep.distill`: `iteration` (from 1), `metrics`, `seconds`, `seconds_left`, `warnings`, and the networks in `roles`.

    It looks at the training as it goes on: what is drawn from it after later iterations is theirs. `snapshot()` keeps the student as it is now.
    `metrics` has the same keys in every iteration, NaN where one has no such number (`methods.metrics` says what they are). `warnings` are the monitor's lines
    of this iteration, each of which Python's `warnings` has shown as well.
    """

    teacher: Backbone = field(kw_only=True)  # as it was passed, without the run's adapters
    made: Made = field(kw_only=True)
    warnings: tuple[str, ...] = ()
    seconds_left: float = 0.0  # until the last iteration, at the speed of the last ones

    def snapshot(self) -> LoadedStudent:
        """The averaged student as it is now, frozen: it samples and is saved as a loaded one, whatever is trained after it."""
        roles = self.roles
        card = student_card(roles, self.method, self.made)
        with roles.averaged():
            state = roles.student_state()
            vectors = {k: v.detach().clone() for k, v in roles.vectors().items()}
            head = None if roles.head is None else copy.deepcopy(roles.head).requires_grad_(False)
        network = None
        if card.weights == "full":
            network = copied(self.teacher.module).requires_grad_(False).eval()
            network.load_state_dict(state)
        return put_together(card, self.teacher, state if card.weights == "lora" else None, network, vectors, head)

    def save(self, folder: str | Path) -> Path:
        """Write the student as it is now to `folder`, see `LoadedStudent.save`. Returns `folder`."""
        return self.snapshot().save(folder)
