"""Errors that name an option as it was typed."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def in_options(options: Mapping[str, str]) -> Iterator[None]:
    """Name a setting as the option of the command line that has it: `steps: got 0` as `--steps: got 0`."""
    try:
        yield
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        if not colon or name not in options:
            raise
        raise ValueError(f"{options[name]}:{rest}") from error
