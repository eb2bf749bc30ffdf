"""Whatever a parser raises is one line that names the file; pipes and devices are not read at all."""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import pytest
import torch

from fewstep.reading import ReadError, object_in, out_of_memory, read_json, reading, reason, require_regular
from fewstep.typed import shown, typed


class StrangeError(Exception):
    """What some library raises."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (StrangeError("a\n  b\x1b[31m"), "a b\\x1b[31m"),
        (StrangeError(), "StrangeError"),
        (KeyError("weight"), "it lacks 'weight'"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), "byte 0 is no UTF-8 text"),
        (FileNotFoundError(2, "No such file or directory", "a/x"), "No such file or directory: x"),
        (ValueError("x" * 1000), "x" * 200 + " ..."),
    ],
)
def test_any_exception_is_one_line(error: Exception, said: str) -> None:
    with pytest.raises(ReadError) as told, reading("data: [a]\x1b.bin", "copy it again"):
        raise error
    assert str(told.value) == f"data: [a]\\x1b.bin is damaged ({said}); copy it again"
    assert told.value.__cause__ is error


def test_what_has_been_said_and_what_is_no_error_goes_through() -> None:
    with pytest.raises(ReadError, match=r"^inner is damaged \(x\); y$"), reading("outer", "z"), reading("inner", "y"):
        raise ValueError("x")
    for stop in (KeyboardInterrupt, SystemExit):
        with pytest.raises(stop), reading("a", "b"):
            raise stop
    with reading("a", "b"):
        pass


def test_a_file_that_asks_for_too_much_memory_says_so() -> None:
    with pytest.raises(ReadError, match=r"^a takes more memory than there is"), reading("a", "b"):
        torch.empty(2**60)
    assert out_of_memory(torch.OutOfMemoryError()) and not out_of_memory(RuntimeError("shape"))


@pytest.mark.skipif(sys.platform == "win32", reason="pipes")
def test_pipes_devices_and_folders_are_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.json").symlink_to("/dev/zero")
    (tmp_path / "folder.json").mkdir()
    for name, kind in (("pipe", "pipe or a device"), ("zero", "pipe or a device"), ("folder", "folder")):
        with pytest.raises(ReadError, match=rf"{name}\.json is damaged \(it is a {kind}, not a file\); x"):
            read_json(tmp_path / f"{name}.json", "x")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json", "x")
    with pytest.raises(FileNotFoundError):
        require_regular(tmp_path / "none.json")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "[" * 100_000, '{"a":' * 100_000, "\ufeff{}", '{"a": 1' + "0" * 5000 + "}"]
)
def test_what_is_no_object_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ReadError, match=r"run: .*a\.json is damaged \(.+\); x") as told:
        read_json(path, "x", "run")
    assert len(str(told.value)) < 400 + len(str(path))
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UnicodeDecodeError) as broken:
        object_in(path)
    assert reason(broken.value) == "byte 0 is no UTF-8 text"


class Part(TypedDict, total=False):
    """A part of what is read."""

    rank: int | None


class Whole(Part):
    """All keys but these go through."""

    name: str


@dataclass(frozen=True)
class Card:
    """As a student's."""

    steps: tuple[int, ...]
    pair: tuple[str, float] = ("a", 1.0)
    parts: dict[str, list[float]] = field(default_factory=dict)


def test_what_fits_comes_back_as_it_is() -> None:
    assert typed(Whole, {"name": "a", "rank": None, "more": [1]}) == {"name": "a", "rank": None, "more": [1]}
    assert typed(Card, {"steps": [4, 2], "pair": ["b", 2], "parts": {"4": [1, 0.5]}}) == Card(
        (4, 2), ("b", 2), {"4": [1, 0.5]}
    )
    assert typed(dict[str, Any], {"a": {}}) == {"a": {}}


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [
        (int, True, "it is true, not a whole number"),
        (int, 4.0, "it is 4.0, not a whole number"),
        (float, "1", "it is '1', not a number"),
        (bool, 1, "it is 1, not true or false"),
        (int | None, "x", "it is 'x', not a whole number or null"),
        (list[int], [1, None], "1 is null, not a whole number"),
        (Whole, {"rank": 1}, "it lacks name"),
        (Whole, {"name": "a", "rank": []}, r"rank is \[\], not a whole number or null"),
        (Card, [], r"it is \[\], not an object"),
        (Card, {}, "it lacks steps"),
        (Card, {"steps": [1], "x": 1}, "it has x, which nothing here is called"),
        (Card, {"steps": 4}, "steps is 4, not a list"),
        (Card, {"steps": [], "pair": ["a"]}, "pair is a list of 1, not of 2"),
        (Card, {"steps": [], "parts": {"4": [None]}}, "parts.4.0 is null, not a number"),
    ],
)
def test_what_does_not_fit_is_named(kind: Any, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}$"):
        typed(kind, value)


def test_a_value_is_shown_in_a_few_words() -> None:
    deep: Any = 1
    for _ in range(900):
        deep = [deep]
    for value in (
        deep,
        "x" * 10_000,
        json.loads("[1]") * 10_000,
        10**4000,
        {str(i): i for i in range(1000)},
        "\x1b[31m",
    ):
        assert len(shown(value)) < 200 and "\x1b" not in shown(value)
