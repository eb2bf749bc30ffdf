"""What a student's card counts, and what no stock pipeline does."""

from dataclasses import replace
from typing import Any

import pytest

from fewstep.backbones.student_scheduler import pipeline_nfe
from fewstep.core.schedule import Flow
from fewstep.student.card import counted
from fewstep.student.formats import _require_stock

from .. import tiny
from .card import CARD


def test_every_step_count_says_its_calls() -> None:
    assert counted(CARD) == "4 in 4 steps"
    assert counted(replace(CARD, steps=(4, 1), head="span")) == "4 in 4 steps, 1 in 1 step"
    assert (
        counted(replace(CARD, steps=(4, 1), analytic_first_step=True))
        == "3 in 4 steps, 0 in 1 step (the first step is free)"
    )


@pytest.mark.parametrize(
    ("own", "by"),
    [
        ({"head": "span"}, "a head"),
        ({"analytic_first_step": True}, "an analytic first step"),
        ({"solver": {"4": "ipndm"}}, "ipndm"),
    ],
)
def test_what_no_stock_pipeline_does_is_not_written_for_one(own: dict[str, Any], by: str) -> None:
    with pytest.raises(
        ValueError,
        match=f"^--format: this student is sampled with {by}, which no stock pipeline has; choose student or merged$",
    ):
        _require_stock(replace(CARD, **own))
    _require_stock(CARD)


def test_a_pipeline_takes_an_analytic_first_step_where_it_asks_what_to_ask_about() -> None:
    """Flow's asks the network about the state itself, at every step."""
    assert [pipeline_nfe(tiny.TABLE, analytic, k) for analytic in (False, True) for k in (1, 4)] == [1, 4, 1, 3]
    assert pipeline_nfe(Flow(), True, 4) == 4
