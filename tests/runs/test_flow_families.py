"""Students of the families of flow in stock pipelines and under original names.

One family of each kind: guided by two halves (FLUX.2), guided with norms kept (Qwen-Image), told its guidance
(FLUX.1), and with time the other way round (Z-Image).
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders.single_file_utils import convert_flux2_transformer_checkpoint_to_diffusers
from torch import nn

import fewstep
from fewstep.backbones.flow_transformer import FlowTransformer
from fewstep.backbones.flux2 import LAYOUT
from fewstep.backbones.layouts import shift_first
from fewstep.backbones.load import pipeline_of
from fewstep.student.card import StudentCard
from fewstep.student.kohya import native, renamed

from .. import pipelines

PROMPTS = ["red cat", "a photo of a green house"]
KINDS = ["flux2", "qwenimage", "flux", "zimage", "krea2", "qwenimage21"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    place = tmp_path_factory.mktemp("flow")
    return lambda family: place / family if (place / family).exists() else pipelines.save(family, place / family)


@pytest.mark.parametrize("family", [pytest.param(f, marks=[] if f == "flux2" else pytest.mark.slow) for f in KINDS])
def test_a_lora_in_the_stock_pipeline_with_its_own_scheduler(family: str, folders: Any, tmp_path: Path) -> None:
    """The stock pipeline is told sigmas for the student's times, and draws the student's images."""
    folder = folders(family)
    teacher = pipelines.load(folder)
    assert isinstance(teacher, FlowTransformer)
    method = fewstep.TDM(steps=2, warmup=0, guidance=3.0)
    # A network that is told its guidance is the student at first: the fake score has to move before it.
    train = fewstep.TrainConfig(iterations=2, batch=2, lr=0.02)
    *_, step = fewstep.distill(teacher, method, PROMPTS, train=train, roles=fewstep.RolesConfig(rank=2), watch=None)
    own = fewstep.sample(step, PROMPTS, [0, 1])
    with step.roles.averaged():
        final = step.student().write(tmp_path / "final")
    card: StudentCard = fewstep.load_student(final).card
    told = {"sigmas": teacher.stock_sigmas(card.timesteps["2"][:-1])}
    scale = 3.0 if teacher.embeds_guidance else 1.0
    pipe: Any = pipeline_of(pipelines.load(folder))
    pipe.scheduler.register_to_config(shift_terminal=None)
    pipe.load_lora_weights(str(final))
    size = {"height": teacher.image_size, "width": teacher.image_size}
    options = {**pipelines.options(family, scale, len(PROMPTS)), **told, **size}
    theirs = pipelines.called(pipe, PROMPTS, [0, 1], num_inference_steps=2, **options)
    torch.testing.assert_close(theirs, own, rtol=0, atol=1e-4)


def test_original_names_of_flux2_are_the_same_weights() -> None:
    """What the file for ComfyUI adds to the original weights is what diffusers' converter calls the student's."""
    network = pipelines.flux2_dev().transformer
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear)}
    state = {
        f"{n}.lora_{half}.weight": torch.randn((2, m.in_features) if half == "A" else (m.out_features, 2))
        for n, m in layers.items()
        for half in "AB"
    }
    names = dict(LAYOUT.names(network))
    assert renamed(state, names)
    file = {k.removeprefix("diffusion_model."): v for k, v in native(state, names, shift_first(network)).items()}
    stems = {k.partition(".lora_")[0] for k in file}
    added = {f"{n}.weight": file[f"{n}.lora_B.weight"] @ file[f"{n}.lora_A.weight"] for n in stems}
    theirs = convert_flux2_transformer_checkpoint_to_diffusers(added)
    assert theirs.keys() == {f"{n}.weight" for n in layers}
    for n in layers:
        own = state[f"{n}.lora_B.weight"] @ state[f"{n}.lora_A.weight"]
        torch.testing.assert_close(theirs[f"{n}.weight"], own)
    del state["transformer_blocks.0.attn.to_k.lora_A.weight"], state["transformer_blocks.0.attn.to_k.lora_B.weight"]
    assert not renamed(state, names)  # a third of a layer has no name of its own
