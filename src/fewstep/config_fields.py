"""Settings that declare allowed values.

Ranges and choices stand next to a field as annotations; one line of documentation stands below the field.
"""

import ast
import inspect
import math
import reprlib
import textwrap
from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`.

    With `above` or `below`, the lower or upper end is excluded. `hint` is appended to messages.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    hint: str = ""

    def __contains__(self, value: float) -> bool:
        over = value > self.low if self.above else value >= self.low
        under = value < self.high if self.below else value <= self.high
        return over and under and math.isfinite(value)

    def text(self, whole: bool) -> str:
        """Return the range in words.

        For example `whole numbers from 1 to 1000; 4 is a good start`.
        """
        number = "whole numbers" if whole else "numbers"
        low = "" if self.low == -math.inf else f" {'above' if self.above else 'from'} {self.low:g}"
        high = "" if self.high == math.inf else f" {'up to, not including,' if self.below else 'to'} {self.high:g}"
        return f"{number}{low}{high}{self.hint}" if low + high else f"finite {number}{self.hint}"


@dataclass(frozen=True, eq=False)
class OneOf:
    """The names of a table, read when a setting is checked."""

    names: Collection[str]


POSITIVE = Range(0, above=True)
WEIGHT = Range(0, hint=" (0: off)")
COUNT = Range(1)


def check_fields(config: Any, section: str) -> None:
    """Check every field of a dataclass against the field's annotation.

    Raises ValueError with one line, which names the option `section.field`.
    """
    for name, kinds, limits in declared(type(config)):  # type: ignore[arg-type]
        value = getattr(config, name)
        if value is None and NoneType in kinds:
            continue
        for one in value if isinstance(value, tuple) else (value,):
            if wrong := _wrong(one, kinds, limits):
                raise ValueError(f"{section}.{name}: got {_said(value)}, allowed are {wrong}")


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_said, value))}]"
    return str(value).lower() if isinstance(value, bool) else reprlib.repr(value)


def _wrong(value: Any, kinds: tuple[Any, ...], limits: tuple[Any, ...]) -> str:
    """Return what is allowed for a disallowed value; otherwise an empty text."""
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    words += [word for limit in limits if isinstance(limit, OneOf) for word in limit.names]
    if words:
        return "" if value in words else ", ".join(map(str, words))
    blocks = [k for k in kinds if isinstance(k, type) and is_dataclass(k)]
    if blocks and not isinstance(value, tuple(blocks)):
        return " or ".join(f"a {k.__name__}" for k in blocks)
    plain = tuple(k for k in kinds if k in (int, float, str, bool))
    if not plain:
        return ""
    number = int in plain or float in plain
    if number and (
        (isinstance(value, bool) and bool not in plain) or not isinstance(value, int | float if float in plain else int)
    ):
        return next((limit.text(float not in plain) for limit in limits if isinstance(limit, Range)), "numbers")
    if not number and not isinstance(value, plain):
        return " or ".join({str: "texts", bool: "true, false"}[k] for k in plain)
    ranges = [limit for limit in limits if isinstance(limit, Range)]
    return next((limit.text(float not in plain) for limit in ranges if value not in limit), "")


@cache
def declared(config: Hashable) -> tuple[tuple[str, tuple[Any, ...], tuple[Any, ...]], ...]:
    """Return (name, types, limits) of every field of a dataclass.

    A tuple field has the types and limits of the tuple's elements.
    """
    hints = get_type_hints(config, include_extras=True)
    return tuple((f.name, *_unfolded(hints[f.name])) for f in fields(config))  # type: ignore[arg-type]


def _unfolded(annotation: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kinds, limits = _unfolded(parts[0])
        return kinds, (*limits, *parts[1:])
    if origin in (Union, UnionType) or origin is tuple:
        found = [_unfolded(part) for part in parts if part is not Ellipsis]
        return tuple(k for kinds, _ in found for k in kinds), tuple(v for _, limits in found for v in limits)
    return (annotation,), ()


def allowed_text(config: type, name: str) -> str:
    """Return the allowed values of a setting in words.

    For example `whole numbers from 1`, or `noisy, clean`; empty for a setting that allows anything of the
    setting's type.
    """
    kinds, limits = next((kinds, limits) for known, kinds, limits in declared(config) if known == name)
    words = [str(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    words += [word for limit in limits if isinstance(limit, OneOf) for word in limit.names]
    if words:
        return ", ".join(words)
    whole = float not in kinds
    ranges = [limit.text(whole).partition(";")[0] for limit in limits if isinstance(limit, Range)]
    return ranges[0] if ranges else "true, false" if bool in kinds else ""


@cache
def field_texts(config: type) -> dict[str, str]:
    """Return the docstring below each field of a dataclass, by name.

    Fields of base classes are included.
    """
    found: dict[str, str] = {}
    for kind in reversed(config.__mro__):
        if kind.__module__.partition(".")[0] != __name__.partition(".")[0]:
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in _pairs(tree.body):
            if (
                isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                found[field] = inspect.cleandoc(below.value.value)
    return found


def _pairs(body: Sequence[ast.stmt]) -> Iterator[tuple[str, ast.stmt | None]]:
    """Yield every annotated field with the statement after the field."""
    for i, statement in enumerate(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id, body[i + 1] if i + 1 < len(body) else None
