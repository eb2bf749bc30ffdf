"""`benchmarks/arena.py`: its page of made-up rows, its order of trainings and its measures."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

Load = Callable[[str], dict[str, Any]]
MEASURED = {"accuracy": 90.0, "precision": 0.5, "recall": 0.5, "diversity": 1.0}


def row(key: str, rate: float, seed: int, fd: float, count: int = 4, stage: str = "race") -> dict[str, Any]:
    return {
        "stage": stage, "key": key, "count": count, "rate": rate, "seed": seed, "iterations": 10, "seconds": 9.0,
        "measured": {str(count): MEASURED | {"fd": fd}},
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
    assert "| TDM | 5.50 | 3.50 | - |" in text
    assert "| adversarial term, real images | TDM eq. 16 | 0.50 | 5.50 |" in text  # next to the same seed


def test_the_search_tries_every_rate_and_later_stages_take_the_best(load: Load) -> None:
    arena = load("arena")
    tuned = list(arena["cells"]("search", [], 0))
    assert len({(c.key, c.rate) for c in tuned}) == len(tuned) == 3 * len(arena["RACERS"])
    rows = [row(key, rate, 0, 1.0 + (rate != racer.rates[2]), stage="search")
            for key, racer in arena["RACERS"].items() for rate in racer.rates]  # fmt: skip
    for stage, racers in (("settings", arena["OTHERS"]), ("rewards", arena["REWARDED"])):
        cells = list(arena["cells"](stage, rows, 1))
        assert {c.rate for c in cells} == {arena["RACERS"]["tdm"].rates[2]} and len(cells) == len(racers)
    with pytest.raises(SystemExit, match="no rate yet"):
        list(arena["cells"]("race", [], 0))


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
