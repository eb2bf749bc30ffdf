"""Whole evaluations of generators whose quality is known."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.core.guidance import Guidance
from fewstep.evaluation.distances import frechet_distance, moments
from fewstep.evaluation.plan import plan
from fewstep.evaluation.protocols import PROTOCOLS, Row, evaluate, protocol_named
from fewstep.evaluation.reference import load_reference, without_tone

from .conftest import Draw, World

CONTRACT = {
    "model",
    "steps",
    "guidance",
    "nfe",
    "n",
    "fd_real",
    "fd_teacher",
    "retrieval_top1",
    "retrieval_top5",
    "diversity",
    "seconds_per_image",
}


def run(world: World, rows: Sequence[Row], cache: Path | None = None, **options: Any) -> dict[str, Any]:
    return evaluate(rows, world.protocol, cache, reference=world.folder, **options)


def teacher(draw: Draw, steps: int = 50) -> Row:
    return Row("teacher", steps, Guidance(scale=3.0), 2 * steps, draw)


def student(draw: Draw, steps: int = 4) -> Row:
    return Row("student", steps, Guidance(), steps, draw)


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    return {**result, "rows": [{k: v for k, v in row.items() if k != "seconds_per_image"} for row in result["rows"]]}


@pytest.fixture(scope="module")
def result(world: World) -> dict[str, Any]:
    """A good teacher with few and with many steps, and five students.

    The students are as good, worse, at the wrong prompt and tone, and collapsed.
    """
    captions = [b.caption for b in world.blobs if not b.tone]

    def elsewhere(prompt: str) -> str:
        name, tone = without_tone(prompt)
        return (
            captions[captions.index(prompt) - 1]
            if prompt in captions
            else f"{name}, {'light' if tone.startswith('d') else 'dark'} skin tone"
        )

    rows = [
        teacher(world.draw(0.2), steps=4),
        teacher(world.draw(0.02)),
        teacher(world.draw(0.3)),
        student(world.draw(0.02)),
        student(world.draw(0.2), steps=1),
        student(world.draw(0.02, elsewhere), steps=2),
        student(world.draw(0.02, one_seed=True), steps=8),
    ]
    return run(world, rows)


def test_the_contract(result: dict[str, Any], world: World) -> None:
    assert result["protocol"] == "blobs"
    assert result["distance"] == "FD-efflite0, 6 components"
    assert set(result["versions"]) == {"fewstep", "torch"}
    assert result["reference_sha256"] == world.protocol.reference
    assert all(len(result[k]) == 64 for k in ("prompts_sha256", "seeds_sha256"))
    assert all(set(row) >= CONTRACT for row in result["rows"])
    assert [row["model"] for row in result["rows"]] == ["teacher"] * 3 + ["student"] * 4
    assert all(row["n"] == 20 for row in result["rows"])
    assert all(0 < row["seconds_per_image"] < 1 for row in result["rows"])
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert "fid" not in json.dumps(result).lower()


def test_the_floor_is_the_distance_of_the_named_images_in_the_leading_components(
    world: World, result: dict[str, Any]
) -> None:
    reference = load_reference(world.folder)
    names = plan(world.protocol, reference).prompts[:20]
    some = reference.gallery[[reference.names.index(n) for n in names], :6]
    assert result["fd_floor"] == pytest.approx(frechet_distance(moments(reference.gallery[:, :6]), moments(some)))


def test_a_generator_of_real_images_is_as_good_as_real_images(result: dict[str, Any]) -> None:
    good, worse = result["rows"][3], result["rows"][4]
    for key in ("retrieval_top1", "retrieval_top5", "tone", "held_out_top1", "held_out_tone"):
        assert good[key] == 1.0, key
    assert good["fd_real"] < 2 * result["fd_floor"]
    assert good["fd_real"] < 0.5 * worse["fd_real"]
    assert good["kid_real"] < 0.5 * worse["kid_real"]
    assert not good["collapsed"]


def test_images_of_other_prompts_are_near_the_real_ones_and_found_out(result: dict[str, Any]) -> None:
    wrong = result["rows"][5]
    assert wrong["fd_real"] < 3 * result["fd_floor"]
    assert wrong["retrieval_top1"] <= 0.1
    assert wrong["tone"] == wrong["held_out_tone"] == 0.0
    assert wrong["held_out_top1"] == 1.0  # the name is right, the tone is not


def test_held_out_tones_are_counted_apart(world: World) -> None:
    held_out = {b.caption: f"{b.name}, light skin tone" for b in world.blobs if b.held_out}
    row = run(world, [student(world.draw(0.02, lambda prompt: held_out.get(prompt, prompt)))])["rows"][0]
    assert (row["tone"], row["held_out_tone"]) == (1.0, 0.0)


def test_a_generator_without_diversity_is_flagged(result: dict[str, Any]) -> None:
    collapsed = result["rows"][6]
    assert collapsed["diversity"] == pytest.approx(0, abs=1e-6)
    assert collapsed["collapsed"] is True
    assert [row["collapsed"] for row in result["rows"][:6]] == [False] * 6
    assert collapsed["retrieval_top1"] == 1.0  # nothing else would tell


def test_the_teacher_with_most_steps_is_compared_with(result: dict[str, Any]) -> None:
    rows = result["rows"]
    assert [row["fd_teacher"] is None for row in rows] == [False, True, False, False, False, False, False]
    assert rows[3]["fd_teacher"] == pytest.approx(0, abs=1e-5)  # the very images of the first teacher at 50 steps
    assert rows[0]["fd_teacher"] > 1
    assert rows[1]["diversity_ratio"] == rows[3]["diversity_ratio"] == 1.0
    assert rows[4]["diversity_ratio"] == pytest.approx(rows[4]["diversity"] / rows[1]["diversity"])


def test_without_a_teacher_nothing_is_compared(world: World) -> None:
    row = run(world, [student(world.draw(0.02))])["rows"][0]
    assert row["fd_teacher"] is row["diversity_ratio"] is row["collapsed"] is None
    assert math.isfinite(row["fd_real"])


def test_the_same_generator_twice_is_the_same(world: World, result: dict[str, Any]) -> None:
    again = run(world, [teacher(world.draw(0.02)), student(world.draw(0.02))])
    for key in ("fd_real", "kid_real", "retrieval_top5", "diversity", "tone"):
        assert again["rows"][0][key] == again["rows"][1][key] == result["rows"][1][key]


def test_every_row_gets_the_same_prompts_and_seeds_in_batches(world: World) -> None:
    asked: list[list[tuple[str, int]]] = [[], []]

    def recording(i: int) -> Draw:
        def sampler(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            assert len(prompts) <= world.protocol.batch
            asked[i] += zip(prompts, seeds, strict=True)
            return world.draw()(prompts, seeds)

        return sampler

    run(world, [teacher(recording(0)), student(recording(1))])
    assert asked[0] == asked[1]
    assert len(asked[0]) == world.protocol.total(1)


def test_images_are_rounded_as_in_a_file(world: World) -> None:
    def rounded(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return (world.draw(0.1)(prompts, seeds) * 255).round().to(torch.uint8).float() / 255

    exact = run(world, [student(world.draw(0.1))])
    assert without_times(run(world, [student(rounded)])) == without_times(exact)


class Stopped(BaseException):
    """As a Ctrl-C would."""


def counting(draw: Draw, calls: list[int], stop_after: int | None = None) -> Draw:
    def sampler(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        if len(calls) == stop_after:
            raise Stopped
        calls.append(len(prompts))
        return draw(prompts, seeds)

    return sampler


def test_an_interrupted_evaluation_goes_on_to_the_same_numbers(world: World, tmp_path: Path) -> None:
    straight = run(world, [teacher(world.draw(0.05)), student(world.draw(0.1))])
    first: list[int] = []
    with pytest.raises(Stopped):
        run(world, [teacher(world.draw(0.05)), student(counting(world.draw(0.1), first, stop_after=2))], tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    heard: list[int] = []
    calls: tuple[list[int], list[int]] = ([], [])
    rows = [teacher(counting(world.draw(0.05), calls[0])), student(counting(world.draw(0.1), calls[1]))]
    resumed = run(world, rows, tmp_path, progress=heard.append)
    assert without_times(resumed) == without_times(straight)
    total = world.protocol.total(1)
    assert calls[0] == [1]  # only the image that is compared
    assert calls[1] == [1, *[8] * ((total - 16) // 8), *([total % 8] if total % 8 else [])]
    assert heard == sorted(heard)
    assert heard[0] == total
    assert heard[-1] == world.protocol.total(2)
    assert run(world, rows, tmp_path) == resumed  # finished rows keep their times too


def test_a_model_that_changed_is_measured_anew(world: World, tmp_path: Path) -> None:
    run(world, [student(world.draw(0.02))], tmp_path)
    changed = run(world, [student(world.draw(0.1))], tmp_path)
    assert without_times(changed) == without_times(run(world, [student(world.draw(0.1))]))


def test_a_shipped_row_is_used_and_not_written(world: World, tmp_path: Path) -> None:
    shipped, cache, calls = tmp_path / "shipped", tmp_path / "cache", list[int]()
    expected = run(world, [teacher(world.draw(0.02))], shipped)
    before = {f.name: f.stat().st_mtime_ns for f in shipped.iterdir()}
    assert run(world, [teacher(counting(world.draw(0.02), calls))], cache, shipped=shipped) == expected
    assert calls == [1]
    assert not cache.exists()
    assert {f.name: f.stat().st_mtime_ns for f in shipped.iterdir()} == before


def test_the_longest_kept_row_is_used(world: World, tmp_path: Path) -> None:
    shipped, cache, calls = tmp_path / "shipped", tmp_path / "cache", list[int]()
    with pytest.raises(Stopped):
        run(world, [student(counting(world.draw(0.02), [], stop_after=2))], cache)
    expected = run(world, [student(world.draw(0.02))], shipped)
    assert run(world, [student(counting(world.draw(0.02), calls))], cache, shipped=shipped) == expected
    assert calls == [1]


def test_rows_of_one_name_and_other_costs_are_kept_apart(world: World, tmp_path: Path) -> None:
    calls: list[int] = []
    rows = [
        Row("student", 4, Guidance(), nfe, counting(world.draw(noise), calls)) for nfe, noise in ((4, 0.02), (7, 0.1))
    ]
    run(world, rows, tmp_path)
    calls.clear()
    run(world, rows, tmp_path)
    assert calls == [1, 1]


def test_another_protocol_does_not_take_kept_rows(world: World, tmp_path: Path) -> None:
    run(world, [student(world.draw(0.02))], tmp_path)
    calls: list[int] = []
    smaller = replace(world.protocol, names=10)
    evaluate([student(counting(world.draw(0.02), calls))], smaller, tmp_path, reference=world.folder)
    assert sum(calls) == smaller.total(1)


def test_a_damaged_file_is_named(world: World, tmp_path: Path) -> None:
    run(world, [student(world.draw(0.02))], tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=rf"{file.name} is damaged .*; delete it and run the same command again"):
        run(world, [student(world.draw(0.02))], tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: {k: v for k, v in t.items() if k != "seconds"},
        lambda t: t | {"embeddings": t["embeddings"][:, 1:]},
        lambda t: t | {"colours": t["colours"][1:]},
        lambda t: t | {"seconds": t["seconds"][:0]},
        lambda t: t | {"seconds": torch.tensor(1.0)},
        lambda t: t | {"colours": t["colours"].double()},
        lambda t: t | {"embeddings": t["embeddings"] * float("nan")},
    ],
)
def test_a_file_of_other_tensors_is_named(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], world: World, tmp_path: Path
) -> None:
    run(world, [student(world.draw(0.02))], tmp_path)
    (file,) = tmp_path.iterdir()
    save_file({k: v.contiguous() for k, v in change(load_file(file)).items()}, file)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged .*; delete it and run the same command again"):
        run(world, [student(world.draw(0.02))], tmp_path)


def test_another_reference_is_refused(world: World) -> None:
    with pytest.raises(
        ValueError,
        match=r"protocol emoji-quick: the reference .* has hash \w{12}, expected \w{12}; install fewstep again",
    ):
        evaluate([student(world.draw())], protocol_named("emoji-quick"), reference=world.folder)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda x: x[:1], r"returned \[1, 3, 64, 64\]; return images \[8, 3, H, W\]"),
        (lambda x: x[:, :1], r"returned \[8, 1, 64, 64\]"),
        (lambda x: x * 2 - 1, r"go from -0\.\d+ to 0\.\d+; return finite values in \[0, 1\]"),
        (lambda x: x / 0, "return finite values"),
    ],
)
def test_a_sampler_that_returns_something_else(world: World, broken: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"row student-4steps-guidance1: .*{message}"):
        run(world, [student(lambda prompts, seeds: broken(world.draw()(prompts, seeds)))])


def test_protocols_have_names() -> None:
    assert [protocol_named(p.name) for p in PROTOCOLS] == list(PROTOCOLS)
    with pytest.raises(ValueError, match="protocol: got 'coco'; choose one of emoji-quick, emoji-medium, emoji-full"):
        protocol_named("coco")


def test_a_shipped_protocol_runs_on_the_shipped_reference(tmp_path: Path) -> None:
    """Noise is no emoji."""
    protocol = replace(protocol_named("emoji-quick"), names=8, repeated=2, seeds=2, toned=2, held_out=2, components=4)

    def noise(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return torch.stack([torch.rand((3, 64, 64), generator=torch.Generator().manual_seed(s)) for s in seeds])

    row = evaluate([student(noise)], protocol, tmp_path)["rows"][0]
    assert row["retrieval_top1"] == 0
    assert row["fd_real"] > 30
