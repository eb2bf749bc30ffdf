"""What a file may be called, what is made of what it may not, and how either is shown."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewstep.names import (
    LONGEST,
    expanded,
    fault_of,
    made_name,
    quoted,
    read_name,
    require_name,
    require_path,
    visible,
)

ODD = [
    "", ".", "..", "...", " . ", "../../x", "/etc/x", "a/b", "a\\b", "C:\\x", "c:x", "a\0b", "a\nb", "a\x1b[31mb",
    "a\x7fb", "a\x9bb", "a\u2028b", "a\u202egnp.exe", "con", "NUL", "nul.txt", "Com1", "lpt9.tar.gz", "x" * 300,
    "é" * 60, " x", "x ", "x.", "a:b", "a*b", "a?b", 'a"b', "a<b>", "a|b", "\udcff",
]  # fmt: skip
FINE = [
    "tiny",
    "mymix #2",
    "[SD] mix",
    "it's",
    "a,b;c",
    "100%",
    "~x",
    "-x",
    "a+b",
    "a@0.8",
    "x = y",
    "Müller",
    "東京",
    "👩‍🚀",
    "console",
    "a.b.c",
    ".hidden",
    "!&$()",
]


@pytest.mark.parametrize("name", ODD)
def test_what_no_file_may_be_called_is_said_and_mended(name: str, tmp_path: Path) -> None:
    assert fault_of(name)
    with pytest.raises(
        ValueError, match=r"^name: got .*, which .*; allowed is one folder's name: .*; choose another$"
    ) as said:
        require_name(name, "name")
    assert str(said.value).isprintable()
    made, plain = made_name(name, "-kohya.safetensors"), made_name(name)
    assert made == f"{plain}-kohya.safetensors" and not fault_of(plain) and len(os.fsencode(made)) <= 143
    (tmp_path / made).write_bytes(b"")
    assert [p.name for p in tmp_path.iterdir()] == [made]
    assert made_name(plain) == plain


@pytest.mark.parametrize("name", [None, 3, True, ["x"], {"a": 1}])
def test_a_name_is_a_text(name: object) -> None:
    with pytest.raises(ValueError, match="which is a"):
        read_name(name, "x")


@pytest.mark.parametrize("name", FINE)
def test_what_people_call_their_files_stays(name: str) -> None:
    assert require_name(name, "name") == made_name(name) == read_name(name, "name") == visible(name) == name


def test_names_that_lead_elsewhere_are_refused_and_odd_ones_mended() -> None:
    for name in ("../../x", "/etc/x", "a\\..\\b", "..", "a\0b"):
        with pytest.raises(ValueError, match="do not use this file"):
            read_name(name, "student")
    assert read_name("a:b", "student") == "a_b"
    assert len(os.fsencode(read_name("x" * 300, "student"))) <= LONGEST


def test_long_names_stay_apart() -> None:
    one, two = (made_name("東" * 200 + end) for end in "ab")
    assert one != two and one[:20] == two[:20] and max(len(os.fsencode(n)) for n in (one, two)) <= LONGEST


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert visible("a\x1b[2Jb\x07\r\x9b\udcff\u202e") == "a\\x1b[2Jb\\x07\\r\\x9b\\xff\\u202e"
    assert visible("a\nb\tc") == "a\nb\tc" and visible("a\nb", lines=False) == "a\\nb"
    assert visible("[red]é東👩‍🚀[/x] :smile:") == "[red]é東👩‍🚀[/x] :smile:"


@pytest.mark.skipif(sys.platform == "win32", reason="bash")
def test_printed_commands_are_what_a_shell_reads() -> None:
    given = [*FINE, *(n for n in ODD if "\0" not in n and "\udcff" not in n), *map(chr, range(1, 256)), "a'b\x1b\\n"]
    line = quoted(*given)
    assert visible(line, lines=False) == line
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == given


def test_home_is_found_where_the_shell_leaves_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.chdir(tmp_path)
    assert expanded("~/x") == "/home/me/x" and expanded("a~b") == "a~b"
    (tmp_path / "~").mkdir()
    assert expanded("~") == "~"


def test_a_value_of_many_lines_is_named_by_its_type() -> None:
    with pytest.raises(ValueError, match=r"^images: got a value of the type Tensor, allowed is the path"):
        require_path(torch.zeros(2, 2), "images")
