"""Settings that a method's name stands for.

With other settings, a method takes another name.
"""

from operator import attrgetter
from typing import Any

from .method import Method

STANDS_FOR: dict[str, dict[str, Any]] = {
    "tdm-fisher": {"match.divergence": "fisher", "match.state": "noisy"},
    "dmd2": {"match.divergence": "reverse-kl", "match.state": "clean", "match.tau_range": "full"},
    "diff-instruct": {"match.divergence": "reverse-kl", "match.state": "clean", "match.tau_range": "full"},
    "sid": {"match.divergence": "fisher", "match.state": "clean", "match.tau_range": "full"},
    "sfd": {"head": "none"},
}
CLASSES = {"lcm": "ConsistencyDistillation", "progressive": "ProgressiveDistillation"}


def require_name(method: Method) -> None:
    """Check that class and settings match the method's name.

    Raises ValueError otherwise.
    """
    kind = type(method).__name__
    if (class_name := CLASSES.get(method.name, kind)) != kind:
        raise ValueError(
            f"method.name: got {method.name} for {kind}, and {method.name} stands for {class_name}; "
            f"fewstep.method({method.name!r}, ...) makes one, other settings take another name"
        )
    for option, wanted in STANDS_FOR.get(method.name, {}).items():
        if (got := attrgetter(option)(method)) != wanted:
            raise ValueError(
                f"method.name: got {method.name} with method.{option}={got}, and {method.name} stands for {wanted}; "
                f"fewstep.method({method.name!r}, ...) has all its settings, other settings take another name"
            )
