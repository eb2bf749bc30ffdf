"""The benchmarks' stored records: one shape, read by one function, and pages made of them alone."""

import json
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from ..project import ROOT

Load = Callable[[str], dict[str, Any]]
FOLDER = ROOT / "benchmarks"
STORED = sorted(file.relative_to(FOLDER).with_suffix("").as_posix() for file in FOLDER.rglob("*.json"))
UNMEASURED = {"gpu", "table1", "true_size"}  # no GPU, no hub, no machine without other work was at hand
ROW = {"model": "student", "fd": 3.0}
HERE = {"device": "CPU", "instructions": "avx2", "threads": 2}


def test_every_benchmark_has_a_record_and_a_page() -> None:
    ours = {f.stem for f in FOLDER.glob("*.py")} - {
        "arena_teacher",
        "card",
        "configurations",
        "records",
        "tdm_variants",
        "trajpl_teachers",
    }
    assert {*STORED} - UNMEASURED == (ours | {"race/tdm"}) - UNMEASURED
    assert {*STORED} == {f.relative_to(FOLDER).with_suffix("").as_posix() for f in FOLDER.rglob("*.md")}


@pytest.mark.parametrize("name", STORED)
def test_a_record_has_the_one_shape_and_its_page_is_made_of_it(name: str, load: Load) -> None:
    bench = load(name.rsplit("/", 1)[-1])
    records = load("records")
    stored = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert list(stored) == [f.name for f in fields(records["Record"])]
    assert stored["benchmark"] == name.rsplit("/", 1)[-1]
    record = records["read_record"](FOLDER / f"{name}.json")
    own = [row for row in record.rows if "hardware" in row]
    assert record.rows and len(own) in (0, len(record.rows))
    for holder in own or [stored]:
        assert list(holder["hardware"]) == ["device", "instructions", "threads"] and holder["hardware"]["device"]
    for row in record.rows:
        made = row.get("versions", stored["versions"])
        assert list(made) == ["commit", "torch"] and made["commit"]
    assert bench["page"](record) == (FOLDER / f"{name}.md").read_text(encoding="utf-8")


def test_a_record_says_where_it_comes_from(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    records = load("records")
    made = records["new_record"]("ring", "python x.py", [{"n": {1: 0.5}}], [2, 0], {"floor": 0.1})
    assert made.rows == [{"n": {"1": 0.5}}] and made.seeds == [0, 2]
    assert (made.hardware, made.versions) == (records["hardware"](), records["versions"]())
    assert made.hardware["threads"] == 1
    assert records["provenance"](made).startswith("`python x.py`, ") and made.date in records["provenance"](made)


def test_rows_of_several_runs_name_their_own_and_the_record_what_they_share(load: Load) -> None:
    records = load("records")
    rows = [ROW | {"hardware": HERE, "versions": {"commit": c, "torch": "2"}} for c in ("b", "a")]
    made = records["new_record"]("x", "run", rows, None, {})
    assert (made.hardware, made.versions) == (HERE, {"commit": None, "torch": "2"})
    assert records["provenance"](made) == f"`run`, CPU with avx2, 2 threads, commit a, b, torch 2, {made.date}"
    other = ROW | {"hardware": HERE | {"threads": 1}, "versions": {"commit": None, "torch": None}}
    mixed = records["new_record"]("x", "run", [*rows, other], None, {})
    assert mixed.hardware == HERE | {"threads": None} and mixed.versions == {"commit": None, "torch": None}
    assert records["machines"](mixed) == ["CPU with avx2, 1 thread", "CPU with avx2, 2 threads"]


def test_a_mean_of_several_seeds_has_a_deviation(load: Load) -> None:
    spread = load("records")["spread"]
    assert (spread([]), spread([2.0]), spread([1.0, 2.0], 1)) == ("-", "2.00", "1.5 ± 0.7")
