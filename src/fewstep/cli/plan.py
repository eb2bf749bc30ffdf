"""`fewstep plan`: what a recipe needs in memory, part by part.

With `--memory`, the plan finds settings that make a recipe fit a card: first those with the same result.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any

import torch
from rich.table import Table

from ..backbones.base import Backbone
from ..backbones.encoders import at_once
from ..backbones.kinds import Operations, Unfilled
from ..backbones.load import at_size, quiet
from ..backbones.meta import meta_teacher
from ..backbones.parts import DiffusersBackbone, networks
from ..data.prompts import Embeddings
from ..names import quoted
from ..reading import reason
from ..report.words import plural, size
from ..roles.quantized import KINDS, Kind, layers_of, quantize
from ..runs.init import roles_for
from ..runs.recipe import DistillRecipe, first_stage, read_recipe
from ..runs.trajectory_sources import trajectory_times
from ..training.ledger import module_bytes
from ..training.memory import Training, calls_alone, calls_once, peak_bytes, training_bytes
from ..training.once import Costs
from ..training.optimizer import OPTIMIZERS, OptimizerName
from .beside import beside
from .preflight import note_shadowed
from .progress import console, put_result, working

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
LONGEST = "word " * 1024  # longer than any network's text: Z-Image and language models take as many tokens as there are
LEAST_BATCH = 4  # below this batch, checkpointing is faster than smaller batches


class TooLargeError(ValueError):
    """A recipe that fits a card with no settings.

    The smallest settings need `needed` bytes.
    """

    def __init__(self, text: str, needed: int) -> None:
        super().__init__(text)
        self.needed = needed


@dataclass(frozen=True)
class Phase:
    """A part of a run, and its bytes on a card."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Surroundings:
    """Bytes of a recipe that do not depend on the batch.

    `encoders` are alone on the card while they encode. `idle` is there all the time: the autoencoder.
    `drawing` is the autoencoder at work, its own bytes included.
    """

    encoders: tuple[Phase, ...]
    idle: int
    drawing: int


@dataclass(frozen=True)
class Hollow:
    """A teacher of fake (meta) tensors, with what its plans share.

    `texts` are two prompts of as many tokens as the networks take.
    """

    teacher: Backbone
    texts: Embeddings
    costs: Costs = field(default_factory=Costs)


@dataclass(frozen=True)
class Plan:
    """What a recipe needs in memory, on each of some cards."""

    recipe: DistillRecipe
    around: Surroundings
    training: Training
    hollow: Hollow = field(compare=False, repr=False)
    cards: int = 1

    @property
    def phases(self) -> tuple[Phase, ...]:
        """The parts of a run, in their order."""
        t, around, shown = self.training, self.around, shown_images(self.recipe)
        rest = t.held + around.idle
        sampling = t.sampling * min(shown, self.recipe.train.batch) // self.recipe.train.batch
        exchange = Phase("cards exchange gradients", rest + t.gradients + t.exchange)
        return (
            *around.encoders,
            Phase("training", t.total + around.idle),
            *([exchange] if t.exchange else []),
            Phase("previews: the student or the teacher samples", rest + sampling),
            Phase("previews: the autoencoder decodes", t.held + around.drawing),
            Phase("the average takes the student's place", rest + t.gathered),
            Phase("a checkpoint is saved", rest + t.gathered),
        )

    @property
    def peak(self) -> Phase:
        """The part that needs the most."""
        return max(self.phases, key=lambda phase: phase.bytes)

    @property
    def total(self) -> int:
        return self.peak.bytes

    @property
    def least(self) -> int:
        """Bytes that a card has to hold.

        Encoders work on the CPU where they do not fit.
        """
        return max(phase.bytes for phase in self.phases if phase not in self.around.encoders)

    @property
    def fixed(self) -> int:
        """Bytes that no other batch and no checkpointing saves."""
        return self.training.held + self.around.drawing


def shown_images(recipe: DistillRecipe) -> int:
    """Return the number of images in a preview."""
    return len(recipe.preview.prompts or [None] * 8)


def run_plan(
    source: str,
    overrides: list[str],
    memory: str | None,
    given: Mapping[str, str] = MappingProxyType({}),
    cards: int = 1,
) -> None:
    """Print the plan, and with `memory` the settings that fit.

    Raises TooLargeError with one line where no settings fit.
    """
    quiet()
    recipe = read_recipe(source, overrides, DistillRecipe, given)
    note_shadowed(recipe.teacher)
    usable = None if memory is None else usable_bytes(memory)
    with working("counting its memory"):
        plans = plans_of(recipe, cards)
    for made in plans:
        show(made)
    if memory is None or usable is None:
        put_result({"plans": [plan_values(made) for made in plans]})
        return
    console.print(
        f"{memory}: {size(usable)} are usable; "
        f"CUDA takes about {size(CONTEXT)}, {RESERVE:.0%} are kept for workspaces and fragments"
    )
    sets: list[str] = []
    for made, prefix in zip(plans, ("warm_start.", "") if len(plans) > 1 else ("",), strict=True):
        with working("looking for settings that fit"):
            own, needed = fit(made, usable, prefix)
        sets += [s for s in own if s not in sets]
        console.print(f"{made.recipe.name}: {size(needed)}, {'with the settings below' if own else 'as it is'}")
        for phase in made.around.encoders:
            if phase.bytes > usable:
                console.print(f"{phase.name}: {size(phase.bytes)} do not fit, it works on the CPU, slowly")
    put_result({"plans": [plan_values(made) for made in plans], "usable": usable, "settings": sets})
    changes = [what for option, what in ROUNDED.items() if any(s.partition("=")[0].endswith(option) for s in sets)]
    if changes:
        console.print(f"nothing that gives the same result fits; with these it changes a little: {'; '.join(changes)}")
    if sets:
        options = [part for s in [*overrides, *sets] for part in ("--set", s)] + [
            p for key, text in given.items() for p in (f"--{key}", text)
        ]
        console.print(f"  {quoted('fewstep', 'distill', source, *options)}")


def plan_values(made: Plan) -> dict[str, Any]:
    """Return the numbers of a plan, in bytes."""
    return {
        "name": made.recipe.name,
        "teacher": made.recipe.teacher,
        "cards": made.cards,
        "needed": made.total,
        "peak": made.peak.name,
        "phases": {phase.name: phase.bytes for phase in made.phases},
        "checkpoint": made.training.host,
    }


def plans_of(recipe: DistillRecipe, cards: int = 1) -> list[Plan]:
    """Return the plan of each stage of a recipe.

    The plan is of each of `cards`. Raises ValueError for networks that cannot be called as their configuration says.
    """
    teacher = meta_of(recipe)
    stages = [recipe] if recipe.warm_start is None else [first_stage(recipe), recipe]
    hollow = cache(partial(hollow_of, recipe, teacher))  # a copy of this process makes its own

    def first() -> dict[str, list[dict[str, Any]]]:
        """Count all but the last training."""
        return {
            "around": [asdict(around_training(stage, hollow())) for stage in stages],
            "trainings": [asdict(training_of(stage, hollow(), cards)) for stage in stages[:-1]],
        }

    try:
        with beside(first) as found:
            last = training_of(stages[-1], hollow(), cards)
            counted = found()
        around = [Surroundings(tuple(Phase(**p) for p in told.pop("encoders")), **told) for told in counted["around"]]
        trainings = [*(Training(**told) for told in counted["trainings"]), last]
        each = zip(stages, around, trainings, strict=True)
        return [Plan(stage, beyond, training, hollow(), cards) for stage, beyond, training in each]
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
    with Unfilled():
        quantize(teacher, recipe.roles.quantize)
    return teacher


def fit(made: Plan, usable: int, prefix: str) -> tuple[list[str], int]:
    """Return settings of a stage that fit, and the bytes needed.

    The settings are the fastest of those with the same result; where there are none, those that round the
    least. Raises TooLargeError with one line where no settings fit.
    """
    if made.least <= usable:
        return [], made.least
    found, needed = fastest(made, usable, prefix)
    known = {made.recipe.roles.quantize: made.hollow}
    for sets, recipe in roundings(made.recipe, made.hollow.teacher, prefix) if found is None else ():
        if (base := recipe.roles.quantize) not in known:
            known[base] = hollow_of(recipe, meta_of(recipe))
        rounded = plan_of(recipe, known[base], made.around, made.cards)
        ways, needed = ([], rounded.least) if rounded.least <= usable else fastest(rounded, usable, prefix)
        if ways is not None:
            return [*sets, *ways], needed
    if found is not None:
        return found, needed
    bf16 = "; --set dtype=bfloat16 halves the base's weights" if made.recipe.dtype == "float32" else ""
    raise TooLargeError(
        f"--memory: {made.recipe.name} needs {size(needed)} with the smallest batch, "
        f"checkpointing and all that rounds, {size(usable)} are usable{bf16}",
        needed,
    )


def fastest(made: Plan, usable: int, prefix: str) -> tuple[list[str] | None, int]:
    """Return the fastest settings with the same result that fit.

    The settings are None where none fit. The second value is the bytes of these settings, or the least that
    was found to be needed.
    """
    needed = made.fixed
    for ways in savings(made.recipe, prefix) if needed <= usable else ():
        # Within a list each entry needs less than the entry before: bisect for the first that fits.
        fitting, first, last = None, 0, len(ways) - 1
        while ways and first <= last:
            middle = last if fitting is None else (first + last) // 2
            sets, recipe = ways[middle]
            needed = plan_of(recipe, made.hollow, made.around, made.cards).least
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


def hollow_of(recipe: DistillRecipe, teacher: Backbone) -> Hollow:
    """Return a teacher of fake (meta) tensors with its longest prompts."""
    costs = Costs()
    return Hollow(teacher, longest_texts(at_size(teacher, recipe.size), costs.operations), costs)


def around_training(recipe: DistillRecipe, hollow: Hollow) -> Surroundings:
    """Measure the memory before and next to the training."""
    sized, known = at_size(hollow.teacher, recipe.size), hollow.costs.operations
    assert isinstance(sized, DiffusersBackbone)
    encoders = {n: m for n, m in sized.pipe.components.items() if any(m is e for e in sized.encoders)}
    idle = [n for n in networks(sized.pipe) if n is not sized.module and n not in sized.encoders]
    # The longest text decides what a batch of texts needs; to split so many long ones into tokens takes a second.
    texts = [LONGEST, *["word"] * (at_once(sized.encoders) - 1)]
    alone = calls_alone(lambda: sized.encode(texts), list(encoders.values()), known) if encoders else []
    images = torch.zeros(shown_images(recipe), *sized.shape)
    return Surroundings(
        tuple(Phase(f"encoding prompts: {n} alone", b) for n, b in zip(encoders, alone, strict=True)),
        sum(module_bytes(n) for n in idle),
        peak_bytes(lambda: sized.decode(images), *idle, known=known, autoencoder=sized.pipe.components.get("vae")),
    )


def plan_of(recipe: DistillRecipe, hollow: Hollow, around: Surroundings, cards: int = 1) -> Plan:
    """Return the plan of one training."""
    return Plan(recipe, around, training_of(recipe, hollow, cards), hollow, cards)


def training_of(recipe: DistillRecipe, hollow: Hollow, cards: int = 1) -> Training:
    """Count the bytes of one training."""
    sized, method = at_size(hollow.teacher, recipe.size), recipe.method
    times = trajectory_times(method, sized)
    return training_bytes(
        sized,
        lambda: roles_for(sized, method, recipe.roles),
        method,
        times,
        recipe.train,
        hollow.texts,
        cards,
        known=hollow.costs,
    )


def longest_texts(backbone: Backbone, known: Operations | None = None) -> Embeddings:
    """Return two prompts of as many tokens as the networks take."""
    assert isinstance(backbone, DiffusersBackbone)
    text = LONGEST if backbone.encoders else ""
    two, one = calls_once(lambda: [backbone.encode([text] * n) for n in (2, 1)], backbone.encoders, known)
    return Embeddings(two, one, [text] * 2, 0, "")


def show(made: Plan) -> None:
    """Print a plan as a table."""
    recipe, t = made.recipe, made.training
    train = recipe.train.on(made.cards)
    how = f"batch {train.batch}" + (f" x {train.accumulate}" if train.accumulate > 1 else "")
    where = f", on each of {made.cards} cards" + ", weights shared" * train.shard if made.cards > 1 else ""
    table = Table(
        title=(
            f"{recipe.name}: {recipe.teacher}, {recipe.roles.quantize or recipe.dtype}, "
            f"{how}, checkpointing {'on' if recipe.roles.checkpointing else 'off'}{where}"
        ),
        title_justify="left",
    )
    table.add_column("what")
    table.add_column("bytes", justify="right")
    one = "one for all roles"
    rows = {
        f"denoiser ({one if recipe.roles.lora else 'the teacher, whose copies are trained'})": t.base,
        "autoencoder": made.around.idle,
        "trained parameters": t.trained,
        "their gradients": t.gradients,
        f"optimiser ({recipe.train.optimizer})": t.optimiser,
        "student's average": t.average,
        "activations and what else comes and goes": t.work,
    }
    for name, count in rows.items():
        table.add_row(name, size(count))
    table.add_section()
    for phase in made.phases:
        table.add_row(phase.name, size(phase.bytes), style="bold" if phase == made.peak else None)
    table.add_section()
    table.add_row(f"needed ({made.peak.name})", size(made.total), style="bold")
    table.add_section()
    count = -(-recipe.train.iterations // recipe.train.checkpoint_every)
    table.add_row(f"on the disk, each of {plural(count, 'checkpoint')} ({recipe.train.keep} stay)", size(t.host))
    table.add_row("in the machine's memory while a checkpoint is written", size(t.host))
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
