"""One holder of a run's folder at a time: a lock that names its holder and that a dead process does not keep."""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from ..names import visible

LOCK = "run.lock"
BEAT = 30.0  # seconds between two signs of life
SILENT = 600.0  # seconds after which a holder on another machine is taken for dead


@dataclass(frozen=True)
class Holder:
    """A process, told from a later one of the same number by when it `began` (of its machine's own clock; empty where that is not known)."""

    pid: int
    host: str
    began: str
    since: str


def this_holder() -> Holder:
    """Return what a lock says of this process."""
    return Holder(
        os.getpid(), socket.gethostname(), _began(os.getpid()), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    )


def _began(pid: int) -> str:
    """The start of a process on Linux, with what tells one boot and one container from another."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')} {stat.rpartition(')')[2].split()[19]}"
    except (OSError, IndexError):
        return ""


def lives(holder: Holder) -> bool | None:
    """Whether the process of a holder runs; None where this machine cannot say."""
    if holder.host != socket.gethostname():
        return None
    if holder.began:
        mine = _began(os.getpid())
        if holder.began.split()[:2] != mine.split()[:2]:
            return None  # another boot or container of the same name
        return _began(holder.pid) == holder.began
    if os.name == "nt":
        return None  # where asking for a process ends it
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder while the block runs.

    Raises ValueError that names the holder where another process has it. One that is dead loses it: on this machine at once, on
    another after ten minutes without a sign of life.
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
            path.unlink()  # while it is held, so that nobody holds a file without a name
        os.close(handle)
        with suppress(OSError):
            for own in made:
                own.rmdir()  # where nothing came of it


def _taken(path: Path, folder: Path) -> int:
    """The open lock file, which is this process's."""
    me = this_holder()
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            kernel = _kernel_lock(handle)
            if kernel and not _is(handle, path):
                os.close(handle)  # its last holder has just removed it
                continue
            holder = _read(handle)
            if kernel is False or (holder is not None and holder != me and not _dead(holder, handle, kernel)):
                raise ValueError(_refusal(folder, path, holder))
            os.ftruncate(handle, 0)
            os.lseek(handle, 0, os.SEEK_SET)
            os.write(handle, json.dumps(asdict(me)).encode())
            os.fsync(handle)
            if kernel is None:  # two may have come at once, and the last one's name stands there
                time.sleep(0.3)
                if (other := _read(handle)) != me:
                    raise ValueError(_refusal(folder, path, other))
        except BaseException:
            os.close(handle)
            raise
        return handle


def _kernel_lock(handle: int) -> bool | None:
    """Lock the file for as long as this process lives; False where another has it, None where the file system has no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(handle, 1 << 30, os.SEEK_SET)  # beyond what is written, which others are to read
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
    """Whether the open file still has its name."""
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
    """Whether a holder has gone. One that this machine knows nothing of is known by its silence."""
    alive = lives(holder)
    if alive is None and kernel and holder.host == socket.gethostname():
        return True  # from before this machine, or this container, began anew: what lives holds the kernel's lock
    return _silence(handle) > SILENT if alive is None else not alive


def _silence(handle: int) -> float:
    """Seconds since the last sign of life, both times by the clock of the file system where it tells."""
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
        else visible(f"process {holder.pid} on {holder.host} since {holder.since}", lines=False)
    )
    return (
        f"--out: {shown} is in use by {who}; wait for it or choose another --out; if it is dead for sure, delete {lock}"
    )


def _beat(path: Path, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(path)
