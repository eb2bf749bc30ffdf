"""Pixel models against their teacher and against real images: as many as they draw themselves."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.core.guidance import Guidance
from fewstep.evaluation.distances import frechet_distance, moments, principal_components
from fewstep.evaluation.features import feature_network, features
from fewstep.evaluation.images import (
    IMAGES,
    ImageProtocol,
    asked,
    chosen,
    evaluate_images,
    images_named,
    shuffled,
    spread,
)
from fewstep.evaluation.plan import digest
from fewstep.evaluation.protocols import Row

from .conftest import Draw, blob

FEW = ImageProtocol("few", count=18, components=5, batch=8)
CLASSES = ("0", "1", "2")
BLOBS = torch.stack([blob(i, "") for i in range(70)])
REAL = BLOBS[30:]

# What was measured under a protocol's name can be compared only with the same seeds: these never change.
FROZEN = {"images-quick": "345052cea0b2953b", "images": "869c37881dff0259", "images-full": "685e4c89012629cc"}


def draw(noise: float, calls: list[int] | None = None) -> Draw:
    """One of thirty images, chosen by class and seed, under a veil of the seed's colours."""

    def sampler(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        if calls is not None:
            calls.append(len(prompts))
        images = BLOBS[[(11 * int(p or 0) + s) % 30 for p, s in zip(prompts, seeds, strict=True)]].float() / 255
        veils = [torch.rand((3, 3, 3), generator=torch.Generator().manual_seed(s)) for s in seeds]
        return images.lerp(F.interpolate(torch.stack(veils), (64, 64), mode="bilinear"), noise)

    return sampler


def rows(*noises: float) -> list[Row]:
    """A teacher in few steps and in many, and students."""
    teachers = [Row("teacher", 2, Guidance(), 2, draw(0.5)), Row("teacher", 50, Guidance(scale=2.0), 100, draw(0.05))]
    return [*teachers, *(Row("student", 2, Guidance(), 2, draw(noise)) for noise in noises)]


@pytest.mark.parametrize("protocol", IMAGES, ids=lambda p: p.name)
def test_classes_come_in_turn_and_seeds_are_frozen(protocol: ImageProtocol) -> None:
    drawn = asked(protocol, ("cat", "dog"))
    assert drawn.prompts == ("cat", "dog") * (protocol.count // 2)
    assert len(set(zip(drawn.prompts, drawn.seeds, strict=True))) == protocol.count == protocol.total(1)
    assert digest(drawn.seeds)[:16] == FROZEN[protocol.name]
    assert asked(replace(protocol, count=11), ("cat", "dog")).seeds == drawn.seeds[:11]
    assert set(asked(protocol, ()).prompts) == {""}


def test_a_protocol_may_be_of_any_number_of_images() -> None:
    """As many components for each as `images-quick` has, which the images of a row can fill."""
    assert [images_named(f"images-{n}") for n in (8, 128, 1000)] == [
        ImageProtocol("images-8", 8, 3),
        ImageProtocol("images-128", 128, 48),
        ImageProtocol("images-1000", 1000, 48),
    ]
    assert [images_named(p.name) for p in IMAGES] == [None] * 3
    for name in ("images-7", "images-0", "images-50001", "images-008", f"images-{'9' * 5000}"):
        with pytest.raises(ValueError, match=r"^protocol: got images-\d+; choose images-N of N from 8 to 50000$"):
            images_named(name)
    few = images_named("images-8")
    assert few is not None
    result = evaluate_images(rows(0.05, 0.5), few, CLASSES)
    assert result["rows"][2]["fd_teacher"] < result["rows"][3]["fd_teacher"]


def test_a_student_is_as_far_from_its_teacher_as_it_draws_otherwise() -> None:
    result = evaluate_images(rows(0.05, 0.2, 0.5), FEW, CLASSES)
    weak, best, same, near, far = result["rows"]
    assert best["fd_teacher"] is None
    assert same["fd_teacher"] == pytest.approx(0, abs=1e-4)
    assert 1 < near["fd_teacher"] < far["fd_teacher"]
    assert weak["fd_teacher"] == pytest.approx(far["fd_teacher"])
    assert [r["n"] for r in result["rows"]] == [18] * 5
    assert [r["fd_real"] for r in result["rows"]] == [None] * 5
    assert result["distance"] == "FD-efflite0, 5 components of the teacher's features, 18 images against 18"
    assert result["fd_floor"] is None
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_distances_are_between_as_many_real_images_as_are_drawn() -> None:
    result = evaluate_images(rows(0.2), FEW, CLASSES, REAL)
    drawn, network = asked(FEW, CLASSES), feature_network()
    ours = (draw(0.2)(drawn.prompts, drawn.seeds) * 255).round() / 255
    real, others, own = (features(network, x).sqrt().double() for x in (*shuffled(REAL)[:36].split(18), ours))
    space = principal_components(real, 5)
    unit = (100 / space.variance.sum()).sqrt()
    to_real = [frechet_distance(*(moments(unit * space(x)) for x in (real, y))) for y in (own, others)]
    assert result["rows"][2]["fd_real"] == pytest.approx(to_real[0], rel=1e-4)
    assert result["fd_floor"] == pytest.approx(to_real[1], rel=1e-4)
    assert result["rows"][1]["fd_real"] < result["rows"][2]["fd_real"] < result["rows"][0]["fd_real"]
    assert result["rows"][2]["fd_teacher"] > 0
    assert result["distance"] == "FD-efflite0, 5 components of the real images' features, 18 images against 18"
    assert evaluate_images(rows()[1:], FEW, CLASSES, REAL[:35])["fd_floor"] is None


def test_real_images_are_mixed_and_those_without_colour_are_grey() -> None:
    grey = REAL[:, :1]
    shown = shuffled(grey)
    assert shown.shape == (40, 3, 64, 64) and bool((shown[:, 0] == shown[:, 2]).all())
    assert not torch.equal(shown, grey.expand(-1, 3, -1, -1).float() / 255)
    assert torch.equal(shown, shuffled(grey))


def test_an_evaluation_goes_on_where_it_stopped(tmp_path: Path) -> None:
    calls: list[int] = []
    student = [Row("student", 2, Guidance(), 2, draw(0.2, calls))]
    first = evaluate_images(student, FEW, CLASSES, REAL, tmp_path)
    assert calls == [8, 8, 2]
    calls.clear()
    assert evaluate_images(student, FEW, CLASSES, REAL, tmp_path) == first
    assert calls == [1]  # the one that is compared


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="real: got 17 images, protocol few compares 18 with 18; choose a smaller one"):
        evaluate_images(rows(0.2), FEW, CLASSES, REAL[:17])
    with pytest.raises(ValueError, match="protocol few: there is no teacher to compare with, nor real images"):
        evaluate_images(rows(0.2)[2:], FEW, CLASSES)


def test_of_many_prompts_half_as_many_as_images_are_drawn_twice() -> None:
    prompts = [f"prompt {i}" for i in range(40)]
    names = chosen(FEW, [*prompts, *prompts])
    drawn = asked(FEW, names)
    assert len(names) == 9 and set(names) < set(prompts)
    assert sorted(drawn.prompts) == sorted([*names, *names]) and len(set(drawn.seeds)) == 18
    assert chosen(replace(FEW, count=8), prompts) == names[:4]  # a small protocol is the beginning of a large one
    assert chosen(FEW, ["b", "a"]) == tuple(sorted("ab", key=digest))


def test_diversity_is_that_of_the_seeds_of_a_prompt() -> None:
    points = torch.tensor([[0.0, 0.0], [5.0, 0.0], [0.0, 3.0], [5.0, 1.0]], dtype=torch.float64)
    assert spread(points, ["a", "b", "a", "b"]) == pytest.approx(2.0)
    assert spread(points, ["a", "b", "a", "c"]) is None
    result = evaluate_images(rows(0.05, 0.5), FEW, CLASSES)
    _, best, same, far = result["rows"]
    assert same["diversity_ratio"] == pytest.approx(1) and best["collapsed"] is False
    still = Row("student", 2, Guidance(), 2, lambda prompts, seeds: draw(0.05)(prompts, [0] * len(seeds)))
    row = evaluate_images([*rows(), still], FEW, CLASSES)["rows"][-1]
    assert row["diversity"] == pytest.approx(0, abs=1e-6) and row["collapsed"] is True
