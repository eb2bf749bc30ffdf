"""`docs/ring.ipynb`: its cells run as they stand, and its student is near the data."""

import json
import re

import matplotlib
import pytest

from tests.project import ROOT


@pytest.mark.slow
def test_the_ring_runs_and_its_student_is_near_the_data(capsys: pytest.CaptureFixture[str]) -> None:
    matplotlib.use("Agg")
    notebook = json.loads((ROOT / "docs" / "ring.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    rows = re.findall(
        r"(teacher|student) +(\d+) steps +energy distance to the data (-?[\d.]+)", capsys.readouterr().out
    )
    found = {(who, int(steps)): float(distance) for who, steps, distance in rows}
    assert found["student", 2] < 0.1 * found["teacher", 2]
