"""Checks that the methods' settings have in common. Each raises ValueError with one line that names the option."""

import math
from collections.abc import Sequence
from typing import Any

MOST_GUIDANCE = 1000
MOST_STEPS = 1000  # as many as teachers are trained with
MOST_UPDATES = 1000  # of the fake score, an iteration

# What a name stands for, whatever else is changed: with other settings it would be another method's.
STANDS_FOR: dict[str, dict[str, Any]] = {
    "tdm-fisher": {"divergence": "fisher", "match": "landing"},
    "dmd2": {"divergence": "reverse-kl", "match": "clean", "tau": "whole"},
    "diff-instruct": {"divergence": "reverse-kl", "match": "clean", "tau": "whole"},
    "sid": {"divergence": "fisher", "match": "clean", "tau": "whole"},
    "lcm": {"target": "consistency"},
    "progressive": {"target": "progressive"},
    "sfd": {"head": "none"},
}


def require_name(settings: Any) -> None:
    """Settings that are those of their name."""
    for option, wanted in STANDS_FOR.get(settings.name, {}).items():
        if (got := getattr(settings, option)) != wanted:
            raise ValueError(
                f"method.name: got {settings.name} with method.{option}={got}, and {settings.name} stands for {wanted}; "
                f"fewstep.method({settings.name!r}, ...) has all its settings, other settings take another name"
            )


def require_choice(settings: Any, option: str, allowed: Sequence[str]) -> None:
    """One of a list of words."""
    if (got := getattr(settings, option)) not in allowed:
        raise ValueError(f"method.{option}: got {got!r}, allowed are {', '.join(allowed)}")


def require_whole(settings: Any, *options: str, least: int = 1, most: float = math.inf) -> None:
    """A whole number from `least` to `most`."""
    for option in options:
        if not least <= (got := getattr(settings, option)) <= most:
            end = "" if most == math.inf else f" to {most}"
            raise ValueError(f"method.{option}: got {got}, allowed are whole numbers from {least}{'' if least else ' (off)'}{end}")


def require_positive(settings: Any, *options: str) -> None:
    """A finite number above 0."""
    for option in options:
        if not 0 < (got := getattr(settings, option)) < math.inf:
            raise ValueError(f"method.{option}: got {got}, allowed are numbers above 0")


def require_finite(settings: Any, *options: str) -> None:
    """A number, and no infinite one."""
    for option in options:
        if not math.isfinite(got := getattr(settings, option)):
            raise ValueError(f"method.{option}: got {got}, allowed are finite numbers")


def require_weight(settings: Any, *options: str) -> None:
    """A finite number from 0, which switches a term off."""
    for option in options:
        if not 0 <= (got := getattr(settings, option)) < math.inf:
            raise ValueError(f"method.{option}: got {got}, allowed are numbers from 0 (off)")


def require_guidance(settings: Any) -> None:
    """A guidance scale that leaves numbers of a size that networks know, and a share of its parallel part."""
    if not abs(settings.guidance) <= MOST_GUIDANCE:
        raise ValueError(
            f"method.guidance: got {settings.guidance}, allowed are numbers from -{MOST_GUIDANCE} to {MOST_GUIDANCE}; "
            "1 is without guidance, 3.5 is a good start"
        )
    if not 0 <= settings.guidance_parallel <= 1:
        raise ValueError(
            f"method.guidance_parallel: got {settings.guidance_parallel}, allowed are shares from 0, which saturates less, to 1, plain guidance"
        )


def require_free_first(settings: Any) -> None:
    """Free first directions only where others follow, along the same noise."""
    if settings.free_first and min(settings.counts) == 1:
        raise ValueError("method.free_first: got true for a student of 1 step, whose only direction it would be; set it to false")
    if settings.free_first and settings.solver == "renoise":
        raise ValueError(
            "method.free_first: got true with method.solver=renoise, which takes no direction; set it to false, or the solver to ddim"
        )


def require_counts(steps: int | Sequence[int]) -> tuple[int, ...]:
    """The different step counts, the default first, of one or several; one that comes more than once is drawn as much more often."""
    counts = (steps,) if isinstance(steps, int) else tuple(steps)
    if not counts or not 1 <= min(counts) <= max(counts) <= MOST_STEPS:
        raise ValueError(
            f"method.steps: got {steps}, allowed are whole numbers from 1 to {MOST_STEPS}, or a list of them such as [4, 2, 1]; few-step students use 1 to 8"
        )
    return tuple(dict.fromkeys(counts))
