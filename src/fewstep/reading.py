"""Reading files that somebody else may have made.

Whatever a parser raises becomes one line that names the file and what to do. Every file of a user is read
within `reading`, or by a function of this module. `tests/test_reads.py` looks for other reads.
"""

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from .names import visible

PACKAGE = Path(__file__).resolve().parent
LONGEST = 200  # letters kept of another library's message
# Exceptions of mistakes in programs rather than damage. The traceback is of use where the mistake is fewstep's.
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
    """What is wrong with a file, in one line.

    `foreseen` where nobody needs the traceback.
    """

    foreseen = True


@dataclass(frozen=True)
class Guard:
    """The context manager of `reading`.

    A class, so that mypy knows that no exception is swallowed.
    """

    what: str
    cure: str
    wrong: str

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Parsers raise another type for each kind of damage.
        if isinstance(error, Exception) and not isinstance(error, ReadError):
            raise unreadable(self.what, error, self.cure, self.wrong) from error


def reading(what: object, cure: str, wrong: str = "is damaged") -> Guard:
    """Turn any exception of the block into a ReadError.

    The message is `WHAT is damaged (its cause); CURE`. `what` names the file, with the option by which the
    file was given. A ValueError of the block is a cause, too. A ReadError passes unchanged.
    """
    return Guard(str(what), cure, wrong)


def unreadable(what: str, error: Exception, cure: str, wrong: str = "is damaged") -> ReadError:
    """Return the ReadError for a file that could not be read.

    `error` is the cause.
    """
    shown = visible(what, lines=False)
    if out_of_memory(error):
        wrong = "takes more memory than there is"
    made = ReadError(f"{shown} {wrong} ({reason(error)}); {cure}")
    trace = innermost(error)
    made.foreseen = trace is None or not ours(trace) or not isinstance(error, UNFORESEEN)
    return made


def reason(error: BaseException) -> str:
    """Say in one line what an exception says.

    At most `LONGEST` letters. The name of the exception's type where it says nothing.
    """
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
    """Return whether an exception says that memory ran out.

    Python's, a device's, or that of the CPU's allocator, which torch raises as a RuntimeError.
    """
    named = isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__)
    return named or (
        isinstance(error, RuntimeError) and any(t in str(error) for t in ("can't allocate memory", "out of memory"))
    )


def innermost(error: BaseException) -> TracebackType | None:
    """Return the traceback's last entry, where an exception was raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace


def ours(trace: TracebackType) -> bool:
    """Return whether a traceback's entry is in fewstep's own code."""
    return Path(trace.tb_frame.f_code.co_filename).resolve().is_relative_to(PACKAGE)


def require_regular(path: Path) -> Path:
    """Return `path` if a regular file is there.

    A pipe would hang its reader, and a device never end. Raises OSError or ValueError without a cure.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"it is a {'folder' if stat.S_ISDIR(mode) else 'pipe or a device'}, not a file")
    return path


def text_in(path: Path, lenient: bool = False) -> str:
    """Read the UTF-8 text of a regular file.

    `lenient` where a few broken letters do not matter. Raises whatever goes wrong.
    """
    return require_regular(path).read_text(encoding="utf-8", errors="replace" if lenient else "strict")


def json_of(text: str) -> Any:
    """Parse JSON.

    Raises ValueError for text that is no JSON, and for a key that is there twice, of which Python would keep
    the last.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it has the key {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def json_in(path: Path) -> Any:
    """Read the JSON value of a regular file.

    Raises whatever goes wrong.
    """
    return json_of(text_in(path))


def object_in(path: Path) -> dict[str, Any]:
    """Read the JSON object of a regular file.

    Raises whatever goes wrong.
    """
    value = json_in(path)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    return value


def read_json(path: Path, cure: str, option: str = "") -> dict[str, Any]:
    """Read a JSON object.

    Raises ReadError that names the file and the `cure`, and FileNotFoundError where there is no file.
    """
    if not path.exists():
        raise FileNotFoundError(2, "there is no such file", str(path))
    with reading(f"{option}: {path}" if option else path, cure):
        return object_in(path)
