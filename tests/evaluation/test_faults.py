"""Generators with a fault are named as what they are, and healthy ones are not."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fewstep.atomic import write_json
from fewstep.core.guidance import Guidance
from fewstep.evaluation.faults import faults
from fewstep.evaluation.images import ImageProtocol, evaluate_images
from fewstep.evaluation.protocols import Row
from fewstep.report.run import render_run

from .conftest import Draw, blob

FEW = ImageProtocol("few", count=32, components=8, batch=16, seeds=4)
PROMPTS = tuple(f"thing {i}" for i in range(8))
BLOBS = torch.stack([blob(i, "") for i in range(8)]).float() / 255


def drawn(
    change: Callable[[Tensor], Tensor] = lambda x: x,
    prompt_of: Callable[[int], int] = lambda p: p,
    seed_of: Callable[[int], int] = lambda s: s,
) -> Draw:
    """The prompt's stripes, moved and coloured by the seed."""

    def sampler(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        images = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            rng = torch.Generator().manual_seed(seed_of(seed))
            image = BLOBS[prompt_of(PROMPTS.index(prompt))]
            veil = F.interpolate(torch.rand((1, 3, 3, 3), generator=rng), (64, 64), mode="bilinear")[0]
            moved = int(torch.randint(24, (1,), generator=rng))
            images.append(image.roll(moved, -1).lerp(veil, 0.3))
        return change(torch.stack(images)).clamp(0, 1)

    return sampler


def blur(x: Tensor) -> Tensor:
    return F.avg_pool2d(F.pad(x, (3, 3, 3, 3), mode="reflect"), 7, 1)


def saturate(x: Tensor) -> Tensor:
    grey = x.mean(1, keepdim=True)
    return grey + 2.2 * (x - grey)


GENERATORS = {
    "healthy": drawn(seed_of=lambda s: s + 1),
    "the teacher itself": drawn(),
    "collapsed": drawn(prompt_of=lambda p: 3, seed_of=lambda s: s % 3),
    "blurred": drawn(blur),
    "over-saturated": drawn(saturate),
    "seeds alike": drawn(seed_of=lambda s: 5),
    "pale": drawn(lambda x: x.lerp(x.mean(1, keepdim=True), 0.6)),
    "noisy": drawn(lambda x: x + 0.12 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))),
}


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """One student of each kind, in as many steps as its place in the table says."""
    teachers = [Row("teacher", 50, Guidance(scale=2.0), 100, drawn())]
    students = [Row("student", i, Guidance(), i, draw) for i, draw in enumerate(GENERATORS.values(), 1)]
    return evaluate_images([*teachers, *students], FEW, PROMPTS)


def test_each_is_named_as_what_it_is(result: dict[str, Any]) -> None:
    named = {name: [fault.key for fault in faults(result["rows"][i])] for i, name in enumerate(GENERATORS, 1)}
    assert named.pop("healthy") == named.pop("the teacher itself") == []
    for name, found in named.items():
        assert found[:1] == [name] or (name in found and "collapsed" not in found), (name, found)
        assert ("seeds alike" in found) == (name == "seeds alike"), (name, found)
        assert ("blurred" in found) == (name == "blurred"), (name, found)
        assert ("collapsed" in found) == (name == "collapsed"), (name, found)
        assert ("over-saturated" in found) == (name == "over-saturated"), (name, found)


def test_the_report_names_them(result: dict[str, Any], tmp_path: Path) -> None:
    def page(*kept: int) -> str:
        rows = [result["rows"][i] for i in (0, *kept)]
        found = [f | {"row": 1} for f in result["findings"] if f["row"] in kept]
        write_json(tmp_path / "run.json", {"title": "x"})
        write_json(tmp_path / "final" / "eval.json", {**result, "rows": rows, "findings": found, "paired": []})
        return render_run(tmp_path).read_text(encoding="utf-8")

    names = list(GENERATORS)
    for name, words in (
        ("collapsed", "collapsed: different prompts give nearly the same image"),
        ("blurred", "blurred: fine detail is missing"),
        ("over-saturated", "over-saturated: its colours are too strong"),
        ("seeds alike", "its seeds are all alike"),
    ):
        assert words in page(1 + names.index(name))
    healthy = page(1)
    assert "Found in the evaluation" not in healthy and "Nothing wrong was found" in healthy
    assert "<h2>Drift</h2>" in healthy


def test_a_model_without_prompts_collapses_to_one_image() -> None:
    protocol = replace(FEW, count=16, components=4)

    def one(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return drawn(seed_of=lambda s: 5)([PROMPTS[0]] * len(prompts), seeds)

    def several(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return drawn()([PROMPTS[s % 8] for s in seeds], seeds)

    rows = [Row("teacher", 50, Guidance(), 50, several), Row("student", 1, Guidance(), 1, one)]
    found = evaluate_images(rows, protocol, ())["findings"]
    assert "collapsed" in [f["fault"] for f in found] and "seeds alike" not in [f["fault"] for f in found]


def test_a_clip_that_does_not_move_is_named() -> None:
    def moving(by: int) -> Draw:
        def sampler(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
            stills = drawn()(prompts, seeds)
            return torch.stack([stills.roll(by * f, -1) for f in range(5)], 1)

        return sampler

    rows = [Row("teacher", 50, Guidance(), 50, moving(3)), Row("student", 1, Guidance(), 1, moving(0))]
    result = evaluate_images([*rows, Row("student", 2, Guidance(), 2, moving(3))], replace(FEW, count=16), PROMPTS)
    assert [(f["row"], f["fault"]) for f in result["findings"]] == [(1, "still")]
    assert result["rows"][1]["motion_ratio"] == pytest.approx(0) and result["rows"][2]["motion_ratio"] == 1.0
