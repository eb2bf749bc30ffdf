"""Files are whole or not there: a failure changes nothing and leaves nothing."""

import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewstep.atomic import DTYPES, read_json, replacing, write_json, write_rows, write_tensors


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
    with pytest.raises(OSError, match=r"cannot write .*x\.safetensors: .*x\.safetensors is a folder, and only ordinary files are replaced"):
        write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)})
    assert names(tmp_path) == ["x.safetensors"]


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
