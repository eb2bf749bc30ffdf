"""`benchmarks/tdm.py`: every student's recipe can be run, and the table says of made-up results what they are."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fewstep.atomic import write_json
from fewstep.runs.recipe import DistillRecipe, validate

from ..project import ROOT


@pytest.fixture
def bench(load: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return load("tdm")


@pytest.fixture
def a(bench: dict[str, Any], tmp_path: Path) -> argparse.Namespace:
    (tmp_path / "out").mkdir()
    return bench["options"]().parse_args(["--out", str(tmp_path / "out"), "--to", str(tmp_path)])


def finish(
    bench: dict[str, Any], a: argparse.Namespace, key: str, seed: int, curve: dict[float, float], hardware: str = "h"
) -> None:
    """A result as training leaves it: FD by seconds."""
    variant = next(v for v in bench["VARIANTS"] if v.key == key)
    row = {"fd_real": min(curve.values()), "fd_teacher": 1.0, "retrieval_top1": 0.5, "diversity_ratio": 1.0}
    points = [{"seconds": s, "fd_real": fd} for s, fd in curve.items()]
    result = {
        "key": key,
        "seed": seed,
        "rows": [row | {"draw": d.title} for d in variant.draws],
        "curve": points,
        "seconds": max(curve),
        "calls": 5.5,
        "recipe": bench["settled"](variant, a),
        "hardware": {"device": hardware, "instructions": None, "threads": None},
        "versions": {"commit": "c", "torch": None},
    }
    write_json(a.out / f"{key}-{seed}" / "result.json", {"settings": bench["shared"](a), "row": result})


def test_every_recipe_can_be_run_and_every_ordering_names_a_student(bench: dict[str, Any]) -> None:
    keys = [v.key for v in bench["VARIANTS"]]
    assert len(set(keys)) == len(keys)
    for variant in bench["VARIANTS"]:
        for iterations in (2, 260):
            recipe = validate(bench["recipe_value"](variant, 3, iterations), DistillRecipe, variant.key)
        assert recipe.train.seed == 3
        assert len(variant.expect) <= len(variant.draws)
        assert bool(variant.expect) == (variant.against in keys)
        assert not variant.init_from or variant.init_from in keys
    by_key = {v.key: bench["recipe_value"](v, 0, 260)["method"] for v in bench["VARIANTS"]}
    assert by_key["dmd2"]["loss"] == "l2"
    assert by_key["dmd2"]["warmup"] * 10 == by_key["tdm-4"]["warmup"]


def test_a_tuned_variant_is_what_its_tuning_ran(bench: dict[str, Any]) -> None:
    """Its own rate is the default's times what `--rate` was, so that the run which found it can stand in the table."""
    full, recipe_value = next(v for v in bench["VARIANTS"] if v.key == "full"), bench["recipe_value"]
    assert recipe_value(full, 0, 260) == recipe_value(replace(full, rate=1.0), 0, 260, rate=full.rate)
    train = recipe_value(full, 0, 260)["train"]
    assert (train["lr"], train["fake_lr"]) == pytest.approx((5e-5, 5e-4))


def raced(bench: dict[str, Any], a: argparse.Namespace) -> list[str]:
    said: list[str] = bench["race"](list(bench["finished"](a).values()))
    return said


def test_the_race(bench: dict[str, Any], a: argparse.Namespace) -> None:
    """TDM is below the rival's best, 14, after 20 seconds, and within the noise of it after 10.

    The rival needs 150 and 100 seconds. TDM ends at 12 of 14.
    """
    finish(bench, a, "tdm-4", 0, {5: 20.0, 10: 14.1, 20: 12.0})
    finish(bench, a, "dmd2", 0, {50: 30.0, 100: 14.1, 150: 14.0})
    (line,) = raced(bench, a)
    assert line.startswith(
        "DMD2, 10 fake updates: TDM has its best FD in 13.33 % of the time, to within 0.15 of it (both) in 10.00 % of "
        "the time, and ends 14.29 % lower"
    )
    finish(bench, a, "dmd2", 0, {50: 11.0})
    assert "its best FD never, to within 0.15 of it (both) never, and ends" in raced(bench, a)[0]
    finish(bench, a, "dmd2", 0, {50: 11.0}, hardware="a faster one")
    assert raced(bench, a) == []


def test_the_table(bench: dict[str, Any], a: argparse.Namespace) -> None:
    finish(bench, a, "tdm-4", 0, {10: 12.0})
    finish(bench, a, "tdm-4", 1, {10: 13.0})
    finish(bench, a, "clean", 0, {10: 20.0})
    finish(bench, a, "full", 0, {10: 12.0})
    bench["write"]([], a)
    table = (a.to / "tdm.md").read_text()
    said = " ".join(table.split())
    command = "python benchmarks/tdm.py --only tdm-4 clean full --seeds 0 1 --iterations 260"
    assert f"`{command} --out {a.out} --to {a.to}`" in said
    assert "times 5 for `full`: what gained more than noise with one seed (docs/log.md)." in said
    assert "| 4 steps | 4 | 12.50 ± 0.71 |" in table
    assert "yes: worse, +8.00 next to tdm-4" in table
    assert (a.to / "tdm.png").stat().st_size > 10_000
    for file in a.out.glob("*/result.json"):  # a table outlives the runs
        file.unlink()
    assert set(bench["finished"](a)) == {("tdm-4", 0), ("tdm-4", 1), ("clean", 0), ("full", 0)}
    a.guidance = 3.0
    with pytest.raises(SystemExit, match="give --to another folder"):
        bench["finished"](a)


def test_a_result_with_other_settings_counts_for_nothing(bench: dict[str, Any], a: argparse.Namespace) -> None:
    finish(bench, a, "clean", 0, {10: 20.0})
    clean = next(v for v in bench["VARIANTS"] if v.key == "clean")
    assert ("clean", 0) in bench["finished"](a, of=clean)
    clean.method["match"] = {"state": "clean"}
    assert ("clean", 0) not in bench["finished"](a, of=clean)


def test_the_stored_rows_are_not_run_again(bench: dict[str, Any], a: argparse.Namespace) -> None:
    a.to = ROOT / "benchmarks"
    rows = bench["finished"](a)
    assert len(rows) == sum(len(bench["finished"](a, of=v)) for v in bench["VARIANTS"]) > 0


def test_beyond_noise(bench: dict[str, Any]) -> None:
    verdict = bench["verdict"]
    assert verdict("worse", {0: 12.0}, {0: 11.0}) == "yes: worse, +1.00"
    assert verdict("worse", {0: 12.0}, {0: 11.9}) == "no: level, +0.10"
    assert verdict("level", {0: 10.0, 1: 14.0}, {0: 11.0, 1: 12.0}) == "yes: level, +0.50"
    # Seed by seed.
    assert verdict("worse", {0: 10.0, 1: 14.0}, {0: 9.8, 1: 13.8, 2: 1.0}) == "yes: worse, +0.20"
