"""Votes are counted right to the digit, and answers of another study are not."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fewstep.study.answers import read_ballots
from fewstep.study.count import Tally, as_json, count, per_prompt, summary
from fewstep.study.key import Pair
from fewstep.study.statistics import wilson

from .studies import key_of, sheet, written

KEY = replace(
    key_of(("a", "b|c")),
    pairs=(Pair(0, 0, 1), Pair(1, 1, 0), Pair(0, 2, 0), Pair(1, 0, 2), Pair(0, 1, 2), Pair(1, 2, 1)),
)
A, B, C = KEY.models


def answers(better: str, left: str = "ffffff") -> list[dict[str, Any]]:
    """One letter for every pair: f(irst), s(econd), t(ie), or . for none; and which is on the left."""
    words = {"f": "first", "s": "second", "t": "tie"}
    return [
        {"pair": i, "left": words[left[i]], "better": words[c], "seconds": 1.5}
        for i, c in enumerate(better)
        if c != "."
    ]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    one = sheet(KEY, "r1", answers("ffstff", "fsfsfs"), name="Ada")
    two = sheet(KEY, "r2", answers("fs.tsf"), name="Bo <b>")
    return [written(tmp_path / "1.json", one), written(tmp_path / "2.json", two)]


def test_wins_ties_and_losses_are_those_of_the_models(files: list[Path]) -> None:
    result = count(KEY, read_ballots(files, KEY))
    ab, ac, bc = result.questions["better"].matches
    # A against B: pair 0 is A's for both; pair 1 has B first, who wins with Ada and loses with Bo.
    assert ab.tally == Tally(3, 0, 1) and ab.prompts == (Tally(2, 0, 0), Tally(1, 0, 1))
    assert ab.raters == {"Ada": Tally(1, 0, 1), "Bo <b>": Tally(2, 0, 0)}
    # A against C: pair 2 has C first and goes to A with Ada, Bo did not answer; pair 3 is a tie for both.
    assert ac.tally == Tally(1, 2, 0) and ac.tally.rate == 2 / 3
    # B against C: pair 4 B with Ada, C with Bo; pair 5 has C first, who wins twice.
    assert bc.tally == Tally(1, 0, 3) and bc.tally.rate == 0.25
    assert (bc.low, bc.high) == wilson(0.25, 2) or bc.low < 0.25 < bc.high
    # The left: Ada had the second image there in pairs 1, 3 and 5, of which 0, 0.5 and 0 went to it.
    assert result.questions["better"].left["Ada"] == pytest.approx((1 + 0 + 0 + 0.5 + 1 + 0) / 6)
    assert result.questions["follows"].matches[0].tally == Tally(0, 0, 0)
    assert result.questions["follows"].matches[0].tally.rate is None


def test_the_tables_say_the_same(files: list[Path]) -> None:
    result = count(KEY, read_ballots(files, KEY))
    lines = summary(result)
    assert f"| {A} | {B} | 3 | 0 | 1 | 75.0 % |" in "\n".join(lines)
    assert "11 of 12 votes, 2 raters, 2 prompts. A tie is half a win." in lines
    assert "0 of 12 votes, 2 raters, 2 prompts. A tie is half a win." in lines
    assert any(line.startswith("| Bo \\<b\\> | 2-0-0 (100.0 %) | 0-1-0 (50.0 %)") for line in lines)
    assert "| b\\|c | 1-0-1 | 0-2-0 | 0-0-2 |" in per_prompt(result)
    values = json.loads(json.dumps(as_json(result)))
    first = values["questions"]["better"]["pairs"][0]
    assert (first["a"], first["b"], first["wins"], first["rate"]) == (A, B, 3, 0.75)
    assert first["interval"][0] < 0.75 < first["interval"][1]
    assert [p["prompt"] for p in first["prompts"]] == ["a", "b|c"]
    assert values["questions"]["follows"]["agreement"] is None


def test_agreement_is_over_pairs_that_several_answered(files: list[Path], tmp_path: Path) -> None:
    same = written(tmp_path / "3.json", sheet(KEY, "r3", answers("ffstff"), name="Ada"))
    result = count(KEY, read_ballots([files[0], same], KEY))
    assert result.questions["better"].alpha == 1
    assert result.raters == ("Ada (1)", "Ada (2)")
    assert count(KEY, read_ballots(files[:1], KEY)).questions["better"].alpha is None


def test_what_a_rater_saved_last_counts(files: list[Path], tmp_path: Path) -> None:
    later = written(tmp_path / "3.json", sheet(KEY, "r1", answers("sstsss"), name="Ada", saved="2027"))
    for order in ([later, files[0]], [files[0], later]):
        ballots = read_ballots(order, KEY)
        assert ballots.notes == ("note: Ada is there twice; what was saved last counts",)
        assert count(KEY, ballots).questions["better"].matches[0].tally == Tally(1, 0, 1)


def test_answers_of_another_study_are_refused_in_one_line(tmp_path: Path) -> None:
    other = written(tmp_path / "other.json", sheet(KEY, "r", [], study="0123456789abcdef"))
    said = f"other.json answers study 0123456789abcdef, the key is that of {KEY.study}; pass --out FOLDER of that study"
    with pytest.raises(ValueError, match=re.escape(said)) as told:
        read_ballots([other], KEY)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({}, "it lacks answers"),
        ([], "it holds a list"),
        (sheet(KEY, "r", [{"pair": 6, "left": "first"}]), "pair 6 is none of the study's 6"),
        (sheet(KEY, "r", [{"pair": 0, "left": "first"}] * 2), "or is there twice"),
        (sheet(KEY, "r", [{"pair": 0, "left": "first", "better": "mine"}]), "is 'mine', not first, tie, second"),
        (sheet(KEY, "r", [{"pair": 0, "left": "up"}]), "has 'up' on its left"),
        (sheet(KEY, "r", [{"pair": True, "left": "first"}]), "answers.0.pair is true"),
        (sheet(KEY, "r", [{"pair": 0, "left": "first", "better": 3}]), "better is 3"),
    ],
)
def test_a_file_that_holds_something_else_is_one_line(tmp_path: Path, value: object, said: str) -> None:
    path = written(tmp_path / "x.json", value)
    with pytest.raises(ValueError, match=re.escape(said)) as told:
        read_ballots([path], KEY)
    assert str(told.value).startswith(f"--count: {path} holds no answers") and "\n" not in str(told.value)
