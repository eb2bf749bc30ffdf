"""`run.json`: what was run, with what, on what."""

import os
import platform
import sys
import time
from importlib.metadata import version
from typing import Any

import torch

from .. import __version__
from ..names import quoted
from ..training.processes import this_process
from .recipe import DistillRecipe, settings_of


def run_record(recipe: DistillRecipe, base_hash: str, source: str, overrides: list[str]) -> dict[str, Any]:
    """`run.json`."""
    return {
        "command": command_line(), "recipe_source": source, "overrides": overrides, "recipe": settings_of(recipe),
        "base_hash": base_hash, "seed": recipe.train.seed, "hardware": hardware(), "versions": versions(), "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def versions() -> dict[str, str]:
    return {"fewstep": __version__, "python": platform.python_version()} | {
        p: version(p) for p in ("torch", "diffusers", "transformers", "peft", "accelerate")
    }


def hardware() -> str:
    """The device's name as a person would say it."""
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU threads"
    count = this_process().num_processes
    return name if count == 1 else f"{count} x {name}"


def command_line() -> str:
    count = this_process().num_processes
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))  # torchrun's: of them on this machine
    machines = [] if here == count else ["--nnodes", str(count // here)]
    launched = ["fewstep"] if count == 1 else ["torchrun", *machines, "--nproc_per_node", str(here), "-m", "fewstep.cli.main"]
    return quoted(*launched, *sys.argv[1:])
