"""`benchmarks/finetunes.py`: its table, of made-up rows."""

import runpy
import sys

import pytest

from ..project import ROOT


def test_students_of_several_seeds_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("origin", "tdm_variants"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    bench = runpy.run_path(str(ROOT / "benchmarks" / "finetunes.py"))
    common = {"style": "fluent", "steps": 4, "guidance": 1.0, "nfe": 4, "retrieval_top1": 0.25, "diversity_ratio": None}
    named = {"tdm-4-0": 3.0, "tdm-4-1": 5.0, "lcm-0": 7.0, "lcm-full-0": 8.0, "own-0": 2.0}
    lines = bench["table"]([common | {"model": k, "fd_teacher": fd} for k, fd in named.items()])
    assert lines == [
        "| fluent | tdm-4 | 4 | 1 | 4 | 4.00 ± 1.41 | 25.00 ± 0.00 | - | 2 |",
        "| fluent | lcm | 4 | 1 | 4 | 7.00 | 25.00 | - | 1 |",
        "| fluent | lcm-full | 4 | 1 | 4 | 8.00 | 25.00 | - | 1 |",
        "| fluent | own | 4 | 1 | 4 | 2.00 | 25.00 | - | 1 |",
    ]
