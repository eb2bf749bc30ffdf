"""What a run records of its software and hardware."""

import platform
from importlib.metadata import version

import torch

from .. import __version__
from ..processes import this_process
from ..report.words import plural


def versions() -> dict[str, str]:
    """Return the versions of Python, fewstep and what fewstep computes with."""
    return {"fewstep": __version__, "python": platform.python_version()} | {
        p: version(p) for p in ("torch", "diffusers", "transformers", "peft", "accelerate")
    }


def hardware() -> str:
    """Return the device's name as a person would say it."""
    name = torch.cuda.get_device_name(0) if torch.cuda.is_available() else plural(torch.get_num_threads(), "CPU thread")
    count = this_process().num_processes
    return name if count == 1 else f"{count} x {name}"
