"""A student's files in a diffusers pipeline: the images it had in memory, on a base that stays what it was."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

import fewstep
from fewstep.backbones.few_step import FewStepPipeline
from fewstep.backbones.files import save_lora
from fewstep.backbones.generate import sample_images
from fewstep.backbones.sd import StableDiffusion
from fewstep.core import timegrid
from fewstep.roles.adapters import plain_state
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.student.folder import lora_path, read_lora
from fewstep.student.pipeline import load
from fewstep.student.student import Origin, Student

from .. import tiny


def trained(share: bool) -> Roles:
    roles = make_roles(tiny.stable_diffusion(), RolesConfig(lora=share, rank=2))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in roles.trained["student"].values():
            p.add_(torch.randn(p.shape, generator=rng) / 20)
    return roles


def saved(roles: Roles, folder: Path) -> Path:
    """Students of two step counts that are the same for both, so that there is nothing to tell them."""
    method = fewstep.TDM(steps=(2, 4), warmup=0)
    return Student.of(roles, method, Origin("tiny", "", 1, 1.0, "tdm-unify")).write(folder / "final")


def shown(pipe: FewStepPipeline) -> Tensor:
    return pipe("red cat", generator=torch.Generator().manual_seed(0), output_type="pt").images


def of_teacher(backbone: StableDiffusion) -> Tensor:
    x, cond = torch.ones(1, *backbone.shape), backbone.encode(["red cat"])
    with torch.no_grad():
        return backbone.predict(backbone.module, x, torch.tensor([500.0]), cond)


@pytest.mark.parametrize("base", ["fresh", "just trained"])
@pytest.mark.parametrize("share", [True, False])
def test_images_are_those_in_memory_and_the_base_stays_the_teacher(tmp_path: Path, share: bool, base: str) -> None:
    roles = trained(share)
    backbone = roles.backbone
    times = timegrid.uniform(backbone.schedule, 2)
    wanted = sample_images(backbone, roles.denoise("student", backbone.encode(["red cat"])), [0], times)
    folder, teacher = saved(roles, tmp_path), tiny.stable_diffusion() if base == "fresh" else backbone
    assert isinstance(teacher, StableDiffusion)
    before = of_teacher(teacher)
    for pipe in [load(teacher.pipe, folder) for _ in range(2)]:
        torch.testing.assert_close(shown(pipe), wanted, rtol=0, atol=1e-4)
        assert pipe.scheduler.timesteps.tolist() == [999, 499]  # two steps, the first count served
    assert torch.equal(of_teacher(teacher), before)
    torch.testing.assert_close(
        sample_images(backbone, roles.denoise("student", backbone.encode(["red cat"])), [0], times),
        wanted,
        rtol=0,
        atol=1e-6,
    )


def test_the_pipeline_keeps_no_second_copy_of_the_base(tmp_path: Path) -> None:
    teacher = tiny.stable_diffusion()
    pipe = load(teacher.pipe, saved(trained(True), tmp_path))
    own = {p.data_ptr() for p in teacher.module.parameters()}
    assert own <= {p.data_ptr() for p in pipe.unet.parameters()}


def test_unusual_wishes_are_granted_with_a_warning(tmp_path: Path) -> None:
    pipe = load(tiny.stable_diffusion().pipe, saved(trained(True), tmp_path))
    with pytest.warns(UserWarning, match="num_inference_steps: got 3, this student was trained for 2, 4"):
        pipe("red cat", num_inference_steps=3, output_type="pt")
    with pytest.warns(UserWarning, match=r"guidance_scale: got 5\.0, guidance is baked into this student"):
        pipe("red cat", guidance_scale=5.0, output_type="pt")
    with pytest.raises(ValueError, match=r"^num_inference_steps: got 0, allowed are whole numbers from 1"):
        pipe("red cat", num_inference_steps=0)


@pytest.mark.parametrize("keep", [None, 0, 50])
def test_a_missing_or_damaged_lora_is_one_clear_error(tmp_path: Path, keep: int | None) -> None:
    """Also where no card says its hash."""
    network, path = trained(True).networks["student"], lora_path(tmp_path)
    save_lora(path, network, *plain_state(network, "student"))
    assert set(read_lora(tmp_path)) == set(trained(True).student_state())
    if keep is None:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"^student: .* is missing or damaged \(.*\); export the run again$"):
        read_lora(tmp_path)
