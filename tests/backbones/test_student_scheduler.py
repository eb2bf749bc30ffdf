"""The student's own steps in diffusers' pipelines, also in those that begin with an image."""

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, DiffusionPipeline
from torch import Tensor

from fewstep.backbones.base import Backbone, denoiser
from fewstep.backbones.few_step import FEW_STEP, FewStepPipeline, SamplingDefaults, few_step_pipeline
from fewstep.backbones.load import around
from fewstep.backbones.parts import denoiser_of
from fewstep.backbones.student_scheduler import SamplingSpec, StudentScheduler
from fewstep.core.prediction import Split
from fewstep.core.schedule import diffuse
from fewstep.core.solvers import Correction, SolverHistory, sample, solver_named
from fewstep.core.timegrid import uniform
from tests import pipelines

PROMPT = "red cat"


def unchanged(way: Split, t: Tensor, t_next: Tensor, past: SolverHistory) -> Split:
    """A head that only serves to be there."""
    return way


def student(
    backbone: Backbone, base: DiffusionPipeline, solver: str, head: Correction | None = None, analytic: bool = False
) -> FewStepPipeline:
    """A pipeline of the teacher's own weights on uneven times, in 4 and 3 steps."""
    grids = {k: uniform(backbone.schedule, k, shift=2.5) for k in (4, 3)}
    spec = SamplingSpec(backbone.schedule, backbone.row, solver_named(solver), grids, head, analytic)
    scheduler = StudentScheduler.of(base.scheduler.config, spec)
    return few_step_pipeline(base, copy.deepcopy(denoiser_of(base)), scheduler, SamplingDefaults((4, 3)))


def asked_at(pipe: DiffusionPipeline) -> list[float]:
    """The times at which the pipeline asks its network from now on."""
    seen: list[float] = []
    network = pipe.unet if "unet" in pipe.components else pipe.transformer

    def see(_: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(float(torch.as_tensor(kwargs.get("timestep", args[1] if len(args) > 1 else 0)).reshape(-1)[0]))

    network.register_forward_pre_hook(see, with_kwargs=True)
    return seen


@pytest.mark.parametrize("solver", ["ddim", "ipndm", "dpmpp"])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_image_to_image_steps_from_where_the_network_was_asked(family: str, solver: str) -> None:
    """Image-to-image is the student's own trajectory from the image's noised state.

    At every strength it starts at the first time that the network is asked for.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = pipelines.FAMILIES[family]()
        x0 = torch.randn(1, *around(base, "tiny").shape)
    backbone = around(base, "tiny")
    pipe = AutoPipelineForImage2Image.from_pipe(student(backbone, base, solver))
    assert "Img2Img" in type(pipe).__name__
    assert isinstance(pipe.scheduler, StudentScheduler)
    pipe.set_progress_bar_config(disable=True)
    seen, grid = asked_at(pipe), pipe.scheduler.student.grids[4]
    assert grid.tolist() != uniform(backbone.schedule, 4).tolist()
    told = grid if backbone.schedule.resolution else grid * 1000
    size = {"height": backbone.image_size, "width": backbone.image_size} if family == "sd3" else {}
    for strength, first in ((1.0, 0), (0.75, 1), (0.5, 2), (0.25, 3), (0.99, 0 if family == "sd3" else 1)):
        seen.clear()
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            found = pipe(
                PROMPT,
                image=x0,
                strength=strength,
                num_inference_steps=4,
                guidance_scale=1.0,
                generator=generator,
                output_type="latent",
                **size,
            ).images
            assert seen == pytest.approx(told[first:-1].tolist(), abs=1e-2)
            start = diffuse(
                backbone.schedule,
                x0,
                grid[first].expand(1),
                torch.randn(x0.shape, generator=torch.Generator().manual_seed(7)),
            )
            denoise = denoiser(backbone, base.unet if family != "sd3" else base.transformer, backbone.encode([PROMPT]))
            *_, last = sample(denoise, backbone.schedule, start, grid[first:], solver_named(solver))
        torch.testing.assert_close(found, last.x, rtol=0, atol=2e-4)


def test_two_images_in_a_row_do_not_remember_one_another() -> None:
    base = pipelines.sd()
    pipe = AutoPipelineForImage2Image.from_pipe(student(around(base, "tiny"), base, "ipndm"))
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))

    def drawn(strength: float) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        return pipe(
            PROMPT,
            image=image,
            strength=strength,
            num_inference_steps=4,
            guidance_scale=1.0,
            generator=generator,
            output_type="pt",
        ).images

    first = drawn(0.75)
    drawn(0.5)
    assert torch.equal(first, drawn(0.75))


def test_inpainting_is_found_too() -> None:
    base = pipelines.sd()
    pipe = AutoPipelineForInpainting.from_pipe(student(around(base, "tiny"), base, "ddim"))
    pipe.set_progress_bar_config(disable=True)
    seen = asked_at(pipe)
    image, mask = torch.rand(1, 3, 16, 16), torch.ones(1, 1, 16, 16)
    pipe(
        PROMPT,
        image=image,
        mask_image=mask,
        strength=0.5,
        num_inference_steps=4,
        guidance_scale=1.0,
        height=16,
        width=16,
    )
    assert seen == pipe.scheduler.student.grids[4][2:-1].tolist()


@pytest.mark.parametrize(
    ("how", "by"),
    [({"head": unchanged}, "a head that knows where it began"), ({"analytic": True}, "a first direction")],
)
def test_a_student_that_begins_with_pure_noise_takes_no_image(how: dict[str, Any], by: str) -> None:
    base = pipelines.sd()
    pipe = AutoPipelineForImage2Image.from_pipe(student(around(base, "tiny"), base, "ddim", **how))
    with pytest.raises(
        ValueError, match=f"^image: this student has {by}.*; it samples from prompts alone, without an initial image$"
    ):
        pipe(PROMPT, image=torch.rand(1, 3, 16, 16), strength=0.5, num_inference_steps=4, guidance_scale=1.0)


def test_a_strength_that_leaves_no_step_is_refused() -> None:
    base = pipelines.sd()
    pipe = AutoPipelineForImage2Image.from_pipe(student(around(base, "tiny"), base, "ddim"))
    with pytest.raises(ValueError, match=r"^strength: it leaves none of the 4 steps; allowed are 0\.25 to 1$"):
        pipe(PROMPT, image=torch.rand(1, 3, 16, 16), strength=0.2, num_inference_steps=4, guidance_scale=1.0)


def test_steps_and_times_that_are_not_its_own_are_refused() -> None:
    base = pipelines.sd()
    pipe = student(around(base, "tiny"), base, "ddim")
    with pytest.raises(
        ValueError, match="num_inference_steps: got 50, this student serves 4, 3; supported step counts are these alone"
    ):
        pipe.scheduler.set_timesteps(50)
    pipe.scheduler.set_timesteps(4)
    for t, t_next in pairwise(pipe.scheduler.grid[:-1].tolist()):
        with pytest.raises(ValueError, match=f"timestep: got .{(t + t_next) / 2:g}.*, this student visits 999, "):
            pipe.scheduler.step(torch.zeros(1, 4, 8, 8), (t + t_next) / 2, torch.zeros(1, 4, 8, 8))


def test_every_family_keeps_its_name() -> None:
    """diffusers goes by it from task to task."""
    assert {name: few.__name__ for name, few in FEW_STEP.items()} == {name: name for name in FEW_STEP}
