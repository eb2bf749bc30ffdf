"""The `final/` folder of a run: weights, scheduler, card, model card. Written beside, then renamed into place."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..atomic import cure_of, link_or_copy, open_to_others, sync, sync_all, temporary_beside, write_json, write_text
from ..backbones.base import Backbone
from ..backbones.few_step import facts_of
from ..backbones.files import LORA_FILE, save_lora, save_network, save_vectors
from ..backbones.load import pipeline_of
from ..backbones.schedulers import student_scheduler
from ..core import timegrid
from ..hashes import weight_hashes
from ..trajp.files import save_head
from .card import FILE, StudentCard, read_card
from .comfy import workflow
from .model_card import model_card


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
    if os.path.lexists(folder) and not (folder / FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise OSError(
            f"cannot write {folder}: what is there is no student; move it away, then run the same command again: training is not repeated"
        )
    beside, before = temporary_beside(folder), temporary_beside(folder)
    try:
        beside.mkdir(parents=True)
        even = all(timegrid.even(backbone.schedule, torch.tensor(times, dtype=torch.float64)) for times in card.timesteps.values())
        if lora is None:
            save_network(beside, network)
        elif lora:
            save_lora(beside, network, lora, metadata)
            link_or_copy(beside / LORA_FILE, beside / f"{card.name}-lora.safetensors")
            facts = facts_of(pipeline_of(backbone))
            if graph := workflow(card, facts.pipeline, f"{card.name}-lora.safetensors", backbone.picture_size, even):
                write_json(beside / "comfyui-workflow.json", graph)
        if head is not None:
            save_head(beside, head)
        if vectors:
            save_vectors(beside, vectors)
        scheduler = student_scheduler(backbone.scheduler_config, card.steps, card.solver[str(card.steps[0])], even)
        scheduler.save_pretrained(beside / "scheduler")
        write_json(beside / FILE, asdict(replace(card, files=weight_hashes(beside))))
        write_text(beside / "README.md", model_card(card, folder.name, type(scheduler).__name__, facts_of(pipeline_of(backbone)), even))
        open_to_others(beside)
        sync_all(beside)
        if folder.is_dir():
            os.replace(folder, before)
        os.replace(beside, folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        if before.is_dir() and not folder.exists():
            os.replace(before, folder)
        raise OSError(f"cannot write {folder}: {error}; {cure_of(error)} (training is not repeated)") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)
    return folder


def seal(folder: Path) -> None:
    """Say the hashes of a student's weight files anew, where some were written after its card."""
    write_json(folder / FILE, asdict(replace(read_card(folder), files=weight_hashes(folder))))
