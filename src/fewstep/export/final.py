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

from ..atomic import open_to_others, sync, sync_all, temporary_beside, unwritten, write_json, write_text
from ..backbones.base import Backbone
from ..backbones.few_step import facts_of
from ..backbones.files import save_lora, save_network, save_vectors
from ..backbones.load import pipeline_of
from ..backbones.schedulers import student_scheduler
from ..core import timegrid
from ..hashes import weight_hashes
from ..trajp.files import save_head
from .card import FILE, StudentCard, read_card
from .clients import WORKFLOW, other_programs, write_client_file
from .comfy import workflow
from .headers import own_header
from .kohya import layers_of
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
    written twice: under diffusers' standard name, and for programs that only know files (see `write_client_file`). Either is right by
    itself for the card's first step count; `vectors` are what tells a student of several the others,
    `head` is what corrects its direction. Raises ValueError for a LoRA that changes nothing.
    """
    if card.weights == "lora":
        require_change(lora or {})
    if os.path.lexists(folder) and not (folder / FILE).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise OSError(
            f"cannot write {folder}: what is there is no student; move it away, then run the same command again: training is not repeated"
        )
    beside, before = temporary_beside(folder), temporary_beside(folder)
    try:
        beside.mkdir(parents=True)
        even = all(timegrid.even(backbone.schedule, torch.tensor(times, dtype=torch.float64)) for times in card.timesteps.values())
        schedule, file = backbone.schedule, ""
        if lora is None:
            save_network(beside, network)
        elif lora:
            save_lora(beside, network, lora, metadata, own_header(card))
        if lora and not card.own_network:
            facts = facts_of(pipeline_of(backbone))
            file = write_client_file(beside, network, card, facts, lora, backbone.picture_size)
            if graph := workflow(card, facts.pipeline, file, backbone.picture_size, schedule, backbone.scheduler_config):
                write_json(beside / WORKFLOW, graph)
        if head is not None:
            save_head(beside, head)
        if vectors:
            save_vectors(beside, vectors)
        if card.own_network:
            about = own_card(card, folder.name)
        else:
            facts = facts_of(pipeline_of(backbone))
            scheduler = student_scheduler(backbone.scheduler_config, card.steps, card.solver[str(card.steps[0])], even)
            scheduler.save_pretrained(beside / "scheduler")
            elsewhere = other_programs(card, facts, schedule, backbone.scheduler_config, file, layers_of(lora or {}), folder.name)
            about = model_card(card, folder.name, type(scheduler).__name__, facts, even, elsewhere)
        write_json(beside / FILE, asdict(replace(card, files=weight_hashes(beside))))
        write_text(beside / "README.md", about)
        open_to_others(beside)
        sync_all(beside)
        if folder.is_dir():
            os.replace(folder, before)
        os.replace(beside, folder)
        sync(folder.parent)
    except (OSError, SafetensorError) as error:
        if before.is_dir() and not folder.exists():
            os.replace(before, folder)
        raise unwritten(folder, error, " (training is not repeated)") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(before, ignore_errors=True)
    return folder


def seal(folder: Path) -> None:
    """Say the hashes of a student's weight files anew, where some were written after its card."""
    write_json(folder / FILE, asdict(replace(read_card(folder), files=weight_hashes(folder))))


def require_change(lora: Mapping[str, Tensor]) -> None:
    """Raises ValueError for a LoRA [out, r] x [r, in] that has no layers, changes none of them, or holds what is no number."""
    layers = layers_of(lora)
    if not layers:
        raise ValueError("student: its LoRA has no layers, so it is its teacher; train the run again with roles.targets=all")
    if odd := [n for n, v in lora.items() if not bool(torch.isfinite(v).all())]:
        raise ValueError(
            f"student: its LoRA holds numbers that are not finite ({odd[0]} and {len(odd) - 1} more); take an earlier checkpoint"
        )
    if not any(bool(lora[f"{n}.lora_A.weight"].any()) and bool(lora[f"{n}.lora_B.weight"].any()) for n in layers):
        raise ValueError(
            f"student: its LoRA is zero in all of its {len(layers)} layers, so it is its teacher; train it for longer, or at a higher train.lr"
        )
