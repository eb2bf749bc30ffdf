"""Race few-step methods on a teacher on which they part.

    python benchmarks/arena.py --data FOLDER      # makes what is missing; writes benchmarks/arena.md and .json
    python benchmarks/arena.py --only teacher search    # some stages; --until S: stop after S s

The teacher draws ten kinds of clothing (Fashion-MNIST in half of its size, 14x14), of which none determines an image,
with a perceptron of 0.9 million weights, so that seconds of a core hold a training. Methods train all weights, from
real images where they need images, for equal CPU seconds on one core: iterations follow from a method's pace. Paces are
medians of iterations for which all trainings take turns, so that a busy machine slows all of them alike; `CPU s` says
what a training took. Each method has the best of its learning rates, the lowest of those within 0.1 FD. A fake score
has one update for one of the student, at ten times its rate; `even` updates are at the student's rate. FD is the
Frechet distance of 5,000 images to the 10,000 test images in 64 features of a classifier that is trained here, in a
unit in which real images have a variance of 100. Accuracy is the classifier's, in percent; precision and recall are
those of third neighbours; diversity is the mean distance of images of a class, relative to that of real ones. Students
take no guidance. `longer` trains the nearest for four times the seconds, at rates that are searched for that time.

A stage that was stopped continues: what `arena.json` holds is not run again. FOLDER is Fashion-MNIST's, as in Debian's
package dataset-fashion-mnist.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from arena_teacher import (
    COUNT,
    Classifier,
    Clothes,
    Measures,
    classifier,
    clothes,
    confidence,
    drawn,
    measures,
    painter,
    saturation,
    states_of,
    teacher_of,
)
from fewstep.backbones.base import Backbone, Cond, guided
from fewstep.backbones.load import fingerprint
from fewstep.core import timegrid
from fewstep.core.guidance import Guidance
from fewstep.core.solvers import Denoise, sample, solver_named
from fewstep.data.images import ImageData
from fewstep.data.prompts import Embeddings, embed
from fewstep.data.teacher_images import teacher_images
from fewstep.methods.method import Method, student_of
from fewstep.methods.presets import preset
from fewstep.objectives.rewards import Reward
from fewstep.report.images import png, to_pil
from fewstep.roles.roles import Roles, RolesConfig
from fewstep.runs.init import roles_for
from fewstep.training.loop import TrainConfig, distill
from fewstep.zoo.pixel_data import FASHION
from records import (
    CLOCK,
    Facts,
    Record,
    about,
    markdown,
    new_record,
    origin,
    provenance,
    read_record,
    spread,
    wrapped,
    write_record,
)

SEEDS, COUNTS, GUIDANCE, BATCH = (0, 1, 2), (4, 2, 1), 1.5, 32
STAGES = ("teacher", "search", "race", "counts", "longer", "settings", "rewards", "averages")
LONGER = 4  # times the seconds, for the nearest of a step count
NEAREST = {
    4: ("tdm", "tdm-wide", "after-progressive"),
    2: ("after-progressive", "tdm-wide"),
    1: ("after-progressive", "tdm", "diff-instruct"),
}
Settings = dict[str, Any]
RATES = (3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3)  # a search goes on until both neighbours of the best rate are worse
MATCHING, HIGHER = 1e-4, 3e-4  # where it begins
EMA, EMAS = 0.99, (0.0, 0.9, 0.97, 0.99, 0.997)  # of all students; those that are compared
NOISE = 0.1  # of FD between draws of one model


@dataclass(frozen=True)
class Racer:
    """A method as settings; `images` says what it trains on beside classes."""

    label: str
    method: Settings = field(default_factory=dict)
    rate: float = MATCHING  # where its search begins
    counts: tuple[int, ...] = COUNTS
    images: str = ""  # real, teacher
    reward: str = ""  # one of Arena.rewards
    source: str = ""
    begin: str = ""  # a racer that has the first half of the time, whose student goes on
    fake: float = 10  # the fake score's rate, in the student's
    like: str = "tdm"  # a racer that has its rate, where none is searched
    per_step: bool = False  # whether each step has weights of its own


def tdm(
    label: str,
    source: str,
    images: str = "",
    begin: str = "",
    like: str = "tdm",
    per_step: bool = False,
    **method: Any,
) -> Racer:
    """Return TDM with a setting of others, in 4 steps; after another method in all.

    It has the rate of `like`, and its fake score's, too.
    """
    counts, fake = COUNTS if begin else (4,), 10 if like == "tdm" else 1
    own = {"name": "tdm", **method}
    return Racer(label, own, MATCHING, counts, images, "", source, begin, fake, like, per_step)


def dmd2(label: str, updates: int, more: Settings, images: str = "") -> Racer:
    """Return a form of DMD2, which is raced in 4 steps."""
    return Racer(f"DMD2, {label}", {"name": "dmd2", "fake": {"updates": updates}, **more}, HIGHER, (4,), images)


def even(label: str, name: str, **method: Any) -> Racer:
    """Return a method with five fake updates for one of the student, at the student's rate."""
    return Racer(f"{label}, 5 even fake updates", {"name": name, "fake": {"updates": 5}, **method}, HIGHER, fake=1)


WIDE = {"tau_range": "to_noise"}
GAN = {"weight": 1.0, "r1": 0.01}


def weighed(name: str) -> Settings:
    """Return the settings of an f-divergence, whose ratio a discriminator knows."""
    return {"match": {"divergence": name}, "gan": {**GAN, "loss": "non-saturating"}}


RACERS: dict[str, Racer] = {
    "tdm": Racer("TDM", {"name": "tdm"}),
    "tdm-unify": Racer("TDM-unify", {"name": "tdm-unify", "steps": list(COUNTS)}),
    "tdm-fisher": Racer("TDM, Fisher divergence", {"name": "tdm-fisher"}),
    "dmd2-5": Racer("DMD2, 5 fake updates", {"name": "dmd2", "fake": {"updates": 5}}, HIGHER),
    "dmd2-1": Racer("DMD2, 1 fake update", {"name": "dmd2", "fake": {"updates": 1}}, HIGHER),
    "lcm": Racer("LCM", {"name": "lcm"}, HIGHER, images="real"),
    "progressive": Racer("progressive distillation", {"name": "progressive"}, HIGHER, images="real"),
    "sid": Racer("SiD", {"name": "sid"}),
    "diff-instruct": Racer("Diff-Instruct", {"name": "diff-instruct"}),
    "dmd2-2": dmd2("2 fake updates", 2, {}),
    "dmd2-3": dmd2("3 fake updates", 3, {}),
    "dmd2-10": dmd2("10 fake updates", 10, {}),
    "dmd2-gan": dmd2("5 fake updates, adversarial term, real images", 5, {"gan": GAN}, "real"),
    "dmd2-gan-own": dmd2(
        "5 fake updates, adversarial term on the fake score's features, real images",
        5,
        {"gan": {**GAN, "loss": "non-saturating", "features": "fake"}},
        "real",
    ),
    "dmd2-even": even("DMD2", "dmd2"),
    "diff-instruct-even": even("Diff-Instruct", "diff-instruct"),
    "tdm-even": even("TDM", "tdm"),
    "tdm-wide": even("TDM, tau up to pure noise", "tdm", match=WIDE),
    "unify-wide": even("TDM-unify, tau up to pure noise", "tdm-unify", steps=list(COUNTS), match=WIDE),
    "sid-even": even("SiD", "sid"),
    "fisher-even": even("TDM, Fisher divergence", "tdm-fisher"),
}
OTHERS: dict[str, Racer] = {  # settings of rivals, the likeliest first
    "after-progressive": tdm("after progressive distillation, half of the time each", "", begin="progressive"),
    "progressive-wide": tdm(
        "after progressive distillation, half of the time each, tau up to pure noise, 5 even fake updates",
        "",
        begin="progressive",
        like="tdm-wide",
        match=WIDE,
        fake={"updates": 5},
    ),
    "to-noise": tdm("tau up to pure noise", "TDM eq. 5", match=WIDE),
    "clean": tdm("clean states, tau over all times", "TDM tab. 7", match={"state": "clean", "tau_range": "full"}),
    "after-lcm": tdm("after LCM, half of the time each", "TDM fig. 8", begin="lcm"),
    "sample-dpmpp": tdm("sampled with DPM-Solver++", "TDM tab. 6", sample_solver="dpmpp"),
    "gan-real": tdm("adversarial term, real images", "TDM eq. 16", "real", gan=GAN),
    "gan-teacher": tdm("adversarial term, the teacher's images", "arXiv 2606.12575", "teacher", gan=GAN),
    "per-step": tdm("own weights per step", "arXiv 2606.12575", per_step=True),
    "guidance-own": tdm(
        "guidance as its own term, tau in the segment", "arXiv 2511.22677", match={"guidance_tau": "own"}
    ),
    "guidance-above": tdm(
        "guidance as its own term, tau above the landing time", "arXiv 2511.22677", match={"guidance_tau": "above"}
    ),
    "random-times": tdm("times drawn at random", "arXiv 2605.06376", random_times=True),
    "pull": tdm("fake score pulled to the student, 0.03", "arXiv 2506.00523", fake={"pull": 0.03}),
    "ladder": tdm("ladder of 16, 8, 4 steps", "FastVideo's trainer of TDM", ladder=[16, 8]),
    "transition": tdm("fake score on the transition noise", "arXiv 2605.26108", fake={"target": "transition"}),
    "consistency": tdm(
        "fake score on the transition noise, its consistency at 0.01",
        "arXiv 2605.26108",
        fake={"target": "transition", "consistency": 0.01},
    ),
    "density-ratio": tdm(
        "fake score weighed by the density ratio to the power 1/d", "TDM eq. 7", fake={"density_ratio": True}
    ),
    "first-step": tdm("first step regressed on the teacher, 0.05", "arXiv 2602.03139", first_step={"weight": 0.05}),
    "first-step-1": tdm("first step regressed on the teacher, 1", "arXiv 2602.03139", first_step={"weight": 1.0}),
    "f-js": tdm("Jensen-Shannon weights, adversarial term, real images", "arXiv 2502.15681", "real", **weighed("js")),
    "f-kl": tdm("forward KL weights, adversarial term, real images", "arXiv 2502.15681", "real", **weighed("kl")),
    "l2": tdm("l2 with DMD's normaliser", "TDM app. F", loss="l2"),
    "train-renoise": tdm("re-noising", "arXiv 2303.01469", solver="renoise"),
}
REWARD_WEIGHTS = {
    ("confidence", "gradient"): (0.1, 0.3, 1.0),
    ("confidence", "preference"): (0.001, 0.3, 1.0),  # the first has the cost alone
    ("saturation", "gradient"): (1.0, 3.0, 10.0, 30.0),
    ("saturation", "preference"): (0.3, 1.0),
}


def rewarded(name: str, by: str, weight: float) -> Racer:
    """Return TDM with a reward beside it."""
    method = {"name": "tdm", "reward": {"weight": weight, "by": by}}
    return Racer(f"{name} by {by}, weight {weight:g}", method, counts=(4,), reward=name)


REWARDED: dict[str, Racer] = {
    f"{name}-{by}-{weight:g}": rewarded(name, by, weight)
    for (name, by), weights in REWARD_WEIGHTS.items()
    for weight in weights
}
WARMUP = 40  # updates of the fake score before the student moves
TURNS, TURN = 4, 5  # of a pace, and iterations of a turn: enough that a cache is warm; the first does not count
YARDSTICK = ("tdm", 4)


def everyone() -> dict[str, Racer]:
    """Return all racers by key."""
    return RACERS | OTHERS | REWARDED


@dataclass(frozen=True)
class Cell:
    """One training of the race."""

    key: str
    count: int  # 0: all that the method serves
    rate: float
    seed: int


@dataclass(frozen=True)
class Arena:
    """The teacher, what students are trained on, and what they are measured by."""

    teacher: Backbone
    measure: Measures
    data: Embeddings
    real: ImageData
    rewards: dict[str, Reward]
    a: argparse.Namespace


def method_of(racer: Racer, count: int, warmup: int = WARMUP) -> Method:
    """Return a racer's method for a step count, with so many updates of the fake score at the start."""
    own: Settings = {"steps": count} | racer.method | {"guidance": Guidance(scale=GUIDANCE)}
    if own["name"] not in ("lcm", "progressive"):
        updates = own.get("fake", {}).get("updates", 10 if own["name"] == "dmd2" else 1)
        own = {"warmup": max(1, warmup // updates)} | own
    return preset(**own)


def training(
    arena: Arena, racer: Racer, method: Method, cell: Cell, iterations: int, begin: Mapping[str, Tensor] | None = None
) -> Iterator[Roles]:
    """Train a racer, from the teacher or another student's weights, and yield its roles after every iteration."""
    roles = roles_for(arena.teacher, method, RolesConfig(lora=False, per_step=racer.per_step), cell.seed)
    if begin is not None:
        roles.start_from(begin)
    roles = replace(roles, reward=arena.rewards[racer.reward] if racer.reward else None)
    train = TrainConfig(
        iterations=iterations, batch=BATCH, lr=cell.rate, fake_lr=racer.fake * cell.rate, decay=iterations // 2,
        ema=EMA, seed=cell.seed,
    )  # fmt: skip
    images = {"": None, "real": arena.real}.get(racer.images) if method.needs.images else None
    if racer.images == "teacher":
        images = teacher_states(arena)
    for step in distill(roles, method, arena.data, train, real=images):
        yield step.roles


def paces(arena: Arena, wanted: Sequence[tuple[str, int]]) -> dict[str, float]:
    """Return the CPU seconds of an iteration after the warm-up of (method, step count), by name.

    The trainings take turns of some iterations, so that other processes slow all of them alike.
    """
    going, took = {}, dict[str, list[float]]()
    for key, count in wanted:
        racer = everyone()[key]
        going[name_of(key, count)] = training(
            arena, racer, method_of(racer, count, 1), Cell(key, count, racer.rate, 0), TURNS * TURN
        )
    for _ in range(TURNS):
        for name, steps in going.items():
            before = CLOCK()
            for _ in range(TURN):
                next(steps)
            took.setdefault(name, []).append((CLOCK() - before) / TURN)
    return {name: statistics.median(seconds[1:]) for name, seconds in took.items()}


def name_of(key: str, count: int) -> str:
    """Return the name of a method in a step count."""
    return f"{key}-{count}"


def paced(arena: Arena, wanted: Sequence[tuple[str, int]], known: dict[str, float]) -> None:
    """Add the paces that are not known, in the unit of the known ones: TDM's in four steps is in both."""
    lacking = [one for one in wanted if name_of(*one) not in known]
    if not lacking:
        return
    found, unit = paces(arena, [*{YARDSTICK: None, **dict.fromkeys(lacking)}]), name_of(*YARDSTICK)
    scale = known.get(unit, found[unit]) / found[unit]
    known.update({name: seconds * scale for name, seconds in found.items() if name not in known})


def begun(arena: Arena, cell: Cell, budget: float, paces: Mapping[str, float]) -> tuple[dict[str, Tensor], float]:
    """Train a student for a budget, and return its averaged weights with the CPU seconds."""
    racer, began = RACERS[cell.key], CLOCK()
    iterations = int(budget / paces[name_of(cell.key, cell.count)])
    *_, roles = training(arena, racer, method_of(racer, cell.count), cell, iterations)
    with roles.averaged():
        return roles.student_state(), CLOCK() - began


def race(arena: Arena, stage: str, cell: Cell, paces: dict[str, float], rate: float = 0.0) -> Facts:
    """Train one student for the budget, and measure it in every step count that it serves.

    `rate` is that of the racer that begins.
    """
    racer, seconds, begin = everyone()[cell.key], 0.0, None
    method, share = method_of(racer, cell.count), 0.5 if racer.begin else 1.0
    budget = arena.a.seconds * (LONGER if stage == "longer" else 1)
    if racer.begin:
        begin, seconds = begun(arena, replace(cell, key=racer.begin, rate=rate), share * budget, paces)
    iterations = max(method.warmup + 2, int(share * budget / paces[name_of(cell.key, cell.count)]))
    began, curve = CLOCK(), list[tuple[float, float]]()
    marks = [iterations * k // 4 for k in (1, 2, 3)] if stage == "race" and cell.seed == 0 else []
    for i, roles in enumerate(training(arena, racer, method, cell, iterations, begin), 1):
        if i in marks:
            seconds += CLOCK() - began
            with roles.averaged(), torch.no_grad():
                curve.append((seconds, measured(arena, method, roles, 4, cell, whole=False)["fd"]))
            began = CLOCK()
    seconds += CLOCK() - began
    with roles.averaged(), torch.no_grad():
        found = {count: measured(arena, method, roles, count, cell) for count in method.counts}
    return {
        "stage": stage,
        "key": cell.key,
        "count": cell.count,
        "rate": cell.rate,
        "seed": cell.seed,
        "budget": budget,
        "iterations": iterations,
        "seconds": seconds,
        "method": racer.method,
        "curve": curve,
        "measured": found,
        "images": COUNT,
        **origin(),
    }


def averages(arena: Arena, cell: Cell, paces: Mapping[str, float]) -> Facts:
    """Train one student for the budget, and measure several averages of its weights in 4 steps."""
    racer, count, kept = everyone()[cell.key], first(everyone()[cell.key]), dict[float, list[Tensor]]()
    method, iterations = method_of(racer, count), int(arena.a.seconds / paces[name_of(cell.key, count)])
    for done, roles in enumerate(training(arena, racer, method, cell, iterations), 1):
        weights = [p.detach() for p in roles.trained["student"].values()]
        for decay in EMAS:
            own = kept.setdefault(decay, [w.clone() for w in weights])
            torch._foreach_lerp_(own, weights, 1 - min(decay, done / (done + 9)))
    found = {}
    for decay, own in kept.items():
        for place, weight in zip(roles.trained["student"], own, strict=True):
            roles.average[place].copy_(weight)
        with roles.averaged(), torch.no_grad():
            found[f"{decay:g}"] = measured(arena, method, roles, 4, cell, whole=False)
    return {
        "stage": "averages", "key": cell.key, "count": count, "rate": cell.rate, "seed": cell.seed,
        "budget": arena.a.seconds, "iterations": iterations, "measured": found, "images": COUNT, **origin(),
    }  # fmt: skip


def measured(
    arena: Arena, method: Method, roles: Roles, count: int, cell: Cell, whole: bool = True
) -> dict[str, float]:
    """Measure a student in a step count; not `whole`: its distance alone."""
    times = method.times(arena.teacher.schedule, count)

    def call(cond: Cond) -> Denoise:
        return student_of(method, roles, cond, count)

    title = f"{cell.key}-{count}"
    shown_in = title if cell.seed == 0 and whole else ""
    return arena_measure(arena, call, times, method.sampler, cell.seed, shown_in, whole)


def arena_measure(
    arena: Arena, call: Any, times: Tensor, solver: str, seed: int, title: str = "", whole: bool = True
) -> dict[str, float]:
    """Measure what a denoiser draws; the first images go to `title`.png."""

    def draw(noise: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
        rule = solver_named(solver, lambda like: torch.randn(like.shape, generator=rng))
        *_, last = sample(call({"label": labels}), arena.teacher.schedule, noise, times, rule)
        return last.x

    with torch.no_grad():
        images, labels = drawn(draw, seed)
        if title:
            show(images[:80], arena.a.out / "grids" / f"{title}.png")
        if not whole:
            return {"fd": arena.measure.distance(images)}
        prompts = [FASHION[k] for k in labels.tolist()]
        scores = {name: float(reward(images, prompts).mean()) for name, reward in arena.rewards.items()}
        return arena.measure(images, labels) | scores


def show(images: Tensor, file: Path) -> None:
    """Write images [N, 1, H, W] in [-1, 1], ten a row, each pixel as 4x4."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [torch.cat(list(row), 2) for row in ((images.clamp(-1, 1) + 1) / 2).split(10)]
    grid = torch.cat(rows, 1).repeat_interleave(4, 1).repeat_interleave(4, 2)
    file.write_bytes(png(to_pil(grid.expand(3, -1, -1))))


def teacher_states(arena: Arena) -> ImageData:
    """Return 2,000 images of the teacher in 16 guided steps, made once."""
    guidance = Guidance(scale=GUIDANCE)
    return teacher_images(arena.teacher, arena.data, 2000, 16, guidance, arena.a.out / "images", chunk=250)


def teacher_rows(arena: Arena, done: Sequence[Facts]) -> Iterator[Facts]:
    """Measure the teacher, guided and not, by two solvers."""
    known = {(r["steps"], r["solver"], r["guidance"], r["seed"]) for r in done if r["stage"] == "teacher"}
    plans = [(50, "ddim", GUIDANCE, 0), (50, "ddim", 1.0, 0)]
    plans += [(k, s, GUIDANCE, 0) for k in (8, 4, 2, 1) for s in ("ddim", "dpmpp")]
    plans += [(k, "ddim", 1.0, 0) for k in (8, 4, 2, 1)]
    plans += [(k, "ddim", GUIDANCE, seed) for seed in (1, 2) for k in (4, 2, 1, 50)]
    for steps, solver, guidance, seed in plans:
        if (steps, solver, guidance, seed) in known:
            continue
        times = timegrid.uniform(arena.teacher.schedule, steps)
        null = arena.teacher.encode([""])

        def call(cond: Cond, guidance: float = guidance, null: Cond = null) -> Denoise:
            return guided_teacher(arena.teacher, cond, null, guidance)

        title = f"teacher-{steps}-{solver}-{guidance:g}" if seed == 0 else ""
        found = arena_measure(arena, call, times, solver, seed, title)
        yield {
            "stage": "teacher", "steps": steps, "solver": solver, "guidance": guidance, "seed": seed,
            "measured": found, "images": COUNT, **origin(),
        }  # fmt: skip


def guided_teacher(teacher: Backbone, cond: Cond, null: Cond, scale: float) -> Denoise:
    """Return the teacher with guidance, or without at scale 1."""
    return guided(teacher, teacher.module, cond, null, Guidance(scale=scale))


def cells(stage: str, rows: Sequence[Facts], seed: int) -> Iterator[Cell]:
    """Return a stage's trainings of a seed, the most telling first; all but the search need the best rates.

    `rows` are those that are there when the next one is asked for.
    """
    if stage == "search" and seed == 0:
        for key, racer in RACERS.items():
            yield from climbing(key, first(racer), racer.rate, rows)
        for count in (2, 1):
            for key, racer in RACERS.items():
                if first(racer) and count in racer.counts and searched(key, rows):
                    yield from climbing(key, count, best_rate(key, rows), rows)
    if stage == "race" or (stage == "averages" and seed == 0):
        yield from (Cell(key, first(r), best_rate(key, rows), seed) for key, r in RACERS.items())
    if stage == "counts":
        several = [(key, k) for k in (1, 2) for key, r in everyone().items() if first(r) and k in r.counts]
        yield from (Cell(key, k, best_rate(key, rows, k), seed) for key, k in several)
    if stage == "longer":
        for key, k in ((key, k) for k, keys in NEAREST.items() for key in keys):
            if seed == 0:
                yield from climbing(key, k, best_rate(key, rows, k), rows, longer=True)
            else:
                yield Cell(key, k, best_rate(key, rows, k, longer=True), seed)
    if stage in ("rewards", "settings"):
        own = REWARDED if stage == "rewards" else OTHERS
        yield from (Cell(key, 4, best_rate(key, rows), seed) for key in own)


def climbing(key: str, count: int, begin: float, rows: Sequence[Facts], longer: bool = False) -> Iterator[Cell]:
    """Return trainings with the rates next to the best one, until both are there."""
    asked = set[float]()
    while True:
        known = distances(key, count, rows, longer)
        if asked - known.keys():
            return  # nobody trained the last one
        at = RATES.index(min(known, key=known.__getitem__)) if known else RATES.index(begin)
        near = [RATES[i] for i in (at, at - 1, at + 1) if 0 <= i < len(RATES) and RATES[i] not in known]
        if not near:
            return
        asked.add(near[0])
        yield Cell(key, count, near[0], 0)


def distances(key: str, count: int, rows: Sequence[Facts], longer: bool = False) -> dict[float, float]:
    """Return the FD of each rate in the search; a student of several step counts is tuned in 4 steps."""
    stage = "longer" if longer else "search"
    own = [r for r in rows if (r["stage"], r.get("seed")) == (stage, 0) and (r["key"], r["count"]) == (key, count)]
    return {r["rate"]: r["measured"][str(count or 4)]["fd"] for r in own}


def first(racer: Racer) -> int:
    """Return the step count that a method is tuned at first; 0 where it serves all."""
    return 0 if "steps" in racer.method else 4


def searched_as(key: str) -> str:
    """Return the method whose rates another one has."""
    return key if key in RACERS else everyone()[key].like


def best_rate(key: str, rows: Sequence[Facts], count: int = 4, longer: bool = False) -> float:
    """Return the rate with the lowest FD in the search, the lowest rate within noise.

    A racer that is not searched has the rate of one that is like it; for the longer time each has its own.
    """
    if longer and (found := distances(key, count, rows, longer)):
        return min(rate for rate, fd in found.items() if fd <= min(found.values()) + NOISE)
    key = searched_as(key)
    known = distances(key, count if first(RACERS[key]) else 0, rows)
    if not known:
        raise SystemExit(f"{key} has no rate in {count} steps yet; run --only search first")
    return min(rate for rate, fd in known.items() if fd <= min(known.values()) + NOISE)


def searched(key: str, rows: Sequence[Facts], count: int = 4) -> bool:
    """Return whether a method has a rate in a step count."""
    key = searched_as(key)
    return bool(distances(key, count if first(RACERS[key]) else 0, rows))


def up_to_date(rows: Sequence[Facts]) -> list[Facts]:
    """Return rows without those that were measured otherwise, or whose rate is not the search's best any more.

    A search stays as it was measured.
    """
    kept = [r for r in rows if r["stage"] == "search" or r["images"] == COUNT]
    return [
        r for r in kept
        if r["stage"] in ("teacher", "search")
        or (r["stage"], r["seed"]) == ("longer", 0)
        or not searched(r["key"], kept, r["count"] or 4)
        or r["rate"] == best_rate(r["key"], kept, r["count"] or 4, r["stage"] == "longer")
    ]  # fmt: skip


def write(rows: Sequence[Facts], common: Mapping[str, Any], a: argparse.Namespace) -> None:
    """Write record and page."""
    rate = {
        name_of(key, k): best_rate(key, rows, k)
        for key, r in RACERS.items()
        for k in r.counts
        if searched(key, rows, k)
    }
    longer = {
        name_of(key, k): best_rate(key, rows, k, longer=True)
        for k, keys in NEAREST.items()
        for key in keys
        if distances(key, k, rows, longer=True)
    }
    known = {**common, "rate": rate, "longer_rate": longer}
    known["label"] = {key: named(racer) for key, racer in everyone().items()}
    record = new_record("arena", "python benchmarks/arena.py --data FOLDER", rows, SEEDS, known)
    write_record(record, page(record), a.to)


def plot(a: argparse.Namespace) -> None:
    """Draw the figures of a written record."""
    record = read_record(a.to / "arena.json")
    if record is not None and any(r["stage"] == "race" for r in record.rows):
        plot_race(record, a.figures / "arena.png")
    if record is not None and any(r["stage"] == "rewards" for r in record.rows):
        plot_rewards(record, a.figures / "arena-rewards.png")


RANKED = ("method", "rate", "iterations", "CPU s")
MEASURES = {"fd": 2, "accuracy": 1, "precision": 2, "recall": 2, "diversity": 2}
SCORED = ("confidence", "saturation")


def shown(found: Sequence[Mapping[str, float]]) -> list[str]:
    """Return all measures, mean and deviation."""
    return [spread([m[k] for m in found], digits) for k, digits in MEASURES.items()]


def page(record: Record) -> str:
    """Return the page of a record."""
    parts = [f"# The arena\n\n{about(__doc__)}\n\n{wrapped(provenance(record))}"]
    if "classifier" in record.common:
        right = record.common["classifier"]
        parts.append(wrapped(f"The classifier is right about {right:.1f} % of test images."))
    drawn_by = [r for r in record.rows if r["stage"] == "teacher"]
    group = itertools.groupby(
        sorted(drawn_by, key=lambda r: (-r["steps"], r["solver"], -r["guidance"])),
        key=lambda r: (r["steps"], r["solver"], r["guidance"]),
    )
    head = [*MEASURES, "seeds"]
    lines = []
    for (steps, solver, guidance), rows in group:
        own = [r["measured"] for r in rows]
        lines.append([steps, solver, f"{guidance:g}", *shown(own), len(own)])
    parts.append("## The teacher\n\n" + markdown(["steps", "solver", "guidance", *head], lines))
    for count in COUNTS:
        title = f"## {count} step{'s' if count > 1 else ''}"
        figure = "![FD over CPU seconds, seed 0](../docs/arena.png)\n\n" if count == max(COUNTS) else ""
        if lines := ranking(record, count):
            head_line = f"{title}, {seconds_of(record):g} CPU seconds each"
            parts.append(f"{head_line}\n\n{figure}{markdown([*RANKED, *head], lines)}")
        if lines := ranking(record, count, longer=True):
            head_line = f"{title}, {LONGER * seconds_of(record):g} CPU seconds each"
            parts.append(f"{head_line}\n\n{markdown([*RANKED, *head], lines)}")
    others = (settings_part, rewards_part, search_part, averages_part)
    return "\n\n".join([*parts, *(line for part in others for line in part(record))]) + "\n"


def ranking(record: Record, count: int, longer: bool = False) -> list[list[object]]:
    """Return the lines of all methods in a step count, the nearest to real images first."""
    ranked: list[tuple[float, list[object]]] = []
    for key, racer in {**RACERS, **{k: r for k, r in OTHERS.items() if r.begin}}.items():
        if own := of(record, key, count, longer):
            its, took = (statistics.mean(r[k] for r in own) for k in ("iterations", "seconds"))
            found = [r["measured"][str(count)] for r in own]
            told = [named(racer), f"{own[0]['rate']:g}", f"{its:.0f}", f"{took:.1f}"]
            ranked.append((statistics.mean(m["fd"] for m in found), [*told, *shown(found), len(own)]))
    return [line for _, line in sorted(ranked, key=lambda one: one[0])]


def named(racer: Racer) -> str:
    """Return a method's name among others."""
    return f"TDM {racer.label}" if racer.begin else racer.label


def of(record: Record, key: str, count: int = 4, longer: bool = False) -> list[Facts]:
    """Return the rows of a method that was trained for a step count, or for several."""
    stages = ("longer",) if longer else ("race", "counts", "settings", "rewards")
    kinds = [r for r in record.rows if r["stage"] in stages and r["key"] == key]
    own = [r for r in kinds if r["count"] in (0, count) and str(count) in r["measured"]]
    rate = record.common.get("longer_rate", {}).get(name_of(key, count))
    return own if rate is None or not longer else [r for r in own if r["rate"] == rate]


def seconds_of(record: Record) -> float:
    """Return the budget of a training."""
    return float(record.common.get("seconds", 0))


def apart(own: Sequence[Facts], base: Sequence[Facts], name: str) -> list[float]:
    """Return differences of a measure between rows of equal seeds."""
    by_seed = {r["seed"]: r["measured"]["4"][name] for r in base}
    return [r["measured"]["4"][name] - by_seed[r["seed"]] for r in own if r["seed"] in by_seed]


def settings_part(record: Record) -> list[str]:
    """Return the table of rivals' settings next to TDM."""
    base, lines = of(record, "tdm"), []
    for key, racer in OTHERS.items():
        if own := of(record, key):
            found = shown([r["measured"]["4"] for r in own])
            lines.append([racer.label, racer.source, spread(apart(own, base, "fd")), *found, len(own)])
    if not lines:
        return []
    plain = ["plain TDM", "", "", *shown([r["measured"]["4"] for r in base]), len(base)]
    head = ["TDM with", "source", "change in FD", *MEASURES, "seeds"]
    noise = spread([r["measured"]["4"]["fd"] for r in base])
    said = f"TDM with one setting of others, in 4 steps, at TDM's rate. Plain TDM has {noise} over its seeds; a change "
    said += "is the mean of the differences between equal seeds."
    return [f"## Settings that others ship\n\n{wrapped(said)}\n\n{markdown(head, [plain, *lines])}"]


def rewards_part(record: Record) -> list[str]:
    """Return the table of rewards next to TDM."""
    if not any(of(record, key) for key in REWARDED):
        return []
    named = [("plain TDM", "", "", "tdm")]
    named += [(*key.split("-"), key) for key in REWARDED]  # type: ignore[misc]
    lines = []
    for name, by, weight, key in named:
        if own := of(record, key):
            found = [r["measured"]["4"] for r in own]
            scores = [spread([m[k] for m in found], 3) for k in SCORED]
            lines.append([name, by, weight, *scores, *shown(found), len(own)])
    head = ["reward", "by", "weight", *SCORED, *MEASURES, "seeds"]
    said = (
        "TDM in 4 steps with a reward beside matching. Confidence is the log-probability that a second classifier "
        "gives an image's class; distances are in the first one's features. Saturation is how near pixels are to black "
        "or white: blots of both have the most. By gradient the reward is differentiated through the one step; by "
        "preference a third network learns it from groups of eight images of a class."
    )
    figure = "![Reward and FD](../docs/arena-rewards.png)"
    return [f"## Rewards\n\n{wrapped(said)}\n\n{figure}\n\n{markdown(head, lines)}"]


def search_part(record: Record) -> list[str]:
    """Return the search of rates."""
    lines = []
    budgets = {False: seconds_of(record), True: LONGER * seconds_of(record)}
    for longer, budget in budgets.items():
        for key, racer in everyone().items():
            for count in (k for k in ((0,) if not first(racer) else COUNTS) if distances(key, k, record.rows, longer)):
                known = distances(key, count, record.rows, longer)
                found = [f"{known[rate]:.2f}" if rate in known else "" for rate in RATES]
                lines.append([named(racer), count or "4, 2, 1", f"{budget:g}", *found])
    if not lines:
        return []
    said = "A search begins in the middle and goes on until both neighbours of the best rate are worse; in 2 and 1 "
    said += "steps it begins at the best rate in 4. TDM-unify is tuned in 4 steps."
    fewer = {r["images"] for r in record.rows if r["stage"] == "search"} - {COUNT}
    if fewer:
        said += (
            f" Rates for {budgets[False]:g} seconds were searched with {', '.join(f'{n:,}' for n in sorted(fewer))} "
        )
        said += "images in the features of an earlier classifier: their FD is next to each other's alone."
    table = markdown(["method", "steps", "CPU seconds", *(f"{rate:g}" for rate in RATES)], lines)
    return [f"## The search of rates: FD, seed 0\n\n{wrapped(said)}\n\n{table}"]


def averages_part(record: Record) -> list[str]:
    """Return the table of averages of a student's weights."""
    own = {r["key"]: r["measured"] for r in record.rows if r["stage"] == "averages"}
    lines = [
        [named(racer), *(f"{own[key][f'{decay:g}']['fd']:.2f}" for decay in EMAS)]
        for key, racer in RACERS.items()
        if key in own
    ]
    if not lines:
        return []
    said = f"All other tables have the average of decay {EMA:g}. These are averages of one training each, in 4 steps, "
    said += "seed 0, at the best rate."
    table = markdown(["method", *(f"{decay:g}" for decay in EMAS)], lines)
    return [f"## The average of weights: FD by its decay\n\n{wrapped(said)}\n\n{table}"]


def plot_race(record: Record, file: Path) -> None:
    """Draw FD over CPU seconds of every method in 4 steps, with the teacher's."""
    figure, axes = plt.subplots(figsize=(10, 4.5), layout="constrained")
    for i, (key, racer) in enumerate((key, racer) for key, racer in RACERS.items() if racer.counts == COUNTS):
        first_seed = [r for r in of(record, key) if r["seed"] == 0]
        for row in first_seed:
            points = [*row["curve"], (row["seconds"], row["measured"]["4"]["fd"])]
            style: Settings = {"color": plt.get_cmap("tab20")(i), "linestyle": "--" if racer.fake == 1 else "-"}
            style |= {"color": "black", "linewidth": 2.5} if key == "tdm" else {}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=racer.label, **style)
    for steps in (50, 8, 4):
        own = [r for r in record.rows if r["stage"] == "teacher" and (r["steps"], r["solver"]) == (steps, "ddim")]
        guided_rows = [r["measured"]["fd"] for r in own if r["guidance"] == GUIDANCE]
        if guided_rows:
            axes.axhline(statistics.mean(guided_rows), color="gray", linestyle=":", linewidth=1)
            place = {"xy": (0.01, statistics.mean(guided_rows)), "xycoords": axes.get_yaxis_transform()}
            axes.annotate(f"teacher, {steps} guided steps", **place, fontsize=7, color="gray", va="bottom")
    axes.set(xlabel="CPU seconds of training", ylabel="FD to real images, 4 steps", yscale="log")
    axes.set_yticks([2, 3, 4, 5, 6, 8], list("234568"))
    axes.minorticks_off()
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file, dpi=110)
    plt.close(figure)


def plot_rewards(record: Record, file: Path) -> None:
    """Draw FD against both rewards; lines join the weights of one way to learn."""
    figure, panels = plt.subplots(1, len(SCORED), figsize=(11, 4.2), layout="constrained", sharey=True)
    plain = [r["measured"]["4"] for r in of(record, "tdm")]
    for name, axes in zip(SCORED, panels, strict=True):
        for by, colour in (("gradient", "tab:blue"), ("preference", "tab:orange")):
            ways = [(w, of(record, f"{name}-{by}-{w:g}")) for w in REWARD_WEIGHTS[name, by]]
            groups = [(f"{w:g}", [r["measured"]["4"] for r in own]) for w, own in ways if own]
            groups = [("", plain), *groups] if by == "gradient" else groups  # preference has another cost
            at = [[statistics.mean(m[k] for m in found) for k in (name, "fd")] for _, found in groups if found]
            axes.plot(*zip(*at, strict=True), marker="o", color=colour, label=f"by {by}") if at else None
            for (weight, _), place in zip(groups, at, strict=False):
                axes.annotate(weight, place, fontsize=8, xytext=(4, 4), textcoords="offset points")
        if plain:
            axes.plot(*(statistics.mean(m[k] for m in plain) for k in (name, "fd")), "ks", label="plain TDM")
        axes.set(xlabel=f"{name} of the student's images", title=f"reward: {name}")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.legend(fontsize=8)
    panels[0].set(ylabel="FD to real images", yscale="log")
    panels[0].set_yticks([3, 4, 6, 10, 20], list(map(str, (3, 4, 6, 10, 20))))
    panels[0].minorticks_off()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def make(a: argparse.Namespace, ends: float) -> Arena | None:
    """Return the arena; None where the teacher is not finished in time."""
    train, test = clothes(a.data, "train"), clothes(a.data, "t10k")
    run = a.out / "painter"
    if not (run / "teacher.safetensors").exists():
        for step, loss in painter(train, run):
            if step % 200 == 0:
                print(f"teacher {step} {loss:.4f}", flush=True)
            if time.monotonic() > ends:
                return None
    net, teacher = classifier(train, a.out / "classifier.safetensors"), teacher_of(run)
    data = embed(teacher, list(FASHION), None, fingerprint(teacher.module))
    judge = classifier(train, a.out / "judge.safetensors", 500, 1)
    rewards = {"confidence": confidence(judge), "saturation": saturation}
    return Arena(teacher, measures(net, test), data, states_of(teacher, train), rewards, a)


def accuracy(net: Classifier, test: Clothes) -> float:
    """Return the classifier's share of right answers in percent."""
    with torch.no_grad():
        return 100 * float((net(test.images).argmax(1) == test.labels).double().mean())


def main() -> None:
    """Make, race and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--only", nargs="*", choices=STAGES, default=list(STAGES), help="stages to run")
    parser.add_argument("--keys", nargs="*", default=[*everyone()], help="methods to run")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of a training")
    parser.add_argument("--until", type=float, default=float("inf"), help="begin nothing after so many seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/arena"), help="where runs are kept")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    parser.add_argument("--figures", type=Path, default=Path(__file__).parents[1] / "docs", help="where figures go")
    a = parser.parse_args()
    ends = time.monotonic() + a.until
    torch.set_num_threads(1)
    kept = read_record(a.to / "arena.json")
    rows = [] if kept is None else up_to_date(kept.rows)
    common: Facts = {"seconds": a.seconds, "pace": {}} if kept is None else dict(kept.common)
    if common["seconds"] != a.seconds:
        raise SystemExit(f"{a.to / 'arena.json'} is of {common['seconds']:g} seconds: give --to another folder")
    if (arena := make(a, ends)) is None:
        return
    common["classifier"] = accuracy(arena.measure.net, clothes(a.data, "t10k"))
    if {*a.only} - {"teacher"}:
        asked = {key: r for key, r in everyone().items() if key in a.keys}
        wanted = [(key, k) for key, r in asked.items() for k in ((0,) if "steps" in r.method else r.counts)]
        paced(arena, wanted, common["pace"])
        write(rows, common, a)
    for stage, seed in ((stage, seed) for seed in a.seeds for stage in a.only):
        if stage == "teacher":
            todo = teacher_rows(arena, rows) if seed == a.seeds[0] else iter(())
        else:
            todo = raced(arena, stage, seed, rows, common["pace"])
        for row in todo:
            rows.append(json.loads(json.dumps(row)))
            rows[:] = up_to_date(rows)
            write(rows, common, a)
            print(told(row), flush=True)
            if time.monotonic() > ends:
                plot(a)
                return
    write(rows, common, a)
    plot(a)


def raced(arena: Arena, stage: str, seed: int, rows: Sequence[Facts], paces: dict[str, float]) -> Iterator[Facts]:
    """Run the trainings of a stage that are not in the table."""
    for cell in cells(stage, rows, seed):
        if cell.key in arena.a.keys and not any(r["stage"] == stage and equal(r, cell) for r in rows):
            begin = everyone()[cell.key].begin
            if stage == "averages":
                yield averages(arena, cell, paces)
            else:
                yield race(arena, stage, cell, paces, best_rate(begin, rows, cell.count) if begin else 0.0)


def equal(row: Facts, cell: Cell) -> bool:
    """Return whether a row is a training's."""
    return (row["key"], row["count"], row["rate"], row["seed"]) == (cell.key, cell.count, cell.rate, cell.seed)


def told(row: Facts) -> str:
    """Return a row in a line."""
    about_it = {k: v for k, v in row.items() if k not in ("measured", "hardware", "versions", "method", "stage")}
    return f"{about_it} {json.dumps(row['measured'])}"


if __name__ == "__main__":
    main()
