"""The table shows the numbers of eval.json and marks the best; the headlines count as they say."""

import math

import pytest

from fewstep.report.summary import Cost, at_equal_cost, headlines
from fewstep.report.table import COLUMNS, table
from fewstep.report.words import duration, times


def row(
    model: str, steps: int, nfe: int, fd: float | None, top1: float, seconds: float | None = None
) -> dict[str, object]:
    return {
        "model": model,
        "steps": steps,
        "nfe": nfe,
        "fd_real": fd,
        "retrieval_top1": top1,
        "seconds_per_image": seconds,
    }


ROWS = [
    row("teacher", 50, 100, 136.94, 0.6312, 2.471),
    row("teacher", 4, 4, 169.8, 0.4, 0.1),
    row("student", 4, 4, 142.6, 0.6312, 0.1052),
]


def shown(key: str, rows: list[dict[str, object]]) -> list[tuple[str, bool]]:
    made = table(rows)
    place = [c.key for c in made.columns].index(key)
    return [(cells[place].text, cells[place].best) for cells in made.cells]


def test_values_units_and_the_best() -> None:
    assert shown("fd_real", ROWS) == [("136.9", True), ("169.8", False), ("142.6", False)]
    assert shown("retrieval_top1", ROWS) == [("63.1\xa0%", True), ("40.0\xa0%", False), ("63.1\xa0%", True)]
    assert shown("seconds_per_image", ROWS) == [("2.471\xa0s", False), ("0.100\xa0s", True), ("0.105\xa0s", False)]
    assert shown("nfe", ROWS) == [("100", False), ("4", False), ("4", False)]
    assert [cells[3].value for cells in table(ROWS).cells] == [136.94, 169.8, 142.6]


def test_missing_and_broken_values_are_dashes_and_never_the_best() -> None:
    rows = [
        row("teacher", 50, 100, None, 0.5),
        row("teacher", 4, 4, math.nan, 0.5),
        row("student", 4, 4, 150.0, 0.5),
        row("student", 1, 1, 160.0, 0.5),
    ]
    assert shown("fd_real", rows) == [("–", False), ("–", False), ("150.0", True), ("160.0", False)]


def test_columns_that_no_row_fills_are_left_out() -> None:
    assert [c.key for c in table(ROWS).columns] == [
        "model",
        "steps",
        "nfe",
        "fd_real",
        "retrieval_top1",
        "seconds_per_image",
    ]
    assert table([]).columns == ()
    assert {c.key for c in COLUMNS} >= {"guidance", "n", "fd_teacher", "retrieval_top5", "diversity_ratio"}


def test_text_and_single_rows() -> None:
    assert shown("guidance", [{"guidance": "baked"}, {"guidance": 3.5}]) == [("baked", False), ("3.5", False)]
    assert shown("fd_real", ROWS[:1]) == [("136.9", False)]  # the best of one is no news


def test_the_three_numbers() -> None:
    quality, speed, cost = headlines(ROWS, Cost(452.0, 400, "2 CPU cores"))
    assert quality.value == "83 %"  # (169.8 - 142.6) / (169.8 - 136.94)
    assert all(number in quality.caption for number in ("142.6", "169.8", "136.9", "100 network evaluations"))
    assert (speed.value, cost.value) == ("23×", "7 min 32 s")
    assert "4 network evaluations instead of 100" in speed.caption
    assert cost.caption == "of training, 400 iterations, on 2 CPU cores."


def guided(steps: int, scale: float, fd: float, **more: object) -> dict[str, object]:
    """A teacher's row; a guided step costs two network evaluations."""
    return row("teacher", steps, steps * (2 if scale > 1 else 1), fd, 0.5) | {"guidance": scale, **more}


@pytest.mark.parametrize("flipped", [False, True])
def test_the_best_teacher_at_the_student_s_cost_is_the_baseline_and_is_named(flipped: bool) -> None:
    """The baseline is the best teacher at the student's cost.

    Two guided steps cost what four unguided ones do; the better of them counts, wherever it stands.
    """
    student = row("student", 4, 4, 13.0, 0.5)
    rows = [guided(50, 4.5, 12.8), *[guided(4, 1.0, 17.1), guided(2, 4.5, 24.1)][:: -1 if flipped else 1], student]
    quality = headlines(rows, None)[0]
    assert quality.value == "95 %"  # (17.1 - 13.0) / (17.1 - 12.8); against the worse one it would be 98 %
    assert "17.1 at the student's cost, in 4 unguided steps" in quality.caption and "24.1" not in quality.caption
    better_guided = [guided(50, 4.5, 12.8), guided(4, 1.0, 24.1), guided(2, 4.5, 17.1), student]
    assert (
        headlines(better_guided, None)[0].value == "95 %"
        and "in 2 guided steps" in headlines(better_guided, None)[0].caption
    )


def test_a_cheaper_teacher_counts_where_it_is_better_and_is_none_by_itself() -> None:
    student = row("student", 4, 4, 13.0, 0.5)
    cheap, same = guided(2, 1.0, 15.0), guided(4, 1.0, 17.1)
    assert at_equal_cost([same, cheap, student], student, "fd_real") is cheap
    assert at_equal_cost([cheap, student], student, "fd_real") is None
    assert at_equal_cost([guided(50, 4.5, 1.0)], student, "fd_real") is None
    assert at_equal_cost([same], student | {"nfe": None}, "fd_real") is None
    assert at_equal_cost([guided(4, 1.0, math.nan)], student, "fd_real") is None
    shares = [guided(4, 1.0, 9.0, retrieval_top1=0.4), guided(2, 4.5, 9.0, retrieval_top1=0.5)]
    assert at_equal_cost(shares, student, "retrieval_top1", highest=True) is shares[1]


def test_a_student_of_a_teacher_that_loses_nothing_has_no_percentage() -> None:
    quality = headlines([guided(50, 4.5, 12.8), guided(4, 1.0, 12.0), row("student", 4, 4, 13.0, 0.5)], None)[0]
    assert quality.value == "13.0" and "12.0 at the student's cost" in quality.caption


def test_without_real_images_the_best_teacher_at_equal_cost_is_named_too() -> None:
    teachers = [
        row("teacher", 50, 100, None, 0.5),
        row("teacher", 4, 4, None, 0.5) | {"fd_teacher": 9.0, "guidance": 1.0},
        row("teacher", 2, 4, None, 0.5) | {"fd_teacher": 5.0, "guidance": 4.5},
    ]
    quality = headlines([*teachers, row("student", 4, 4, None, 0.5) | {"fd_teacher": 2.0}], None)[0]
    assert quality.value == "2.0" and "the teacher at the student's cost has 5.0, in 2 guided steps" in quality.caption


def test_a_slower_student_is_not_called_faster() -> None:
    """Many cheap steps may take longer than the teacher's."""
    speed = headlines([row("teacher", 50, 100, 12.8, 0.5, 0.5), row("student", 4, 4, 13.0, 0.5, 1.0)], None)[1]
    assert speed.value == "2.0×" and speed.caption.startswith("slower than the teacher: ")


def test_headlines_need_their_numbers() -> None:
    assert headlines([], None) == []
    assert [h.value for h in headlines([], Cost(5, 1))] == ["5 s"]
    no_equal_cost = [ROWS[0], ROWS[2] | {"seconds_per_image": None}]
    assert [h.value for h in headlines(no_equal_cost, None)] == ["142.6", "25×"]
    worse = [ROWS[0], ROWS[1], row("student", 4, 4, 180.0, 0.1)]
    assert headlines(worse, None)[0].value == "-31 %"
    assert [h.value for h in headlines([row("teacher", 50, 100, None, 0), row("student", 1, 1, 5.0, 0)], None)] == [
        "100×"
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.1052, "0.11 s"),
        (48, "48 s"),
        (59.7, "1 min"),
        (450, "7 min 30 s"),
        (3601, "1 h"),
        (7500, "2 h 5 min"),
        (274000, "3 d 4 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_factors() -> None:
    assert [times(r) for r in (1.26, 9.96, 23.4)] == ["1.3×", "10×", "23×"]
