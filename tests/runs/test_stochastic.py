"""Students with fresh noise at every step, on the families whose stock pipelines were made for none.

fewstep's images are those of the pipeline that it loads, of the exported one, and of the stock pipeline with the
student's scheduler and LoRA, where all draw the same noise.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LCMScheduler
from diffusers.schedulers import scheduling_flow_match_euler_discrete as stock_euler
from torch import Tensor

import fewstep
from fewstep.backbones.autoencoders import over_white
from fewstep.backbones.families import FAMILIES, family_of_pipeline
from fewstep.backbones.few_step import drawn, told_times
from fewstep.backbones.generate import noise_of
from fewstep.backbones.load import pipeline_of
from fewstep.backbones.schedulers import TOLD_SIGMAS, load_scheduler, student_scheduler, visits_alone
from fewstep.cli.export import run_export
from fewstep.core import timegrid
from fewstep.core.schedule import Flow

from .. import pipelines

PROMPTS, SEEDS, STEPS = ["red cat", "a photo of a green house"], [0, 1], 4
OWN = ("sd", "sdxl", "pixart", "pixart-sigma")  # whose students have had LCM's scheduler, and tests of their own
FAST = ("sd3", "cogvideox")
CASES = [f for f in (*pipelines.FAMILIES, *pipelines.VARIANTS) if f not in OWN]


def student_of(folder: Path, final: Path) -> Tensor:
    """Train a student of DMD2 for two iterations, write it, and return its images."""
    method = fewstep.method("dmd2", steps=STEPS, warmup=0, guidance=3.0, fake={"updates": 1})
    train = fewstep.TrainConfig(iterations=2, batch=2, lr=0.02)
    teacher = pipelines.load(folder)
    *_, step = fewstep.distill(teacher, method, PROMPTS, train=train, roles=fewstep.RolesConfig(rank=2), watch=None)
    images = fewstep.sample(step, PROMPTS, SEEDS)
    assert (images - fewstep.sample(step, PROMPTS, SEEDS, solver="ddim")).abs().max() > 1e-3  # its noise shows
    with step.roles.averaged():
        step.student().write(final)
    return images


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f in FAST else pytest.mark.slow) for f in CASES])
def test_fresh_noise_is_the_same_everywhere(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, final = pipelines.save(family, tmp_path / family), tmp_path / "final"
    own = student_of(folder, final)
    teacher: Any = pipelines.load(folder)
    scheduler, flow = load_scheduler(final / "scheduler"), isinstance(teacher.schedule, Flow)
    assert type(scheduler) is (FlowMatchEulerDiscreteScheduler if flow else LCMScheduler)
    assert not flow or scheduler.config.stochastic_sampling
    torch.testing.assert_close(drawn(fewstep.load(folder, final), PROMPTS, STEPS), own, rtol=0, atol=1e-4)
    if family.startswith("wan"):  # its pipeline tells no scheduler its times
        with pytest.raises(ValueError, match="this student has fresh noise at every step, and its pipeline tells no"):
            run_export(str(final), tmp_path / "pipeline", "pipeline", None, None)
        assert "fewstep.load(" in (final / "README.md").read_text()
        return
    run_export(str(final), tmp_path / "pipeline", "pipeline", None, None)
    pipe: Any = pipeline_of(teacher)
    known = family_of_pipeline(pipe)
    pipe.scheduler = scheduler
    pipe.load_lora_weights(str(final))
    generators = list[torch.Generator]()  # of a call

    def draw(shape: torch.Size, **_: Any) -> Tensor:
        noise = known.latents(noise_of(generators, teacher.shape))
        return noise if noise.shape == shape else noise.flatten(2).mT  # FLUX.2's scheduler gets tokens

    if flow:  # pipelines hand over no generator: the noise of each step is torch's own
        monkeypatch.setattr(stock_euler, "randn_tensor", draw)
        assert "`torch.manual_seed(0)` before the call repeats an image" in (final / "README.md").read_text()
    groups = [[i] for i in SEEDS] if known.alone else [SEEDS]
    options = {**pipelines.options(family, 3.0 if teacher.embeds_guidance else 1.0, len(groups[0]))}
    options |= known.call_options(pipe)
    card = fewstep.load_student(final).card
    if not visits_alone(teacher.scheduler_config, "renoise", even=True):
        options |= told_times(known, scheduler.config.shift, card.timesteps[str(STEPS)][:-1])
    if family in pipelines.SIZES or family == "sd3":
        options |= {"height": teacher.image_size, "width": teacher.image_size}
    seen = list[Tensor]()
    for some in groups:
        generators[:] = [torch.Generator().manual_seed(s) for s in some]
        prompts = [PROMPTS[i] for i in some]
        found = pipe(prompt=prompts, num_inference_steps=STEPS, generator=generators, output_type="pt", **options)
        seen.append(found.frames if known.video else over_white(found.images))
    torch.testing.assert_close(torch.cat(seen), own, rtol=0, atol=1e-4)


def test_a_scheduler_of_flow_visits_the_times_that_it_is_told() -> None:
    """Also uneven ones; by itself it visits a student's times only if its pipeline tells it K even sigmas."""
    for shift in (1.0, 3.0):
        config = {"num_train_timesteps": 1000, "shift": shift}
        scheduler: Any = student_scheduler(config, [STEPS], "renoise", even=False)
        times = timegrid.uniform(Flow(shift=shift), STEPS, 2.0)[:-1]
        scheduler.set_timesteps(**told_times(FAMILIES["FluxPipeline"], shift, times.tolist()))
        torch.testing.assert_close(scheduler.timesteps.double() / 1000, times, rtol=0, atol=1e-6)
        assert not visits_alone(config, "renoise", even=True) and visits_alone(config, "ddim", even=True)
        assert visits_alone({**config, TOLD_SIGMAS: True}, "renoise", even=True)
        assert not visits_alone({**config, TOLD_SIGMAS: True}, "renoise", even=False)
