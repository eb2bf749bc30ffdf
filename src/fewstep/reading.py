"""Reading files that somebody else may have made: whatever a parser raises becomes one line that names the file and what to do.

Every file of a user is read within `reading`, or by a function here; `tests/test_reads.py` looks for those that are not.
"""

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .names import visible

PACKAGE = Path(__file__).resolve().parent
LONGEST = 200  # letters of what another library says
# What a mistake in a program raises, rather than damage: where it was fewstep's, its traceback is of use.
UNFORESEEN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    IndexError,
    NameError,
    NotImplementedError,
    TypeError,
    UnboundLocalError,
)


class ReadError(ValueError):
    """What is wrong with a file, the whole of it in one line; `foreseen` where nobody needs the traceback."""

    foreseen = True


@dataclass(frozen=True)
class Guard:
    """See `reading`. A class, so that mypy knows that nothing is swallowed."""

    what: str
    cure: str
    wrong: str

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(
            error, ReadError
        ):  # parsers raise as many types as there are kinds of damage
            raise unreadable(self.what, error, self.cure, self.wrong) from error


def reading(what: object, cure: str, wrong: str = "is damaged") -> Guard:
    """Turn any exception of the block into a ReadError `WHAT is damaged (its cause); CURE`; one that is a ReadError already stays.

    `what` names the file, with the option that it was given by. What the block itself raises as ValueError is a cause, too.
    """
    return Guard(str(what), cure, wrong)


def unreadable(what: str, error: Exception, cure: str, wrong: str = "is damaged") -> ReadError:
    """What to say of a file that could not be read because of `error`, which is its cause."""
    shown = visible(what, lines=False)
    if out_of_memory(error):
        wrong = "takes more memory than there is"
    made = ReadError(f"{shown} {wrong} ({reason(error)}); {cure}")
    trace = innermost(error)
    made.foreseen = trace is None or not ours(trace) or not isinstance(error, UNFORESEEN)
    return made


def reason(error: BaseException) -> str:
    """What an exception says, in one line of no more than 200 letters, or its type where it says nothing."""
    if isinstance(error, KeyError) and len(error.args) == 1:
        text = f"it lacks {error.args[0]!r}"
    elif isinstance(error, UnicodeDecodeError):
        text = f"byte {error.start} is no {error.encoding.upper()} text"
    elif isinstance(error, RecursionError):
        text = "nested too deeply"
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror + (
            f": {visible(Path(str(error.filename)).name, lines=False)}" if error.filename is not None else ""
        )
    else:
        text = visible(" ".join(str(error).split()), lines=False)
    return (text if len(text) <= LONGEST else f"{text[:LONGEST]} ...") or type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out: Python's, a device's, or the allocator's of the CPU, which torch tells as a RuntimeError."""
    named = isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or (
        isinstance(error, RuntimeError) and any(t in str(error) for t in ("can't allocate memory", "out of memory"))
    )


def innermost(error: BaseException) -> TracebackType | None:
    """Where an exception was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def ours(trace: TracebackType) -> bool:
    """Whether it is in fewstep's own code."""
    return Path(trace.tb_frame.f_code.co_filename).resolve().is_relative_to(PACKAGE)


def require_regular(path: Path) -> Path:
    """Return `path` if a regular file is there; a pipe would hang its reader, a device never end. Raises OSError or ValueError without a cure."""
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"it is a {'folder' if stat.S_ISDIR(mode) else 'pipe or a device'}, not a file")
    return path


def text_in(path: Path, lenient: bool = False) -> str:
    """The UTF-8 text of a regular file; `lenient` where a few broken letters do not matter. Raises whatever goes wrong."""
    return require_regular(path).read_text(encoding="utf-8", errors="replace" if lenient else "strict")


def json_of(text: str) -> Any:
    """Parse JSON. Raises ValueError for what is none, and for a key that is there twice, of which Python would keep the last one."""
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def json_in(path: Path) -> Any:
    """The JSON value of a regular file. Raises whatever goes wrong."""
    return json_of(text_in(path))


def object_in(path: Path) -> dict[str, Any]:
    """The JSON object of a regular file. Raises whatever goes wrong."""
    value = json_in(path)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def read_json(path: Path, cure: str, option: str = "") -> dict[str, Any]:
    """A JSON object. Raises ReadError that names the file and the `cure`; FileNotFoundError where there is none."""
    if not path.exists():
        raise FileNotFoundError(2, "there is no such file", str(path))
    with reading(f"{option}: {path}" if option else path, cure):
        return object_in(path)
