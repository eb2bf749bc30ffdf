"""Where a benchmark's numbers come from: the commit and the hardware."""

import subprocess

import torch


def commit() -> str:
    """Of this project, as `git log` shows it; empty outside of it."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()


def hardware() -> str:
    """The GPU, or how many threads of the CPU."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
