"""A head as one safetensors file: weights, and in its header the curve and everything else that it was made with."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..atomic import write_tensors
from ..core.schedule import Schedule
from ..hashes import require_listed
from ..reading import reading
from ..tensors import read_tensors
from .curve import Curve
from .head import Facts, Head, kind_of, make_head

FILE = "trajp.safetensors"
CURVE = "curve."


def save_head(folder: Path, head: nn.Module) -> Path:
    """`folder/trajp.safetensors`."""
    assert isinstance(head, Head)
    curve = head.facts.curve
    tensors: dict[str, Tensor] = dict(head.state_dict())
    tensors |= {f"{CURVE}weights": curve.weights, f"{CURVE}shape": curve.shape, f"{CURVE}r2": curve.r2}
    about = {"kind": kind_of(head), "spread": head.facts.spread, "grids": [g.tolist() for g in head.facts.grids]}
    write_tensors(folder / FILE, tensors, {"fewstep": json.dumps(about)})
    return folder / FILE


def load_head(folder: Path, schedule: Schedule) -> Head:
    """The head in `folder`. Raises ValueError when it is missing or damaged."""
    path = folder / FILE
    require_listed(folder, FILE)
    with reading(f"student: {path}", "export the run again", "is missing or damaged"):
        tensors = read_tensors(path)
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()["fewstep"])
        curve = Curve(*(tensors.pop(f"{CURVE}{part}") for part in ("weights", "shape", "r2")))
        grids = tuple(torch.tensor(g, dtype=torch.float64) for g in about["grids"])
        head = make_head(about["kind"], schedule, Facts(curve, tensors["centre"], about["spread"], grids))
        head.load_state_dict(tensors)
    return head
