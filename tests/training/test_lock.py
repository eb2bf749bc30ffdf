"""A run's folder has one holder; one that is dead holds nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fewstep.training import lock
from fewstep.training.lock import LOCK, Holder, lives, locked, this_holder

from ..project import ROOT

HOLD = (
    "import sys, time; from pathlib import Path; from fewstep.training.lock import locked\n"
    "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def take(folder: Path) -> None:
    with locked(folder):
        assert (folder / LOCK).is_file()


def test_two_do_not_hold_one_folder_and_a_killed_one_holds_nothing(
    other: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = (
        rf"^--out: .* is in use by process {other.pid} on .* since 20.*; wait for it or choose another --out; "
        rf"if it is dead for sure, delete .*{LOCK}$"
    )
    with pytest.raises(ValueError, match=said):
        take(tmp_path)
    with monkeypatch.context() as patch:  # a file system without locks of the kernel's
        patch.setattr(lock, "_kernel_lock", lambda handle: None)
        with pytest.raises(ValueError, match=said):
            take(tmp_path)
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert (tmp_path / LOCK).exists()
    take(tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_a_stopped_process_still_holds_it(other: subprocess.Popen[str], tmp_path: Path) -> None:
    other.send_signal(signal.SIGSTOP)
    with pytest.raises(ValueError, match="in use by process"):
        take(tmp_path)


def test_the_same_process_does_not_hold_it_twice(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(ValueError, match="in use by another run of this process"):
        take(tmp_path)
    take(tmp_path)


def leave(folder: Path, holder: Holder, age: float = 0.0) -> None:
    """The lock of a process that is not ours, with its last sign of life."""
    from dataclasses import asdict

    (folder / LOCK).write_text(json.dumps(asdict(holder)), encoding="utf-8")
    then = time.time() - age
    os.utime(folder / LOCK, (then, then))


@pytest.mark.parametrize("kernel", [True, False])
def test_one_on_another_machine_is_known_by_its_silence(
    kernel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr(lock, "_kernel_lock", lambda handle: None)
    leave(tmp_path, Holder(12, "elsewhere\x1b[31m", "", "2026-01-01T00:00:00Z"), age=60)
    with pytest.raises(ValueError, match=r"in use by process 12 on elsewhere\\x1b\[31m since 2026"):
        take(tmp_path)
    leave(tmp_path, Holder(12, "elsewhere", "", "2026-01-01T00:00:00Z"), age=lock.SILENT + 60)
    take(tmp_path)


def test_a_number_that_another_process_has_by_now_is_no_holder(tmp_path: Path) -> None:
    me = this_holder()
    if me.began:
        boot, space, _ = me.began.split()
        assert lives(me) and not lives(Holder(os.getpid(), me.host, f"{boot} {space} 1", me.since))
        leave(tmp_path, Holder(os.getpid(), me.host, f"{boot} {space} 1", me.since))
        take(tmp_path)
        leave(tmp_path, Holder(os.getpid(), me.host, f"before {space} 1", me.since))  # the machine began anew
        take(tmp_path)
    leave(tmp_path, Holder(2**22 + 1, me.host, "", me.since))
    take(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 3}', "\0" * 40])
def test_a_lock_that_says_nothing_holds_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(text, encoding="utf-8")
    take(tmp_path)


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept", encoding="utf-8")
    (tmp_path / LOCK).symlink_to("mine")
    with pytest.raises(OSError, match="symbolic links"):
        take(tmp_path)
    assert (tmp_path / "mine").read_text(encoding="utf-8") == "kept"


def test_a_sign_of_life_comes_while_it_is_held_and_no_empty_folder_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with locked(tmp_path / "runs" / "x"):
        os.utime(tmp_path / "runs" / "x" / LOCK, (0, 0))
        until = time.monotonic() + 5
        while not (beat := (tmp_path / "runs" / "x" / LOCK).stat().st_mtime) and time.monotonic() < until:
            time.sleep(0.01)
        assert beat > 0
    assert list(tmp_path.iterdir()) == []
