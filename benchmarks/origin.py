"""Where a benchmark's numbers come from: the commit, the hardware and the clock."""

import subprocess
import time
from pathlib import Path

import torch

CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time  # processors are shared with others


def commit() -> str:
    """Of this project, as `git log` shows it; empty outside of it."""
    return subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()


def hardware() -> str:
    """The GPU, or the processor and how many of its threads."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    listed = Path(
        "/proc/cpuinfo"
    )  # Linux. Processors of one name differ threefold in speed, so the widest instructions go along
    lines = [line.partition(":") for line in (listed.read_text().splitlines() if listed.exists() else [])]
    found = {name.strip(): value.strip() for name, _, value in lines}
    flags = found.get("flags", "").split()
    wide = next((f" with {f}" for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags), "")
    return f"{found.get('model name', 'CPU')}{wide}, {torch.get_num_threads()} threads"
