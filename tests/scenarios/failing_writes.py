"""Writes that fail from one place of writing on.

The disk is full, or may not be written to. Every place is tried in one run: at each the process makes a child, whose
writes fail from there on, and goes on by itself when the child has ended. The child works on a copy of the run's
folder.
"""

import builtins
import errno
import io
import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

from . import storm

CODES = {"full": errno.ENOSPC, "read-only": errno.EROFS}
PATIENCE = 120  # seconds after which a child hangs


class Places:
    """The places of writing of this process, below its folder.

    `failing` says how writes fail from now on; it is empty where they do not.
    """

    def __init__(self, fault: Mapping[str, Any], mark: str) -> None:
        self.fault, self.mark, self.folder = fault, Path(mark), os.getcwd()
        self.failing, self.number, self.busy = "", 0, False
        self.found: list[dict[str, Any]] = []
        self.seen, self.rng = Counter[str](), random.Random(0)

    def fails(self, what: str, path: Any) -> bool:
        """Whether a write of this kind is to fail, here and now; a place of writing where none has failed yet."""
        if (
            self.busy
            or not isinstance(path, str | os.PathLike)
            or not os.path.abspath(path).startswith(os.path.join(self.folder, "runs"))
        ):
            return False
        if not self.failing:
            self.number += 1
            if "at" in self.fault:
                self.failing = self.fault["kind"] if self.number >= self.fault["at"] else ""
            else:
                self.try_all(what, os.path.relpath(path, self.folder))
        return bool(self.failing)

    def error(self, *path: Any) -> OSError:
        code = CODES[self.failing]
        return OSError(code, os.strerror(code), *map(str, path))

    def try_all(self, what: str, path: str) -> None:
        """Have a child fail here in every way. Returns in the child too, which goes on to fail."""
        self.busy, phase = True, storm.seen_phases(self.mark)[-1]
        for kind in CODES:
            if not self.child(kind, phase, what, path):
                self.busy, self.failing = False, kind
                return
        self.busy = False

    def child(self, kind: str, phase: str, what: str, path: str) -> bool:
        """Whether this is still the parent. It waits, and writes down how the child ended and what it left."""
        runs, own, log = Path("runs"), Path("runs-own"), Path(self.fault["out"]) / "said.txt"
        there, marked = runs.exists(), self.mark.stat().st_size
        if there:
            runs.rename(own)
            shutil.copytree(own, runs, copy_function=os.link)  # a write that fails changes no file in its place
        sys.stdout.flush(), sys.stderr.flush()
        if not (pid := os.fork()):
            storm.print_to(str(log))
            return False
        code = waited(pid)
        row = {
            "number": self.number,
            "kind": kind,
            "phase": phase,
            "what": what,
            "path": path,
            "code": code,
            "said": log.read_text(),
        }
        self.found.append({**row, "odd": storm.half_written(runs, own), "kept": ""})
        self.keep(runs)
        if there:
            own.rename(runs)
        os.truncate(self.mark, marked)
        (Path(self.fault["out"]) / "places.json").write_text(json.dumps(self.found))
        return True

    def keep(self, runs: Path) -> None:
        """Of every phase the folder of one place, each as likely as the others."""
        row = self.found[-1]
        group = row["phase"]
        self.seen[group] += 1
        if runs.exists() and self.rng.random() * self.seen[group] < 1:
            place = Path(self.fault["out"]) / group
            shutil.rmtree(place, ignore_errors=True)
            shutil.copytree(runs, place)
            for other in self.found:
                other["kept"] = "" if other["kept"] == str(place) else other["kept"]
            row["kept"] = str(place)
        shutil.rmtree(runs, ignore_errors=True)


def waited(pid: int) -> int:
    """The exit code of a child; -9 of one that hangs."""
    began = time.monotonic()
    while not (done := os.waitpid(pid, os.WNOHANG))[0]:
        if time.monotonic() - began > PATIENCE:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(done[1])


def fail_writes(fault: Mapping[str, Any], mark: str) -> None:
    """Let this process's writes fail from the place `at` on, as `kind`.

    Without these two, children fail at every place in its turn, and `out` holds what became of them.
    """
    places = Places(fault, mark)
    real_open, real_os_open, real_write, real_mkdir = io.open, os.open, os.write, os.mkdir
    serialize = vars(safetensors.torch)["serialize_file"]

    def open_(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if not set(mode) & set("wxa+") or not places.fails("open", file):
            return real_open(file, mode, *arguments, **options)
        if places.failing == "read-only" or "+" in mode:
            raise places.error(file)
        opened = real_open(file, mode, *arguments, **options)  # a full disk has room for a name
        full = real_os_open("/dev/full", os.O_WRONLY)
        os.dup2(full, opened.fileno())
        os.close(full)
        return opened

    def os_open(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        wanted = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if wanted and places.fails("open", path) and (places.failing == "read-only" or not os.path.exists(path)):
            raise places.error(path)
        return real_os_open(path, flags, *arguments, **options)

    def write(handle: int, data: Any) -> int:
        if not places.busy and places.fails("write", os.readlink(f"/proc/self/fd/{handle}")):
            raise places.error()
        return real_write(handle, data)

    def mkdir(path: Any, *arguments: Any, **options: Any) -> None:
        if not os.path.lexists(path) and places.fails("mkdir", path):
            raise places.error(path)
        real_mkdir(path, *arguments, **options)

    def serialize_file(tensors: Any, filename: Any, *arguments: Any, **options: Any) -> None:
        if places.fails("serialize", filename):
            code = CODES[places.failing]
            if places.failing == "full":
                real_open(filename, "wb").close()
            raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")
        serialize(tensors, filename, *arguments, **options)

    def naming(what: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def named(source: Any, target: Any, *arguments: Any, **options: Any) -> Any:
            if places.fails(what, target):
                raise places.error(source, target)
            return inner(source, target, *arguments, **options)

        return named

    def removing(inner: Callable[..., Any]) -> Callable[..., Any]:
        def removed(path: Any, *arguments: Any, **options: Any) -> Any:
            if places.failing == "read-only" and not places.busy:  # a full disk lets go of what it has
                raise places.error(path)
            return inner(path, *arguments, **options)

        return removed

    builtins.open = io.open = open_
    os.open, os.write, os.mkdir = os_open, write, mkdir
    vars(safetensors.torch)["serialize_file"] = serialize_file  # not among the names that it declares
    for name in ("replace", "rename", "link"):
        setattr(os, name, naming(name, getattr(os, name)))
    for name in ("unlink", "remove", "rmdir"):
        setattr(os, name, removing(getattr(os, name)))
