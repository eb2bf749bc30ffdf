"""A setting of a teacher is followed, or refused in one line.

The refusal comes when the teacher is loaded, and a wrong setting is never a traceback.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import fewstep
from fewstep.backbones.few_step import drawn
from fewstep.backbones.load import around, load_teacher
from fewstep.backbones.meta import meta_teacher
from fewstep.backbones.schedulers import student_scheduler
from fewstep.core import timegrid

from .. import pipelines, tiny

PROMPTS = ["red cat"]


@pytest.fixture(scope="module")
def pipes() -> dict[str, DiffusionPipeline]:
    return {name: pipelines.FAMILIES[name]() for name in ("sd", "sdxl", "pixart", "sd3", "cogvideox")} | {
        "pixels": tiny.pixels(()).pipe
    }


@pytest.mark.parametrize(
    ("family", "part", "setting", "value", "said"),
    [
        ("sd", "unet", "flip_sin_to_cos", 3, "unet says flip_sin_to_cos 3, allowed are true and false"),
        (
            "sd",
            "scheduler",
            "rescale_betas_zero_snr",
            "no",
            'scheduler says rescale_betas_zero_snr "no", allowed are true and false',
        ),
        ("sdxl", "vae", "use_quant_conv", [False], "vae says use_quant_conv [false], allowed are true and false"),
        (
            "pixels",
            "scheduler",
            "prediction_type",
            ["epsilon"],
            'prediction_type ["epsilon"], allowed are epsilon, v_prediction, sample',
        ),
        ("sd", "unet", "in_channels", 9, "unet says in_channels 9, text-to-image with this autoencoder takes 4"),
        ("sd", "unet", "out_channels", 8, "unet says out_channels 8"),
        ("sd", "unet", "time_cond_proj_dim", 256, "takes guidance as an input"),
        ("sd", "unet", "class_embed_type", "timestep", "has no classes"),
        ("sd", "unet", "num_class_embeds", 10, "has no classes"),
        ("sd", "unet", "encoder_hid_dim_type", "image_proj", "takes images next to the text"),
        ("sd", "unet", "addition_embed_type", "text_time", "a StableDiffusionPipeline gives it nothing or text"),
        ("sd", "unet", "addition_embed_type", "image", 'addition_embed_type "image"'),
        ("sd", "unet", "cross_attention_dim", 768, "its text encoders give 32"),
        ("sd", "unet", "cross_attention_dim", [32, 16], "its text encoders give 32"),
        ("sd", "unet", "sample_size", None, "unet says no sample_size; pass size=PIXELS"),
        ("sd", "unet", "sample_size", [8, 16], "unet says sample_size [8, 16], fewstep samples squares"),
        ("sd", "unet", "sample_size", "8", "allowed are whole numbers"),
        ("sd", "unet", "sample_size", 10**9, "allowed are whole numbers from 1 to 4096"),
        ("sd", "unet", "sample_size", -8, "allowed are whole numbers"),
        ("sd", "vae", "scaling_factor", None, "vae says scaling_factor null, allowed are positive numbers"),
        ("sd", "vae", "scaling_factor", 0, "allowed are positive numbers"),
        ("sd", "vae", "scaling_factor", float("nan"), "allowed are positive numbers"),
        ("sd", "vae", "shift_factor", 0.1, "which a StableDiffusionPipeline does not read; set it to null"),
        (
            "sd",
            "vae",
            "latents_mean",
            [0.0] * 4,
            "latents_mean and latents_std, which a StableDiffusionPipeline does not read",
        ),
        ("sd", "vae", "in_channels", 4, "images have 3"),
        ("sd", "scheduler", "prediction_type", "flow_prediction", "allowed are epsilon, v_prediction, sample"),
        ("sd", "scheduler", "prediction_type", None, "allowed are epsilon, v_prediction, sample"),
        (
            "sd",
            "scheduler",
            "prediction_type",
            "epsilon",
            "predicts noise, and at its noisiest time (999) the schedule leaves",
        ),
        ("sdxl", "vae", "latents_std", [1.0] * 4, "vae says latents_mean null, allowed are 4 numbers"),
        ("sdxl", "unet", "addition_embed_type", None, "a StableDiffusionXLPipeline gives it text_time"),
        ("sdxl", "unet", "addition_time_embed_dim", None, "addition_time_embed_dim null"),
        ("sdxl", "unet", "projection_class_embeddings_input_dim", 2560, "the pooled text and six sizes are 80"),
        ("sdxl", "unet", "cross_attention_dim", 2048, "its text encoders give 64"),
        ("pixart", "transformer", "in_channels", 16, "its autoencoder's latents have 4"),
        ("pixart", "transformer", "out_channels", 5, "allowed are 4, or 8 with a variance"),
        ("pixart", "transformer", "sample_size", None, "transformer says no sample_size"),
        ("pixart", "transformer", "sample_size", 7, "no multiple of its patch_size 2"),
        ("pixart", "transformer", "patch_size", 0, "patch_size 0"),
        ("pixart", "transformer", "caption_channels", 4096, "its text encoders give 32"),
        ("sd3", "transformer", "pooled_projection_dim", 2048, "its text encoders give 64"),
        ("sd3", "transformer", "joint_attention_dim", 4096, "its text encoders give 64"),
        ("sd3", "transformer", "in_channels", 16, "its autoencoder's latents have 4"),
        ("sd3", "vae", "shift_factor", None, "allowed are finite numbers"),
        (
            "sd3",
            "scheduler",
            "use_dynamic_shifting",
            True,
            "scheduler says use_dynamic_shifting, which fewstep does not read",
        ),
        ("sd3", "scheduler", "shift", 0, "allowed are positive numbers"),
        ("sd3", "scheduler", "shift", "3", "allowed are positive numbers"),
        ("cogvideox", "transformer", "patch_size_t", 2, "it is CogVideoX 1.5"),
        ("cogvideox", "transformer", "in_channels", 8, "twice as many are for video from images"),
        ("cogvideox", "transformer", "sample_frames", 10, "allowed are 4 n + 1"),
        ("cogvideox", "transformer", "sample_frames", None, "sample_frames null"),
        ("cogvideox", "transformer", "sample_height", [2], "sample_height [2]"),
        ("cogvideox", "transformer", "sample_width", 3, "no multiple of its patch_size 2"),
        ("cogvideox", "transformer", "text_embed_dim", 4096, "its text encoders give 32"),
        ("cogvideox", "transformer", "temporal_compression_ratio", 8, "its autoencoder says 4"),
        ("cogvideox", "vae", "latents_mean", [0.1], "which a CogVideoXPipeline does not read"),
        ("pixels", "unet", "in_channels", 4, "images have 1 or 3"),
        ("pixels", "unet", "out_channels", 6, "a learned variance is not read"),
        ("pixels", "unet", "sample_size", None, "sample_size null"),
        ("pixels", "unet", "sample_size", [8, 8, 8], "allowed are a number, or height and width"),
        ("pixels", "unet", "class_embed_type", "identity", "classes are given by their number"),
        (
            "pixels",
            "unet",
            "num_class_embeds",
            1000,
            "num_class_embeds 1000, labels.json names 0 classes; write 999 names",
        ),
    ],
)
def test_what_is_asked_for_and_not_done(
    family: str, part: str, setting: str, value: Any, said: str, pipes: dict[str, DiffusionPipeline]
) -> None:
    pipe = pipes[family]
    around(pipe, "tiny")
    network = getattr(pipe, part)
    kept = network.config.get(setting)
    try:
        network.register_to_config(**{setting: value})
        with pytest.raises(ValueError, match=r"^base: tiny: ") as error:
            around(pipe, "tiny")
        assert said in str(error.value) and "\n" not in str(error.value)
    finally:
        network.register_to_config(**{setting: kept})


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.save("sd", tmp_path_factory.mktemp("settings") / "sd")


@pytest.fixture
def edit(sd: Path) -> Iterator[Any]:
    """Change a JSON file of the folder for one test."""
    kept: dict[Path, str] = {}

    def change(file: str, **values: Any) -> Path:
        path = sd / file
        kept.setdefault(path, path.read_text())
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return sd

    yield change
    for path, text in kept.items():
        path.write_text(text)


@pytest.mark.parametrize(
    ("file", "setting", "value", "said"),
    [
        (
            "model_index.json",
            "_class_name",
            ["my_pipeline", "MyPipeline"],
            "is a ['my_pipeline', 'MyPipeline'], supported are",
        ),
        (
            "model_index.json",
            "unet",
            None,
            "model_index.json says 'unet' null, which is no part of a StableDiffusionPipeline",
        ),
        ("model_index.json", "vae", ["diffusers"], "model_index.json says 'vae'"),
        ("model_index.json", "extra", ["my_code", "Network"], "model_index.json says 'extra'"),
        ("model_index.json", "scheduler", ["my_code", "Scheduler"], "cannot be loaded"),
        ("unet/config.json", "layers_per_block", 10**9, "says layers_per_block 1e+09, allowed are 0 to 1000"),
        ("unet/config.json", "block_out_channels", "wide", "cannot be loaded"),
        ("unet/config.json", "attention_head_dim", 3, "cannot be loaded"),
        ("unet/config.json", "norm_eps", "small", "its parts do not go together"),
        (
            "unet/config.json",
            "quantization_config",
            {"load_in_4bit": True},
            "asks for weights in fewer bits (quantization_config)",
        ),
        ("text_encoder/config.json", "num_hidden_layers", 10**8, "says num_hidden_layers 1e+08, allowed are 0 to 1000"),
        ("text_encoder/config.json", "vocab_size", 10, "cannot be loaded"),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**10, "allowed are 2 to 100000"),
        (
            "scheduler/scheduler_config.json",
            "trained_betas",
            [-0.5] * 1000,
            "no noise schedule: signal does not fall from 1 towards 0",
        ),
        (
            "scheduler/scheduler_config.json",
            "trained_betas",
            [0.5, -0.5, 0.1],
            "has 3 betas and says num_train_timesteps 1000",
        ),
        ("scheduler/scheduler_config.json", "beta_schedule", "wild", "cannot be loaded"),
        ("tokenizer/tokenizer_config.json", "model_max_length", 1, "model_max_length 1, allowed are 3 to 8"),
        ("vae/config.json", "down_block_types", [], "(20 tensors are left over, which this network does not have)"),
    ],
)
def test_files_that_are_trusted_too_far(file: str, setting: str, value: Any, said: str, edit: Any) -> None:
    folder = edit(file, **{setting: value})
    with pytest.raises(ValueError, match=r"^teacher: ") as error:
        load_teacher(folder)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\x00"])
def test_files_that_are_no_settings(text: str, sd: Path) -> None:
    for name in ("unet/config.json", "model_index.json"):
        path, kept = sd / name, (sd / name).read_text()
        try:
            path.write_text(text)
            for load in (load_teacher, meta_teacher):
                with pytest.raises(
                    ValueError, match=r"config.json is damaged|model_index.json cannot be read|is a "
                ) as error:
                    load(sd)
                assert "\n" not in str(error.value)
        finally:
            path.write_text(kept)


def test_a_tokenizer_without_a_length_has_that_of_its_encoder(sd: Path, edit: Any) -> None:
    whole = load_teacher(sd)
    wanted = whole.encode(["a photo of a green house, red cat, blue dog, red cat"])["text"]
    path = sd / "tokenizer" / "tokenizer_config.json"
    edit("tokenizer/tokenizer_config.json")
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "model_max_length"}))
    for teacher in (load_teacher(sd), meta_teacher(sd)):
        assert teacher.pipe.tokenizer.model_max_length == 8  # type: ignore[attr-defined]
    assert torch.equal(
        load_teacher(sd).encode(["a photo of a green house, red cat, blue dog, red cat"])["text"], wanted
    )


def test_sizes_said_twice_or_not_at_all(sd: Path, edit: Any) -> None:
    assert load_teacher(edit("unet/config.json", sample_size=[8, 8])).shape == (4, 8, 8)
    folder = edit("unet/config.json", sample_size=None)
    for load in (load_teacher, meta_teacher):
        with pytest.raises(ValueError, match="unet says no sample_size; pass size=PIXELS"):
            load(folder)
        assert load(folder, size=32).shape == (4, 16, 16)


def test_latents_that_are_normalised_by_channel_are_decoded_as_their_pipeline_does(
    pipes: dict[str, DiffusionPipeline],
) -> None:
    """SDXL's `latents_mean` and `latents_std`, both ways."""
    pipe = pipes["sdxl"]
    plain = fewstep.sample(around(pipe, "plain"), PROMPTS, steps=2)
    try:
        pipe.vae.register_to_config(latents_mean=[0.3, -0.2, 0.1, 0.5], latents_std=[1.5, 0.5, 2.0, 0.7])
        teacher = around(pipe, "tiny")
        ours = fewstep.sample(teacher, PROMPTS, steps=2)
        z = torch.randn(2, *teacher.shape)
        shift, scale = teacher.latent_scale(z)  # type: ignore[attr-defined]
        torch.testing.assert_close((z / scale + shift - shift) * scale, z)
        kept, pipe.scheduler = pipe.scheduler, student_scheduler(teacher.scheduler_config, [2], "ddim")
        try:
            theirs = drawn(pipe, PROMPTS, 2)
        finally:
            pipe.scheduler = kept
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
        assert (ours - plain).abs().max() > 1e-2
        assert timegrid.uniform(teacher.schedule, 2).shape == (3,)
    finally:
        pipe.vae.register_to_config(latents_mean=None, latents_std=None)


def test_words_of_several_tokens_are_encoded_as_the_pipeline_does() -> None:
    """A textual inversion of three vectors: `<thing>` stands for `<thing> <thing>_1 <thing>_2`."""
    pipe = tiny.pipeline()
    pipe.load_textual_inversion(
        {"<thing>": torch.randn(3, 32, generator=torch.Generator().manual_seed(0))}, token="<thing>"
    )
    teacher = around(pipe, "tiny")
    ours = teacher.encode(["a <thing>", "a"])["text"]
    theirs, _ = pipe.encode_prompt(["a <thing>", "a"], "cpu", 1, False)
    tokens = pipe.tokenizer(
        "a <thing> <thing>_1 <thing>_2", padding="max_length", max_length=8, return_tensors="pt"
    ).input_ids
    spelt = pipe.text_encoder(tokens)[0].detach()
    assert torch.equal(ours, theirs)
    torch.testing.assert_close(ours[:1], spelt)


def test_class_names_that_are_none(tmp_path: Path) -> None:
    folder = tmp_path / "pixels"
    tiny.pixels().pipe.save_pretrained(folder)
    (folder / "labels.json").write_text('["cat", "dog"]')
    assert load_teacher(folder).labels == ("cat", "dog")  # type: ignore[attr-defined]
    for text in ("{", "3", "[]", '["cat", 3]', '["cat", "cat"]', '["cat", ""]', '["cat"]', '["a", "b", "c"]'):
        (folder / "labels.json").write_text(text)
        with pytest.raises(ValueError, match=r"^teacher: .*(labels.json|num_class_embeds)"):
            load_teacher(folder)
