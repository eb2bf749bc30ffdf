"""Errors in the words of whoever made the mistake: settings are named as recipes do, and here become Python arguments."""

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
    ("the same command", "the same call"),
    ("run: pip install", "run: pip install"),
    ("--set ", ""),
)


def python_words(text: str, section: str = "") -> str:
    """`train.lr: got true` as `lr: got True`, `data.count` as `trajectories.count`; options of `section` stand by themselves.

    The one place where recipes' keys and the command line's options become arguments of `fewstep.distill` and its settings.
    """
    for recipe, python in PHRASES:
        text = text.replace(recipe, python)
    text = re.sub(rf"(?<![/\w.-])(?:{SECTIONS}{'|' + section if section else ''})\.(?=[a-z_]+\b)", "", text)
    text = re.sub(r"(?<![/\w.-])data\.(?=[a-z_]+\b)", "trajectories.", text)
    return re.sub(r"(=|: got |\bto )(true|false|null)\b", lambda found: found[1] + VALUES[found[2]], text)


@contextmanager
def in_python(section: str = "") -> Iterator[None]:
    """Within it a user's mistake is told in Python's words."""
    try:
        yield
    except ValueError as error:
        if (said := python_words(str(error), section)) == str(error):
            raise
        raise ValueError(said) from error


def speaks_python(section: str) -> Callable[[Kind], Kind]:
    """A class of settings whose constructor tells mistakes in Python's words; recipes, which are read without it, in theirs."""

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
    """A public function whose mistakes are told in Python's words."""

    @wraps(function)
    def call(*args: P.args, **settings: P.kwargs) -> R:
        with in_python():
            return function(*args, **settings)

    return call
