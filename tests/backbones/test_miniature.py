"""The miniature is the real thing: any text, any size, the classes that everybody loads."""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from fewstep.backbones import miniature

from .. import tiny


def test_tokenizer_takes_any_text_and_comes_back_from_disk(tmp_path: Path) -> None:
    tokenizer = miniature.word_tokenizer(["red cat", "red dog"] * 3, 600, 12)
    for text in ("red cat", "Zürich 12:30 café", "猫", ""):
        ids = tokenizer(text, padding="max_length", max_length=12, truncation=True).input_ids
        assert len(ids) == 12
        assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(tokenizer("red cat").input_ids, skip_special_tokens=True).strip() == "red cat"
    assert len(tokenizer("red cat").input_ids) == 4  # two whole words were learned
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    assert again("a red dog, a cat").input_ids == tokenizer("a red dog, a cat").input_ids


def test_pipeline_round_trips_through_a_folder(tmp_path: Path) -> None:
    pipe = tiny.pipeline()
    pipe.save_pretrained(tmp_path)
    again = StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    images = []
    for p in (pipe, again):
        p.set_progress_bar_config(disable=True)
        images.append(
            p("red cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
        )
    torch.testing.assert_close(images[0], images[1], rtol=0, atol=1e-5)
    assert images[0].shape == (1, 3, 16, 16)


def test_scheduler_starts_at_pure_noise_and_ends_clean() -> None:
    scheduler = miniature.scheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    assert scheduler.alphas_cumprod[-1] == 0
    assert scheduler.final_alpha_cumprod == 1
    assert scheduler.config.prediction_type == "v_prediction"
