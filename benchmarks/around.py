"""Compare what is around a training with an earlier commit: plans, caches of prompts, checkpoints.

    python benchmarks/configurations.py FOLDER
    python benchmarks/around.py FOLDER --name before    # with PYTHONPATH at the earlier commit's src
    python benchmarks/around.py FOLDER                  # writes benchmarks/around.md and .json

`fewstep plan` runs in a process of its own, whose CPU seconds count: other processes share the machine. A cache is
written for 256 prompts of PixArt's shape, of whose 120 tokens 100 are padding, and its bytes are scaled to 100,000
prompts. A checkpoint of 256 MiB is saved by the writer, with the seconds that the training waits, and directly, in
turn; the least of several counts.
"""

import argparse
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fewstep.backbones.base import Cond, Denoiser
from fewstep.core.schedule import Flow
from fewstep.data.prompts import embed
from fewstep.training.state import save_checkpoint
from records import (
    Facts,
    Record,
    about,
    markdown,
    new_record,
    origin,
    provenance,
    read_record,
    stored_rows,
    wrapped,
    write_record,
)

RECIPES = ("sd15-tdm4-lora", "sd15-tdm4", "sdxl-tdm4-lora", "pixart-tdm4-lora", "cogvideox-tdm4-lora")
SCALED, PROMPTS, TOKENS = 100_000, 256, 20
GB, GIB = 1e9, 2**30


def plan(recipe: str, folder: Path, *options: str) -> list[Facts]:
    """Return CPU seconds of a plan, and what it says of encoding and in all, in GiB."""
    teacher = folder / recipe.partition("-")[0]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "fewstep.cli.main", "plan", recipe, "--teacher", str(teacher), *options],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    says = [(line, float(m[1]) / (1 if m[2] == "G" else 1024)) for line in done.stdout.splitlines()
            if (m := re.search(r"([\d.]+) ([GM])iB", line))]  # fmt: skip
    what = " ".join((f"`fewstep plan {recipe}", *options)) + "`"
    return [
        {"what": what, "unit": "CPU s", "value": seconds},
        {"what": f"{what}: encoding", "unit": "GiB", "value": max(v for line, v in says if "encoding" in line)},
        {"what": f"{what}: needed", "unit": "GiB", "value": max(v for line, v in says if "needed" in line)},
    ]


def padded(prompts: Sequence[str]) -> Cond:
    """Return conditions of PixArt's shape, of which all but some tokens are padding."""
    text = torch.zeros(len(prompts), 120, 4096, dtype=torch.bfloat16)
    text[:, :TOKENS] = 1
    return {"text": text, "mask": (text[..., 0] != 0).long()}


def caches() -> list[Facts]:
    """Return the bytes of caches of 100,000 prompts."""
    prompts = [f"prompt {i}" for i in range(PROMPTS)]
    with tempfile.TemporaryDirectory() as folder:
        pixart = Denoiser(nn.Linear(1, 1), Flow(), (1,), "flow", conditions=padded)
        embed(pixart, prompts, Path(folder) / "pixart", "x")
        taken = sum(f.stat().st_size for f in Path(folder).rglob("*.safetensors"))
    return [
        {"what": "cache of 100,000 prompts, PixArt, 20 tokens", "unit": "GB", "value": taken / PROMPTS * SCALED / GB}
    ]


def checkpoints(repeats: int = 5) -> list[Facts]:
    """Return the seconds that a training waits for a checkpoint."""
    from fewstep.training.saving import checkpoint_writer

    groups: dict[str, dict[str, Tensor]] = {"student": {f"w{i}": torch.randn(2**20) for i in range(64)}}
    direct, beside = [], []
    with tempfile.TemporaryDirectory() as folder, checkpoint_writer(Path(folder) / "beside", 2) as writer:
        for step in range(1, repeats + 1):
            began = time.perf_counter()
            save_checkpoint(Path(folder) / "direct", step, groups, {})
            direct.append(time.perf_counter() - began)
            began = time.perf_counter()
            writer.save(step, groups, {})
            beside.append(time.perf_counter() - began)
            writer.wait()
    return [
        {
            "what": "a checkpoint of 256 MiB: the training waits",
            "unit": "s",
            "value": min(beside),
            "before": min(direct),
        }
    ]


def page(record: Record) -> str:
    """Return the page of a record."""
    lines = []
    for r in record.rows:
        old, new = r.get("before"), r.get("value")
        numbers = ("-" if v is None else f"{v:.3g}" for v in (old, new))
        ratio = "-" if not old or new is None else f"{new / old:.2f}"
        lines.append([r["what"], r["unit"], *numbers, ratio])
    return f"""# What is around a training, before and after

{about(__doc__)}

{wrapped(f"{provenance(record)}. Before: commit {record.common['before']}.")}

{markdown(["what", "unit", "before", "after", "ratio"], lines)}
"""


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of benchmarks/configurations.py")
    parser.add_argument("--only", nargs="*", default=["plan", "caches", "checkpoints"])
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--options", nargs="*", default=[], help="of fewstep plan, e.g. --options=--cards 8")
    parser.add_argument("--name", choices=["before", "value"], default="value", help="which column is measured")
    parser.add_argument("--commit", default=None, help="of the column `before`")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    found = [row for recipe in a.recipes if "plan" in a.only for row in plan(recipe, a.folder, *a.options)]
    found += caches() if "caches" in a.only else []
    found += checkpoints() if "checkpoints" in a.only else []
    rows = {r["what"]: r for r in stored_rows(a.to / "around.json")}
    for row in found:
        value = row.pop("value")
        rows[row["what"]] = {
            **rows.get(row["what"], {}),
            **row,
            a.name: value,
            **(origin() if a.name == "value" else {}),
        }
        print(rows[row["what"]], flush=True)
    here = origin()
    listed = [{**here, **row} for row in rows.values()]
    commit = a.commit or (here["versions"]["commit"] if a.name == "before" else None)
    stored = read_record(a.to / "around.json")
    common = {"before": commit or (None if stored is None else stored.common["before"])}
    record = new_record("around", "python benchmarks/around.py FOLDER", listed, None, common)
    write_record(record, page(record), a.to)


if __name__ == "__main__":
    main()
