"""Text is UTF-8 whatever the locale, and what users wrote is printed as it is."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project import ROOT, pyproject

PACKAGE = ROOT / "src" / "fewstep"
BINARY = {"Image", "av", "os", "tarfile", "zipfile", "gzip"}  # whose `open` opens no text


def unsaid(source: str) -> list[int]:
    """Lines that read or write text in the locale's own encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(k.arg == "encoding" for k in node.keywords):
            continue
        name = (
            node.func.attr
            if isinstance(node.func, ast.Attribute)
            else node.func.id
            if isinstance(node.func, ast.Name)
            else ""
        )
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        text = name in ("read_text", "write_text") and owner != "" and not (name == "read_text" and node.args)
        modes = [
            a.value
            for a in [*node.args, *(k.value for k in node.keywords)]
            if isinstance(a, ast.Constant) and isinstance(a.value, str)
        ]
        opened = name == "open" and owner not in BINARY and not any("b" in m for m in modes)
        if text or opened:
            found.append(node.lineno)
    return found


def marked(source: str) -> list[int]:
    """Lines that let rich read styles or emoji in what is printed, or that print past the one console."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            loud = any(
                k.arg in ("markup", "emoji", "highlight")
                and not (isinstance(k.value, ast.Constant) and not k.value.value)
                for k in node.keywords
            )
            column = name == "TextColumn" and not any(k.arg == "markup" for k in node.keywords)
            if (
                name in ("Console", "rich.print", "print", "typer.echo", "typer.secho", "Text.from_markup")
                or loud
                or column
            ):
                found.append(node.lineno)
    return found


@pytest.mark.parametrize(
    "source",
    ["p.read_text()", "p.write_text('x')", "open('x')", "p.open('a')", "p.open()", "with open(p, 'w') as f: ..."],
)
def test_text_in_the_locales_encoding_is_found(source: str) -> None:
    assert unsaid(source) == [1]


@pytest.mark.parametrize(
    "source",
    [
        "p.read_text(encoding='utf-8')",
        "open('x', 'rb')",
        "p.open('wb')",
        "Image.open(p)",
        "tarfile.open(p)",
        "write_text(p, 'x')",
    ],
)
def test_what_is_no_text_or_says_its_encoding_is_not(source: str) -> None:
    assert unsaid(source) == []


def test_all_text_is_utf8() -> None:
    assert not {
        f"{f.relative_to(ROOT)}:{n}" for f in PACKAGE.rglob("*.py") for n in unsaid(f.read_text(encoding="utf-8"))
    }
    assert "PLW1514" in pyproject()["tool"]["ruff"]["lint"]["select"]


def test_the_one_console_prints_what_it_is_given() -> None:
    assert (
        marked("Console()")
        and marked("c.print(x, markup=True)")
        and marked("TextColumn('{task.description}')")
        and marked("print(x)")
    )
    files = [f for f in PACKAGE.rglob("*.py") if f != PACKAGE / "cli" / "progress.py"]
    assert not {f"{f.relative_to(ROOT)}:{n}" for f in files for n in marked(f.read_text(encoding="utf-8"))}


CHILD = """
import sys
from pathlib import Path
from fewstep.atomic import write_json, write_text
from fewstep.reading import read_json
from fewstep.cli.progress import console, show_all_letters
from fewstep.names import expanded, made_name
show_all_letters()
where = Path(sys.argv[1])
write_json(where / "a.json", {"name": "M\\u00fcller \\u6771\\u4eac", "given": sys.argv[2], "path": str(where)})
assert expanded(read_json(where / "a.json", "")["given"]) == sys.argv[2] \
and read_json(where / "a.json", "")["name"] == "M\\u00fcller \\u6771\\u4eac"
write_text(where / (made_name(sys.argv[2]) + ".txt"), sys.argv[2])
console.print("R\\u00b2 " + sys.argv[2])
"""


@pytest.mark.parametrize(
    ("given", "written"), [("Müller 東京 🐈".encode(), "Müller 東京 🐈".encode()), (b"caf\xe9", b"caf\\udce9")]
)
def test_a_locale_without_letters_loses_none(given: bytes, written: bytes, tmp_path: Path) -> None:
    """Python in the C locale, whose own encoding is ASCII: names come as bytes that it cannot read."""
    folder = os.path.join(os.fsencode(tmp_path), given)
    os.mkdir(folder)
    bare = {k: v for k, v in os.environ.items() if not k.startswith(("LC_", "LANG"))}
    env = bare | {"PYTHONUTF8": "0", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", CHILD, folder, given], env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.startswith(b"R\\xb2 ")
    assert len(os.listdir(folder)) == 2 and written in [
        Path(os.fsdecode(os.path.join(folder, f))).read_bytes() for f in os.listdir(folder)
    ]
