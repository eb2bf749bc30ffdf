"""Count what distilling each model family needs in memory.

    python benchmarks/memory.py                       # writes benchmarks/memory.md and .json
    python benchmarks/memory.py --only sdxl           # counts that family again and keeps the others
    python benchmarks/memory.py --arrangements        # counts cards alone

One iteration at true size runs on meta tensors. TDM in 4 steps with a guided teacher, LoRA of rank 32; the networks
compute in bfloat16. `one base`: teacher, student and fake score are adapters of one frozen network, with weights in
bfloat16 or in single precision. `three copies`: two more networks, all weights trained in single precision, because
bfloat16 loses the updates in rounding. Weights are those of all copies and adapters. `adamw8bit` keeps Adam's moments
in 8 bits; int8 and nf4 round the frozen base. These change the result, and are compared with copies that do not. Text
encoders and autoencoder are left out; `fewstep plan` counts them, too. `python -m pytest tests/training/test_memory.py`
shows that the count is what an allocator gives, within five percent.

The second table has what `fewstep plan RECIPE --memory CARD` prints for each LoRA recipe, and `--cards 8` with the base
as it is, not rounded, or with `train.shard` where that does not fit. Encoders that do not fit work on the CPU.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from configurations import PIPELINES, write
from fewstep.backbones.load import at_size
from fewstep.backbones.meta import meta_teacher
from fewstep.backbones.sizes import Size
from fewstep.cli.plan import Plan, TooLargeError, fit, longest_texts, plans_of, usable_bytes
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.roles.quantized import weight_count
from fewstep.roles.roles import RolesConfig, make_roles
from fewstep.runs.recipe import DistillRecipe, read_recipe
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


FULL = tuple(PIPELINES)[:4]  # families small enough for three copies, counted in all arrangements
OTHERS = [name for name in ARRANGEMENTS if "one base, checkpointing" in name and "single" not in name]
BATCH = {"sd15": 4}  # 1 for the others
SIZES: dict[str, Size] = {  # where it is not what the settings of the networks say
    **dict.fromkeys(
        ("flux2-klein-4b", "flux2-klein-9b", "flux2-dev", "flux", "qwenimage", "zimage", "krea2", "qwenimage21"), 1024
    ),
    "wan22-5b": "832x480x81",
}
CARDS = (("16GiB", 1), ("24GiB", 1), ("80GiB", 1), ("80GiB", 8))  # a card's memory, and their number


def row(name: str, arrangement: str, batch: int) -> Facts:
    """Return one row, in bytes."""
    roles, optimizer, dtype = ARRANGEMENTS[arrangement]
    began, method = time.perf_counter(), DistributionMatching(steps=4)
    with tempfile.TemporaryDirectory() as folder:
        backbone = at_size(meta_teacher(write(name, Path(folder)), dtype), SIZES.get(name))
    data = longest_texts(backbone)
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


def card_rows(name: str, cards: list[tuple[str, int]]) -> Iterator[Facts]:
    """Yield what a family's LoRA recipe needs on each of these cards, in bytes, with the settings that fit."""
    recipe, size = f"{name}-tdm4-lora", SIZES.get(name)
    shipped = read_recipe(recipe, [], DistillRecipe)
    sized = [] if size is None or size == shipped.size else [f"size={size}"]
    batch, whole = shipped.train.batch, shipped.train.global_batch or 0
    with tempfile.TemporaryDirectory() as folder:
        teacher = str(write(name, Path(folder)))
        plans: dict[str, Plan] = {}

        def planned(sets: list[str], count: int) -> Plan:
            key = " ".join([*sets, str(count)])
            if key not in plans:
                told = read_recipe(recipe, [*sized, *sets], DistillRecipe, {"teacher": teacher})
                plans[key] = max(plans_of(told, count), key=lambda made: made.least)
            return plans[key]

        for memory, count in cards:
            began, usable = time.perf_counter(), usable_bytes(memory)
            if count == 1 or Path(teacher, "transformer_2").exists():  # two networks cannot be sharded
                sets: list[str] = []
                made = planned(sets, count)
                try:
                    sets, needed = fit(made, usable, "")
                except TooLargeError as error:
                    needed = error.needed
            else:
                own = ["roles.quantize=null"] if shipped.roles.quantize else []
                own += [f"train.batch={whole // count}"] if 0 < whole < batch * count else []
                for way in ([], ["train.shard=true"]):
                    made = planned(sets := [*own, *way], count)
                    needed = made.least
                    if needed <= usable:
                        break
            yield {
                "family": name,
                "recipe": recipe,
                "memory": memory,
                "cards": count,
                "sets": [*sized, *sets],
                "needed": needed,
                "fits": needed <= usable,
                "batch": made.recipe.train.batch,
                "quantize": made.recipe.roles.quantize,
                "parameters": weight_count(made.hollow.teacher.module),
                "on_cpu": [phase.name for phase in made.around.encoders if phase.bytes > usable],
                "counted_in_s": time.perf_counter() - began,
                "hardware": COUNTED,
                "versions": versions(),
            }


def page(record: Record) -> str:
    """Return the page of a record."""
    counted = [r for r in record.rows if "arrangement" in r]
    lines, of = [], {(r["family"], r["batch"], r["arrangement"]): r for r in counted}
    for r in counted:
        copies = of.get((r["family"], r["batch"], COPIES + CHECKPOINTED * (CHECKPOINTED in r["arrangement"])))
        ratio = ""
        if copies is not None and copies is not r:
            ratio = f"{r['weights'] / copies['weights']:.2f} / {r['total'] / copies['total']:.2f}"
        sizes = (f"{r[key] / 2**30:.2f}" for key in ("weights", "work", "total"))
        lines.append([r["family"], "x".join(map(str, r["shape"])), r["batch"], r["arrangement"], *sizes, ratio])
    head = ["family", "state", "batch", "arrangement", "weights", "temporary", "in all", "relative to copies"]
    cards = [
        [r["recipe"], f"{r['cards']} x {r['memory']}", *said(r), ", ".join(r["on_cpu"])]
        for r in record.rows
        if "memory" in r
    ]
    fits = ["recipe", "cards", "needed, GiB", "settings", "on the CPU"]
    where = ", ".join(part for part in (f"`{record.command}`", commits(record), torch_of(record)) if part)
    return f"""# What a training needs, family by family

{about(__doc__)}

{wrapped(f"{where}. GiB; the last column is weights and total relative to three copies.")}

{markdown(head, lines)}

{second(__doc__)}

{markdown(fits, cards)}
"""


def said(row: Facts) -> tuple[str, str]:
    """Return the memory that a recipe needs on a card, and its settings."""
    settings = " ".join(f"`{s}`" for s in row["sets"]) or "as it is"
    return f"{row['needed'] / 2**30:.1f}", settings if row["fits"] else "does not fit"


def second(doc: str | None) -> str:
    """Return the fourth paragraph of a docstring."""
    return (doc or "").split("\n\n")[3].strip()


def order(row: Facts) -> tuple[bool, int, int]:
    """Return the place of a row: arrangements first, then cards, both by family."""
    family = list(PIPELINES).index(row["family"])
    if "arrangement" in row:
        return False, family, list(ARRANGEMENTS).index(row["arrangement"])
    return True, family, CARDS.index((row["memory"], row["cards"]))


def main() -> None:
    """Count families and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(PIPELINES), default=list(PIPELINES))
    parser.add_argument("--arrangements", nargs="*", choices=list(ARRANGEMENTS), help="default: all that a family has")
    parser.add_argument("--cards", nargs="*", choices=[f"{n}x{m}" for m, n in CARDS], help="default: all")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    cards = [(m, n) for m, n in CARDS if a.cards is None or f"{n}x{m}" in a.cards]
    rows = stored_rows(a.to / "memory.json")

    def keep(made: Facts) -> None:
        nonlocal rows
        rows = sorted([r for r in rows if order(r) != order(made)] + [made], key=order)
        print(made, flush=True)
        record = new_record("memory", "python benchmarks/memory.py", rows, None, {})
        write_record(record, page(record), a.to)

    for name in a.only:
        for arrangement in a.arrangements if a.arrangements is not None else ARRANGEMENTS if name in FULL else OTHERS:
            keep(row(name, arrangement, BATCH.get(name, 1)))
        for made in card_rows(name, cards):
            keep(made)


if __name__ == "__main__":
    main()
