"""What a student requires of its base.

A base predicts what the student's base predicted. A network of one's own also has the same process,
conditions and weights.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..backbones.base import Backbone, Denoiser
from ..backbones.load import fingerprint
from ..backbones.parts import DiffusersBackbone
from ..backbones.process import differences, probe, process_data
from .card import StudentCard


def process_of(backbone: Backbone) -> dict[str, Any]:
    """Return what a card records of a network of one's own.

    The record is process, shape and conditions, so that the network is not used with others. Empty for a
    pipeline, whose folder has the record.
    """
    if isinstance(backbone, DiffusersBackbone):
        return {}
    with torch.no_grad():
        heard = probe(backbone.encode([""]))
    return {**process_data(backbone), "shape": tuple(backbone.shape), "conditions": heard}


def require_own(card: StudentCard, backbone: Backbone, folder: Path, other_weights: bool = True) -> None:
    """Check that a base fits a student.

    Raises ValueError where the base predicts something else. For a network of one's own also where process,
    conditions or time layer differ, and, unless `other_weights`, where the weights differ.
    """
    if not card.own_network:
        if isinstance(backbone, Denoiser):
            raise ValueError(
                f"base: {folder} is a student of {card.base}, a diffusers pipeline, "
                f"got the Denoiser {backbone.name}; leave base out"
            )
        own = str(backbone.scheduler_config.get("prediction_type", ""))
        if own != card.prediction:
            raise ValueError(
                f"student: {folder} was made on a base that predicts {card.prediction or 'a flow'}, "
                f"this one predicts {own or 'a flow'}; load it on {card.base}, or on another base of its kind"
            )
        _require_times(card, backbone, folder)
        return
    if isinstance(backbone, DiffusersBackbone):
        raise ValueError(
            f"base: {folder} is a student of {card.base}, a network of one's own, "
            f"got the pipeline {backbone.name}; pass its fewstep.Denoiser"
        )
    said = asdict(card)
    now = process_of(backbone) | ({"time_layer": backbone.time_layer} if card.time_layer else {})
    if odd := differences({k: said[k] for k in now}, now):
        raise ValueError(
            f"base: {folder} was made with another base: {', '.join(odd)}; "
            "pass the fewstep.Denoiser that it was made from"
        )
    if not other_weights and card.weights != "full" and (here := fingerprint(backbone.module)) != card.base_hash:
        raise ValueError(
            f"base: {folder} was trained on other weights (hash {card.base_hash}, here {here}); "
            "load those, or pass other_weights=True to use it on these all the same"
        )


def _require_times(card: StudentCard, backbone: Backbone, folder: Path) -> None:
    """Check that a base has the student's times and time layer.

    Raises ValueError for times outside the base's process, and for a time layer that the base lacks.
    """
    low, high = backbone.schedule.t_clean, backbone.schedule.t_max
    if odd := [t for times in card.timesteps.values() for t in times if not low <= t <= high]:
        raise ValueError(
            f"student: {folder} visits the time {odd[0]:g}, those of its base are {low:g} to {high:g}; "
            "export the run again"
        )
    if card.time_layer not in ("", backbone.time_layer):
        raise ValueError(
            f"student: {folder} is told its steps at {card.time_layer!r}, "
            f"its base is told at {backbone.time_layer!r}; export the run again"
        )
