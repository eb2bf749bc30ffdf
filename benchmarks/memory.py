"""Count what distilling each model family needs in memory.

    python benchmarks/memory.py                # about 10 minutes; writes benchmarks/memory.md and .json
    python benchmarks/memory.py --only sdxl    # counts that family again and keeps the others

One iteration at true size runs on meta tensors. TDM in 4 steps with a guided teacher, LoRA of rank 32; the networks
compute in bfloat16. `one base`: teacher, student and fake score are adapters of one frozen network, with weights in
bfloat16 or in single precision. `three copies`: two more networks, all weights trained in single precision, because
bfloat16 loses the updates in rounding. Weights are those of all copies and adapters. `adamw8bit` keeps Adam's moments
in 8 bits; int8 and nf4 round the frozen base. These change the result, and are compared with copies that do not. Text
encoders and autoencoder are left out; `fewstep plan` counts them, too. `python -m pytest tests/training/test_memory.py`
shows that the count is what an allocator gives, within five percent.
"""

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from backbones import FAMILIES, embeddings
from fewstep.backbones.base import Backbone
from fewstep.backbones.load import around
from fewstep.backbones.parts import default_dtype
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.roles.roles import RolesConfig, make_roles
from fewstep.training.loop import TrainConfig
from fewstep.training.memory import training_bytes
from fewstep.training.optimizer import OptimizerName
from records import (
    Facts,
    Record,
    about,
    commits,
    markdown,
    new_record,
    stored_rows,
    torch_of,
    versions,
    wrapped,
    write_record,
)

COUNTED: Facts = {"device": "counted, not run", "instructions": None, "threads": None}


class Arrangement(NamedTuple):
    """The roles, their optimizer, and the type of the base's weights."""

    roles: RolesConfig
    optimizer: OptimizerName = "adamw"
    dtype: torch.dtype = torch.bfloat16


LORA, CHECKPOINTED_LORA = RolesConfig(rank=32), RolesConfig(rank=32, checkpointing=True)
INT8 = RolesConfig(rank=32, checkpointing=True, quantize="int8")
NF4 = RolesConfig(rank=32, checkpointing=True, quantize="nf4")
COPIES, CHECKPOINTED = "three copies", ", checkpointing"
ARRANGEMENTS = {
    "one base": Arrangement(LORA),
    "one base, checkpointing": Arrangement(CHECKPOINTED_LORA),
    "one base, checkpointing, adamw8bit": Arrangement(CHECKPOINTED_LORA, "adamw8bit"),
    "one base, checkpointing, adamw8bit, int8": Arrangement(INT8, "adamw8bit"),
    "one base, checkpointing, adamw8bit, nf4": Arrangement(NF4, "adamw8bit"),
    "one base, single precision": Arrangement(LORA, dtype=torch.float32),
    "one base, checkpointing, single precision": Arrangement(CHECKPOINTED_LORA, dtype=torch.float32),
    COPIES: Arrangement(RolesConfig(lora=False), dtype=torch.float32),
    COPIES + CHECKPOINTED: Arrangement(RolesConfig(lora=False, checkpointing=True), dtype=torch.float32),
}


def meta_backbone(name: str, dtype: torch.dtype) -> Backbone:
    """Return the family's backbone at true size, of meta tensors."""
    with FakeTensorMode(allow_non_fake_inputs=True), default_dtype(dtype):
        pipe = FAMILIES[name].build(False)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # its table is needed as numbers
    for part in (pipe.vae, pipe.unet if "unet" in pipe.components else pipe.transformer):
        part.requires_grad_(False).eval()
    return around(pipe, name)


def row(name: str, arrangement: str, batch: int) -> Facts:
    """Return one row, in bytes."""
    roles, optimizer, dtype = ARRANGEMENTS[arrangement]
    began, backbone, method = time.perf_counter(), meta_backbone(name, dtype), DistributionMatching(steps=4)
    data = embeddings(name, backbone, dtype, 2)
    config = TrainConfig(iterations=1, batch=batch, lr=1e-4, fake_lr=1e-4, precision="bf16", optimizer=optimizer)
    counted = training_bytes(
        backbone, lambda: make_roles(backbone, roles), method, method.times(backbone.schedule), config, data
    )
    return {
        "family": name,
        "shape": list(backbone.shape),
        "arrangement": arrangement,
        "batch": batch,
        "weights": counted.base + counted.trained,
        "total": counted.total,
        "work": counted.work,
        "counted_in_s": time.perf_counter() - began,
        "hardware": COUNTED,
        "versions": versions(),
    }


def page(record: Record) -> str:
    """Return the page of a record."""
    lines, of = [], {(r["family"], r["batch"], r["arrangement"]): r for r in record.rows}
    for r in record.rows:
        copies = of.get((r["family"], r["batch"], COPIES + CHECKPOINTED * (CHECKPOINTED in r["arrangement"])))
        ratio = ""
        if copies is not None and copies is not r:
            ratio = f"{r['weights'] / copies['weights']:.2f} / {r['total'] / copies['total']:.2f}"
        sizes = (f"{r[key] / 2**30:.2f}" for key in ("weights", "work", "total"))
        lines.append([r["family"], "x".join(map(str, r["shape"])), r["batch"], r["arrangement"], *sizes, ratio])
    head = ["family", "state", "batch", "arrangement", "weights", "temporary", "in all", "relative to copies"]
    where = ", ".join(part for part in (f"`{record.command}`", commits(record), torch_of(record)) if part)
    return f"""# What a training needs, family by family

{about(__doc__)}

{wrapped(f"{where}. GiB; the last column is weights and total relative to three copies.")}

{markdown(head, lines)}
"""


def main() -> None:
    """Count families and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--arrangements", nargs="*", choices=list(ARRANGEMENTS), default=list(ARRANGEMENTS))
    parser.add_argument("--batch", type=int, default=0, help="samples of an iteration; 0: each family's own")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    rows = stored_rows(a.to / "memory.json")
    order = [(name, arrangement) for name in FAMILIES for arrangement in ARRANGEMENTS]
    for name in a.only:
        for arrangement in a.arrangements:
            rows = [r for r in rows if (r["family"], r["arrangement"]) != (name, arrangement)]
            rows.append(row(name, arrangement, a.batch or FAMILIES[name].batch))
            print(rows[-1], flush=True)
            rows.sort(key=lambda r: order.index((r["family"], r["arrangement"])))
            record = new_record("memory", "python benchmarks/memory.py", rows, None, {})
            write_record(record, page(record), a.to)


if __name__ == "__main__":
    main()
