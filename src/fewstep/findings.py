"""Checks before something long starts, and what they found."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One thing that was checked.

    `said` is what was found. `cure` says what helps where the check does not hold.
    """

    name: str
    said: str
    holds: bool = True
    cure: str = ""


def require(checks: Sequence[Check], subject: str) -> None:
    """Check that all checks hold.

    Raises ValueError with one line for the first that does not. `subject` is what was checked, as the user
    named it.
    """
    for check in checks:
        if not check.holds:
            raise ValueError(f"{subject}: {check.said}; {check.cure}")
