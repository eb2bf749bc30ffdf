"""Where a benchmark's numbers come from: the commit, the hardware and the clock."""

import subprocess
import time

import torch

CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time  # processors are shared with others


def commit() -> str:
    """Of this project, as `git log` shows it; empty outside of it."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()


def hardware() -> str:
    """The GPU, or how many threads of the CPU."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
