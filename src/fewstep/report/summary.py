"""The three numbers that matter: quality against the teacher, speed-up, cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from .table import Row
from .words import duration, finite, plural, times


@dataclass(frozen=True)
class Headline:
    """One large number and the sentence that says how it was counted."""

    value: str
    caption: str


@dataclass(frozen=True)
class Cost:
    """What the training took: wall-clock seconds, iterations and the machine in words ("2 CPU cores", "1 x H100 80 GB")."""

    seconds: float
    iterations: int
    hardware: str = ""


def headlines(rows: Sequence[Row], cost: Cost | None) -> list[Headline]:
    """At most three headlines from the rows of eval.json and the cost; one for which a number is missing is left out.

    The teacher at its best is its row with the most evaluations; the student's row is the one with the most steps.
    """
    student, teacher = _most(rows, "student", "steps"), _most(rows, "teacher", "nfe")
    found = [_quality(rows, student, teacher), _speed(student, teacher), _training(cost)]
    return [h for h in found if h is not None]


def _most(rows: Sequence[Row], model: str, key: str) -> Row | None:
    return max((r for r in rows if r.get("model") == model and finite(r.get(key))), key=lambda r: r[key], default=None)


def _quality(rows: Sequence[Row], student: Row | None, teacher: Row | None) -> Headline | None:
    """How much of the gap between the teacher at the student's cost and the teacher at its best is closed.

    Without real images, how far the student is from the teacher at its best.
    """
    if student is None or teacher is None:
        return None
    if not finite(student.get("fd_real")) or not finite(teacher.get("fd_real")):
        return _imitation(rows, student, teacher)
    ours, goal = student["fd_real"], teacher["fd_real"]
    teachers = [r for r in rows if r.get("model") == "teacher" and finite(r.get("fd_real"))]
    start = max((r["fd_real"] for r in teachers if r.get("nfe") == student.get("nfe")), default=goal)
    if start > goal:
        lost = f"of the quality that the teacher loses at {_evaluations(student)} is won back."
        compared = f"student {ours:.1f}, teacher {start:.1f} at the same cost and {goal:.1f} with {_evaluations(teacher)}"
        distances = f"Fréchet distance to real images: {compared}."
        return Headline(f"{100 * (start - ours) / (start - goal):.0f} %", f"{lost} {distances}")
    compared = f"the teacher has {goal:.1f} with {_evaluations(teacher)}"
    return Headline(f"{ours:.1f}", f"Fréchet distance to real images, lower is better; {compared}.")


def _imitation(rows: Sequence[Row], student: Row, teacher: Row) -> Headline | None:
    if not finite(student.get("fd_teacher")):
        return None
    same = [r["fd_teacher"] for r in rows if r.get("model") == "teacher" and r.get("nfe") == student["nfe"] and finite(r.get("fd_teacher"))]
    beside = f"; the teacher at the student's cost has {max(same):.1f}" if same else ""
    told = f"Fréchet distance to the teacher's images of {_evaluations(teacher)}, lower is better{beside}."
    return Headline(f"{student['fd_teacher']:.1f}", told)


def _speed(student: Row | None, teacher: Row | None) -> Headline | None:
    """The ratio of measured times; of network evaluations where no times were taken."""
    if student is None or teacher is None or not finite(student.get("nfe")) or student["nfe"] <= 0:
        return None
    counted = f"{_evaluations(student)} instead of {teacher['nfe']:g}"
    slow, fast = teacher.get("seconds_per_image"), student.get("seconds_per_image")
    if finite(slow) and finite(fast) and slow > 0 and fast > 0:
        measured = f"{duration(fast)} for an image instead of {duration(slow)}"
        return Headline(times(slow / fast), f"faster than the teacher: {measured}, {counted}.")
    return Headline(times(teacher["nfe"] / student["nfe"]), f"less work for an image: {counted}.")


def _training(cost: Cost | None) -> Headline | None:
    if cost is None:
        return None
    where = f", on {cost.hardware}" if cost.hardware else ""
    return Headline(duration(cost.seconds), f"of training, {cost.iterations:,} iterations{where}.")


def _evaluations(row: Row) -> str:
    return plural(row["nfe"], "network evaluation")
