"""`fewstep plan`: what a recipe needs in memory, part by part.

With `--memory`, the plan finds settings that make a recipe fit a card: first those with the same result.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from rich.table import Table

from ..backbones.base import Backbone
from ..backbones.load import at_size, quiet
from ..backbones.meta import meta_teacher
from ..backbones.parts import DiffusersBackbone, networks
from ..data.prompts import CHUNK, Embeddings
from ..names import quoted
from ..reading import reason
from ..report.words import size
from ..roles.quantized import KINDS, Kind, layers_of, quantize
from ..runs.init import roles_for
from ..runs.recipe import DistillRecipe, first_stage, read_recipe
from ..runs.trajectory_sources import trajectory_times
from ..training.memory import Training, module_bytes, peak_bytes, training_bytes
from ..training.optimizer import OPTIMIZERS, OptimizerName
from .preflight import note_shadowed
from .progress import console

UNITS = {"": 1, "B": 1, "MB": 10**6, "MIB": 2**20, "GB": 10**9, "GIB": 2**30, "M": 2**20, "G": 2**30}
RESERVE = 0.05  # share of a card's memory for fragments and workspaces of libraries
CONTEXT = 2**29  # bytes that CUDA takes for itself
BASES: tuple[Kind | None, ...] = (None, *KINDS)
ROUNDINGS: tuple[tuple[Kind | None, OptimizerName], ...] = (
    (None, "adamw8bit"), ("int8", "adamw"), ("int8", "adamw8bit"), ("nf4", "adamw8bit")
)  # fmt: skip
ROUNDED = {
    "train.optimizer": "Adam's moments are kept in 8 bits",
    "roles.quantize": "the base's weights are quantized, the teacher's too",
}
LEAST_BATCH = 4  # below this batch, checkpointing is faster than smaller batches


@dataclass(frozen=True)
class Phases:
    """Bytes of a recipe that do not depend on the batch.

    `idle` is in memory all the time: the autoencoder. `drawing` is the autoencoder at work.
    """

    encoding: int
    idle: int
    drawing: int


@dataclass(frozen=True)
class Plan:
    """What a recipe needs in memory."""

    recipe: DistillRecipe
    phases: Phases
    training: Training

    @property
    def drawing(self) -> int:
        return self.training.total - self.training.work + self.phases.drawing

    @property
    def total(self) -> int:
        return max(self.phases.encoding, self.training.total + self.phases.idle, self.drawing)


def run_plan(
    source: str, overrides: list[str], memory: str | None, given: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Print the plan, and with `memory` the settings that fit.

    Raises ValueError with one line where no settings fit.
    """
    quiet()
    recipe = read_recipe(source, overrides, DistillRecipe, given)
    note_shadowed(recipe.teacher)
    usable = None if memory is None else usable_bytes(memory)
    teacher, plans = plans_of(recipe)
    for made in plans:
        show(made)
    if memory is None or usable is None:
        return
    console.print(
        f"{memory}: {size(usable)} are usable; "
        f"CUDA takes about {size(CONTEXT)}, {RESERVE:.0%} are kept for workspaces and fragments"
    )
    sets: list[str] = []
    for made, prefix in zip(plans, ("warm_start.", "") if len(plans) > 1 else ("",), strict=True):
        own, needed = fit(made, teacher, usable, prefix)
        sets += [s for s in own if s not in sets]
        console.print(f"{made.recipe.name}: {size(needed)}, {'with the settings below' if own else 'as it is'}")
    changes = [what for option, what in ROUNDED.items() if any(s.partition("=")[0].endswith(option) for s in sets)]
    if changes:
        console.print(f"nothing that gives the same result fits; with these it changes a little: {'; '.join(changes)}")
    if sets:
        options = [part for s in [*overrides, *sets] for part in ("--set", s)] + [
            p for key, text in given.items() for p in (f"--{key}", text)
        ]
        console.print(f"  {quoted('fewstep', 'distill', source, *options)}")


def plans_of(recipe: DistillRecipe) -> tuple[Backbone, list[Plan]]:
    """Return the recipe's teacher and the plan of each stage.

    The teacher has fake (meta) tensors. Raises ValueError for networks that cannot be called as their
    configuration says.
    """
    teacher = meta_of(recipe)
    stages = [recipe] if recipe.warm_start is None else [first_stage(recipe), recipe]
    try:
        return teacher, [plan_of(stage, teacher, phases_of(stage, teacher)) for stage in stages]
    # These come from networks that do not fit their configuration.
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ZeroDivisionError) as error:
        raise ValueError(
            f"teacher: {recipe.teacher} cannot be called as its configuration says ({reason(error)}); "
            "check it, or download it again"
        ) from error


def meta_of(recipe: DistillRecipe) -> Backbone:
    """Return the recipe's teacher with fake (meta) tensors.

    The teacher is quantized where the recipe says so.
    """
    teacher = meta_teacher(recipe.teacher, getattr(torch, recipe.dtype), recipe.size)
    quantize(teacher, recipe.roles.quantize)
    return teacher


def fit(made: Plan, teacher: Backbone, usable: int, prefix: str) -> tuple[list[str], int]:
    """Return settings of a stage that fit, and the bytes needed.

    The settings are the fastest of those with the same result; where there are none, those that round the
    least. Raises ValueError with one line where no settings fit.
    """
    if made.total <= usable:
        return [], made.total
    found, needed = fastest(made, teacher, usable, prefix)
    for sets, recipe in roundings(made.recipe, teacher, prefix) if found is None else ():
        hollow = meta_of(recipe)
        rounded = plan_of(recipe, hollow, phases_of(recipe, hollow))
        ways, needed = ([], rounded.total) if rounded.total <= usable else fastest(rounded, hollow, usable, prefix)
        if ways is not None:
            return [*sets, *ways], needed
    if found is not None:
        return found, needed
    bf16 = "; --set dtype=bfloat16 halves the base's weights" if made.recipe.dtype == "float32" else ""
    raise ValueError(
        f"--memory: {made.recipe.name} needs {size(needed)} with the smallest batch, "
        f"checkpointing and all that rounds, {size(usable)} are usable{bf16}"
    )


def fastest(made: Plan, teacher: Backbone, usable: int, prefix: str) -> tuple[list[str] | None, int]:
    """Return the fastest settings with the same result that fit.

    The settings are None where none fit. The second value is the bytes of these settings, or the least that
    was found to be needed.
    """
    needed = max(made.phases.encoding, made.drawing)
    for ways in savings(made.recipe, prefix) if needed <= usable else ():
        # Within a list each entry needs less than the entry before: bisect for the first that fits.
        fitting, first, last = None, 0, len(ways) - 1
        while ways and first <= last:
            middle = last if fitting is None else (first + last) // 2
            sets, recipe = ways[middle]
            needed = plan_of(recipe, teacher, made.phases).total
            if needed <= usable:
                fitting, last = (sets, needed), middle - 1
            elif fitting is None:
                break
            else:
                first = middle + 1
        if fitting is not None:
            return fitting
    return None, needed


def roundings(recipe: DistillRecipe, teacher: Backbone, prefix: str) -> list[tuple[list[str], DistillRecipe]]:
    """Return settings that need less memory and change the result.

    The least change comes first. What the recipe rounds already stays so.
    """
    own, by = recipe.roles.quantize, recipe.train.optimizer
    able = recipe.roles.lora and (own is not None or bool(layers_of(teacher)))
    return [
        (
            [f"{prefix}train.optimizer={optimizer}"] * (optimizer != by) + [f"roles.quantize={base}"] * (base != own),
            recipe.model_copy(
                update={
                    "train": replace(recipe.train, optimizer=optimizer),
                    "roles": replace(recipe.roles, quantize=base),
                }
            ),
        )
        for base, optimizer in ROUNDINGS
        if (base, optimizer) != (own, by)
        and BASES.index(base) >= BASES.index(own)
        and OPTIMIZERS.index(optimizer) >= OPTIMIZERS.index(by)
        and (able or base == own)
    ]


def savings(recipe: DistillRecipe, prefix: str) -> list[list[tuple[list[str], DistillRecipe]]]:
    """Return settings that need less memory for the same result.

    The fastest come first: a list with the batch in parts, then a list with checkpointing, in parts too.
    Within a list each entry needs less than the entry before.
    """
    parts = [k for k in (1, 2, 4, 8, 16, 32, 64, 128) if recipe.train.batch % k == 0]
    few = [k for k in parts if k > 1 and recipe.train.batch // k >= LEAST_BATCH]

    def way(k: int, checkpointing: bool) -> tuple[list[str], DistillRecipe]:
        follows = recipe.train.global_batch is not None
        train = replace(
            recipe.train,
            batch=recipe.train.batch // k,
            accumulate=1 if follows else recipe.train.accumulate * k,
        )
        sets = [] if k == 1 else [f"{prefix}train.batch={train.batch}"]
        sets += [] if k == 1 or follows else [f"{prefix}train.accumulate={train.accumulate}"]
        sets += ["roles.checkpointing=true"] if checkpointing and not recipe.roles.checkpointing else []
        return sets, recipe.model_copy(
            update={"train": train, "roles": replace(recipe.roles, checkpointing=checkpointing)}
        )

    if recipe.roles.checkpointing:
        return [[way(k, True) for k in parts[1:]]]
    return [[way(k, False) for k in few], [way(k, True) for k in parts]]


def phases_of(recipe: DistillRecipe, teacher: Backbone) -> Phases:
    """Measure the memory before and next to the training."""
    sized = at_size(teacher, recipe.size)
    assert isinstance(sized, DiffusersBackbone)
    idle = [n for n in networks(sized.pipe) if n is not sized.module and n not in sized.encoders]
    shown = len(recipe.preview.prompts or [None] * 8)
    return Phases(
        peak_bytes(lambda: sized.encode([""] * CHUNK), *networks(sized.pipe)),
        sum(module_bytes(n) for n in idle),
        peak_bytes(lambda: sized.decode(torch.zeros(shown, *sized.shape)), *idle),
    )


def plan_of(recipe: DistillRecipe, teacher: Backbone, phases: Phases) -> Plan:
    """Return the plan of one training."""
    sized, method = at_size(teacher, recipe.size), recipe.method
    data = Embeddings(sized.encode([""] * 2), sized.encode([""]), [""] * 2, 0, "")
    times = trajectory_times(method, sized)
    return Plan(
        recipe,
        phases,
        training_bytes(sized, lambda: roles_for(sized, method, recipe.roles), method, times, recipe.train, data),
    )


def show(made: Plan) -> None:
    """Print a plan as a table."""
    recipe, t = made.recipe, made.training
    train = recipe.train.on(1)
    how = f"batch {train.batch}" + (f" x {train.accumulate}" if train.accumulate > 1 else "")
    table = Table(
        title=(
            f"{recipe.name}: {recipe.teacher}, {recipe.roles.quantize or recipe.dtype}, "
            f"{how}, checkpointing {'on' if recipe.roles.checkpointing else 'off'}"
        ),
        title_justify="left",
    )
    table.add_column("what")
    table.add_column("bytes", justify="right")
    rows = {
        (
            "denoiser ("
            f"""{
                "one for all roles"
                if recipe.roles.lora
                else "three copies, those of student and fake score among the trained"
            }"""
            ")"
        ): t.base,
        "autoencoder": made.phases.idle,
        "trained parameters": t.trained,
        "their gradients": t.gradients,
        f"optimiser ({recipe.train.optimizer})": t.optimiser,
        "student's average": t.average,
        "activations and what else comes and goes": t.work,
    }
    for name, count in rows.items():
        table.add_row(name, size(count))
    table.add_section()
    table.add_row("training", size(t.total + made.phases.idle))
    table.add_row("before it, encoding prompts (all networks)", size(made.phases.encoding))
    table.add_row("in between, decoding previews", size(made.drawing))
    table.add_row("needed", size(made.total), style="bold")
    console.print(table)


def usable_bytes(memory: str) -> int:
    """Return the usable bytes of a card of this size.

    Raises ValueError with one line.
    """
    usable = int((parse_bytes(memory) - CONTEXT) * (1 - RESERVE))
    if usable <= 0:
        raise ValueError(
            f"--memory: got {memory}, of which CUDA alone takes about {size(CONTEXT)}; "
            "pass the size of the card, e.g. 24GiB"
        )
    return usable


def parse_bytes(text: str) -> int:
    """Parse `24GiB`, `16 GB` or `500MiB` as bytes.

    Raises ValueError with one line.
    """
    match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    unit = None if match is None else UNITS.get(match[2].upper())
    try:
        return int(float(match[1]) * unit) if match is not None and unit is not None else int("")
    except ValueError:
        raise ValueError(f"--memory: got {text!r}, allowed are sizes such as 24GiB, 16GB or 500MiB") from None
