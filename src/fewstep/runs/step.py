"""One iteration, as handed to the code that distils in Python.

The iteration has metrics, warnings, and a student that can be kept.
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..backbones.base import Backbone
from ..notebook import as_html, png_of
from ..student.student import Origin, Student
from ..training import loop


@dataclass(frozen=True)
class Step(loop.Step):
    """One iteration of `fewstep.distill`.

    The fields are `iteration` (from 1), `metrics`, `seconds`, `seconds_left`, `warnings`, and the networks
    in `roles`.

    A step shows the training as the training goes on: samples taken after later iterations come from later
    weights. `snapshot()` keeps the student as it is now.

    `metrics` has the same keys in every iteration, NaN for numbers that one iteration does not have
    (`methods.metrics` says what the numbers are). `warnings` are the monitor's lines of this iteration;
    Python's `warnings` has shown each kind of line once.
    """

    teacher: Backbone = field(kw_only=True)  # as passed, without the run's adapters
    origin: Origin = field(kw_only=True)
    warnings: tuple[str, ...] = ()
    seconds_left: float = 0.0  # until the last iteration, at the present speed
    image: Path | bytes | None = None  # the newest preview, a PNG

    def __repr__(self) -> str:
        """Say where the training is, without its networks."""
        known = ", ".join(f"{k} {v:.4g}" for k, v in self.metrics.items() if v == v)
        return f"Step({self.iteration}: {known}; {self.seconds:.3g} s, {self.seconds_left:.0f} s left)"

    def _repr_html_(self) -> str:
        """Show the step in a notebook.

        With the newest preview, where there is one. No network is run.
        """
        return as_html(repr(self), png_of(self.image))

    def student(self) -> Student:
        """Return the student on the run's own modules.

        The weights are those of this moment; within `roles.averaged()` they are the averaged weights.
        """
        return Student.of(self.roles, self.method, self.origin)

    def snapshot(self) -> Student:
        """Copy the averaged student as it is now.

        The copy samples and is saved like a student that was read from a folder, whatever is trained
        afterwards.
        """
        with self.roles.averaged():
            return self.student().snapshot(self.teacher)

    def save(self, folder: str | Path) -> Path:
        """Write the averaged student as it is now to `folder`.

        See `Student.save`. Returns `folder`.
        """
        return self.snapshot().save(folder)
