"""What was looked at before something long begins, and what was found."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what was found, and, where it does not hold, what cures it."""

    name: str
    said: str
    holds: bool = True
    cure: str = ""


def require(checks: Sequence[Check], subject: str) -> None:
    """Raises ValueError with one line for the first check that does not hold; `subject` is what was looked at, as the user named it."""
    for check in checks:
        if not check.holds:
            raise ValueError(f"{subject}: {check.said}; {check.cure}")
