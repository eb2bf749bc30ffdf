"""Fine-tuning a teacher: it learns the images it is shown, by LoRA or whole, and can be stopped and resumed."""

import copy
from pathlib import Path

import pytest
import torch

from fewstep.backbones.base import Denoiser
from fewstep.data.images import ImageData
from fewstep.data.prompts import embed
from fewstep.roles.roles import RolesConfig
from fewstep.training.finetune import finetune
from fewstep.training.fit import FitConfig

from .. import tiny

CONFIG = FitConfig(steps=60, batch=16, lr=1e-2, warmup=5, decay=20, ema=0.9, checkpoint_every=30)


def data(backbone: Denoiser) -> ImageData:
    x0 = torch.full((3, *backbone.shape), 0.7)
    return ImageData(x0, embed(backbone, tiny.WORDS, None, "x"), "x")


@pytest.mark.parametrize("share", [True, False])
def test_it_learns_and_leaves_a_plain_network(tmp_path: Path, share: bool) -> None:
    backbone = tiny.denoiser()
    before = copy.deepcopy(backbone.module.state_dict())
    steps = list(finetune(backbone, data(backbone), RolesConfig(lora=share, rank=4), CONFIG, tmp_path))
    assert sum(s.loss for s in steps[-10:]) < 0.7 * sum(s.loss for s in steps[:10])
    after = backbone.module.state_dict()
    assert set(after) == set(before)  # no adapter is left
    assert not any(p.requires_grad for p in backbone.module.parameters())
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    assert changed == ({n for n in before if n.endswith("weight")} if share else set(before))


@pytest.mark.parametrize("share", [True, False])
def test_stopped_and_resumed_it_is_the_same_teacher_bit_for_bit(tmp_path: Path, share: bool) -> None:
    straight, resumed = tiny.denoiser(), tiny.denoiser()
    how = RolesConfig(lora=share, rank=4)
    list(finetune(straight, data(straight), how, CONFIG, tmp_path / "straight"))
    for step in finetune(tiny.denoiser(), data(straight), how, CONFIG, tmp_path / "stopped"):
        if step.step == 40:
            break
    list(finetune(resumed, data(resumed), how, CONFIG, tmp_path / "stopped"))
    for a, b in zip(straight.module.state_dict().values(), resumed.module.state_dict().values(), strict=True):
        assert torch.equal(a, b)
