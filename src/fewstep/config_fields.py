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
from numbers import Integral, Real
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
        return over and under and (isinstance(value, int) or math.isfinite(value))

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

    Lists become tuples, and other libraries' numbers (numpy's) Python's own. Raises ValueError with one line,
    which names the option `section.field`.
    """
    kind: Hashable = type(config)  # type: ignore[assignment]
    for name, kinds, limits in declared(kind):
        value, lengths = getattr(config, name), tuple_lengths(kind)[name]
        if value is None and NoneType in kinds:
            continue
        found = _plain(tuple(value) if isinstance(value, list) and lengths else value)
        if wrong := _misshapen(found, kinds, limits, lengths) or next(
            (said for one in (found if isinstance(found, tuple) else (found,)) if (said := _wrong(one, kinds, limits))),
            "",
        ):
            raise ValueError(f"{section}.{name}: got {_said(found)}, allowed are {wrong}")
        if found is not value:
            object.__setattr__(config, name, found)


def whole_number(value: Any, option: str, least: int = 1) -> int:
    """Return a whole number, at least `least`, as an int.

    Raises ValueError that names the `option`.
    """
    found = _plain(value)
    if isinstance(found, bool) or not isinstance(found, int) or found < least:
        raise ValueError(f"{option}: got {shortened(value)}, allowed are whole numbers from {least}")
    return found


def shortened(value: object) -> str:
    """Return a value in a few words, whatever it is."""
    return f"the class {value.__name__}" if isinstance(value, type) else reprlib.repr(value).replace("\n", " ")


def _plain(value: Any) -> Any:
    """Return another library's number as Python's, and anything else unchanged."""
    if isinstance(value, tuple):
        plain = tuple(map(_plain, value))
        return value if all(a is b for a, b in zip(plain, value, strict=True)) else plain
    if type(value) in (bool, int, float):
        return value
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, Real) and not isinstance(value, bool) else value


def _misshapen(value: Any, kinds: tuple[Any, ...], limits: tuple[Any, ...], lengths: tuple[int, ...]) -> str:
    """Return what is allowed in place of a value of another shape.

    The value is a list where a single value is asked for, or the reverse, or a list of another length.
    """
    text = _wrong(object(), kinds, limits)
    if (isinstance(value, tuple) and -1 in lengths) or (not isinstance(value, tuple) and 0 in lengths) or not lengths:
        return text if isinstance(value, tuple) and not lengths else ""
    if isinstance(value, tuple) and len(value) in lengths:
        return ""
    count = next((f"{n} " for n in lengths if n > 0), "")
    return f"a list of {count}{text}"


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_said, value))}]"
    return str(value).lower() if isinstance(value, bool) else shortened(value)


def _wrong(value: Any, kinds: tuple[Any, ...], limits: tuple[Any, ...]) -> str:
    """Return what is allowed for a disallowed value; otherwise an empty text."""
    words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    words += [word for limit in limits if isinstance(limit, OneOf) for word in limit.names]
    if words:
        return "" if isinstance(value, str) and value in words else ", ".join(map(str, words))
    blocks = [k for k in kinds if isinstance(k, type) and is_dataclass(k)]
    if blocks and not isinstance(value, tuple(blocks)):
        return " or ".join(f"a {k.__name__}" for k in blocks)
    plain = tuple(k for k in kinds if k in (int, float, str, bool))
    if not plain:
        return ""
    ranges = [limit for limit in limits if isinstance(limit, Range)]
    number, whole = int in plain or float in plain, float not in plain
    if number and (
        (isinstance(value, bool) and bool not in plain) or not isinstance(value, int | float if float in plain else int)
    ):
        return next((limit.text(whole) for limit in ranges), "whole numbers" if whole else "numbers")
    if not number and not isinstance(value, plain):
        return " or ".join({str: "texts", bool: "true, false"}[k] for k in plain)
    return next((limit.text(whole) for limit in ranges if value not in limit), "")


@cache
def tuple_lengths(config: Hashable) -> dict[str, tuple[int, ...]]:
    """Return how many elements the tuples of each field may have.

    -1 is any number, and 0 that a single value may stand there; empty where no tuple may.
    """
    hints = get_type_hints(config)
    found = {}
    for f in fields(config):  # type: ignore[arg-type]
        hint = hints[f.name]
        parts = [
            p for p in (get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)) if p is not NoneType
        ]
        tuples = [get_args(p) for p in parts if get_origin(p) is tuple]
        counts = [-1 if Ellipsis in args else len(args) for args in tuples]
        found[f.name] = tuple(counts + [0] * (len(tuples) < len(parts))) if tuples else ()
    return found


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
