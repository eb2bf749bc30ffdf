"""The three headline numbers: quality, speed-up and cost."""

from collections.abc import Sequence
from dataclasses import dataclass

from .table import Row
from .words import duration, finite, plural, times


@dataclass(frozen=True)
class Headline:
    """One large number and the sentence that explains the number.

    The sentence says how the number was counted.
    """

    value: str
    caption: str


@dataclass(frozen=True)
class Cost:
    """What the training took: wall-clock seconds, iterations and machine.

    The machine is in words ("2 CPU cores", "1 x H100 80 GB").
    """

    seconds: float
    iterations: int
    hardware: str = ""


def headlines(rows: Sequence[Row], cost: Cost | None) -> list[Headline]:
    """Return at most three headlines.

    The headlines come from the rows of eval.json and the cost; one for which a number is missing is left
    out. The teacher at its best is the row with the most evaluations; the student's row is the row with the
    most steps.
    """
    student, teacher = _most(rows, "student", "steps"), _most(rows, "teacher", "nfe")
    found = [_quality(rows, student, teacher), _speed(student, teacher), _training(cost)]
    return [h for h in found if h is not None]


def _most(rows: Sequence[Row], model: str, key: str) -> Row | None:
    return max((r for r in rows if r.get("model") == model and finite(r.get(key))), key=lambda r: r[key], default=None)


def at_equal_cost(rows: Sequence[Row], student: Row, key: str, highest: bool = False) -> Row | None:
    """Return the teacher's best row at the student's cost.

    The row is the best by `key` among those with no more network evaluations than the student's. Of a
    distance the lowest is best, of a share the `highest`.

    None where no row costs exactly as many: a cheaper teacher alone would flatter the student.
    """
    cost = student.get("nfe")
    teachers = [r for r in rows if r.get("model") == "teacher" and finite(r.get(key)) and finite(r.get("nfe"))]
    if not finite(cost) or all(r["nfe"] != cost for r in teachers):
        return None
    return min((r for r in teachers if r["nfe"] <= cost), key=lambda r: -float(r[key]) if highest else float(r[key]))


def called(row: Row) -> str:
    """Return what a teacher's row is, in words.

    `2 guided steps`, `4 unguided steps`; `4 steps` where the row has no guidance.
    """
    scale = row.get("guidance")
    kind = "" if not finite(scale) else "guided " if scale > 1 else "unguided "
    return plural(row["steps"], f"{kind}step")


def _quality(rows: Sequence[Row], student: Row | None, teacher: Row | None) -> Headline | None:
    """Return how much of the teacher's loss of quality is closed.

    The gap is that between the best teacher at the student's cost and the teacher at its best. Without real
    images, the headline is how far the student is from the teacher at its best.
    """
    if student is None or teacher is None:
        return None
    if not finite(student.get("fd_real")) or not finite(teacher.get("fd_real")):
        return _imitation(rows, student, teacher)
    ours, goal = student["fd_real"], teacher["fd_real"]
    start = at_equal_cost(rows, student, "fd_real")
    compared = f"student {ours:.1f}, teacher {goal:.1f} with {_evaluations(teacher)}"
    if start is None:
        return Headline(f"{ours:.1f}", f"Fréchet distance to real images, lower is better: {compared}.")
    compared += f" and {start['fd_real']:.1f} at the student's cost, in {called(start)}, its best at that NFE"
    if start["fd_real"] <= goal:
        return Headline(f"{ours:.1f}", f"Fréchet distance to real images, lower is better: {compared}.")
    lost = f"of the quality that the teacher loses at {_evaluations(student)} is won back."
    won = 100 * (start["fd_real"] - ours) / (start["fd_real"] - goal)
    return Headline(f"{won:.0f} %", f"{lost} Fréchet distance to real images: {compared}.")


def _imitation(rows: Sequence[Row], student: Row, teacher: Row) -> Headline | None:
    if not finite(student.get("fd_teacher")):
        return None
    same = at_equal_cost(rows, student, "fd_teacher")
    beside = (
        "" if same is None else f"; the teacher at the student's cost has {same['fd_teacher']:.1f}, in {called(same)}"
    )
    told = f"Fréchet distance to the teacher's images of {_evaluations(teacher)}, lower is better{beside}."
    return Headline(f"{student['fd_teacher']:.1f}", told)


def _speed(student: Row | None, teacher: Row | None) -> Headline | None:
    """Return the speed-up over the teacher.

    The ratio is that of measured times, or of network evaluations where no times were taken.
    """
    if student is None or teacher is None or not finite(student.get("nfe")) or student["nfe"] <= 0:
        return None
    counted = f"{_evaluations(student)} instead of {teacher['nfe']:g}"
    slow, fast = teacher.get("seconds_per_image"), student.get("seconds_per_image")
    if finite(slow) and finite(fast) and slow > 0 and fast > 0:
        measured = f"{duration(fast)} for an image instead of {duration(slow)}"
        how = "faster" if slow >= fast else "slower"
        return Headline(times(max(slow, fast) / min(slow, fast)), f"{how} than the teacher: {measured}, {counted}.")
    return Headline(times(teacher["nfe"] / student["nfe"]), f"less work for an image: {counted}.")


def _training(cost: Cost | None) -> Headline | None:
    if cost is None:
        return None
    where = f", on {cost.hardware}" if cost.hardware else ""
    return Headline(duration(cost.seconds), f"of training, {cost.iterations:,} iterations{where}.")


def _evaluations(row: Row) -> str:
    return plural(row["nfe"], "network evaluation")
