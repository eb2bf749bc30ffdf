"""Settings that are on or off: diffusers takes any text, number or list that stands there for on."""

import inspect
import json
from typing import get_type_hints

from diffusers import ConfigMixin, DiffusionPipeline

from .weights import UnfitError


def require_switches(pipe: DiffusionPipeline) -> None:
    """Raises UnfitError where a setting of a part that its class says is a bool is another value than true, false and null."""
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
