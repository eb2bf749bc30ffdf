"""Checkpoints that are written beside the training."""

import gc
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep.atomic import stream_tensors
from fewstep.training import saving, state
from fewstep.training.loop import distill
from fewstep.training.saving import CheckpointWriter, checkpoint_writer, free_memory
from fewstep.training.state import checkpoints, latest_checkpoint, load_checkpoint

from .common import CONFIG, METHOD, parts, run

SECONDS = 20.0  # that a thread may take before a test fails


def group(value: float) -> dict[str, dict[str, Tensor]]:
    return {"student": {"w": torch.full((64,), value)}}


class Gate:
    """A `save_checkpoint` that waits until it is opened."""

    def __init__(self) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()

    def __call__(self, *arguments: Any) -> Path:
        self.entered.set()
        assert self.opened.wait(SECONDS)
        return state.save_checkpoint(*arguments)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    held = Gate()
    monkeypatch.setattr(saving, "save_checkpoint", held)
    return held


def test_the_training_goes_on_and_the_file_has_the_old_values(tmp_path: Path, gate: Gate) -> None:
    tensors = group(1.0)
    with checkpoint_writer(tmp_path, 2) as writer:
        writer.save(1, tensors, {})
        assert gate.entered.wait(SECONDS) and checkpoints(tmp_path) == []
        tensors["student"]["w"].fill_(2.0)
        gate.opened.set()
    assert torch.equal(load_checkpoint(checkpoints(tmp_path)[0])[0]["student"]["w"], torch.ones(64))


def test_a_second_save_waits_for_the_first(tmp_path: Path, gate: Gate) -> None:
    with checkpoint_writer(tmp_path, 2) as writer:
        writer.save(1, group(1.0), {})
        second = threading.Thread(target=lambda: writer.save(2, group(2.0), {}))
        second.start()
        second.join(0.2)
        assert second.is_alive()
        gate.opened.set()
        second.join(SECONDS)
        assert not second.is_alive() and checkpoints(tmp_path)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000001", "checkpoint-000002"]


def test_what_does_not_fit_twice_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "free_memory", lambda: 2 * 64 * 4 - 1)
    seen: list[str] = []

    def save(*arguments: Any) -> Path:
        seen.append(threading.current_thread().name)
        return state.save_checkpoint(*arguments)

    monkeypatch.setattr(saving, "save_checkpoint", save)
    writer = CheckpointWriter(tmp_path, 2)
    writer.save(1, group(1.0), {})
    assert seen == [threading.main_thread().name] and checkpoints(tmp_path)
    monkeypatch.setattr(saving, "free_memory", lambda: 2 * 64 * 4)
    writer.save(2, group(1.0), {})
    writer.wait()
    assert seen[1] != seen[0]


def test_an_error_of_the_writer_ends_the_run_with_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def fill_up(*arguments: Any) -> str:
        calls.append(arguments)
        if len(calls) > 5:  # the second checkpoint
            raise OSError(28, "No space left on device")
        return stream_tensors(*arguments)

    monkeypatch.setattr(state, "stream_tensors", fill_up)
    with pytest.raises(OSError, match=r"^cannot write checkpoint .*: .*No space left on device.*; free some space"):
        run(config=replace(CONFIG, checkpoint_every=1), out=tmp_path)
    assert [p.name for p in tmp_path.glob("*checkpoint*")] == ["checkpoint-000001"]


def test_the_newest_stay(tmp_path: Path) -> None:
    run(config=replace(CONFIG, checkpoint_every=1, keep=1), out=tmp_path / "one")
    run(config=replace(CONFIG, checkpoint_every=1, keep=3), out=tmp_path / "three")
    assert [len(checkpoints(tmp_path / name)) for name in ("one", "three")] == [1, 3]


def test_a_run_that_nobody_holds_any_more_is_saved(tmp_path: Path) -> None:
    """The collector closes it with all that refers to itself, in whichever thread."""
    roles, data = parts()
    held: list[Any] = [distill(roles, METHOD, data, CONFIG, tmp_path)]
    for _ in range(4):
        next(held[0])
    held.append(held)
    del held
    gc.collect()
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000003", "checkpoint-000004"]


def dying_at(event: int, calls: list[tuple[Any, str]]) -> None:
    """Kill this process before the n-th of these calls, in whichever thread."""
    left = [event]

    def before(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return wrapped

    for owner, name in calls:
        setattr(owner, name, before(getattr(owner, name)))


def status(work: Callable[[], None]) -> int:
    """Run `work` in a copy of this process, and return its exit code."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001 - it must not go on as a test
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.skipif(sys.platform == "win32", reason="fork")
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """One checkpoint is kept, and the process dies at each step of writing the next one."""

    def write(out: Path, event: int) -> None:
        with checkpoint_writer(out, 1) as writer:
            writer.save(4, group(1.0), {})
            writer.wait()
            dying_at(event, [(os, "replace"), (os, "fsync"), (shutil, "rmtree"), (state, "stream_tensors")])
            writer.save(8, group(2.0), {})

    for event in range(1, 40):
        out = tmp_path / str(event)
        ended = status(lambda out=out, event=event: write(out, event))  # type: ignore[misc]
        found = latest_checkpoint(out)
        assert found is not None and found[1]["step"] in (4, 8)
        if ended == 0:
            break
        assert ended == -signal.SIGKILL
    assert event > 5 and found is not None and float(found[0]["student"]["w"][0]) == 2.0


def test_what_files_keep_in_memory_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = free_memory()
    assert alone > 2**20
    files = {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 5\ninactive_file 40\n"}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(saving, "CGROUP", tmp_path)
    assert free_memory() == 140
    (tmp_path / "memory.max").write_text("max\n", encoding="utf-8")
    assert free_memory() > 2**20
