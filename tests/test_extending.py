"""`docs/extending.md`: every task, done literally in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.project import ROOT

TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = {
    part.partition("\n")[0]: part for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:] if "<!-- try -->" in part
}
BLOCK = re.compile(
    r"<!-- (file|before|import|row|try)(?:: ([^:\n]+?)(?:: (.+?))?)? -->\n```python\n(.*?)```", re.DOTALL
)
ALLOWED = {"file", "before", "import", "row", "try"}


def test_every_task_is_there() -> None:
    assert list(SECTIONS) == [
        "A surrogate loss",
        "A reward",
        "A divergence",
        "A family of pipelines",
        "A solver",
        "A metric",
    ]


@pytest.mark.parametrize("name", SECTIONS)
def test_a_task_is_one_file_and_one_row(name: str) -> None:
    steps = [kind for kind, *_ in BLOCK.findall(SECTIONS[name])]
    assert steps.count("row") == 1 and steps.count("try") == 1
    assert steps.count("file") + steps.count("before") == 1


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if i < 1 else pytest.mark.slow) for i, name in enumerate(SECTIONS)]
)
def test_a_task_done_to_the_letter_works(name: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    program = ""
    for kind, place, anchor, code in BLOCK.findall(SECTIONS[name]):
        file = tmp_path / place.strip()
        if kind == "try":
            program = code
        elif kind == "file":
            assert not file.exists()
            file.write_text(code, encoding="utf-8")
        elif kind == "import":
            before = file.read_text(encoding="utf-8")
            first = re.search(r"^from \.", before, re.MULTILINE)
            assert first is not None
            file.write_text(before[: first.start()] + code + before[first.start() :], encoding="utf-8")
        elif kind == "before":
            before = file.read_text(encoding="utf-8")
            place_of = re.search(rf"^{re.escape(anchor)}", before, re.MULTILINE)
            assert place_of is not None, f"{place}: nothing begins with {anchor!r}"
            file.write_text(f"{before[: place_of.start()]}{code}\n\n{before[place_of.start() :]}", encoding="utf-8")
        else:
            file.write_text(with_row(file.read_text(encoding="utf-8"), anchor, code), encoding="utf-8")
    script = tmp_path / "task.py"
    script.write_text(program, encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "src"),
        "OMP_NUM_THREADS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def with_row(text: str, table: str, row: str) -> str:
    """Insert a row at the end of a table.

    The end is the line that closes the braces, or the tuple that the table is made from.
    """
    begin = re.search(rf"^{table}: .*= {{$", text, re.MULTILINE)
    assert begin is not None, f"there is no table {table}"
    end = re.compile(r"^    \)$|^\}$", re.MULTILINE).search(text, begin.end())
    assert end is not None
    return text[: end.start()] + row + text[end.start() :]
