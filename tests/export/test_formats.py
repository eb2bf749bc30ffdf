"""Names that other programs know, and the workflow that calls a student as it was trained."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from fewstep.backbones.student_scheduler import calls
from fewstep.cli.export import _require_stock
from fewstep.core.schedule import Flow
from fewstep.export.card import StudentCard, counted
from fewstep.export.comfy import workflow
from fewstep.export.kohya import kohya

from .. import tiny

CARD = StudentCard(
    name="x-tdm-4step", method="tdm", base="me/my-model", base_hash="", steps=(4,), timesteps={"4": [999, 749, 499, 249, -1]}, solver={"4": "ddim"}, prediction="epsilon",
    weights="lora", rank=8, alpha=8.0, teacher_guidance=3.5, licence="other", iterations=1, train_seconds=1.0, hardware="", version="0",
)  # fmt: skip


def test_every_step_count_says_its_calls() -> None:
    assert counted(CARD) == "4 in 4 steps"
    assert counted(replace(CARD, steps=(4, 1), head="span")) == "4 in 4 steps, 1 in 1 step"
    assert counted(replace(CARD, steps=(4, 1), free_first=True)) == "3 in 4 steps, 0 in 1 step (the first step is free)"


def test_kohyas_names_hold_the_same_numbers_and_their_own_alpha() -> None:
    a, b = torch.rand(8, 3), torch.rand(5, 8)
    layer = "down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"
    named = kohya({f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b}, 8.0)
    stem = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0"
    assert set(named) == {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"}
    assert torch.equal(named[f"{stem}.lora_down.weight"], a)
    assert torch.equal(named[f"{stem}.lora_up.weight"], b)
    assert float(named[f"{stem}.alpha"]) == 8.0


def test_a_workflow_takes_the_students_steps_without_guidance_at_strength_one() -> None:
    graph = workflow(CARD, "StableDiffusionPipeline", "x-tdm-4step-lora.safetensors", 512)
    assert graph is not None
    nodes = {node["class_type"]: node["inputs"] for node in json.loads(json.dumps(graph)).values()}
    assert (nodes["LoraLoader"]["lora_name"], nodes["LoraLoader"]["strength_model"]) == ("x-tdm-4step-lora.safetensors", 1.0)
    sampler = nodes["KSampler"]
    assert (sampler["steps"], sampler["cfg"], sampler["sampler_name"], sampler["scheduler"]) == (4, 1.0, "euler", "simple")
    assert nodes["CheckpointLoaderSimple"]["ckpt_name"] == "my-model.safetensors"
    assert (nodes["EmptyLatentImage"]["width"], nodes["EmptyLatentImage"]["height"]) == (512, 512)
    links = [(key, value) for node in graph.values() for key, value in node["inputs"].items() if isinstance(value, list)]
    assert all(source in graph for _, (source, _) in links)


@pytest.mark.parametrize(
    ("own", "by"), [({"head": "span"}, "a head"), ({"free_first": True}, "a free first direction"), ({"solver": {"4": "ipndm"}}, "iPNDM")]
)
def test_what_no_stock_pipeline_does_is_not_written_for_one(own: dict[str, Any], by: str) -> None:
    with pytest.raises(
        ValueError, match=f"^--format: this student is sampled with {by}, which no stock pipeline has; choose student or merged$"
    ):
        _require_stock(replace(CARD, **own))
    _require_stock(CARD)


def test_a_pipeline_takes_a_free_first_step_where_it_asks_what_to_ask_about() -> None:
    """Flow's asks the network about the state itself, at every step."""
    assert [calls(tiny.TABLE, free, k) for free in (False, True) for k in (1, 4)] == [1, 4, 1, 3]
    assert calls(Flow(), True, 4) == 4


@pytest.mark.parametrize(
    ("card", "pipeline"),
    [
        (CARD, "PixArtAlphaPipeline"),
        (replace(CARD, head="span"), "StableDiffusionPipeline"),
        (replace(CARD, free_first=True), "StableDiffusionPipeline"),
        (replace(CARD, solver={"4": "ipndm"}), "StableDiffusionPipeline"),
    ],
)
def test_there_is_no_workflow_for_what_comfyui_has_no_nodes_for(card: StudentCard, pipeline: str) -> None:
    assert workflow(card, pipeline, "x.safetensors", 512) is None
