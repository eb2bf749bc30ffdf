"""The tiny video pipeline is an ordinary CogVideoX whose tokens are words."""

from pathlib import Path

import torch
from diffusers import CogVideoXDDIMScheduler
from transformers import T5EncoderModel

from fewstep.backbones import miniature_video as mini


def test_a_word_is_a_token_and_any_other_text_is_letters(tmp_path: Path) -> None:
    words = mini.tokenizer(["woman running, medium-dark skin tone", "Wolf face"], 12)
    words.save_pretrained(tmp_path)
    for tokens in (words, mini.load_tokenizer(tmp_path)):
        pieces = tokens.convert_ids_to_tokens(tokens("Wolf running, medium-dark zebra".lower()).input_ids)
        assert pieces == ["▁wolf", "▁running", ",", "▁medium-dark", "▁", "z", "e", "b", "r", "a", "</s>"]
        assert tokens("", padding="max_length").input_ids == [1] + [0] * 11


def test_an_encoder_that_was_trained_as_its_inner_stack_is_saved_whole(tmp_path: Path) -> None:
    """T5EncoderModel has a second name for the stack's embeddings."""
    words = mini.tokenizer(["red cat"], 4)
    text = mini.text_encoder(words, 16, 1, 2).eval()
    text.encoder.load_state_dict({k: torch.rand_like(v) for k, v in text.encoder.state_dict().items()})
    tokens = words(["red cat"], return_tensors="pt").input_ids
    text.save_pretrained(tmp_path)
    assert torch.equal(T5EncoderModel.from_pretrained(tmp_path)(tokens)[0], text.encoder(tokens)[0])


def test_time_is_compressed_four_times_but_for_the_first_frame() -> None:
    vae = mini.autoencoder((8, 8, 8), 4, 16).eval()
    x = torch.randn(1, 3, 9, 16, 16)
    with torch.no_grad():
        z = vae.encode(x).latent_dist.mean
        assert z.shape == (1, 4, 3, 4, 4)
        assert vae.decode(z).sample.shape == x.shape


def test_the_scheduler_is_that_of_cogvideox_2b() -> None:
    """The settings of THUDM/CogVideoX-2b's scheduler_config.json."""
    own = mini.scheduler()
    assert isinstance(own, CogVideoXDDIMScheduler)
    expected = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "prediction_type": "v_prediction",
        "snr_shift_scale": 3.0,
        "rescale_betas_zero_snr": True,
        "set_alpha_to_one": True,
        "timestep_spacing": "trailing",
        "num_train_timesteps": 1000,
    }
    assert {k: own.config[k] for k in expected} == expected
    assert float(own.alphas_cumprod[-1]) == 0
