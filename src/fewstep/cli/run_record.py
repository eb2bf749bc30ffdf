"""`run.json`: what was run, with which settings, on which machine."""

import os
import sys
import time
from typing import Any

from ..names import quoted
from ..processes import this_process
from ..runs.recipe import DistillRecipe, recorded
from ..runs.record import hardware, versions


def run_record(recipe: DistillRecipe, base_hash: str, source: str, overrides: list[str]) -> dict[str, Any]:
    """Return the content of `run.json`."""
    return {
        "command": command_line(),
        "recipe_source": source,
        "overrides": overrides,
        "recipe": recorded(recipe),
        "base_hash": base_hash,
        "seed": recipe.train.seed,
        "hardware": hardware(),
        "versions": versions(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def command_line() -> str:
    """Return the command that started this process, for a shell."""
    count = this_process().num_processes
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count))  # set by torchrun: processes on this machine
    machines = [] if here == count else ["--nnodes", str(count // here)]
    launched = (
        ["fewstep"] if count == 1 else ["torchrun", *machines, "--nproc_per_node", str(here), "-m", "fewstep.cli.main"]
    )
    return quoted(*launched, *sys.argv[1:])
