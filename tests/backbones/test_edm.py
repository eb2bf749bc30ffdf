"""Pixel models with EDM's preconditioning draw the same images as diffusers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
)
from torch import Tensor

from fewstep.api import sample as drawn_by_fewstep
from fewstep.backbones import miniature
from fewstep.backbones.base import denoiser
from fewstep.backbones.load import load_teacher
from fewstep.backbones.meta import meta_teacher
from fewstep.backbones.schedulers import load_scheduler, student_scheduler
from fewstep.backbones.unconditional import PixelModel, drawn_pixels, pixel_pipeline, pixel_unet, save_pixel_model
from fewstep.checks import check_backbone
from fewstep.core import timegrid
from fewstep.core.guidance import Guidance
from fewstep.core.schedule import EDM
from fewstep.core.solvers import SOLVERS, sample
from fewstep.data.prompts import embed
from fewstep.data.trajectories import TrajectoryConfig, generate_trajectories, guided_teacher, run_to_completion
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.methods.method import Method
from fewstep.methods.trajectory_imitation import TrajectoryImitation
from fewstep.roles.roles import RolesConfig, make_roles
from fewstep.training.loop import TrainConfig, distill

LABELS = ("zero", "one", "two")
LEVELS = {"sigma_max": 70.0, "sigma_min": 0.01, "rho": 5.0, "sigma_data": 0.6}


def saved(folder: Path, scheduler: Any, labels: tuple[str, ...] = LABELS) -> Path:
    torch.manual_seed(0)
    save_pixel_model(folder, pixel_unet([16, 32], [False, True], 1, 8, len(labels)), scheduler, labels)
    return folder


def loaded(folder: Path, scheduler: Any, labels: tuple[str, ...] = LABELS) -> PixelModel:
    model = load_teacher(saved(folder, scheduler, labels))
    assert isinstance(model, PixelModel)
    return model


@pytest.fixture(params=[LABELS, ()], ids=["classes", "no classes"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> PixelModel:
    return loaded(tmp_path / "digits", EDMEulerScheduler(**LEVELS), request.param)


def test_the_network_is_asked_and_understood_as_edm_says(model: PixelModel) -> None:
    """`D = c_skip x + c_out F(c_in x, c_noise)` with the constants of EDM, tab. 1, from the scheduler's settings."""
    assert model.schedule == EDM(t_max=70.0, t_min=0.01, rho=5.0, data_std=1.0)
    cond = model.encode(["one", ""])
    numbers = torch.tensor([1, 3]) if model.labels else None
    x, data = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(0)), 0.6
    for level in (0.02, 0.6, 30.0):
        t = torch.full((2,), level, dtype=torch.float64)
        c_in, c_noise = 1 / math.sqrt(level**2 + data**2), torch.full((2,), math.log(level) / 4)
        c_skip, c_out = data**2 / (level**2 + data**2), level * data / math.sqrt(level**2 + data**2)
        with torch.no_grad():
            raw = model.pipe.unet(c_in * x, c_noise, class_labels=numbers).sample
            torch.testing.assert_close(model.predict(model.module, x, t, cond), raw, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(
                denoiser(model, model.module, cond)(x, t).x0, c_skip * x + c_out * raw, rtol=1e-4, atol=1e-4
            )


def theirs(model: PixelModel, scheduler: Any, noise: Tensor, steps: int) -> list[Tensor]:
    """The loop that diffusers documents for its schedulers."""
    scheduler.set_timesteps(steps)
    label, x = model.encode(["one", "two"]).get("label"), noise * scheduler.init_noise_sigma
    states = [x]
    for t in scheduler.timesteps:
        with torch.no_grad():
            raw = model.pipe.unet(scheduler.scale_model_input(x, t), t, class_labels=label).sample
        x = scheduler.step(raw, t, x).prev_sample
        states.append(x)
    return states


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("kind", "solver"), [(EDMEulerScheduler, "ddim"), (EDMDPMSolverMultistepScheduler, "dpmpp")])
def test_steps_are_those_of_diffusers(tmp_path: Path, kind: Any, solver: str, prediction: str, steps: int) -> None:
    """Every state equals that of diffusers, from the same noise.

    The times are the scheduler's own. The tolerance is the rounding of the largest numbers: Euler's step in diffusers
    subtracts numbers of the size of the noise in single precision.
    """
    model = loaded(tmp_path / "digits", kind(**LEVELS, prediction_type=prediction))
    noise = torch.randn((2, *model.shape), generator=torch.Generator().manual_seed(1))
    wanted = theirs(model, model.pipe.scheduler, noise, steps)
    denoise = denoiser(model, model.module, model.encode(["one", "two"]))
    with torch.no_grad():
        got = list(
            sample(
                denoise,
                model.schedule,
                noise * model.schedule.start_std,
                model.pipe.scheduler.sigmas.double(),
                SOLVERS[solver],
            )
        )
    assert len(got) == len(wanted) == steps + 1
    largest = float(wanted[0].abs().max())
    assert max(float((s.x - x).abs().max()) for s, x in zip(got, wanted, strict=True)) < 5e-7 * largest


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("solver", ["ddim", "dpmpp"])
def test_a_student_s_scheduler_draws_its_steps_in_diffusers(
    model: PixelModel, tmp_path: Path, solver: str, steps: int
) -> None:
    """A stock pipeline with a stock scheduler samples fewstep's own grid.

    The grid has K steps, the scheduler goes through a file, and the noise is included.
    """
    student_scheduler(model.scheduler_config, [steps], solver).save_pretrained(tmp_path / "scheduler")
    scheduler = load_scheduler(tmp_path / "scheduler")
    scheduler.set_timesteps(steps)
    torch.testing.assert_close(scheduler.sigmas.double(), timegrid.uniform(model.schedule, steps), rtol=2e-6, atol=0)
    wanted = drawn_by_fewstep(model, ["one", "two"], steps=steps, solver=solver)
    model.pipe.scheduler = scheduler
    assert (drawn_pixels(model, ["one", "two"], steps) - wanted).abs().max() < 2e-5


def test_what_has_no_such_scheduler_is_not_begun(tmp_path: Path) -> None:
    config = EDMEulerScheduler(**LEVELS).config
    with pytest.raises(ValueError, match=r"^method\.shift: .* exported for even times alone; set it to 1$"):
        student_scheduler(config, [4], "ddim", even=False)
    with pytest.raises(ValueError, match=r"^method\.solver: got renoise, .* exported for ddim or dpmpp; choose one$"):
        student_scheduler(config, [4], "renoise")


def test_a_folder_is_an_ordinary_pipeline(model: PixelModel, tmp_path: Path) -> None:
    """diffusers loads it without fewstep and draws what fewstep draws, in the scheduler's own 6 steps."""
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "digits")
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn((1, *model.shape), generator=torch.Generator().manual_seed(3))
    options = {"class_labels": [1]} if model.labels else {}
    shown = pipe(
        num_inference_steps=6, generator=[torch.Generator().manual_seed(3)], output_type="pt", **options
    ).images
    denoise, schedule = denoiser(model, model.module, model.encode(["one"])), model.schedule
    with torch.no_grad():
        *_, last = sample(denoise, schedule, noise * schedule.start_std, pipe.scheduler.sigmas.double())
    assert (model.decode(last.x)[:, :1] - shown).abs().max() < 2e-5


def test_a_pipeline_that_ignores_its_scheduler_is_put_right(tmp_path: Path) -> None:
    """A `DDPMPipeline` with EDM's scheduler is sampled as EDM says.

    `DDPMPipeline` takes any scheduler and scales nothing for it.
    """
    torch.manual_seed(0)
    pipe = DDPMPipeline(pixel_unet([16, 32], [False, True], 1, 8, 3), EDMEulerScheduler(**LEVELS))
    pipe.save_pretrained(tmp_path / "old")
    (tmp_path / "old" / "labels.json").write_text('["zero", "one", "two"]')
    model = load_teacher(tmp_path / "old")
    assert isinstance(model, PixelModel)
    assert model.labels == LABELS
    assert isinstance(model.schedule, EDM)
    model.pipe.save_pretrained(tmp_path / "new")
    assert not isinstance(DiffusionPipeline.from_pretrained(tmp_path / "new"), DDPMPipeline)


def test_a_model_with_a_table_may_come_in_the_pipeline_that_is_told_classes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet = pixel_unet([16, 32], [False, True], 1, 8, 3)
    pixel_pipeline(unet, miniature.scheduler(), told=True).save_pretrained(tmp_path / "digits")
    (tmp_path / "digits" / "labels.json").write_text('["zero", "one", "two"]')
    model = load_teacher(tmp_path / "digits")
    assert isinstance(model, PixelModel)
    assert model.schedule.resolution == meta_teacher(tmp_path / "digits").schedule.resolution == 1
    wanted = drawn_by_fewstep(model, ["one", "two"], steps=4)
    model.pipe.scheduler = student_scheduler(model.scheduler_config, [4], "ddim")
    assert (drawn_pixels(model, ["one", "two"], 4) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (CMStochasticIterativeScheduler(), "its CMStochasticIterativeScheduler has no table of betas"),
        (EDMEulerScheduler(sigma_schedule="exponential"), "sigma_schedule is exponential; set it to karras"),
        (
            EDMDPMSolverMultistepScheduler(prediction_type="sample"),
            "prediction_type (is|says)? ?.?sample.?, allowed are epsilon, v_prediction",
        ),
    ],
)
def test_other_schedulers_are_refused_in_a_line(tmp_path: Path, scheduler: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=rf"^teacher: .*digits.*{reason}") as told:
        load_teacher(saved(tmp_path / "digits", scheduler))
    assert "\n" not in str(told.value)
    with pytest.raises(ValueError, match=reason):  # nor is it planned
        meta_teacher(tmp_path / "digits")


def test_it_keeps_what_a_backbone_promises(model: PixelModel, tmp_path: Path) -> None:
    """An EDM model passes `check_backbone`, and its plan reads the same schedule."""
    check_backbone(model, ["one", "two"])
    hollow = meta_teacher(tmp_path / "digits")
    assert hollow.schedule == model.schedule
    assert hollow.scheduler_config == model.scheduler_config


@pytest.mark.parametrize(
    "method",
    [
        DistributionMatching(steps=2, warmup=0, guidance=Guidance(scale=2.0)),
        TrajectoryImitation(steps=(2, 1), head="span"),
    ],
    ids=["tdm", "trajp-l"],
)
@pytest.mark.parametrize("share", [True, False], ids=["LoRA", "full"])
def test_it_is_distilled(model: PixelModel, method: Method, share: bool) -> None:
    data = embed(model, list(LABELS), None, "digits")
    config = TrainConfig(iterations=2, batch=4, lr=1e-3, fake_lr=1e-3)
    times = torch.unique(torch.cat([method.times(model.schedule, k) for k in method.counts])).flip(0)
    walked = TrajectoryConfig(count=8, steps=8)
    source = guided_teacher(model, data.unconditional(torch.device("cpu")), walked, times, Guidance())
    paths = (
        run_to_completion(generate_trajectories(model, data, walked, times, source, None, "digits"))
        if method.needs.trajectories
        else None
    )
    roles = make_roles(model, RolesConfig(rank=2, lora=share), fake=method.needs.fake)
    cond = model.encode(["one", "two"])
    x, t = (
        3 * torch.randn((2, *model.shape), generator=torch.Generator().manual_seed(0)),
        torch.tensor([3.0, 0.4], dtype=torch.float64),
    )
    with torch.no_grad():
        teacher = denoiser(model, model.module, cond)(x, t).x0
        assert torch.equal(roles.denoise("student", cond)(x, t).x0, teacher)
    steps = list(distill(roles, method, data, config, paths=paths))
    assert [s.iteration for s in steps] == [1, 2]
    assert all(math.isfinite(v) for s in steps for v in s.metrics.values())
    with torch.no_grad():
        assert not torch.equal(roles.denoise("student", cond)(x, t).x0, teacher)
        assert torch.equal(roles.denoise("teacher", cond)(x, t).x0, teacher)
