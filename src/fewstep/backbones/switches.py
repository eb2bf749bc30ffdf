"""Checks of settings that are true or false.

diffusers takes any text, number or list for true.
"""

import inspect
import json
from typing import get_type_hints

from diffusers import ConfigMixin, DiffusionPipeline

from .weights import UnfitError


def require_switches(pipe: DiffusionPipeline) -> None:
    """Check that settings declared as bool are booleans or null.

    A part's class declares the types of its settings. Raises UnfitError for another value.
    """
    for name, part in pipe.components.items():
        if not isinstance(part, ConfigMixin):
            continue
        kinds = get_type_hints(inspect.unwrap(type(part).__init__))
        for key, value in part.config.items():
            if kinds.get(key) is bool and value is not None and not isinstance(value, bool):
                raise UnfitError(
                    f"{name} says {key} {json.dumps(value, default=repr)[:60]}, allowed are true and false",
                    "set it in its config.json",
                )
