"""JSON values as the types that they should have.

A value of another type in a file is found where the file is read.
"""

import reprlib
from dataclasses import MISSING, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from .names import visible

NAMES = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    NoneType: "null",
    list: "a list",
    dict: "an object",
}

SHORT = reprlib.Repr()
SHORT.maxlevel, SHORT.maxstring, SHORT.maxlong, SHORT.maxother = 3, 80, 40, 80


def typed(kind: Any, value: Any, where: str = "") -> Any:
    """Return `value` as a `kind`, with everything inside it.

    A kind is int, float, str, bool, None, Any, or a union, list, tuple (from a list), dict, TypedDict or
    dataclass of these. Nothing is converted but lists into tuples and objects into dataclasses; `true` is no
    number. A TypedDict allows other keys, a dataclass does not. Raises ValueError that names the key, what is
    there, and what should be.
    """
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return _one_of(parts, value, where)
    if is_typeddict(kind) or is_dataclass(kind):
        return _record(kind, value, where)
    plain = origin or kind
    if plain is tuple:
        _require(list, value, where)
        kinds = [parts[0]] * len(value) if parts[1:] == (...,) else list(parts)
        if len(kinds) != len(value):
            raise ValueError(f"{where or 'it'} is a list of {len(value)}, not of {len(kinds)}")
        return tuple(typed(k, v, _below(where, i)) for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    _require(plain, value, where)
    if plain is list and parts:
        return [typed(parts[0], v, _below(where, i)) for i, v in enumerate(value)]
    if plain is dict and parts:
        return {key: typed(parts[1], v, _below(where, key)) for key, v in value.items()}
    return value


def _record(kind: Any, value: Any, where: str) -> Any:
    """Return a TypedDict or a dataclass from an object."""
    _require(dict, value, where)
    hints = get_type_hints(kind)
    known = {key: typed(hints[key], v, _below(where, key)) for key, v in value.items() if key in hints}
    if is_typeddict(kind):
        needed = kind.__required_keys__
    else:
        needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
        if odd := [key for key in value if key not in hints]:
            raise ValueError(f"it has {_below(where, odd[0])}, which nothing here is called")
    if lacking := sorted(needed - known.keys()):
        raise ValueError(f"it lacks {_below(where, lacking[0])}")
    return {**value, **known} if is_typeddict(kind) else kind(**known)


def _one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    wrong = []
    for kind in kinds:
        try:
            return typed(kind, value, where)
        except ValueError:
            if type(value) is (get_origin(kind) or kind) or (isinstance(value, dict) and is_typeddict(kind)):
                raise  # the value is of this kind, and something inside the value is wrong
            wrong.append(NAMES.get(get_origin(kind) or kind, "an object"))
    raise ValueError(f"{where or 'it'} is {shown(value)}, not {' or '.join(wrong)}")


def _require(kind: type, value: Any, where: str) -> None:
    fits = type(value) in (int, float) if kind is float else type(value) is kind
    if not fits:
        raise ValueError(f"{where or 'it'} is {shown(value)}, not {NAMES[kind]}")


def _below(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def shown(value: Any) -> str:
    """Show a JSON value in a few words."""
    text = (
        {True: "true", False: "false", None: "null"}[value]
        if value is None or isinstance(value, bool)
        else SHORT.repr(value)
    )
    return visible(text, lines=False)
