"""Files are whole or not there: a failure changes nothing and leaves nothing."""

from pathlib import Path

import pytest
import torch

from fewstep.atomic import read_json, replacing, write_json, write_tensors


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
    with pytest.raises(OSError, match=r"cannot write .*x\.safetensors: .*; free some space"):
        write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)})
    assert names(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize(("text", "said"), [("{", "Expecting"), ("[1]", "holds a list"), ("3", "holds a int")])
def test_damaged_json_is_named_with_its_cure(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=rf"run\.json is damaged \(.*{said}.*\); delete it"):
        read_json(tmp_path / "run.json", "delete it")
