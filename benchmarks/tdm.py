"""Compare TDM with its variants, its ablations and its rivals on the bundled teacher.

    python benchmarks/tdm.py                      # trains what is missing; writes benchmarks/tdm.md, .json and .png
    python benchmarks/tdm.py --only tdm-4 dmd2    # some variants; --seeds 0: one seed; --iterations N: another budget
    python benchmarks/tdm.py --only dmd2 --rate 2 --out runs/tdm-2 --to runs/tdm-2    # other rates, a table of its own

The analogue of the paper's tables 1, 3, 5, 6, 7, 8 and figures 8, 9, 10. Every variant (`tdm_variants.py`) is the same
recipe with a few settings changed, trained for the same iterations and measured on the same prompts and seeds. FD is
FD-efflite0, lower is better. Retrieval top-1 is in percent, diversity relative to the teacher's. `training NFE` are the
network calls of one iteration for each image of its batch, forward, of all roles. Minutes are of training alone, on a
CPU those of the processor; where several machines trained, those of the machine of TDM's last seed. Numbers are
mean ± deviation over seeds. Students take no guidance. `claim` is the paper's, on SD-v1.5 (HPS, higher is better).
`here` says whether the claim's ordering holds in FD.

A run that was stopped continues. What `benchmarks/tdm.json` holds with the same settings is not run again (--to another
folder starts an empty table). Several processes, each with its own --only, fill one table. Lost modes (fig. 11) are
counted in `ring.py`, where they are known. Supervised fine-tuning before TDM is in `finetunes.py`.
"""

import argparse
import json
import shlex
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from torch import Tensor, nn

from fewstep.api import load_teacher, sample
from fewstep.atomic import write_json
from fewstep.backbones.base import Backbone
from fewstep.backbones.load import fingerprint, quiet
from fewstep.core.guidance import Guidance
from fewstep.data.images import ImageData, encode_images_of
from fewstep.data.prompts import Embeddings, embed, read_prompts
from fewstep.data.teacher_images import teacher_images
from fewstep.evaluation.protocols import Row, evaluate, protocol_named
from fewstep.roles.roles import Roles
from fewstep.runs.init import initialize, roles_for
from fewstep.runs.recipe import DistillRecipe, validate
from fewstep.student.student import Origin, Student
from fewstep.training.loop import Step, distill
from records import (
    CLOCK,
    Facts,
    Record,
    about,
    machine,
    markdown,
    new_record,
    origin,
    provenance,
    read_record,
    spread,
    wrapped,
    write_record,
)
from tdm_variants import BASE, VARIANTS, Draw, Relation, Settings, Variant, recipe_value

NOISE = 0.15  # of FD, between draws and trainings of one student
RIVALS = ("dmd2", "dmd2-5", "dmd2-gan", "sid", "lcm", "lcm-full", "progressive")
RACE = """The paper's fig. 9 in numbers, with curves over as many names as the rows, is in [race/tdm.md](race/tdm.md):
`python benchmarks/tdm.py --only tdm-4 dmd2 --curve emoji-medium --every 26 --out runs/race --to benchmarks/race`."""

Found = dict[tuple[str, int], Facts]  # (variant, seed) -> row


class Calls:
    """A counter of the images that networks are called for in training."""

    def __init__(self, roles: Roles, before: float) -> None:
        self.images, self.on = before, True
        for module in {id(m): m for m in (roles.backbone.module, *roles.networks.values())}.values():
            module.register_forward_pre_hook(self.add)

    def add(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Count one call."""
        self.images += len(inputs[0]) if self.on else 0


def train(variant: Variant, seed: int, teacher: Backbone, a: argparse.Namespace) -> None:
    """Train and measure one student, unless it is finished."""
    run = a.out / f"{variant.key}-{seed}"
    continued = any(
        v.init_from == variant.key and (v.key, seed) not in finished(a, of=v) for v in VARIANTS if v.key in a.only
    )
    # The table may outlive a student that another variant continues.
    if (variant.key, seed) in finished(a, of=variant) and ((run / "final").exists() or not continued):
        return
    recipe = validate(recipe_value(variant, seed, a.iterations, a.rate), DistillRecipe, variant.key)
    method, identity = recipe.method, fingerprint(teacher.module, *teacher.encoders)
    prompts = embed(teacher, read_prompts(str(a.prompts)), a.out / "embeddings", identity)
    real = real_images(variant, recipe, seed, teacher, prompts, identity, a)
    roles = roles_for(teacher, method, recipe.roles, recipe.train.seed)
    if variant.init_from:
        initialize(roles, a.out / f"{variant.init_from}-{seed}" / "final")
    file = run / "curve.json"
    curve: list[dict[str, float]] = json.loads(file.read_text()) if file.exists() else []
    seconds = curve[-1]["seconds"] if curve else 0.0
    calls, step, since = Calls(roles, curve[-1]["calls"] if curve else 0.0), None, CLOCK()
    for step in distill(roles, method, prompts, recipe.train, run, real):
        if curve and step.iteration <= curve[-1]["iteration"]:
            calls.images, since = curve[-1]["calls"], CLOCK()
            continue
        seconds, since = seconds + CLOCK() - since, CLOCK()
        if step.iteration % a.every == 0 or step.iteration in (a.every // 2, recipe.train.iterations):
            calls.on = False
            row = measure(step, teacher, [Draw(method.counts[0])], a.curve, a)[0]
            calls.on, since = True, CLOCK()
            point = {"iteration": step.iteration, "seconds": seconds, "calls": calls.images}
            curve.append(point | {k: row[k] for k in ("fd_real", "diversity_ratio")})
            write_json(file, curve)
            seen = f"FD {row['fd_real']:.2f}  diversity {row['diversity_ratio']:.2f}"
            print(f"{run.name} {step.iteration:4d} {seconds:6.0f} s  {seen}", flush=True)
    if step is None:  # training was finished, measuring was not
        step = Step(recipe.train.iterations, {}, 0.0, roles, method)
    rows = measure(step, teacher, variant.draws, a.protocol, a)
    with roles.averaged():
        made = Origin("emoji", "", recipe.train.iterations, seconds, variant.key)
        Student.of(roles, method, made).write(run / "final")
    result = {
        "key": variant.key,
        "seed": seed,
        "seconds": seconds,
        "iterations": recipe.train.iterations,
        "calls": curve[-1]["calls"] / (recipe.train.iterations * recipe.train.batch),
        "curve": curve,
        "rows": rows,
        "recipe": settled(variant, a),
        **origin(),
    }
    write_json(run / "result.json", {"settings": shared(a), "row": result})


def real_images(
    variant: Variant,
    recipe: DistillRecipe,
    seed: int,
    teacher: Backbone,
    prompts: Embeddings,
    identity: str,
    a: argparse.Namespace,
) -> ImageData | None:
    """Return the images that a variant trains on, the teacher's own by default; None if it needs none."""
    if recipe.data is None:
        return None
    if variant.key == "gan" and a.images:
        return encode_images_of(teacher, a.images, a.out / "embeddings", identity)
    count, steps, guidance = recipe.data.count, recipe.data.steps, recipe.method.guidance
    return teacher_images(teacher, prompts, count, steps, guidance, a.out / "embeddings", seed)


def shared(a: argparse.Namespace) -> Settings:
    """Return what results must share to stand in one table."""
    settings = {key: getattr(a, key) for key in ("iterations", "protocol", "curve", "guidance", "rate", "images")}
    return settings | {"prompts": a.prompts.name}


def settled(variant: Variant, a: argparse.Namespace) -> Settings:
    """Return a variant's recipe without the seed, as JSON keeps it."""
    value = recipe_value(variant, 0, a.iterations, a.rate)
    value["train"] = {k: v for k, v in value["train"].items() if k != "seed"}
    kept: Settings = json.loads(json.dumps(value))
    return kept


def finished(a: argparse.Namespace, of: Variant | None = None) -> Found:
    """Return the rows of the table and of this folder's runs.

    `of` a variant: only rows with the settings that the variant has today.
    """
    table = read_record(a.to / "tdm.json")
    if table is not None and table.rows and table.common["settings"] != shared(a):
        raise SystemExit(f"{a.to / 'tdm.json'} has other settings than {shared(a)}: give --to another folder")
    rows = [] if table is None else table.rows
    for path in sorted(a.out.glob("*-[0-9]/result.json")):
        result = json.loads(path.read_text())
        rows += [result["row"]] * (result["settings"] == shared(a))
    return {
        (r["key"], r["seed"]): r for r in rows if of is None or (r["key"] == of.key and r["recipe"] == settled(of, a))
    }


def measure(model: Any, teacher: Backbone, draws: Sequence[Draw], protocol: str, a: argparse.Namespace) -> list[Facts]:
    """Return the rows of these draws; the teacher's own images are measured once for all variants."""
    best = teacher_row(teacher, 50, a.guidance)
    rows = [best, *(Row("student", d.steps, Guidance(), d.steps, _sampler(model, d)) for d in draws)]
    found = evaluate(rows, protocol_named(protocol), None, shipped=a.out / "teacher")["rows"]
    return [{**row, "draw": d.title} for row, d in zip(found[1:], draws, strict=True)]


def _sampler(model: Any, d: Draw, guidance: float = 1.0) -> Any:
    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        asked, own = list(prompts), list(seeds)
        return sample(model, asked, own, guidance=guidance, steps=d.steps, solver=d.solver, condition=d.condition)

    return draw


def teacher_row(teacher: Backbone, steps: int, guidance: float) -> Row:
    """Return a row of the teacher to evaluate."""
    nfe = steps * (2 if guidance != 1 else 1)
    return Row("teacher", steps, Guidance(scale=guidance), nfe, _sampler(teacher, Draw(steps), guidance))


def teacher_rows(teacher: Backbone, a: argparse.Namespace) -> list[Facts]:
    """Measure the teacher at its best and at the students' costs, under both protocols."""
    found = []
    for protocol in (a.curve, a.protocol):
        counts = ((50, a.guidance), (4, a.guidance), (4, 1.0), (2, 1.0), (1, 1.0))
        rows = [teacher_row(teacher, steps, guidance) for steps, guidance in counts]
        found = evaluate(rows, protocol_named(protocol), a.out / "teacher")["rows"]
    return found


def verdict(relation: Relation, own: Mapping[int, float], other: Mapping[int, float]) -> str:
    """Say whether one FD stands to another as claimed, and by how much.

    The difference is a mean over the seeds that both have, which start with the same noise and batches. A
    difference up to `NOISE` counts as none, and so does one up to two standard errors.
    """
    gaps = [own[seed] - other[seed] for seed in own if seed in other]
    gap, error = statistics.mean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    seen = "level" if abs(gap) <= max(NOISE, 2 * error) else "worse" if gap > 0 else "better"
    return f"{'yes' if seen == relation else 'no'}: {seen}, {gap:+.2f}"


def by_variant(rows: Sequence[Facts]) -> dict[str, list[Facts]]:
    """Return the rows of each variant, seed by seed."""
    return {v.key: sorted((r for r in rows if r["key"] == v.key), key=lambda r: int(r["seed"])) for v in VARIANTS}


def lines_of(rows: Sequence[Facts]) -> list[list[object]]:
    """Return a line for each variant and each of its draws."""
    results = by_variant(rows)
    timed = of_one_machine(results)
    measured = {
        (v.key, d): {r["seed"]: r["rows"][i]["fd_real"] for r in results[v.key]}
        for v in VARIANTS
        for i, d in enumerate(v.draws)
        if results[v.key]
    }
    own_way = {(v.key, v.sampled(d)): measured[v.key, d] for v in VARIANTS for d in v.draws if results[v.key]}
    lines: list[list[object]] = []
    for v in (v for v in VARIANTS if results[v.key]):
        for i, d in enumerate(v.draws):
            here = "-"
            # A named solver stands next to the same solver, a student's own one next to the other student's own.
            other = measured.get((v.against, d)) or own_way.get((v.against, v.sampled(d)))
            if v.expect and other and other.keys() & measured[v.key, d].keys():
                claim = v.expect[min(i, len(v.expect) - 1)]
                here = f"{verdict(claim, measured[v.key, d], other)} next to {v.against}"
            own = [r["rows"][i] for r in results[v.key]]
            cells = [
                *(spread([row[k] for row in own]) for k in ("fd_real", "fd_teacher")),
                spread([100 * row["retrieval_top1"] for row in own]),
                spread([row["diversity_ratio"] for row in own]),
                spread([r["seconds"] / 60 for r in timed[v.key] or results[v.key]]),
                f"{results[v.key][0]['calls']:.1f}",
                len(own),
            ]
            lines.append([v.label, f"`{v.key}`", d.title, d.steps, *cells, v.table, v.claim, here])
    return lines


def page(record: Record) -> str:
    """Return the page of a record."""
    settings = record.common["settings"]
    teachers: list[list[object]] = [
        [
            f"teacher, {Draw(t['steps']).title}, guidance {t['guidance']:g}",
            *("", "", t["nfe"], f"{t['fd_real']:.2f}", f"{t['fd_teacher'] or 0:.2f}"),
            *(f"{100 * t['retrieval_top1']:.2f}", f"{t['diversity_ratio'] or 1:.2f}"),
            *[""] * 6,
        ]
        for t in record.common["teacher"]
    ]
    head = ["model", "key", "sampled in", "NFE", "FD to real", "FD to teacher", "retrieval", "diversity", "minutes"]
    head += ["training NFE", "seeds", "table", "claim", "here"]
    images = "real images" if settings["images"] else "the teacher's own images, whose minutes are not counted"
    # Over fewer names than the rows have, the noise is wider than the difference between TDM and DMD2.
    same = settings["curve"] == settings["protocol"]
    said = "\n".join(f"- {line}" for line in race(record.rows)) if same else RACE
    what = f"""Differences up to {NOISE:g} count as none, and up to two standard errors of the difference seed by seed.
        {rates(record)} LCM, progressive distillation and the adversarial term start from {images}.
        {other_machines(record)}"""
    return f"""# TDM, its variants and its rivals on the bundled teacher

{wrapped(f"{provenance(record)}. Protocol `{settings['protocol']}`.")}

{about(__doc__)}

{wrapped(what)}

{markdown(head, [*teachers, *lines_of(record.rows)])}

{said}

![FD to real over training time](tdm.png)
"""


def other_machines(record: Record) -> str:
    """Say which students another machine trained than TDM's last one, if any."""
    kept = {id(r) for own in of_one_machine(by_variant(record.rows)).values() for r in own}
    found: dict[str, list[str]] = {}
    for r in record.rows:
        if id(r) not in kept:
            found.setdefault(machine(r["hardware"]), []).append(f"{r['key']}-{r['seed']}")
    return " ".join(f"Trained on {name}: {', '.join(sorted(students))}." for name, students in found.items())


def command_of(a: argparse.Namespace, rows: Sequence[Facts]) -> str:
    """Return the command that makes a table of these rows.

    It names the iterations, the seeds, and every option that is not at its default.
    """
    said, default = ["python", "benchmarks/tdm.py"], vars(options().parse_args([]))
    variants, seeds = [key for key, own in by_variant(rows).items() if own], sorted({r["seed"] for r in rows})
    for option, value in (vars(a) | {"seeds": seeds, "only": variants}).items():
        if option in ("iterations", "seeds") or value != default[option]:
            said += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(said)


def rates(record: Record) -> str:
    """Say whose learning rates are not the base's."""
    present = {r["key"] for r in record.rows}
    tuned = [v for v in VARIANTS if v.key in present and v.rate != 1]
    default = "Learning rates are the defaults of `tdm_variants.py`"
    if not tuned:
        return f"{default}."
    times = (
        f"times {rate:g} for {', '.join(f'`{v.key}`' for v in tuned if v.rate == rate)}"
        for rate in sorted({v.rate for v in tuned})
    )
    return f"{default}, {', '.join(times)}: what gained more than noise with one seed (docs/log.md)."


def of_one_machine(results: dict[str, list[Facts]]) -> dict[str, list[Facts]]:
    """Return the rows whose minutes compare with TDM's: those of the machine of its last row."""
    on = [r["hardware"] for r in results["tdm-4"][-1:]]
    return {k: [r for r in own if not on or r["hardware"] in on] for k, own in results.items()}


def race(rows: Sequence[Facts]) -> list[str]:
    """Say when TDM is as good as each rival at its best, as a share of the rival's time, and how it ends.

    This is the paper's fig. 9 in numbers: once to the letter, and once where FD within the noise of the best is as
    good, for both. The latter is earlier for a method that improves slowly.
    """
    found = {(r["key"], r["seed"]): r for r in rows}
    said = []
    for variant in (v for v in VARIANTS if v.key in RIVALS):
        both = [
            (own, rival)
            for seed in range(10)
            if (own := found.get(("tdm-4", seed)))
            and (rival := found.get((variant.key, seed)))
            and own["hardware"] == rival["hardware"]
        ]
        if both:
            exact, about_it = (
                _when([_share(own["curve"], rival["curve"], slack) for own, rival in both]) for slack in (0.0, NOISE)
            )
            ends = [[_end(r) for r in pair] for pair in both]
            lower = spread([100 * (1 - own / rival) for own, rival in ends])
            said.append(
                f"{variant.label}: TDM has its best FD {exact}, to within {NOISE:g} of it (both) {about_it}, and ends "
                f"{lower} % lower (the paper, of DMD2: 4 % of the time, 20 % lower)."
            )
    return said


def _end(row: Facts) -> float:
    return next(float(r["fd_real"]) for r in row["rows"] if r["draw"] == Draw(4).title)


def _share(own: Sequence[Mapping[str, float]], rival: Sequence[Mapping[str, float]], slack: float) -> float:
    """Return the percent of the rival's time to its best FD that the other takes; `slack` above it is as good."""
    level = min(p["fd_real"] for p in rival) + slack
    reached, needed = (
        next((p["seconds"] for p in curve if p["fd_real"] <= level), float("inf")) for curve in (own, rival)
    )
    return 100 * reached / needed


def _when(shares: Sequence[float]) -> str:
    return f"in {spread(shares)} % of the time" if max(shares) < float("inf") else "never"


def plot(record: Record, path: Path) -> None:
    """Draw FD to real over minutes of training, a line for each seed.

    Rivals are on the left (the paper's fig. 9), variants and ablations of TDM on the right; all of one machine.
    """
    results = of_one_machine(by_variant(record.rows))
    figure, panels = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    for axes, rivals in zip(panels, (True, False), strict=True):
        shown = [
            v
            for v in VARIANTS
            if results[v.key] and v.draws != (Draw(1),) and (v.key == "tdm-4" or (v.key in RIVALS) == rivals)
        ]
        for i, variant in enumerate(shown):
            tdm = variant.key == "tdm-4"
            for j, result in enumerate(results[variant.key]):
                axes.plot(
                    [p["seconds"] / 60 for p in result["curve"]],
                    [p["fd_real"] for p in result["curve"]],
                    color="black" if tdm else plt.get_cmap("tab20")(i % 20),
                    lw=2 if tdm else 1.2,
                    label=variant.label if j == 0 else None,
                )
        axes.set(xlabel="minutes of training", title="rivals" if rivals else "variants and ablations")
        if shown:
            axes.legend(fontsize=7, frameon=False)
    names = protocol_named(record.common["settings"]["curve"]).names
    panels[0].set_ylabel(f"FD-efflite0 to real, {names} names")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(teachers: Sequence[Facts], a: argparse.Namespace) -> None:
    """Write the table and the plot of what is finished."""
    rows = [r for own in by_variant(list(finished(a).values())).values() for r in own]
    common = {"settings": shared(a), "teacher": list(teachers)}
    record = new_record("tdm", command_of(a, rows), rows, sorted({r["seed"] for r in rows}), common)
    write_record(record, page(record), a.to)
    plot(record, a.to / "tdm.png")


def options() -> argparse.ArgumentParser:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", choices=[v.key for v in VARIANTS], default=[v.key for v in VARIANTS], metavar="VARIANT"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=BASE["train"]["iterations"])
    parser.add_argument(
        "--rate", type=float, default=1.0, help="times every learning rate; needs other folders for --out and --to"
    )
    parser.add_argument(
        "--every", type=int, default=52, help="iterations between points of the curve; one more at half of the first"
    )
    parser.add_argument("--protocol", default="emoji-medium")
    parser.add_argument("--curve", default="emoji-quick", help="protocol of the curve")
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--images", help="folder of real images for the adversarial term; by default the teacher's own")
    parser.add_argument("--prompts", type=Path, default=Path("src/fewstep/zoo/emoji/prompts.txt"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-tdm"), help="where runs are kept")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    return parser


def main() -> None:
    """Train, measure and write the table."""
    a = options().parse_args()
    quiet()
    teacher = load_teacher("emoji")
    teachers = teacher_rows(teacher, a)
    for seed in a.seeds:
        for variant in VARIANTS:
            if variant.key in a.only:
                began = time.monotonic()
                train(variant, seed, teacher, a)
                write(teachers, a)
                print(f"{variant.key}-{seed} done in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
