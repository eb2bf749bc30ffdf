"""One plain line on the page for whatever nobody foresaw."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import gradio as gr

from . import words

Told = Callable[[Exception], str]  # the line for an error, which may write a log
SECONDS = 30  # that a line stays


class PlainError(Exception):
    """One line that says what went wrong."""


@contextmanager
def plainly(told: Told) -> Iterator[None]:
    """Turn every exception in the block into a PlainError."""
    try:
        yield
    except Exception as error:
        raise PlainError(told(error)) from error


@contextmanager
def shown_plainly(told: Told) -> Iterator[None]:
    """Show the line of every exception in the block over the page."""
    try:
        with plainly(told):
            yield
    except PlainError as error:
        line = words.text(error)  # gradio takes it for HTML
        raise gr.Error(line, duration=SECONDS, title="This did not work", print_exception=False) from error


def guarded(handler: Callable[..., Any], told: Told) -> Callable[..., Any]:
    """Return a handler whose exceptions become lines over the page."""
    if inspect.isgeneratorfunction(handler):

        @wraps(handler)
        def stepping(*given: Any) -> Iterator[Any]:
            with shown_plainly(told):
                yield from handler(*given)

        return stepping

    @wraps(handler)
    def calling(*given: Any) -> Any:
        with shown_plainly(told):
            return handler(*given)

    return calling


def guard(page: gr.Blocks, told: Told) -> None:
    """Guard every handler of a page, so that none can be forgotten."""
    for own in page.fns.values():
        if own.fn is not None:
            own.fn = guarded(own.fn, told)
