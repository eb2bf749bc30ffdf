"""What is wrong with a student, from its numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .alignment import COLLAPSED


@dataclass(frozen=True)
class Fault:
    """A fault, and the ratio to the teacher that shows it.

    The ratio is below `below`, or above `above`, and its interval is all on that side of 1. `unless` names faults
    that explain this one, which is then left out.
    """

    key: str
    metric: str
    said: str
    below: float = 0.0
    above: float = float("inf")
    unless: tuple[str, ...] = ()


FAULTS = (
    Fault("collapsed", "variety_ratio", "collapsed: different prompts give nearly the same image", below=COLLAPSED),
    Fault("blurred", "sharpness_ratio", "blurred: fine detail is missing", below=0.65, unless=("collapsed",)),
    Fault("noisy", "sharpness_ratio", "noisy or over-sharpened: too much fine detail", above=1.6),
    Fault("over-saturated", "saturation_ratio", "over-saturated: its colours are too strong", above=1.35),
    Fault("pale", "saturation_ratio", "pale: its colours are too weak", below=0.65, unless=("collapsed",)),
    Fault("harsh", "contrast_ratio", "too harsh: its contrast is too high", above=1.35),
    Fault("flat", "contrast_ratio", "flat: its contrast is too low", below=0.65, unless=("collapsed", "blurred")),
    Fault("bright", "brightness_ratio", "too bright", above=1.35),
    Fault("dark", "brightness_ratio", "too dark", below=0.65),
    Fault("blown out", "state_std_ratio", "blown out: its latent states are spread too far", above=1.35),
    Fault("still", "motion_ratio", "still: its clips hardly move", below=0.5, unless=("collapsed",)),
    Fault("flickering", "motion_ratio", "flickering: its clips move too much", above=2.0),
    Fault(
        "seeds alike",
        "diversity_ratio",
        "its seeds are all alike: other noise gives nearly the same image",
        below=COLLAPSED,
        unless=("collapsed",),
    ),
)
# Of a model without prompts, whose images differ by their seeds alone.
UNCONDITIONAL = "collapsed: it makes nearly the same image every time"


def faults(row: Mapping[str, Any]) -> list[Fault]:
    """Return the faults that a row's ratios show."""
    found: dict[str, Fault] = {}
    for fault in FAULTS:
        value, (low, high) = row.get(fault.metric), row.get("intervals", {}).get(fault.metric, (None, None))
        if value is None or found.keys() & set(fault.unless):
            continue
        if (value < fault.below and (high is None or high < 1)) or (value > fault.above and (low is None or low > 1)):
            found[fault.key] = fault
    return list(found.values())


def findings(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return every fault of every student, with a sentence.

    Each has the index of its `row`, the `fault`, its `metric` and what is `said`.
    """
    found = []
    for i, row in enumerate(rows):
        if row["model"] == "teacher":
            continue
        for fault in faults(row):
            alone = fault.key == "seeds alike" and row.get("variety_ratio") is None
            value, ends = row[fault.metric], row.get("intervals", {}).get(fault.metric)
            between = "" if ends is None else f", 95 % interval {ends[0]:.2f} to {ends[1]:.2f}"
            said = UNCONDITIONAL if alone else fault.said
            steps = f"{row['steps']} step{'s' if row['steps'] > 1 else ''}"
            found.append(
                {
                    "row": i,
                    "fault": "collapsed" if alone else fault.key,
                    "metric": fault.metric,
                    "said": f"{row['model']}, {steps}: {said} "
                    f"({fault.metric} {value:.2f}, the teacher's is 1{between})",
                }
            )
    return found
