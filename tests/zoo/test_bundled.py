"""The teacher that ships: an ordinary diffusers pipeline, small, and the same model to diffusers as to fewstep."""

import pytest
import torch
from diffusers import DDPMPipeline, StableDiffusionPipeline

import fewstep
from fewstep.backbones.load import BUNDLED, bundled

FOLDER = BUNDLED / "emoji"


def test_it_ships_whole_and_small() -> None:
    assert "emoji" in bundled()
    files = [p for p in FOLDER.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 32e6
    assert {"README.md", "LICENSE", "prompts.txt"} <= {p.name for p in files}
    assert not [p for p in files if p.suffix not in (".safetensors", ".json", ".md", ".txt", "")]


@pytest.mark.parametrize("rescale", [0.0, 0.5])
def test_plain_diffusers_draws_what_fewstep_draws(rescale: float) -> None:
    """Guided DDIM in stock diffusers equals ours, image by image: schedule, guidance, noise and codec agree."""
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipe.set_progress_bar_config(disable=True)
    prompts, seeds = ["red apple", "waving hand sign, dark skin tone"], [3, 4]
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    theirs = pipe(
        prompts,
        num_inference_steps=5,
        guidance_scale=3.0,
        guidance_rescale=rescale,
        generator=generators,
        output_type="pt",
    ).images
    guidance = fewstep.Guidance(scale=3.0, rescale=rescale)
    ours = fewstep.sample(fewstep.load_teacher("emoji"), prompts, seeds, steps=5, guidance=guidance)
    assert (theirs - ours).abs().max() <= 1e-3
    assert ours.std() > 0.1


def test_its_prompts_fit_its_tokenizer() -> None:
    teacher = fewstep.load_teacher("emoji")
    prompts = (FOLDER / "prompts.txt").read_text().splitlines()
    assert len(prompts) == len(set(prompts)) > 3000
    text = teacher.encode([prompts[0], prompts[0], ""])["text"]
    assert torch.equal(text[0], text[1])
    assert not torch.allclose(text[0], text[2], atol=1e-2)


def test_the_pixel_teacher_is_tiny_and_draws_its_kinds() -> None:
    """Trousers are tall, and bags are wide; with and without guidance, from a folder that plain diffusers opens."""
    folder = BUNDLED / "fashion"
    assert {"README.md", "LICENSE", "prompts.txt", "labels.json"} <= {p.name for p in folder.iterdir()}
    teacher = fewstep.load_teacher("fashion")
    assert sum(p.numel() for p in teacher.module.parameters()) < 1e6
    assert DDPMPipeline.from_pretrained(folder).unet.config.sample_size == 28
    for guidance in (1.0, 2.0):
        trousers, bags = fewstep.sample(teacher, ["trouser"] * 6 + ["bag"] * 6, steps=10, guidance=guidance).split(6)
        width = [
            ((p > 0.3).float().amax(2).sum(2) / (p > 0.3).float().amax(3).sum(2).clamp(min=1)).mean()
            for p in (trousers, bags)
        ]
        assert width[0] < 0.75
        assert width[1] > 0.85
