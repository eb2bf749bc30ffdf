"""The memory benchmark: which settings it keeps for a card, and for eight."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from fewstep.cli.plan import Phase, TooLargeError

Load = Callable[[str], dict[str, Any]]
GIB = 2**30
ENCODER = Phase("encoding prompts: text_encoder alone", 50 * GIB)


def rows(
    load: Load, monkeypatch: pytest.MonkeyPatch, cards: list[tuple[str, int]], name: str = "qwenimage"
) -> list[dict[str, Any]]:
    """Return the rows of a recipe that takes 30 GiB rounded, 100 whole, and 40 sharded; below 20 GiB nothing fits."""
    memory = load("memory")

    def plans_of(recipe: Any, count: int) -> list[Any]:
        whole = recipe.roles.quantize is None
        least = (40 if recipe.train.shard else 100 if whole else 30) * GIB
        around = SimpleNamespace(encoders=(ENCODER,))
        hollow = SimpleNamespace(teacher=SimpleNamespace(module=nn.Linear(2, 3)))
        return [SimpleNamespace(recipe=recipe, least=least, around=around, hollow=hollow)]

    def fit(made: Any, usable: int, prefix: str) -> tuple[list[str], int]:
        if usable < 20 * GIB:
            raise TooLargeError("too large", 20 * GIB)
        return (["train.batch=1"], 21 * GIB) if usable < made.least else ([], made.least)

    made = memory["card_rows"]
    monkeypatch.setitem(made.__globals__, "plans_of", plans_of)
    monkeypatch.setitem(made.__globals__, "fit", fit)
    monkeypatch.setitem(made.__globals__, "write", lambda name, folder: folder)
    return list(made(name, cards))


def test_a_card_has_the_settings_that_fit(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    small, middle, large = rows(load, monkeypatch, [("16GiB", 1), ("24GiB", 1), ("80GiB", 1)])
    assert (small["fits"], small["needed"], small["on_cpu"]) == (False, 20 * GIB, [ENCODER.name])
    assert (middle["fits"], middle["sets"], middle["needed"]) == (True, ["train.batch=1"], 21 * GIB)
    assert (large["fits"], large["sets"], large["on_cpu"]) == (True, [], [])
    assert small["parameters"] == 9 and large["recipe"] == "qwenimage-tdm4-lora"


def test_eight_cards_share_a_base_that_is_too_large_for_one(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = rows(load, monkeypatch, [("80GiB", 8)])
    assert row["sets"] == ["roles.quantize=null", "train.shard=true"]
    assert (row["fits"], row["needed"], row["cards"]) == (True, 40 * GIB, 8)


def test_eight_cards_share_the_batch_of_a_recipe(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    (row,) = rows(load, monkeypatch, [("80GiB", 8)], "sd15")
    assert row["sets"] == ["train.batch=8", "train.shard=true"]  # 64 samples over all cards
