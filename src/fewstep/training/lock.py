"""A lock on a run's folder.

Only one process holds a folder at a time. The lock names the holder, and a dead process loses the lock.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ..atomic import cure_of
from ..names import visible

LOCK = "run.lock"
BEAT = 30.0  # seconds between two signs of life
SILENT = 600.0  # seconds after which a holder on another machine is taken for dead


@dataclass(frozen=True)
class Holder:
    """A process that holds a lock.

    `began` distinguishes the process from a later process of the same number: the start time by the machine's
    own clock, empty if unknown.
    """

    pid: int
    host: str
    began: str
    since: str


def this_holder() -> Holder:
    """Return this process as a lock's holder."""
    return holder_of(os.getpid())


def holder_of(pid: int) -> Holder:
    """Return a process of this machine as a lock's holder."""
    return Holder(pid, socket.gethostname(), _began(pid), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


def holder_in(folder: Path) -> tuple[Holder | None, bool]:
    """Return who holds a folder, and whether that process lives.

    Takes no lock, so that a run that begins meanwhile is not refused. A holder that this machine knows nothing
    about lives until it has been silent for long. (None, False) where nobody holds the folder.
    """
    path = folder / LOCK
    try:
        text, silence = path.read_bytes(), time.time() - path.stat().st_mtime
    except OSError:
        return None, False
    try:
        holder = Holder(**json.loads(text))
    except (ValueError, TypeError):
        return None, silence <= SILENT  # it is just being written
    alive = lives(holder)
    return holder, silence <= SILENT if alive is None else alive


def _began(pid: int) -> str:
    """Return the start of a process on Linux.

    The text also identifies the boot and the container. Empty elsewhere.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        fields = stat.rpartition(")")[2].split()
        # A process that has ended and that nobody has waited for is no holder.
        return "" if fields[0] in "ZX" else f"{boot} {os.readlink('/proc/self/ns/pid')} {fields[19]}"
    except (OSError, IndexError):
        return ""


def lives(holder: Holder) -> bool | None:
    """Return whether a holder's process runs.

    None means that this machine cannot say.
    """
    if holder.host != socket.gethostname():
        return None
    if holder.began:
        mine = _began(os.getpid())
        if holder.began.split()[:2] != mine.split()[:2]:
            return None  # another boot, or another container, of the same host name
        return _began(holder.pid) == holder.began
    if os.name == "nt":
        return None  # on Windows, `os.kill` with signal 0 ends the process
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def held_in_python(folder: Path) -> Iterator[None]:
    """Hold a folder as `locked` does, for a program in Python.

    Raises ValueError also where the folder cannot be made.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder))
        except OSError as error:
            shown = visible(str(folder), lines=False)
            raise ValueError(f"out: cannot write to {shown[:200]} ({error.strerror}); {cure_of(error)}") from error
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder within the block.

    Raises ValueError that names the holder if another process, or another run of this one, holds the lock. A
    dead holder loses the lock: on this machine at once, on another machine after ten minutes without a sign
    of life.
    """
    made = [p for p in (folder, *folder.parents) if not p.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK
    handle = _taken(path, folder)
    ended = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, ended), daemon=True)
    beat.start()
    try:
        yield
    finally:
        ended.set()
        beat.join()
        with suppress(OSError):
            path.unlink()  # remove the file while holding the lock, so that nobody locks a removed file
        os.close(handle)
        with suppress(OSError):
            for own in made:
                own.rmdir()  # remove the folder if the run wrote nothing


def _taken(path: Path, folder: Path) -> int:
    """Lock the file, and return the open file."""
    me = this_holder()
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            kernel = _kernel_lock(handle)
            if kernel and not _is(handle, path):
                os.close(handle)  # the last holder has just removed the file
                continue
            holder = _read(handle)
            if kernel is False or (
                holder is not None and (holder != me or kernel is None) and not _dead(holder, handle, kernel)
            ):
                raise ValueError(_refusal(folder, path, holder))
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, json.dumps(asdict(me)).encode())
            os.fsync(handle)
            if kernel is None:  # two processes may have come at once; the file names the last one
                time.sleep(0.3)
                if (other := _read(handle)) != me:
                    raise ValueError(_refusal(folder, path, other))
        except BaseException:
            os.close(handle)
            raise
        return handle


def _kernel_lock(handle: int) -> bool | None:
    """Lock the file for the lifetime of this process.

    Returns False if another process has the lock, None if the file system has no locks.
    """
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, 1 << 30, os.SEEK_SET)  # lock a byte beyond the content, which others have to read
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None
    return True


def _is(handle: int, path: Path) -> bool:
    """Return whether the open file still has this path."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    own = os.fstat(handle)
    return (there.st_ino, there.st_dev) == (own.st_ino, own.st_dev)


def _read(handle: int) -> Holder | None:
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        return Holder(**json.loads(os.read(handle, 1 << 16)))
    except (ValueError, TypeError):
        return None


def _dead(holder: Holder, handle: int, kernel: bool | None) -> bool:
    """Return whether a holder has ended.

    A holder that this machine knows nothing about counts as dead after a long silence.
    """
    alive = lives(holder)
    if alive is None and kernel and holder.host == socket.gethostname():
        # The holder is from before a restart of this machine or container: a living holder has the kernel's lock.
        return True
    return _silence(handle) > SILENT if alive is None else not alive


def _silence(handle: int) -> float:
    """Return the seconds since the last sign of life.

    Both times are from the file system's clock where possible.
    """
    before = os.fstat(handle).st_mtime
    if os.utime not in os.supports_fd:
        return time.time() - before
    os.utime(handle)
    now = os.fstat(handle).st_mtime
    os.utime(handle, (before, before))
    return now - before


def _refusal(folder: Path, path: Path, holder: Holder | None) -> str:
    shown, lock = (visible(str(p), lines=False) for p in (folder, path))
    who = (
        "another process"
        if holder is None
        else "another run of this process"
        if (holder.pid, holder.host) == (os.getpid(), socket.gethostname())
        else visible(f"process {holder.pid} on {holder.host} since {holder.since}", lines=False)
    )
    return (
        f"--out: {shown} is in use by {who}; wait for it or choose another --out; if it is dead for sure, delete {lock}"
    )


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(path)
