"""`benchmarks/stages.py`: what each way trains can be run, and the table keeps what is there."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fewstep.runs.recipe import DistillRecipe, validate

from ..project import ROOT

Bench = dict[str, Any]


@pytest.fixture
def bench(load: Callable[[str], Bench]) -> Bench:
    return load("stages")


def recipe(bench: Bench, key: str, batch: int = 32, seed: int = 3) -> DistillRecipe:
    (way,) = (w for w in bench["WAYS"] if w.key == key)
    return validate(bench["recipe_of"](way, Path("kept"), batch, seed), DistillRecipe, key)


def test_every_way_is_a_recipe_of_the_same_batch_seed_and_trajectories(bench: Bench) -> None:
    for way in bench["WAYS"]:
        found = recipe(bench, way.key, batch=8, seed=3)
        for stage in (found, found.warm_start) if found.warm_start else (found,):
            assert stage.train.batch == 8
            assert stage.train.seed == (31 if stage is found and found.warm_start else 30)
            assert stage.data is None or Path(str(stage.data.folder)) == Path("kept/trajectories")
    assert recipe(bench, "tdm").warm_start is None
    assert {w.key for w in bench["WAYS"]} >= {*bench["ALONE"], *bench["STAGED"]}
    assert recipe(bench, "imitation-equal").warm_start is None
    assert recipe(bench, "imitation-equal").method.name == "trajp-l"
    assert [recipe(bench, f"{key}-equal").method.head for key in ("imitation", "trajpl")] == ["none", "span"]


def test_a_head_is_kept_or_absorbed(bench: Bench) -> None:
    plain, head, absorbed = (recipe(bench, key) for key in ("stages", "head", "absorb"))
    assert plain.warm_start and head.warm_start and absorbed.warm_start
    assert [r.warm_start.method.head for r in (plain, head, absorbed) if r.warm_start] == ["none", "span", "span"]
    assert (head.method.init_head, absorbed.method.init_head) == ("keep", "absorb")
    # As much matching after it.
    assert absorbed.train.iterations - absorbed.method.warmup == head.train.iterations - head.method.warmup


def test_guidance_of_a_way_takes_the_place_of_a_plain_scale(bench: Bench) -> None:
    same, plain = recipe(bench, "tdm-same").method, recipe(bench, "tdm-520").method
    assert (same.guidance.scale, same.guidance.apg_eta, same.shift) == (4.5, 0, 0.5)
    assert (plain.guidance.scale, plain.guidance.apg_eta) == (4.5, 1)


def row(key: str, fd: float, seed: int = 0, settings: Any = None) -> dict[str, Any]:
    of = {"fd_real": fd, "retrieval_top1": 0.5, "retrieval_top5": 0.75}
    return {
        "key": key,
        "seed": seed,
        "seconds": 90.0,
        "settings": settings,
        "teacher": of,
        "row": of,
        "hardware": {"device": "h", "instructions": None, "threads": None},
        "versions": {"commit": "c", "torch": None},
    }


def test_the_table_keeps_its_rows(bench: Bench, tmp_path: Path) -> None:
    a = Namespace(to=tmp_path, batch=32)
    assert bench["kept"](a) == {}
    bench["write"]({("tdm", 0): row("tdm", 9.0)}, a)
    bench["write"](bench["kept"](a) | {("stages", 0): row("stages", 8.5)}, a)
    assert set(bench["kept"](a)) == {("tdm", 0), ("stages", 0)}
    lines = (tmp_path / "stages.md").read_text().splitlines()
    assert "| TDM alone, to its end | `tdm` | 1.5 | 4 | 9.00 | 50.0 % / 75.0 % | 1 |" in lines
    assert "| imitation, then TDM | `stages` | 1.5 | 4 | 8.50 | 50.0 % / 75.0 % | 1 |" in lines
    assert (tmp_path / "stages.png").exists()


def test_what_a_quality_costs_either_way_is_told_by_the_cheapest_that_has_it(bench: Bench) -> None:
    of = {w.key: list[dict[str, Any]]() for w in bench["WAYS"]}
    of |= {
        "tdm": [row("tdm", 9.0) | {"seconds": 1200.0}, row("tdm", 9.2, 1) | {"seconds": 1200.0}],
        "tdm-200": [row("tdm-200", 8.0)],
    }
    of |= {
        "stages": [row("stages", 8.5) | {"seconds": 900.0}],
        "stages-half": [row("stages-half", 9.1) | {"seconds": 300.0}],
    }
    assert bench["costs"](of) == [
        "`tdm-200` has FD 8.00 in 1.5 minutes; no staged way is as good.",
        "`tdm` has FD 9.10 in 20.0 minutes; `stages-half` has 9.10 in 25% of the minutes.",
    ]


def test_a_row_of_other_settings_is_another(bench: Bench) -> None:
    way = next(w for w in bench["WAYS"] if w.key == "stages")
    kept = row("stages", 9.0, settings=bench["settings_of"](way, Namespace(batch=32)))
    assert bench["measured_as"](kept, way, Namespace(batch=32))
    assert not bench["measured_as"](kept, way, Namespace(batch=16))
    other = kept | {"settings": kept["settings"] | {"processes": 2}}
    assert not bench["measured_as"](other, way, Namespace(batch=32))


def test_the_stored_rows_are_not_run_again(bench: Bench) -> None:
    a = Namespace(to=ROOT / "benchmarks", batch=32)
    ways = {w.key: w for w in bench["WAYS"]}
    assert all(bench["measured_as"](kept, ways[key], a) for (key, _), kept in bench["kept"](a).items())
