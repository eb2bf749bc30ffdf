"""Race few-step methods on a teacher on which they part.

    python benchmarks/arena.py --data FOLDER      # makes what is missing; writes benchmarks/arena.md and .json
    python benchmarks/arena.py --only teacher tune seeds    # some stages; --until S: stop after S s

The teacher draws ten kinds of clothing (Fashion-MNIST in half of its size, 14x14), of which none determines an image,
with a perceptron of 0.9 million weights, so that seconds of a core hold a training. Methods train all weights, from
real images where they need images, for equal CPU seconds on one core: iterations follow from a method's pace. Paces are
medians of iterations for which all trainings take turns, so that a busy machine slows all of them alike; `CPU s` says
what a training took. Each method has the best of its learning rates, the fake score's being ten times the student's. FD is the Frechet distance of 2,000
images to the 10,000 test images in 64 features of a classifier that is trained here, in a unit in which real images
have a variance of 100. Accuracy is the classifier's, in percent; precision and recall are those of third neighbours;
diversity is the mean distance of images of a class, relative to that of real ones. Students take no guidance.

A stage that was stopped continues: what `arena.json` holds is not run again. FOLDER is Fashion-MNIST's, as in Debian's
package dataset-fashion-mnist.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arena_teacher import Clothes, Measures, classifier, clothes, drawn, measures, painter, states_of, teacher_of
from fewstep.atomic import write_json
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
STAGES = ("teacher", "tune", "seeds", "settings", "counts", "low-rates")
RATES = {"tune": (1, 2), "low-rates": (0,)}  # which of a method's rates
Settings = dict[str, Any]
MATCHING, HIGHER = (3e-5, 1e-4, 3e-4), (1e-4, 3e-4, 1e-3)  # a search goes on while the highest rate is the best


@dataclass(frozen=True)
class Racer:
    """A method as settings; `images` says what it trains on beside classes."""

    label: str
    method: Settings = field(default_factory=dict)
    rates: tuple[float, ...] = MATCHING
    counts: tuple[int, ...] = COUNTS
    images: str = ""  # real, teacher


def tdm(label: str, images: str = "", **method: Any) -> Racer:
    """Return TDM with other settings, which is raced in 4 steps at TDM's rate."""
    return Racer(f"TDM, {label}", {"name": "tdm", **method}, rates=(), counts=(4,), images=images)


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
}
OTHERS: dict[str, Racer] = {  # settings of rivals, the likeliest first
    "sample-dpmpp": tdm("sampled with DPM-Solver++", sample_solver="dpmpp"),
    "gan-real": tdm("adversarial term, real images", "real", gan={"weight": 1.0, "r1": 0.01}),
    "gan-teacher": tdm("adversarial term, the teacher's images", "teacher", gan={"weight": 1.0, "r1": 0.01}),
    "guidance-own": tdm("guidance as its own term, tau in the segment", match={"guidance_tau": "own"}),
    "guidance-above": tdm("guidance as its own term, tau above the landing time", match={"guidance_tau": "above"}),
    "random-times": tdm("times drawn at random", random_times=True),
    "pull": tdm("fake score pulled to the student, 0.03", fake={"pull": 0.03}),
    "ladder": tdm("ladder of 16, 8, 4 steps", ladder=[16, 8]),
    "transition": tdm("fake score on the transition noise", fake={"target": "transition"}),
    "l2": tdm("l2 with DMD's normaliser", loss="l2"),
    "train-renoise": tdm("re-noising", solver="renoise"),
}
WARMUP = 40  # updates of the fake score before the student moves
SKIPPED, COUNTED = 3, 12  # iterations of a pace
YARDSTICK = ("tdm", 4)


def everyone() -> dict[str, Racer]:
    """Return all racers by key."""
    return RACERS | OTHERS


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
    a: argparse.Namespace


def method_of(racer: Racer, count: int, warmup: int = WARMUP) -> Method:
    """Return a racer's method for a step count, with so many updates of the fake score at the start."""
    own: Settings = {"steps": count} | racer.method | {"guidance": Guidance(scale=GUIDANCE)}
    if own["name"] not in ("lcm", "progressive"):
        updates = own.get("fake", {}).get("updates", 10 if own["name"] == "dmd2" else 1)
        own = {"warmup": max(1, warmup // updates)} | own
    return preset(**own)


def training(arena: Arena, racer: Racer, method: Method, cell: Cell, iterations: int) -> Iterator[Roles]:
    """Train a racer, and yield its roles after every iteration."""
    roles = roles_for(arena.teacher, method, RolesConfig(lora=False), cell.seed)
    train = TrainConfig(
        iterations=iterations, batch=BATCH, lr=cell.rate, fake_lr=10 * cell.rate, decay=iterations // 2, ema=0.99,
        seed=cell.seed,
    )  # fmt: skip
    images = {"": None, "real": arena.real}.get(racer.images) if method.needs.images else None
    if racer.images == "teacher":
        images = teacher_states(arena)
    for step in distill(roles, method, arena.data, train, real=images):
        yield step.roles


def paces(arena: Arena, wanted: Sequence[tuple[str, int]]) -> dict[str, float]:
    """Return the CPU seconds of an iteration after the warm-up of (method, step count), by name.

    The trainings take turns, so that other processes slow all of them alike.
    """
    going, took = {}, dict[str, list[float]]()
    for key, count in wanted:
        racer = everyone()[key]
        rate = racer.rates[0] if racer.rates else MATCHING[0]
        going[name_of(key, count)] = training(
            arena, racer, method_of(racer, count, 1), Cell(key, count, rate, 0), SKIPPED + COUNTED
        )
    for _ in range(SKIPPED + COUNTED):
        for name, steps in going.items():
            before = CLOCK()
            next(steps)
            took.setdefault(name, []).append(CLOCK() - before)
    return {name: statistics.median(seconds[SKIPPED:]) for name, seconds in took.items()}


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


def race(arena: Arena, cell: Cell, paces: dict[str, float]) -> Facts:
    """Train one student for the budget, and measure it in every step count that it serves."""
    racer = everyone()[cell.key]
    method = method_of(racer, cell.count)
    iterations = max(method.warmup + 2, int(arena.a.seconds / paces[name_of(cell.key, cell.count)]))
    began = CLOCK()
    *_, roles = training(arena, racer, method, cell, iterations)
    seconds = CLOCK() - began
    with roles.averaged(), torch.no_grad():
        found = {count: measured(arena, method, roles, count, cell) for count in method.counts}
    return {
        "stage": "race",
        "key": cell.key,
        "count": cell.count,
        "rate": cell.rate,
        "seed": cell.seed,
        "iterations": iterations,
        "seconds": seconds,
        "method": racer.method,
        "measured": found,
        **origin(),
    }


def measured(arena: Arena, method: Method, roles: Roles, count: int, cell: Cell) -> dict[str, float]:
    """Measure a student in a step count."""
    times = method.times(arena.teacher.schedule, count)

    def call(cond: Cond) -> Denoise:
        return student_of(method, roles, cond, count)

    title = f"{cell.key}-{count}"
    return arena_measure(arena, call, times, method.sampler, cell.seed, title if cell.seed == 0 else "")


def arena_measure(arena: Arena, call: Any, times: Tensor, solver: str, seed: int, title: str = "") -> dict[str, float]:
    """Measure what a denoiser draws; the first images go to `title`.png."""

    def draw(noise: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
        rule = solver_named(solver, lambda like: torch.randn(like.shape, generator=rng))
        *_, last = sample(call({"label": labels}), arena.teacher.schedule, noise, times, rule)
        return last.x

    with torch.no_grad():
        images, labels = drawn(draw, seed)
        if title:
            show(images[:80], arena.a.out / "grids" / f"{title}.png")
        return arena.measure(images, labels)


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
            "measured": found, **origin(),
        }  # fmt: skip


def guided_teacher(teacher: Backbone, cond: Cond, null: Cond, scale: float) -> Denoise:
    """Return the teacher with guidance, or without at scale 1."""
    return guided(teacher, teacher.module, cond, null, Guidance(scale=scale))


def cells(stage: str, rows: Sequence[Facts]) -> Iterator[Cell]:
    """Return the trainings of a stage, the most telling first; later stages need the best rates of `tune`."""
    if stage in RATES:
        for k in RATES[stage]:
            yield from (Cell(key, first(r), r.rates[k], 0) for key, r in RACERS.items())
    if stage == "seeds":
        yield from (Cell(key, first(r), best_rate(key, rows), s) for s in SEEDS[1:] for key, r in RACERS.items())
    if stage == "counts":
        yield from (
            Cell(key, count, best_rate(key, rows), seed)
            for seed in SEEDS
            for count in (1, 2)
            for key, r in RACERS.items()
            if "steps" not in r.method
        )
    if stage == "settings":
        yield from (Cell(key, 4, best_rate("tdm", rows), seed) for seed in SEEDS for key in OTHERS)


def first(racer: Racer) -> int:
    """Return the step count that a method is tuned at; 0 where it serves all."""
    return 0 if "steps" in racer.method else 4


def best_rate(key: str, rows: Sequence[Facts]) -> float:
    """Return the rate with the lowest FD of seed 0 in 4 steps."""
    own = [r for r in rows if r["stage"] == "race" and r["key"] == key and r["seed"] == 0 and r["count"] in (0, 4)]
    if not own:
        raise SystemExit(f"{key} has no tuned rate; run --only tune first")
    return float(min(own, key=lambda r: r["measured"]["4"]["fd"])["rate"])


def write(rows: Sequence[Facts], common: Mapping[str, Any], a: argparse.Namespace) -> None:
    """Write record and page."""
    tuned_keys = {r["key"] for r in rows if r["stage"] == "race" and r["key"] in RACERS and r["seed"] == 0}
    best = {key: best_rate(key, rows) for key in RACERS if key in tuned_keys}
    known = {**common, "rate": best | dict.fromkeys(OTHERS, best.get("tdm"))}
    known["label"] = {key: racer.label for key, racer in everyone().items()}
    record = new_record("arena", "python benchmarks/arena.py --data FOLDER", rows, SEEDS, known)
    write_record(record, page(record), a.to)


MEASURES = {"fd": 2, "accuracy": 1, "precision": 2, "recall": 2, "diversity": 2}


def shown(found: Sequence[Mapping[str, float]]) -> list[str]:
    """Return all measures, mean and deviation."""
    return [spread([m[k] for m in found], digits) for k, digits in MEASURES.items()]


def page(record: Record) -> str:
    """Return the page of a record."""
    parts = [f"# The arena\n\n{about(__doc__)}\n\n{wrapped(provenance(record))}"]
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
    raced = [r for r in record.rows if r["stage"] == "race"]
    seconds = record.common.get("seconds", 0)
    for count in COUNTS:
        lines = []
        for key, racer in everyone().items():
            rates = {r["rate"] for r in raced if r["key"] == key and str(count) in r["measured"]}
            rate = best_of(key, raced, rates)
            own = [r for r in raced if r["key"] == key and r["rate"] == rate and str(count) in r["measured"]]
            own = [r for r in own if r["count"] in (0, count)]
            if own:
                its, took = (statistics.mean(r[k] for r in own) for k in ("iterations", "seconds"))
                found = shown([r["measured"][str(count)] for r in own])
                lines.append([racer.label, f"{rate:g}", f"{its:.0f}", f"{took:.1f}", *found, len(own)])
        lines.sort(key=lambda line: float(str(line[4]).split(" ")[0]))
        if lines:
            title = f"## {count} step{'s' if count > 1 else ''}, {seconds:g} CPU seconds each"
            parts.append(f"{title}\n\n{markdown(['method', 'rate', 'iterations', 'CPU s', *head], lines)}")
    lines = [
        [RACERS[key].label, *(tuned(key, rate, raced) for rate in racer.rates)]
        for key, racer in RACERS.items()
        if any(r["key"] == key for r in raced)
    ]
    if lines:
        table = markdown(["method", "low", "middle", "high"], lines)
        listed = f"Rates {', '.join(f'{r:g}' for r in MATCHING)}; of DMD2, LCM and progressive "
        listed += f"distillation {', '.join(f'{r:g}' for r in HIGHER)}."
        parts.append(f"## The search of rates: FD in 4 steps, seed 0\n\n{listed}\n\n{table}")
    return "\n\n".join(parts) + "\n"


def best_of(key: str, raced: Sequence[Facts], rates: set[float]) -> float | None:
    """Return the rate that later stages take."""
    return best_rate(key if key in RACERS else "tdm", raced) if rates else None


def tuned(key: str, rate: float, raced: Sequence[Facts]) -> str:
    """Return the FD of seed 0 in 4 steps at a rate."""
    own = [r for r in raced if (r["key"], r["rate"], r["seed"]) == (key, rate, 0) and r["count"] in (0, 4)]
    return f"{own[0]['measured']['4']['fd']:.2f}" if own else "-"


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
    print(f"the classifier is right about {accuracy(net, test):.1f} % of the test set", flush=True)
    data = embed(teacher, list(FASHION), None, fingerprint(teacher.module))
    return Arena(teacher, measures(net, test), data, states_of(teacher, train), a)


def accuracy(net: Any, test: Clothes) -> float:
    """Return the classifier's share of right answers in percent."""
    with torch.no_grad():
        return 100 * float((net(test.images).argmax(1) == test.labels).double().mean())


def main() -> None:
    """Make, race and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--only", nargs="*", choices=STAGES, default=list(STAGES), help="stages to run")
    parser.add_argument("--keys", nargs="*", default=[*RACERS, *OTHERS], help="methods to run")
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of a training")
    parser.add_argument("--until", type=float, default=float("inf"), help="begin nothing after so many seconds")
    parser.add_argument("--out", type=Path, default=Path("runs/arena"), help="where runs are kept")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    ends = time.monotonic() + a.until
    torch.set_num_threads(1)
    kept = read_record(a.to / "arena.json")
    rows = [] if kept is None else list(kept.rows)
    common: Facts = {"seconds": a.seconds, "pace": {}} if kept is None else dict(kept.common)
    if common["seconds"] != a.seconds:
        raise SystemExit(f"{a.to / 'arena.json'} is of {common['seconds']:g} seconds: give --to another folder")
    if (arena := make(a, ends)) is None:
        return
    if {*a.only} - {"teacher"}:
        several = [(key, count) for key, r in everyone().items() for count in ((0,) if "steps" in r.method else r.counts)]
        paced(arena, [one for one in several if one[0] in a.keys], common["pace"])
        write(rows, common, a)
    for stage in a.only:
        todo = teacher_rows(arena, rows) if stage == "teacher" else raced(arena, stage, rows, common["pace"])
        for row in todo:
            rows.append(json.loads(json.dumps(row)))
            write(rows, common, a)
            write_json(a.out / "paces.json", common["pace"])
            print(told(row), flush=True)
            if time.monotonic() > ends:
                return
    write(rows, common, a)


def raced(arena: Arena, stage: str, rows: Sequence[Facts], paces: dict[str, float]) -> Iterator[Facts]:
    """Run the trainings of a stage that are not in the table."""
    for cell in cells(stage, rows):
        if cell.key in arena.a.keys and not any(
            (r["key"], r["count"], r["rate"], r["seed"]) == (cell.key, cell.count, cell.rate, cell.seed)
            for r in rows
            if r["stage"] == "race"
        ):
            yield race(arena, cell, paces)


def told(row: Facts) -> str:
    """Return a row in a line."""
    about_it = {k: v for k, v in row.items() if k not in ("measured", "hardware", "versions", "method", "stage")}
    return f"{about_it} {json.dumps(row['measured'])}"


if __name__ == "__main__":
    main()
