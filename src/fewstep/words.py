"""Errors that name settings as the caller wrote the settings.

Recipes and the command line have one set of names; in Python the same settings are arguments.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

Kind = TypeVar("Kind", bound=type)
P = ParamSpec("P")
R = TypeVar("R")

SECTIONS = "method|train|roles|preview|evaluate"
VALUES = {"true": "True", "false": "False", "null": "None"}
PHRASES = (
    ("data.source", "images"),
    ("data.from_student", "trajectories.student"),
    ("leave data out", "leave images out"),
    ("train.iterations", "iterations"),
    ("choose another --out", "choose another out"),
    ("--out:", "out:"),
    ("--format: ", "form: "),
    ("--dtype: ", "dtype: "),
    ("DIR: ", "folder: "),
    ("the same command", "the same call"),
    ("--set ", ""),
)


def python_words(text: str, section: str = "") -> str:
    """Rewrite an error from recipes' names to Python's.

    `train.lr: got true` becomes `lr: got True`, and `data.count` becomes `trajectories.count`. Options of
    `section` stand by themselves. No other function turns recipes' keys and the command line's options into
    arguments of `fewstep.distill` and its settings.
    """
    for recipe, python in PHRASES:
        text = text.replace(recipe, python)
    text = re.sub(rf"(?<![/\w.-])(?:{SECTIONS}{'|' + section if section else ''})\.(?=[a-z_]+\b)", "", text)
    text = re.sub(r"(?<![/\w.-])data\.(?=[a-z_]+\b)", "trajectories.", text)
    return re.sub(r"(=|: got |\bto )(true|false|null)\b", lambda found: found[1] + VALUES[found[2]], text)


@contextmanager
def in_python(section: str = "") -> Iterator[None]:
    """Raise a user's mistake in the block in Python's words."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        if (said := python_words(str(error), section)) == str(error):
            raise
        raise type(error)(said) from error


def speaks_python(section: str) -> Callable[[Kind], Kind]:
    """Decorate a class of settings to raise mistakes in Python's words.

    Recipes, which are read without the decorated constructor, keep their own words. Options of `section`
    stand by themselves.
    """

    def of(kind: Kind) -> Kind:
        made: Callable[..., None] = kind.__init__  # type: ignore[misc]

        @wraps(made)
        def init(self: Any, *args: Any, **settings: Any) -> None:
            with in_python(section):
                made(self, *args, **settings)

        kind.__init__ = init  # type: ignore[misc]
        return kind

    return of


def told_in_python(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate a public function to raise mistakes in Python's words."""

    @wraps(function)
    def call(*args: P.args, **settings: P.kwargs) -> R:
        with in_python():
            return function(*args, **settings)

    return call
