"""`benchmarks/ring.py`: its shares and its table; two of its variants from end to end in a handful of iterations."""

import json
import math
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.backbones.toy import Mixture
from fewstep.methods.distribution_matching import DistributionMatching

Bench = dict[str, Any]


@pytest.fixture
def bench(load: Callable[[str], Bench]) -> Bench:
    return load("ring")


def test_shares_are_those_of_the_nearest_mode(bench: Bench) -> None:
    means = Mixture.ring().means
    points = torch.cat([means[0].repeat(3, 1), means[2:]]) + 0.01
    found = bench["shares"](points.float(), means)
    assert found.tolist() == pytest.approx([3 / 9, 0, *[1 / 9] * 6])


def test_every_variant_is_settings_of_one_method(bench: Bench) -> None:
    assert len({v.key for v in bench["VARIANTS"]}) == len(bench["VARIANTS"])
    methods = {v.key: bench["method_of"](v, 600) for v in bench["VARIANTS"]}
    for variant in bench["VARIANTS"]:
        assert isinstance(methods[variant.key], DistributionMatching)
        assert set(variant.counts) <= set(methods[variant.key].counts)
        assert methods[variant.key].fake.snr_clip == 50
    assert len(set(map(repr, methods.values()))) == len(methods)
    dmd2 = methods["dmd2"]
    assert (dmd2.warmup, dmd2.fake.updates, dmd2.match.tau_max, dmd2.solver) == (15, 10, 0.98, "renoise")
    assert (methods["tdm"].warmup, methods["tdm"].fake.updates) == (50, 3)


def test_a_short_training_trains_the_student(bench: Bench) -> None:
    for variant in bench["VARIANTS"]:
        assert bench["method_of"](variant, 4).warmup == min(3, bench["method_of"](variant, 600).warmup)


def row(key: str, seed: int, *measured: tuple[int, float, float]) -> dict[str, Any]:
    return {
        "key": key,
        "seed": seed,
        "seconds": 2.0,
        "rows": [{"steps": k, "distance": d, "rarest": r} for k, d, r in measured],
    }


def test_the_table_is_in_units_of_the_floor_for_what_was_run(bench: Bench, tmp_path: Path) -> None:
    results = [
        row("tdm", 0, (2, 0.2, 0.9)),
        row("tdm", 1, (2, 0.4, 0.7)),
        row("unify", 0, (2, 0.1, 1.0), (1, 0.3, 0.5)),
    ]
    bench["write"](results, 0.1, Namespace(iterations=7, seeds=[0, 1], teacher_steps=2000, to=tmp_path))
    table = json.loads((tmp_path / "ring.json").read_text())
    assert table["rows"] == results
    command = "python benchmarks/ring.py --iterations 7 --seeds 0 1"
    assert (table["common"], table["seeds"], table["command"]) == ({"floor": 0.1}, [0, 1], command)
    lines = [line for line in (tmp_path / "ring.md").read_text().splitlines() if line.startswith("| TDM")]
    assert lines == [
        "| TDM, 2 steps | 2 | 3.00 ± 1.41 | 0.80 ± 0.14 | 2.00 ± 0.00 |  |",
        "| TDM-unify | 2 | 1.00 | 1.00 | 2.00 | one student serves all (eq. 8) |",
        "| TDM-unify | 1 | 3.00 | 0.50 | 2.00 | one student serves all (eq. 8) |",
    ]


@pytest.mark.slow
def test_two_variants_run_and_are_not_run_again(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ["--iterations", "4", "--teacher-steps", "4", "--seeds", "0", "--only", "unify", "dmd2"]
    monkeypatch.setattr("sys.argv", ["ring.py", *settings, "--out", str(tmp_path / "kept"), "--to", str(tmp_path)])
    bench["main"]()
    table = json.loads((tmp_path / "ring.json").read_text())
    assert [(r["key"], [own["steps"] for own in r["rows"]]) for r in table["rows"]] == [
        ("unify", [2, 1]),
        ("dmd2", [2]),
    ]
    assert all(math.isfinite(own["distance"]) and 0 <= own["rarest"] <= 1 for r in table["rows"] for own in r["rows"])
    assert 0 < table["common"]["floor"] < 0.01
    assert table["command"].endswith("--iterations 4 --seeds 0 --teacher-steps 4")
    assert (tmp_path / "ring.md").read_text().count("\n| ") == 2 + 3
    assert {f.name for f in (tmp_path / "kept").iterdir()} == {"unify-0.json", "dmd2-0.json"}

    def again(*_: object) -> None:
        pytest.fail("a kept run was run again")

    monkeypatch.setitem(bench["main"].__globals__, "run", again)
    bench["main"]()
    assert json.loads((tmp_path / "ring.json").read_text())["rows"] == table["rows"]
