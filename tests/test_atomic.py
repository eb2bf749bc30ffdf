"""Files are whole or not there: a failure changes nothing and leaves nothing."""

import errno
import os
import socket
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fewstep.atomic import (
    DTYPES,
    append_text,
    cure_of,
    link_or_copy,
    read_hashed,
    remove_left,
    replacing,
    require_replaceable,
    unwritten,
    write_bytes,
    write_json,
    write_rows,
    write_tensors,
)
from fewstep.reading import read_json


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_json(path, {"step": 1})

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert read_json(path, "") == {"step": 1}
    assert names(tmp_path) == ["state.json"]


def test_folders_are_made(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a" / "b" / "x.safetensors", {"x": torch.ones(2, 3).t()})
    assert names(tmp_path / "a" / "b") == ["x.safetensors"]


def test_tensors_that_cannot_be_written_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").mkdir()
    with pytest.raises(
        OSError, match=r"^[^ ]*x\.safetensors is a folder, and only ordinary files are replaced; move it away$"
    ):
        write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)})
    assert names(tmp_path) == ["x.safetensors"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_full_disk_is_said_with_the_file_and_what_to_do(tmp_path: Path) -> None:
    """The system does not say which file it was; of a file inside another's writing the cause is said once."""

    def fill(path: Path) -> None:
        with replacing(path) as temporary, open("/dev/full", "wb") as full:
            temporary.write_bytes(b"half")
            full.write(b"x")

    said = (
        r"^cannot write [^ ]*out\.png: \[Errno 28\] No space left on device; "
        r"free some space, then run the same command again$"
    )
    with pytest.raises(OSError, match=said) as found:
        fill(tmp_path / "out.png")
    assert names(tmp_path) == []
    assert str(unwritten(Path("final"), found.value, "!")) == (
        "cannot write final: [Errno 28] No space left on device; free some space, then run the same command again!"
    )
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"^cannot write [^ ]*log\.jsonl: \[Errno 28\] .*; free some space"):
        append_text(tmp_path / "log.jsonl", "line\n")


def test_a_disk_that_may_not_be_written_to_keeps_the_first_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be written cannot be removed either, which is no news."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "somewhere")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(OSError, match=r"^cannot write [^ ]*run\.json: .*this folder may not be written to"):
        write_json(tmp_path / "run.json", {})


@pytest.mark.parametrize(
    ("number", "raised"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, True), (errno.EINVAL, False)]
)
def test_a_drive_that_says_late_that_it_is_full_is_heard(
    number: int, raised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of `fsync` is raised, and the old file stays.

    Network drives take what they have no room for, and say so only then. A drive that cannot be asked is no error.
    """
    write_json(tmp_path / "state.json", {"step": 1})

    def failing(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", failing)
    if raised:
        with pytest.raises(OSError, match=r"^cannot write [^ ]*state\.json: "):
            write_json(tmp_path / "state.json", {"step": 2})
    else:
        write_json(tmp_path / "state.json", {"step": 2})
    assert read_json(tmp_path / "state.json", "") == {"step": 1 if raised else 2} and names(tmp_path) == ["state.json"]


def test_the_same_tensors_are_the_same_file(tmp_path: Path) -> None:
    """Its hash says whether a student has changed; safetensors puts what a header says into another order each time."""
    about = dict.fromkeys("qwertyuiop", 'ä\u2028\x7f"')
    written = set()
    for i in range(5):
        write_tensors(
            tmp_path / f"{i}.safetensors", {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.bfloat16)}, about
        )
        written.add((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(written) == 1
    tensors, said = read_hashed(tmp_path / "0.safetensors")
    assert {k: v for k, v in said.items() if k != "sha256"} == about and torch.equal(tensors["b"], torch.ones(3))


@pytest.mark.parametrize(("text", "said"), [("{", "Expecting"), ("[1]", "holds a list"), ("3", "holds a int")])
def test_damaged_json_is_named_with_its_cure(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=rf"run\.json is damaged \(.*{said}.*\); delete it"):
        read_json(tmp_path / "run.json", "delete it")


def test_rows_are_written_as_they_come(tmp_path: Path) -> None:
    """The file is an ordinary one, and the parts that are written are let go."""
    full = {str(d)[6:]: torch.arange(70).reshape(10, 7).to(d) for d in DTYPES}
    alive: list[weakref.ref[torch.Tensor]] = []

    def parts() -> Iterator[dict[str, torch.Tensor]]:
        for i in range(0, 10, 3):
            part = {k: v[i : i + 3].clone() for k, v in full.items()}
            alive.append(weakref.ref(part["float32"]))
            yield part
            del part
            assert sum(r() is not None for r in alive) <= 2

    write_rows(tmp_path / "a" / "rows.safetensors", 10, parts(), {"null": torch.ones(1, 2, 3)})
    read = load_file(tmp_path / "a" / "rows.safetensors")
    assert set(read) == {*full, "null"}
    assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in full.items())
    assert torch.equal(read["null"], torch.ones(1, 2, 3))


@pytest.mark.parametrize("count", [4, 6])
def test_rows_that_are_too_many_or_too_few_leave_nothing(count: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"are not {count}"):
        write_rows(tmp_path / "rows.safetensors", count, [{"x": torch.zeros(2, 3)}, {"x": torch.zeros(3, 3)}], {})
    assert names(tmp_path) == []


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_files_have_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"x": torch.ones(2)})
    write_rows(tmp_path / "b.safetensors", 1, [{"x": torch.ones(1, 2)}], {})
    write_json(tmp_path / "c.json", {})
    assert {p.stat().st_mode & 0o777 for p in tmp_path.iterdir()} == {0o640}


def other_things(folder: Path) -> list[Path]:
    """What is no ordinary file, with the file that a link leads to."""
    (folder / "folder").mkdir()
    (folder / "kept").write_text("kept", encoding="utf-8")
    (folder / "link").symlink_to("kept")
    (folder / "dangling").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    return [folder / name for name in ("folder", "link", "dangling", "pipe", "socket")] + [
        Path("/dev/null"),
        Path("/dev/stdout"),
    ]


def test_only_ordinary_files_are_replaced(tmp_path: Path) -> None:
    for path in other_things(tmp_path):
        before = path.lstat().st_mode
        for write in (
            lambda p: write_json(p, {}),
            lambda p: write_bytes(p, b"x"),
            lambda p: write_tensors(p, {"x": torch.ones(1)}),
            lambda p: write_rows(p, 1, [{"x": torch.ones(1, 1)}], {}),
        ):
            with pytest.raises(OSError, match="only ordinary files are replaced"):
                write(path)
        with pytest.raises(
            ValueError, match=r"^-o: got .*, which is a .*; only ordinary files are replaced: pass the name"
        ):
            require_replaceable(path, "-o")
        assert path.lstat().st_mode == before
    assert (tmp_path / "kept").read_text(encoding="utf-8") == "kept" and not (tmp_path / "nowhere").exists()
    assert require_replaceable(tmp_path / "kept", "-o") == tmp_path / "kept"
    assert require_replaceable(tmp_path / "kept" / "below", "-o")


def test_a_name_as_long_as_any_can_be_written(tmp_path: Path) -> None:
    write_json(tmp_path / ("x" * 250 + ".json"), {"a": 1})
    assert names(tmp_path) == ["x" * 250 + ".json"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK, errno.ENOSYS])
def test_where_there_are_no_links_a_copy_is_made(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    (tmp_path / "a").write_bytes(b"kept")
    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"kept"


@pytest.mark.parametrize(
    ("error", "cure"),
    [
        (OSError(errno.ENOSPC, "x"), "free some space"),
        (OSError(errno.EDQUOT, "x"), "free some space"),
        (
            SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
            "free some space",
        ),
        (SafetensorError("I/O error: Permission denied (os error 13)"), "may not be written to"),
        (OSError(errno.EROFS, "x"), "may not be written to"),
        (OSError(errno.ENAMETOOLONG, "x"), "too long"),
        (OSError(errno.ENOTDIR, "x"), "a part of its path is a file"),
        (OSError(errno.EIO, "x"), "see to that"),
        (OSError("something"), "see to that"),
    ],
)
def test_the_cause_says_the_cure(error: Exception, cure: str) -> None:
    assert cure in cure_of(error)


def flipped(path: Path, skip: int = 0) -> Iterator[None]:
    """The file with one bit changed at a time, all over its length from byte `skip`."""
    data = path.read_bytes()
    for at in range(skip, len(data), max(1, (len(data) - skip) // 40)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        yield
    path.write_bytes(data)


def test_one_flipped_bit_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    whole = {
        "a": torch.arange(40.0).reshape(4, 10),
        "b": torch.ones(3, dtype=torch.bfloat16),
        "c": torch.tensor(True),
        "d": torch.empty(0),
    }
    for write in (
        lambda: write_tensors(path, whole, {"said": "so"}),
        lambda: write_rows(path, 4, [{"a": whole["a"]}], {"b": whole["b"]}),
    ):
        write()
        tensors, about = read_hashed(path)
        assert all(torch.equal(t, whole[n]) for n, t in tensors.items()) and len(about["sha256"]) == 64
        header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        for _ in flipped(path, header):
            with pytest.raises(SafetensorError, match="SHA-256"):
                read_hashed(path)
    save_file(whole, path)  # from before there were hashes
    assert torch.equal(read_hashed(path)[0]["a"], whole["a"])


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    replace, fsync = os.replace, os.fsync

    def replaced(source: Path, target: Path) -> None:
        order.append("named")
        replace(source, target)

    def synced(handle: int) -> None:
        order.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        fsync(handle)

    monkeypatch.setattr(os, "replace", replaced)
    monkeypatch.setattr(os, "fsync", synced)
    write_json(tmp_path / "x.json", {})
    assert order == ["file", "named", "folder"]


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    with replacing(tmp_path / "deep" / "x.json") as temporary:
        left = temporary.with_name(temporary.name.replace("-", "-9"))
    write_bytes(left, b"half")
    for name in (".x.json.12.tmp", ".checkpoint-000002.tmp/student.safetensors"):
        write_bytes(tmp_path / name, b"half")
    kept = {"a.tmp", ".vim.tmp", "x.json", ".checkpoint-2.tmp"}
    for name in kept:
        write_bytes(tmp_path / name, b"kept")
    remove_left(tmp_path)
    assert not left.exists() and set(names(tmp_path)) == kept | {"deep"}
