"""What distilling each family needs in memory at its true size, counted over an iteration on networks without content.

    python benchmarks/memory.py                # about 10 minutes; writes benchmarks/memory.md and .json
    python benchmarks/memory.py --only sdxl    # that family's rows again; the others stay as they are

TDM with 4 steps and a guided teacher, LoRA of rank 32, the networks computing in bfloat16. `one base`: teacher, student and fake score are adapters of
one frozen network, its weights in bfloat16, or in single precision. `three copies`: two more networks, all their weights trained, which takes single
precision: in bfloat16 updates are lost in rounding. Weights are those of all copies and adapters. `adamw8bit` keeps Adam's moments in 8 bits, int8 and nf4 round the frozen base: these change the result, and are compared
with copies that do not. Without text encoders and autoencoder, which `fewstep plan` counts, too. That the count is what an allocator gives, within
five percent: `python -m pytest tests/training/test_memory.py`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from backbones import FAMILIES, embeddings
from fewstep.atomic import write_json
from fewstep.backbones.base import Backbone
from fewstep.backbones.load import around
from fewstep.backbones.meta import default_dtype
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.roles.roles import RolesConfig, make_roles
from fewstep.training.loop import TrainConfig
from fewstep.training.memory import training_bytes
from fewstep.training.optimizer import OptimizerName
from origin import commit


class Arrangement(NamedTuple):
    """How roles are made, their optimiser, and the type of the base's weights."""

    roles: RolesConfig
    optimizer: OptimizerName = "adamw"
    dtype: torch.dtype = torch.bfloat16


COPIES, CHECKPOINTED = "three copies", ", checkpointing"
ARRANGEMENTS = {
    "one base": Arrangement(RolesConfig(rank=32)),
    "one base, checkpointing": Arrangement(RolesConfig(rank=32, checkpointing=True)),
    "one base, checkpointing, adamw8bit": Arrangement(RolesConfig(rank=32, checkpointing=True), "adamw8bit"),
    "one base, checkpointing, adamw8bit, int8": Arrangement(
        RolesConfig(rank=32, checkpointing=True, quantize="int8"), "adamw8bit"
    ),
    "one base, checkpointing, adamw8bit, nf4": Arrangement(
        RolesConfig(rank=32, checkpointing=True, quantize="nf4"), "adamw8bit"
    ),
    "one base, single precision": Arrangement(RolesConfig(rank=32), dtype=torch.float32),
    "one base, checkpointing, single precision": Arrangement(
        RolesConfig(rank=32, checkpointing=True), dtype=torch.float32
    ),
    COPIES: Arrangement(RolesConfig(lora=False), dtype=torch.float32),
    COPIES + CHECKPOINTED: Arrangement(RolesConfig(lora=False, checkpointing=True), dtype=torch.float32),
}


def hollow(name: str, dtype: torch.dtype) -> Backbone:
    """The family's backbone at its true size, without content."""
    with FakeTensorMode(allow_non_fake_inputs=True), default_dtype(dtype):
        pipe = FAMILIES[name].build(False)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # its table is needed as numbers
    for part in (pipe.vae, pipe.unet if "unet" in pipe.components else pipe.transformer):
        part.requires_grad_(False).eval()
    return around(pipe, name)


def row(name: str, arrangement: str, batch: int) -> dict[str, Any]:
    """One row, in bytes."""
    roles, optimizer, dtype = ARRANGEMENTS[arrangement]
    began, backbone, method = time.perf_counter(), hollow(name, dtype), DistributionMatching(steps=4)
    data = embeddings(name, backbone, dtype, 2)
    config = TrainConfig(iterations=1, batch=batch, lr=1e-4, fake_lr=1e-4, precision="bf16", optimizer=optimizer)
    made = training_bytes(
        backbone, lambda: make_roles(backbone, roles), method, method.times(backbone.schedule), config, data
    )
    found = {
        "family": name,
        "shape": list(backbone.shape),
        "arrangement": arrangement,
        "batch": batch,
        "weights": made.base + made.trained,
    }
    return found | {"total": made.total, "work": made.work, "counted_in_s": time.perf_counter() - began}


def write(rows: list[dict[str, Any]], to: Path) -> None:
    """The table and the rows."""
    write_json(
        to / "memory.json",
        {"rows": rows, "hardware": "counted, not run", "commit": commit(), "command": "python benchmarks/memory.py"},
    )
    lines = []
    for r in rows:
        copies = COPIES + CHECKPOINTED * (CHECKPOINTED in r["arrangement"])
        against = next(
            (o for o in rows if (o["family"], o["batch"], o["arrangement"]) == (r["family"], r["batch"], copies)), None
        )
        ratio = (
            ""
            if against is None or against is r
            else f"{r['weights'] / against['weights']:.2f} / {r['total'] / against['total']:.2f}"
        )
        shape = "x".join(map(str, r["shape"]))
        lines.append(
            f"| {r['family']} | {shape} | {r['batch']} | {r['arrangement']} | {r['weights'] / 2**30:.2f} | {r['work'] / 2**30:.2f} | {r['total'] / 2**30:.2f} | {ratio} |"
        )
    text = f"""# What a training needs, family by family

{(__doc__ or "").split(chr(10) * 2)[2].strip()}

`python benchmarks/memory.py`, commit {commit()}, torch {torch.__version__}. GiB; the last column is weights and total against three copies.

| family | state | batch | arrangement | weights | comes and goes | in all | against copies |
|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}
"""
    (to / "memory.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--arrangements", nargs="*", choices=list(ARRANGEMENTS), default=list(ARRANGEMENTS))
    parser.add_argument("--batch", type=int, default=0, help="samples an iteration; 0: each family's own")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent)
    a = parser.parse_args()
    rows = json.loads((a.to / "memory.json").read_text())["rows"] if (a.to / "memory.json").exists() else []
    order = [(name, arrangement) for name in FAMILIES for arrangement in ARRANGEMENTS]
    for name in a.only:
        for arrangement in a.arrangements:
            rows = [r for r in rows if (r["family"], r["arrangement"]) != (name, arrangement)]
            print(made := row(name, arrangement, a.batch or FAMILIES[name].batch), flush=True)
            rows.append(made)
            rows.sort(key=lambda r: order.index((r["family"], r["arrangement"])))
            write(rows, a.to)


if __name__ == "__main__":
    main()
