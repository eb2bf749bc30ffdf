"""Errors that name an option as typed on the command line."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def in_options(options: Mapping[str, str]) -> Iterator[None]:
    """Name settings in errors as options of the command line.

    `steps: got 0` becomes `--steps: got 0`.
    """
    try:
        yield
    except ValueError as error:
        name, colon, rest = str(error).partition(":")
        if not colon or name not in options:
            raise
        raise ValueError(f"{options[name]}:{rest}") from error
