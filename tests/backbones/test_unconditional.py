"""Pixel models, with classes or without, behind the same protocol and through a folder."""

from pathlib import Path

import pytest
import torch

from fewstep.backbones import miniature
from fewstep.backbones.base import denoiser, guided
from fewstep.backbones.load import load_teacher
from fewstep.backbones.unconditional import PixelModel, pixel_unet, save_pixel_model
from fewstep.core.guidance import Guidance
from fewstep.data.prompts import embed
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.roles.roles import RolesConfig, make_roles
from fewstep.training.loop import TrainConfig, distill

from .. import tiny

LABELS = ("zero", "one", "two")


@pytest.fixture(params=[LABELS, ()], ids=["classes", "no classes"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> PixelModel:
    torch.manual_seed(0)
    labels = request.param
    save_pixel_model(
        tmp_path / "digits", pixel_unet([16, 32], [False, True], 1, 8, len(labels)), miniature.scheduler(), labels
    )
    loaded = load_teacher(tmp_path / "digits")
    assert isinstance(loaded, PixelModel)
    return loaded


def test_output_is_that_of_the_network(model: PixelModel) -> None:
    prompts = ["one", ""] if model.labels else ["anything", ""]
    cond = model.encode(prompts)
    x, t = (
        torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(0)),
        torch.tensor([999.0, 300], dtype=torch.float64),
    )
    numbers = torch.tensor([1, 3]) if model.labels else None
    with torch.no_grad():
        assert torch.equal(
            model.predict(model.module, x, t, cond),
            model.pipe.unet(x, torch.tensor([999, 300]), class_labels=numbers).sample,
        )
    assert model.shape == (1, 8, 8)
    assert not any(p.requires_grad for p in model.module.parameters())


def test_prompts_are_class_names(model: PixelModel) -> None:
    if not model.labels:
        assert model.encode(["anything"]) == {}
        return
    assert model.encode(["two", "", "zero"])["label"].tolist() == [2, 3, 0]
    with pytest.raises(ValueError, match=r"^prompts: digits knows no 'nine'; its classes are zero, one, two$"):
        model.encode(["two", "nine"])


def test_many_classes_are_not_all_listed() -> None:
    many = tiny.pixels([f"class {i}" for i in range(1000)])
    with pytest.raises(
        ValueError, match=r"knows no 'nine'; its classes are class 0, .*, class 19 and 980 more, in labels\.json$"
    ):
        many.encode(["nine"])


def test_guidance_leaves_the_class_out(model: PixelModel) -> None:
    cond, null = model.encode(["one", "two"]), model.encode([""])
    x, t = (
        torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(0)),
        torch.tensor([999.0, 300], dtype=torch.float64),
    )
    with torch.no_grad():
        got = guided(model, model.module, cond, null, Guidance(scale=3.0))(x, t).x0
        yes, no = (
            denoiser(model, model.module, cond)(x, t).x0,
            denoiser(model, model.module, model.encode(["", ""]))(x, t).x0,
        )
    torch.testing.assert_close(got, no + 3 * (yes - no), rtol=1e-4, atol=1e-5)
    assert torch.equal(yes, no) == (not model.labels)


def test_states_are_shown_as_images_of_three_channels(model: PixelModel) -> None:
    shown = model.decode(torch.tensor([-3.0, -1, 0, 1, 3]).reshape(5, 1, 1, 1).expand(5, 1, 8, 8))
    assert shown.shape == (5, 3, 8, 8)
    assert shown[:, 0, 0, 0].tolist() == [0, 0, 0.5, 1, 1]


def test_it_is_a_teacher(model: PixelModel, tmp_path: Path) -> None:
    """Found by its folder, and distilled by the same loop."""
    teacher = load_teacher(tmp_path / "digits")
    assert isinstance(teacher, PixelModel)
    assert teacher.labels == model.labels
    data = embed(teacher, list(LABELS), None, "digits")
    config = TrainConfig(iterations=2, batch=4, lr=1e-4, fake_lr=1e-3)
    steps = list(
        distill(
            make_roles(teacher, RolesConfig(rank=2)),
            DistributionMatching(steps=2, warmup=0, guidance=Guidance(scale=2.0)),
            data,
            config,
        )
    )
    assert [s.iteration for s in steps] == [1, 2]
    assert steps[-1].metrics["student_grad"] > 0
