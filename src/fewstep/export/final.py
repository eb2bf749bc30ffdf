"""The `final/` folder of a run: weights, scheduler, card, model card. Written beside, then renamed into place."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..atomic import write_bytes, write_json
from ..backbones.base import Backbone
from ..backbones.few_step import facts_of
from ..backbones.files import LORA_FILE, save_lora, save_network, save_vectors
from ..backbones.load import pipeline_of
from ..backbones.schedulers import student_scheduler
from ..core import timegrid
from ..trajp.files import save_head
from .card import FILE, StudentCard
from .comfy import workflow
from .model_card import model_card
from .own_card import own_card


def write_final(
    folder: Path,
    backbone: Backbone,
    card: StudentCard,
    network: nn.Module,
    lora: Mapping[str, Tensor] | None,
    metadata: Mapping[str, Any],
    vectors: Mapping[float, Tensor] = MappingProxyType({}),
    head: nn.Module | None = None,
) -> Path:
    """Write the student to `folder`, replacing an older one only when everything is there.

    `lora` is the adapter in PEFT's file format, or None for a full student, whose `network` is saved whole. The LoRA is
    written twice: under diffusers' standard name and under a name of its own, for programs that only know files. Either is right by
    itself for the card's first step count; `vectors` are what tells a student of several the others,
    `head` is what corrects its direction.
    """
    beside = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        even = all(timegrid.even(backbone.schedule, torch.tensor(times, dtype=torch.float64)) for times in card.timesteps.values())
        if lora is None:
            save_network(beside, network)
        elif lora:
            save_lora(beside, network, lora, metadata)
        if lora and not card.own_network:
            os.link(beside / LORA_FILE, beside / f"{card.name}-lora.safetensors")
            facts = facts_of(pipeline_of(backbone))
            if graph := workflow(card, facts.pipeline, f"{card.name}-lora.safetensors", backbone.picture_size, even):
                write_json(beside / "comfyui-workflow.json", graph)
        if head is not None:
            save_head(beside, head)
        if vectors:
            save_vectors(beside, vectors)
        if card.own_network:
            about = own_card(card, folder.name)
        else:
            scheduler = student_scheduler(backbone.scheduler_config, card.steps, card.solver[str(card.steps[0])], even)
            scheduler.save_pretrained(beside / "scheduler")
            about = model_card(card, folder.name, type(scheduler).__name__, facts_of(pipeline_of(backbone)), even)
        write_json(beside / FILE, asdict(card))
        write_bytes(beside / "README.md", about.encode())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(beside, folder)
    except OSError as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise OSError(
            f"cannot write {folder}: {error}; free some space, then run the same command again: training is not repeated"
        ) from error
    return folder
