"""What one iteration hands to whoever distils in Python: its numbers, its warnings, and a student that can be kept."""

from dataclasses import dataclass, field
from pathlib import Path

from ..backbones.base import Backbone
from ..student.student import Origin, Student
from ..training import loop


@dataclass(frozen=True)
class Step(loop.Step):
    """One iteration of `fewstep.distill`: `iteration` (from 1), `metrics`, `seconds`, `seconds_left`, `warnings`, and the networks in `roles`.

    It shows the training as it goes on: what is sampled from it after later iterations is theirs. `snapshot()` keeps the student as it is
    now. `metrics` has the same keys in every iteration, NaN for numbers that one does not have (`methods.metrics` says what they are).
    `warnings` are the monitor's lines of this iteration, each of which Python's `warnings` has shown as well.
    """

    teacher: Backbone = field(kw_only=True)  # as it was passed, without the run's adapters
    origin: Origin = field(kw_only=True)
    warnings: tuple[str, ...] = ()
    seconds_left: float = 0.0  # until the last iteration, at the speed of the last ones

    def student(self) -> Student:
        """Show the student on the run's own modules, with its weights of this moment; within `roles.averaged()` the averaged ones."""
        return Student.of(self.roles, self.method, self.origin)

    def snapshot(self) -> Student:
        """Copy the averaged student as it is now: it samples and is saved as one that is read, whatever is trained after it."""
        with self.roles.averaged():
            return self.student().snapshot(self.teacher)

    def save(self, folder: str | Path) -> Path:
        """Write the student as it is now to `folder`, see `Student.save`. Return `folder`."""
        return self.snapshot().save(folder)
