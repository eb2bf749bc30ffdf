"""How a command ends: an error line, an exit code, a log.

Whatever goes wrong becomes one line. The exit code says whose fault the error is. Errors that nobody foresaw
are written to a log.
"""

import dis
import os
import platform
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..names import quoted, visible
from ..reading import PACKAGE, ReadError, innermost, ours, out_of_memory, reason

LOG, ELSEWHERE = "error.log", "fewstep-error.log"  # in a run's folder, and where there is none
USERS, OURS = 2, 1  # exit codes of a user's mistake and of a mistake of fewstep
LESS = {
    "distill": (
        "lower train.batch and raise train.accumulate as much, or set roles.checkpointing=true; "
        "`fewstep plan RECIPE --memory 24GiB` finds what fits"
    ),
    "train-teacher": "lower the batch of its fit, or its images' size",
    "sample": "sample fewer images at once (-n), or at a smaller size",
    "studio": "sample fewer images at once, or stop a training that takes the memory",
}
WORD = re.compile(r"\S{400,}")  # longer than any path
PACKAGES = ("torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy", "pillow")


class FaultError(Exception):
    """The line and the exit code with which a command ends."""

    def __init__(self, line: str, status: int) -> None:
        super().__init__(line)
        self.line, self.status = (
            WORD.sub(lambda long: f"{long[0][:200]} ... {long[0][-60:]}", visible(line, lines=False)),
            status,
        )


@contextmanager
def logged_in(folder: Path | None) -> Iterator[None]:
    """Turn every exception in the block into a FaultError.

    The log of an error that nobody foresaw goes to `folder`, the folder of a run, where there is one.
    """
    try:
        yield
    except Exception as error:
        raise fault_of(error, folder) from error


def fault_of(error: Exception, folder: Path | None = None) -> FaultError:
    """Return the line and the exit code for an exception.

    The traceback of an error that nobody foresaw is written to `folder`, or to the working folder.
    """
    if isinstance(error, FaultError):
        return error
    if isinstance(error, ReadError):
        seen = "" if error.foreseen else f" (its traceback is in {write_log(error, folder)})"
        return FaultError(f"error: {error}{seen}", USERS)
    if isinstance(error, ValueError | OSError | FloatingPointError) and said_by_us(error):
        return FaultError(f"error: {error}", USERS)
    if out_of_memory(error):
        cure = LESS.get(sys.argv[1] if len(sys.argv) > 1 else "", "close other programs, or take a smaller model")
        return FaultError(f"error: out of memory while {step_of(error)} ({reason(error)[:120]}); {cure}", USERS)
    if isinstance(error, OSError) and error.errno is not None:
        names = " and ".join(str(n) for n in (error.filename, error.filename2) if n is not None)
        return FaultError(
            (
                f"error: {names or step_of(error)}: {str(error.strerror).lower()}; "
                "check the path, its permissions and the disk"
            ),
            USERS,
        )
    if isinstance(error, ImportError):
        return FaultError(f"error: a package is missing or does not fit ({reason(error)}); run: fewstep doctor", USERS)
    what = f"{type(error).__name__}: {reason(error)}" if str(error) else type(error).__name__
    return FaultError(
        (
            f"error: {what}, while {step_of(error)}; "
            f"this is a fault of fewstep: please report it with {write_log(error, folder)}"
        ),
        OURS,
    )


def said_by_us(error: BaseException) -> bool:
    """Return whether a `raise` in fewstep's own code made an exception.

    Messages of other libraries and of Python itself say nothing to a user.
    """
    trace = innermost(error)
    return (
        trace is not None
        and ours(trace)
        and trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    )


def step_of(error: BaseException) -> str:
    """Return where in fewstep an exception was raised.

    The place reads `in training.loop.distill, line 120`.
    """
    trace, last = error.__traceback__, None
    while trace is not None:
        last, trace = (trace if ours(trace) else last), trace.tb_next
    if last is None:
        return "starting"
    code = last.tb_frame.f_code
    module = ".".join(Path(code.co_filename).resolve().relative_to(PACKAGE).with_suffix("").parts)
    return f"in {module}.{code.co_name}, line {last.tb_lineno}"


def write_log(error: BaseException, folder: Path | None) -> str:
    """Write versions, command line and traceback to a log file.

    The file is `folder/error.log`, else one in the working folder, else a temporary file. Returns the file's
    path, or a text that says that the log could not be written.
    """
    text = (
        f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n{quoted('fewstep', *sys.argv[1:])}\n{_versions()}\n\n"
    )
    text += "".join(traceback.format_exception(error))
    for path in ([folder / LOG] if folder is not None and folder.is_dir() else []) + [Path(ELSEWHERE)]:
        # The folder may be read-only, the disk full, or a package of `..atomic` itself at fault.
        with suppress(Exception):
            from ..atomic import write_text

            return str(write_text(path, text).resolve())
    try:
        handle, name = tempfile.mkstemp(prefix="fewstep-error-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError:
        return "its traceback, which could not be written anywhere"
    return name


def _versions() -> str:
    known = [f"python {platform.python_version()} on {platform.platform()}"]
    for name in ("fewstep", *PACKAGES):
        try:
            known.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(known)
