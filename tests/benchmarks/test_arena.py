"""`benchmarks/arena.py`: its page of made-up rows, its order of trainings and its measures."""

import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Load = Callable[[str], dict[str, Any]]
MEASURED = {"accuracy": 90.0, "precision": 0.5, "recall": 0.5, "diversity": 1.0}


def row(key: str, rate: float, seed: int, fd: float, count: int = 4, stage: str = "race") -> dict[str, Any]:
    return {
        "stage": stage, "key": key, "count": count, "rate": rate, "seed": seed, "iterations": 10, "seconds": 9.0,
        "measured": {str(count): MEASURED | {"fd": fd}}, "images": 5000,
    }  # fmt: skip


def test_each_method_is_shown_at_its_best_rate_the_nearest_first(load: Load) -> None:
    arena = load("arena")
    rows = [
        row("tdm", 3e-5, 0, 5.5, stage="search"), row("tdm", 1e-4, 0, 3.5, stage="search"),
        row("tdm", 1e-4, 0, 3.0), row("tdm", 1e-4, 1, 5.0), row("lcm", 3e-4, 0, 2.0),
        row("gan-real", 1e-4, 1, 5.5, stage="settings"),
    ]  # fmt: skip
    record = sys.modules["records"].new_record("arena", "made up", rows, (0, 1), {"seconds": 12.0})
    text = arena["page"](record)
    four = text[text.index("## 4 steps, 12 CPU seconds each") :].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:6]] for line in four.splitlines() if line.startswith("| ")]
    assert lines[2:] == [["LCM", "0.0003", "10", "9.0", "2.00"], ["TDM", "0.0001", "10", "9.0", "4.00 ± 1.41"]]
    assert "| TDM | 4 | 12 |  |  | 5.50 | 3.50 |  |  |" in text
    assert "| adversarial term, real images | TDM eq. 16 | 0.50 | 5.50 |" in text  # next to the same seed


def test_longer_trainings_have_tables_of_their_own(load: Load) -> None:
    arena = load("arena")
    rows = [row("tdm", 1e-4, 0, 5.0, 1, "counts"), row("tdm", 1e-4, 0, 3.0, 1, "longer")]
    text = arena["page"](sys.modules["records"].new_record("arena", "made up", rows, (0,), {"seconds": 12.0}))
    short, long = text.split("## 1 step, 12 CPU seconds each")[1].split("## 1 step, 48 CPU seconds each")
    assert "| 5.00 |" in short and "| 3.00 |" not in short and "| 3.00 |" in long and "| 5.00 |" not in long


def test_longer_trainings_climb_to_rates_of_their_own(load: Load) -> None:
    """The shorter time's rate is where the climb begins, and the other seeds take the longer one's."""
    arena = load("arena")
    rows = [row(key, 1e-4, 0, 3.0, k, "search") for key in arena["RACERS"] for k in (4, 2, 1)]
    for cell in arena["cells"]("longer", rows, 0):
        fd = {3e-6: 4.0, 1e-5: 2.0, 3e-5: 3.0}.get(cell.rate, 5.0)
        rows.append(row(cell.key, cell.rate, 0, fd, cell.count, "longer") | {"count": cell.count})
    assert {c.rate for c in arena["cells"]("longer", rows, 1)} == {1e-5}
    assert {r["rate"] for r in rows if r["stage"] == "longer"} == {3e-6, 1e-5, 3e-5, 1e-4}
    old = row("tdm", 1e-4, 1, 9.0, stage="longer")
    assert arena["up_to_date"]([*rows, old]) == rows
    common = {"seconds": 12.0, "longer_rate": {"tdm-4": 1e-5}}
    record = sys.modules["records"].new_record("arena", "made up", rows, (0,), common)
    assert {r["rate"] for r in arena["of"](record, "tdm", 4, longer=True)} == {1e-5}


def test_the_search_climbs_to_the_best_rate_and_later_stages_take_it(load: Load) -> None:
    arena = load("arena")
    rates, racers = arena["RATES"], arena["RACERS"]
    best = {4: rates[0], 2: rates[1], 1: rates[3], 0: rates[4]}
    rows: list[dict[str, Any]] = []
    for cell in arena["cells"]("search", rows, 0):
        fd = 1.0 + abs(rates.index(cell.rate) - rates.index(best[cell.count]))
        rows.append(row(cell.key, cell.rate, 0, fd, cell.count or 4, "search") | {"count": cell.count})
    assert len({(r["key"], r["count"], r["rate"]) for r in rows}) == len(rows)
    for key, racer in racers.items():
        several = "steps" in racer.method
        for count in (4,) if several else racer.counts:
            assert arena["best_rate"](key, rows, count) == best[0 if several else count], (key, count)
    assert arena["best_rate"]("progressive-wide", rows, 2) == arena["best_rate"]("tdm-wide", rows, 2)
    assert {r["rate"] for r in rows if (r["key"], r["count"]) == ("tdm", 4)} == set(rates[:4])
    for stage, own in (("settings", arena["OTHERS"]), ("rewards", arena["REWARDED"])):
        cells = list(arena["cells"](stage, rows, 1))
        assert {c.rate for c in cells} == {best[4]} and len(cells) == len(own)
    assert {c.rate for c in arena["cells"]("counts", rows, 1) if c.key == "after-lcm"} == {best[2], best[1]}
    nearest = [*arena["cells"]("longer", rows, 1)]
    assert {(c.count, c.rate) for c in nearest} == {(k, best[k]) for k in (4, 2, 1)} and "tdm" in {
        c.key for c in nearest
    }
    with pytest.raises(SystemExit, match="no rate in 4 steps yet"):
        list(arena["cells"]("race", [], 0))


def test_rows_of_rates_that_are_not_the_best_any_more_go(load: Load) -> None:
    arena = load("arena")
    rows = [
        row("tdm", 1e-4, 0, 3.5, stage="search"), row("tdm", 3e-5, 0, 3.0, stage="search"),
        row("tdm", 1e-4, 0, 3.5), row("tdm", 3e-5, 0, 3.0), row("gan-real", 1e-4, 0, 3.0, stage="settings"),
        row("lcm", 1e-3, 0, 2.0), {"stage": "teacher", "steps": 4, "images": 5000},
    ]  # fmt: skip
    assert arena["up_to_date"](rows) == [*rows[:2], rows[3], *rows[5:]]


def test_rows_that_were_measured_otherwise_go_but_for_the_search(load: Load) -> None:
    arena = load("arena")
    few = {"images": 2000}
    rows = [row("tdm", 3e-5, 0, 3.0, stage="search") | few, row("tdm", 3e-5, 0, 3.0) | few, row("tdm", 3e-5, 1, 3.0)]
    assert arena["up_to_date"](rows) == [rows[0], rows[2]]
    text = arena["page"](sys.modules["records"].new_record("arena", "made up", rows[::2], (0,), {"seconds": 12.0}))
    assert "Rates for 12 seconds were searched with 2,000 images" in " ".join(text.split())


def test_the_average_that_is_kept_is_one_of_those_that_are_compared(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its distance is the race's, and without an average it is another."""
    arena = load("arena")
    own = sys.modules["arena_teacher"]
    monkeypatch.setattr(own, "COUNT", 40)
    torch.manual_seed(0)
    teacher, net = own.backbone_of(own.Painter(8).eval()), own.Classifier().eval().requires_grad_(False)
    test = own.Clothes(torch.rand(80, 1, 14, 14) * 2 - 1, torch.arange(80) % 10)
    data = arena["embed"](teacher, list(arena["FASHION"]), None, "painter")
    a = Namespace(seconds=12.0, out=tmp_path)
    made = arena["Arena"](teacher, own.measures(net, test), data, own.states_of(teacher, test), {}, a)
    cell, paces = arena["Cell"]("lcm", 4, 1e-3, 0), {"lcm-4": 1.0}
    raced, found = arena["race"](made, "race", cell, paces), arena["averages"](made, cell, paces)
    fds = {decay: m["fd"] for decay, m in found["measured"].items()}
    assert fds["0.99"] == pytest.approx(raced["measured"][4]["fd"], rel=1e-5)
    assert abs(fds["0"] - fds["0.99"]) > 1e-3 and found["iterations"] == raced["iterations"] == 12


def test_every_setting_is_one_that_its_method_takes(load: Load) -> None:
    arena = load("arena")
    for racer in arena["everyone"]().values():
        for count in racer.counts:
            arena["method_of"](racer, count)


def test_precision_counts_samples_inside_the_real_ones_reach(load: Load) -> None:
    load("arena")
    inside = sys.modules["arena_teacher"].inside
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]]).double()  # third neighbours at 3, 2, 2, 2 and 3
    assert inside(torch.tensor([[-2.9], [-3.1], [7.0], [7.1]]).double(), real) == 0.5


def test_an_image_is_half_as_wide_and_any_prompt_has_a_label(load: Load) -> None:
    load("arena")
    module = sys.modules["arena_teacher"]
    net = module.Painter(8, 1)
    label = module.labels_of(["bag", "", "t-shirt"])["label"]
    assert label.tolist() == [8, 10, 0]
    assert net(torch.zeros(3, 1, 14, 14), torch.zeros(3), label).shape == (3, 1, 14, 14)
