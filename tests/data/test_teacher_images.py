"""The teacher's own images: of which prompts, drawn how, and once."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fewstep
from fewstep.backbones.base import guided
from fewstep.backbones.generate import trajectory
from fewstep.core import timegrid
from fewstep.core.guidance import Guidance
from fewstep.data.prompts import embed
from fewstep.data.teacher_images import teacher_images

from .. import tiny


def test_they_are_the_guided_teachers_and_drawn_once(tmp_path: Path) -> None:
    backbone = tiny.stable_diffusion()
    data, plain = embed(backbone, tiny.WORDS, None, "base"), Guidance(scale=2.0)
    apg = Guidance(scale=2.0, apg_eta=0.0)
    told: list[int] = []
    drawn = teacher_images(backbone, data, 7, 3, plain, tmp_path, seed=5, chunk=4, show=told.append)
    assert told == [4, 7]
    assert len(drawn) == 7
    counts = [int((drawn.embeddings.cond["text"][:] == c).flatten(1).all(1).sum()) for c in data.cond["text"]]
    assert sorted(counts) == [2, 2, 3]  # evenly
    cond = drawn.embeddings.at(slice(4, 5), torch.device("cpu"))
    denoise = guided(backbone, backbone.module, cond, data.null, plain)
    alone = trajectory(backbone, denoise, [9], timegrid.uniform(backbone.schedule, 3))[-1].x
    torch.testing.assert_close(drawn.x0[4:5], alone, atol=1e-5, rtol=1e-4)
    projected = teacher_images(backbone, data, 2, 3, apg, tmp_path, seed=5)
    denoise = guided(
        backbone, backbone.module, projected.embeddings.at(slice(1, 2), torch.device("cpu")), data.null, apg
    )
    torch.testing.assert_close(
        projected.x0[1:2],
        trajectory(backbone, denoise, [6], timegrid.uniform(backbone.schedule, 3))[-1].x,
        atol=1e-5,
        rtol=1e-4,
    )
    backbone.module.forward = None  # type: ignore[assignment]
    assert torch.equal(teacher_images(backbone, data, 7, 3, plain, tmp_path, seed=5).x0, drawn.x0)


def test_the_public_function_draws_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Few(fewstep.ImageSource):
        count: int = 4
        steps: int = 2

    monkeypatch.setattr("fewstep.api.ImageSource", Few)
    method = fewstep.ConsistencyDistillation(steps=2, solver_steps=10)
    for step in fewstep.distill(
        tiny.stable_diffusion(),
        method,
        tiny.WORDS,
        train=fewstep.TrainConfig(iterations=2, batch=2),
        images="teacher",
        out=tmp_path,
    ):
        assert step.metrics["student_loss"] > 0
    assert len(list((tmp_path / "embeddings").glob("teacher-*.safetensors"))) == 1
    with pytest.raises(ValueError, match=r"^images: method lcm needs some"):
        next(
            fewstep.distill(
                tiny.stable_diffusion(), method, tiny.WORDS, train=fewstep.TrainConfig(iterations=2, batch=2)
            )
        )
