"""A Stable Diffusion pipeline as a backbone gives the numbers that the pipeline itself gives."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from fewstep.backbones.base import denoiser, guided
from fewstep.backbones.generate import noise_of, sample_images, trajectory
from fewstep.backbones.load import bundled, fingerprint, load_teacher, pipeline_of
from fewstep.backbones.schedulers import student_scheduler
from fewstep.backbones.sd import StableDiffusion
from fewstep.core import timegrid
from fewstep.core.guidance import Guidance
from fewstep.core.schedule import VP

from .. import tiny

PROMPTS = ["red cat", "a photo of a green house"]


@pytest.fixture(scope="module")
def backbone() -> StableDiffusion:
    return tiny.stable_diffusion()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teachers") / "tiny"
    tiny.pipeline().save_pretrained(folder)
    return folder


def test_conditions_are_those_of_the_pipeline(backbone: StableDiffusion) -> None:
    cond, null = backbone.encode(PROMPTS), backbone.encode([""])
    theirs, negative = backbone.pipe.encode_prompt(PROMPTS, "cpu", 1, True)
    torch.testing.assert_close(cond["text"], theirs)
    torch.testing.assert_close(null["text"], negative[:1])


def test_output_is_that_of_the_network(backbone: StableDiffusion) -> None:
    cond = backbone.encode(PROMPTS)
    x, t = (
        torch.randn((2, *backbone.shape), generator=torch.Generator().manual_seed(0)),
        torch.tensor([999.0, 250], dtype=torch.float64),
    )
    with torch.no_grad():
        got = backbone.predict(backbone.module, x, t, cond)
        theirs = backbone.pipe.unet(x, torch.tensor([999, 250]), encoder_hidden_states=cond["text"]).sample
    assert torch.equal(got, theirs)


@pytest.mark.parametrize(("steps", "guidance"), [(1, 1.0), (2, 1.0), (4, 1.0), (4, 3.5)])
@pytest.mark.parametrize("process", ["pure noise, v", "some signal, eps"])
def test_images_are_those_of_the_pipeline(backbone: StableDiffusion, process: str, steps: int, guidance: float) -> None:
    """Same prompts, same seeds, the trained times: what fewstep samples is what `pipe(prompt)` shows.

    On the bundled teacher's schedule, and on that of SD 1.x, whose last time keeps a little signal.
    """
    if process == "some signal, eps":
        scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
        pipe = StableDiffusionPipeline(
            **{**backbone.pipe.components, "scheduler": scheduler}, requires_safety_checker=False
        )
        backbone = StableDiffusion(pipe, "sd", VP(scheduler.alphas_cumprod.double()))
    cond, null = backbone.encode(PROMPTS), backbone.encode([""])
    denoise = guided(backbone, backbone.module, cond, null, Guidance(scale=guidance))
    ours = sample_images(backbone, denoise, [3, 4], timegrid.uniform(backbone.schedule, steps))
    pipe = StableDiffusionPipeline(**backbone.pipe.components, requires_safety_checker=False)
    pipe.scheduler = student_scheduler(backbone.scheduler_config, [steps], "ddim")
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    theirs = pipe(
        PROMPTS, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="pt"
    ).images
    assert ours.shape == (2, 3, 16, 16)
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_a_seed_gives_the_same_noise_in_any_batch(backbone: StableDiffusion) -> None:
    generators = [torch.Generator().manual_seed(s) for s in (5, 6, 7)]
    first, second = noise_of(generators, backbone.shape), noise_of(generators, backbone.shape)
    alone = torch.Generator().manual_seed(6)
    assert torch.equal(first[1:2], noise_of([alone], backbone.shape))
    assert torch.equal(second[1:2], noise_of([alone], backbone.shape))
    assert not torch.equal(first, second)


def test_a_trajectory_has_every_state(backbone: StableDiffusion) -> None:
    times = timegrid.uniform(backbone.schedule, 4)
    states = trajectory(backbone, denoiser(backbone, backbone.module, backbone.encode(PROMPTS)), [0, 1], times)
    assert [s.t[0].item() for s in states] == times.tolist()
    assert not states[-1].x.requires_grad
    torch.testing.assert_close(states[-1].x, states[-1].x0)


def test_a_saved_pipeline_is_loaded_frozen(folder: Path) -> None:
    teacher = load_teacher(folder)
    assert teacher.name == "tiny"
    assert teacher.shape == (4, 8, 8)
    assert not teacher.module.training
    assert not any(p.requires_grad for p in teacher.module.parameters())
    assert isinstance(teacher.schedule, VP)
    assert fingerprint(teacher.module) == fingerprint(tiny.stable_diffusion().module)
    assert fingerprint(teacher.module) != fingerprint(tiny.stable_diffusion(seed=1).module)
    assert pipeline_of(teacher) is pipeline_of(pipeline_of(teacher))


def test_sources_that_are_no_teacher(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teacher: got 'nonsense', allowed are"):
        load_teacher("nonsense")
    with pytest.raises(ValueError, match=r"is no diffusers pipeline \(it has no model_index.json\)"):
        load_teacher(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_teacher(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "AuraFlowPipeline"}')
    with pytest.raises(ValueError, match="is a AuraFlowPipeline, supported are StableDiffusionPipeline"):
        load_teacher(tmp_path)
    (tmp_path / "model_index.json").write_text((folder / "model_index.json").read_text())
    with pytest.raises(ValueError, match="text_encoder/ is missing; download it again"):
        load_teacher(tmp_path)
    with pytest.raises(ValueError, match=r"is no diffusers pipeline; sample it with fewstep\.sample"):
        pipeline_of(tiny.denoiser())


def test_bundled_teachers_are_folders_of_the_package() -> None:
    assert all(
        (Path(load_teacher.__code__.co_filename).parents[1] / "zoo" / name / "model_index.json").is_file()
        for name in bundled()
    )


def test_students_of_a_stochastic_solver_have_even_times() -> None:
    with pytest.raises(
        ValueError,
        match=r"^method\.shift: students of a stochastic solver can only be exported with uniform time grids",
    ):
        student_scheduler({"beta_schedule": "linear"}, [4], "renoise", even=False)


@pytest.mark.parametrize(("steps", "solver"), [([1, 2, 4], "ddim"), ([3], "ddim"), ([4], "dpmpp")])
def test_student_scheduler_visits_the_trained_times(backbone: StableDiffusion, steps: list[int], solver: str) -> None:
    scheduler = student_scheduler(backbone.scheduler_config, steps, solver)
    assert isinstance(scheduler, DDIMScheduler) == (steps == [1, 2, 4])
    for k in steps:
        scheduler.set_timesteps(k)
        assert scheduler.timesteps.tolist() == timegrid.uniform(backbone.schedule, k)[:-1].tolist()
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.rescale_betas_zero_snr
