"""Intervals hold what they promise, and pairs are counted by image."""

from typing import Any

import pytest
import torch

from fewstep.core.guidance import Guidance
from fewstep.evaluation.bootstrap import BLOCK, groups_of, interval, intervals, paired
from fewstep.evaluation.images import evaluate_images
from fewstep.evaluation.protocols import Row

from .test_faults import FEW, PROMPTS, drawn


def test_images_of_a_prompt_are_drawn_together() -> None:
    groups = groups_of(["a", "b", "a", "b"])
    assert [rows.tolist() for rows in groups.rows] == [[0, 2], [1, 3]]
    assert groups.images(torch.tensor([1, 1])).tolist() == [1, 3, 1, 3]
    many = groups_of(["a"] * 10, largest=2 * BLOCK)
    assert [len(rows) for rows in many.rows] == [4, 4, 2]


@pytest.fixture
def many_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.evaluation.bootstrap.DRAWS", 200)


@pytest.mark.usefixtures("many_draws")
def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    """The mean of 40 prompts of 2 images each, whose images are alike: 95 % of intervals hold the truth."""
    rng, held = torch.Generator().manual_seed(0), 0
    groups = groups_of([str(i // 2) for i in range(80)])
    for _ in range(100):
        each = torch.randn(40, generator=rng).repeat_interleave(2) + 0.1 * torch.randn(80, generator=rng)
        drawn_means = groups.means(each)[groups.draws()].mean(1)
        low, high = interval(float(each.mean()), drawn_means)
        held += low <= 0 <= high
    assert 88 <= held <= 100


def test_numbers_that_a_draw_lacks_have_no_interval() -> None:
    draws: list[dict[str, Any]] = [{"a": 1.0, "b": 1.0, "flag": True}, {"a": 3.0, "b": None, "flag": True}]
    found = intervals({"a": 2.0, "b": 1.0, "flag": True}, iter(draws))
    assert found.keys() == {"a"} and found["a"] == pytest.approx((1.05, 2.95))


def test_wins_are_counted_by_image_and_ties_by_half() -> None:
    own, other = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 2.0, 2.0, 5.0])
    found = paired(own, other, groups_of("abcd"), "low")
    assert found.wins == (1 + 0.5 + 0 + 1) / 4 and found.difference == -0.25
    assert found.wins_interval[0] < found.wins < found.wins_interval[1] <= 1
    assert paired(own, other, groups_of("abcd"), "high").wins == 1 - found.wins


def test_a_student_beats_a_teacher_that_strays_further() -> None:
    """Image by image, at the same prompts and noise, against the teacher at the student's cost."""
    far = Row("teacher", 4, Guidance(), 4, drawn(lambda x: x.roll(11, -2).flip(1)))
    near = Row("student", 4, Guidance(), 4, drawn(lambda x: 0.97 * x))
    result = evaluate_images([Row("teacher", 50, Guidance(), 100, drawn()), far, near], FEW, PROMPTS)
    (one,) = result["paired"]
    assert (one["row"], one["against"], one["metric"]) == (2, 1, "teacher_distance")
    assert one["wins"] == 1.0 and one["wins_interval"] == [1.0, 1.0] and one["difference"] < 0
    best, weak, student = result["rows"]
    assert "teacher_distance" not in best and student["teacher_distance"] < weak["teacher_distance"]
    for key in ("fd_teacher", "teacher_distance", "diversity_ratio", "variety_ratio", "saturation_ratio"):
        low, high = weak["intervals"][key]
        assert low <= weak[key] <= high and (low < high or key == "saturation_ratio"), key
    assert "seconds_per_image" not in weak["intervals"]
    assert best["saturation_ratio"] == best["diversity_ratio"] == best["sharpness_ratio"] == 1.0
