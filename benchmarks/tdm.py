"""TDM with every variant, ablation and rival of the paper on the bundled teacher: the analogue of tables 1, 3, 5, 6, 7, 8 and figures 8, 9, 10.

    python benchmarks/tdm.py                       # trains what is missing, then writes benchmarks/tdm.md, .json and .png
    python benchmarks/tdm.py --only tdm-4 dmd2     # some variants; --seeds 0 for one seed; --iterations N for another budget
    python benchmarks/tdm.py --only dmd2 --rate 2 --out runs/tdm-2 --to runs/tdm-2    # tuning: other learning rates, a table of its own

Every variant (`tdm_variants.py`) is the same recipe with a few settings changed, trained for the same iterations, and measured on the same prompts and
seeds. A run that is stopped goes on where it was, and what `benchmarks/tdm.json` holds with the same settings is not run again (`--to` another folder begins
anew); several processes, each with its `--only`, fill one table. `seconds` is training alone, of the processor where there is no GPU; evaluation along the way is not counted.
The modes that are lost (fig. 11) are counted where they are known, in `ring.py`; supervised fine-tuning before TDM is in `finetunes.py`.
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
from fewstep.data.images import encode_images_of
from fewstep.data.prompts import embed, read_prompts
from fewstep.data.teacher_images import teacher_images
from fewstep.evaluation.protocols import Row, evaluate, protocol_named
from fewstep.roles.roles import Roles
from fewstep.runs.init import initialize, roles_for
from fewstep.runs.recipe import DistillRecipe, validate
from fewstep.student.student import Origin, Student
from fewstep.training.loop import Step, distill
from origin import CLOCK, commit, hardware
from tables import spread
from tdm_variants import BASE, VARIANTS, Draw, Relation, Settings, Variant, recipe_value

NOISE = 0.15  # of FD, between draws and trainings of one student; with several seeds two standard errors, where that is more
RACE = "The paper's fig. 9 in numbers, with curves over as many names as the rows: [race/tdm.md](race/tdm.md) (`python benchmarks/tdm.py --only tdm-4 dmd2 --curve emoji-medium --every 26 --out runs/race --to benchmarks/race`)."
RIVALS = ("dmd2", "dmd2-5", "dmd2-gan", "sid", "lcm", "lcm-full", "progressive")


class Calls:
    """Counts pictures that the networks of `roles` are called for while they train."""

    def __init__(self, roles: Roles, before: float) -> None:
        self.pictures, self.on = before, True
        for module in {id(m): m for m in (roles.backbone.module, *roles.networks.values())}.values():
            module.register_forward_pre_hook(self.add)

    def add(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.pictures += len(inputs[0]) if self.on else 0


def train(variant: Variant, seed: int, teacher: Backbone, folder: Path, a: argparse.Namespace) -> None:
    """Train and measure one student; what is finished is left alone."""
    run, known = folder / f"{variant.key}-{seed}", finished(a, of=variant)
    begins = any(
        v.start == variant.key and f"{v.key}-{seed}" not in finished(a, of=v) for v in VARIANTS if v.key in a.only
    )
    if run.name in known and not (
        begins and not (run / "final").exists()
    ):  # the table may outlive the student that another begins as
        return
    recipe = validate(recipe_value(variant, seed, a.iterations, a.rate), DistillRecipe, variant.key)
    method, identity = recipe.method, fingerprint(teacher.module, *teacher.encoders)
    prompts = embed(teacher, read_prompts(str(a.prompts)), folder / "embeddings", identity)
    real = None
    if recipe.data is not None:
        own = a.pictures if variant.key == "gan" and a.pictures else None
        real = encode_images_of(teacher, own, folder / "embeddings", identity) if own else teacher_images(teacher, prompts, recipe.data.count, recipe.data.steps, method.guidance, folder / "embeddings", seed)  # fmt: skip
    roles = roles_for(teacher, method, recipe.roles, recipe.train.seed)
    if variant.start:
        initialize(roles, folder / f"{variant.start}-{seed}" / "final")
    curve: list[dict[str, float]] = (
        json.loads((run / "curve.json").read_text()) if (run / "curve.json").exists() else []
    )
    seconds = curve[-1]["seconds"] if curve else 0.0
    calls, step, since = Calls(roles, curve[-1]["calls"] if curve else 0.0), None, CLOCK()
    for step in distill(roles, method, prompts, recipe.train, run, real):
        if curve and step.iteration <= curve[-1]["iteration"]:
            calls.pictures, since = curve[-1]["calls"], CLOCK()
            continue
        seconds, since = seconds + CLOCK() - since, CLOCK()
        if step.iteration % a.every == 0 or step.iteration in (a.every // 2, recipe.train.iterations):
            calls.on = False
            row = measure(step, teacher, [Draw(method.counts[0])], a.curve, run, a)[0]
            calls.on, since = True, CLOCK()
            curve.append(
                {"iteration": step.iteration, "seconds": seconds, "calls": calls.pictures}
                | {k: row[k] for k in ("fd_real", "diversity_ratio")}
            )
            write_json(run / "curve.json", curve)
            print(
                f"{variant.key}-{seed} {step.iteration:4d} {seconds:6.0f} s  FD {row['fd_real']:.2f}  diversity {row['diversity_ratio']:.2f}",
                flush=True,
            )
    if step is None:  # everything was trained, not measured
        step = Step(recipe.train.iterations, {}, 0.0, roles, method)
    rows = measure(step, teacher, variant.draws, a.protocol, run, a)
    origin = Origin("emoji", "", recipe.train.iterations, seconds, variant.key)
    with roles.averaged():
        Student.of(roles, method, origin).write(run / "final")
    result = {
        "seconds": seconds,
        "iterations": recipe.train.iterations,
        "calls": curve[-1]["calls"] / (recipe.train.iterations * recipe.train.batch),
        "curve": curve,
        "rows": rows,
        "hardware": hardware(),
        "commit": commit(),
    }
    write_json(run / "result.json", result | {"asked": shared(a), "recipe": settled(variant, a)})


def shared(a: argparse.Namespace) -> Settings:
    """What results must share to stand in one table."""
    return {
        "iterations": a.iterations,
        "protocol": a.protocol,
        "curve": a.curve,
        "guidance": a.guidance,
        "rate": a.rate,
        "pictures": a.pictures,
        "prompts": a.prompts.name,
    }


def settled(variant: Variant, a: argparse.Namespace) -> Settings:
    """Its recipe without the seed, as it is kept."""
    value = recipe_value(variant, 0, a.iterations, a.rate)
    value["train"] = {k: v for k, v in value["train"].items() if k != "seed"}
    kept: Settings = json.loads(json.dumps(value))
    return kept


def finished(a: argparse.Namespace, of: Variant | None = None) -> dict[str, dict[str, Any]]:
    """variant-seed -> result: of this folder's runs, and of the table as it was; those `of` a variant with the settings that it has today."""
    table = a.to / "tdm.json"
    found = json.loads(table.read_text())["results"] if table.exists() else {}
    if any(result["asked"] != shared(a) for result in found.values()):
        raise SystemExit(f"{table} was made with other settings than {shared(a)}: give --to another folder")
    for path in a.out.glob("*-[0-9]/result.json"):
        result = json.loads(path.read_text())
        if result["asked"] == shared(a):
            found[path.parent.name] = result
    return {
        k: v
        for k, v in found.items()
        if of is None or (k.rsplit("-", 1)[0] == of.key and v["recipe"] == settled(of, a))
    }


def measure(
    model: Any, teacher: Backbone, draws: Sequence[Draw], protocol: str, run: Path, a: argparse.Namespace
) -> list[dict[str, Any]]:
    """Rows of these draws; the teacher's own pictures are measured once for all variants."""
    best = Row(
        "teacher",
        50,
        Guidance(scale=a.guidance),
        100,
        lambda p, s: sample(teacher, list(p), list(s), steps=50, guidance=a.guidance),
    )
    rows = [best, *(Row("student", d.steps, Guidance(), d.steps, _sampler(model, d)) for d in draws)]
    found = evaluate(rows, protocol_named(protocol), None, shipped=a.out / "teacher")["rows"]
    return [{**row, "draw": d.title} for row, d in zip(found[1:], draws, strict=True)]


def _sampler(model: Any, d: Draw, guidance: float = 1.0) -> Any:
    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return sample(
            model, list(prompts), list(seeds), steps=d.steps, guidance=guidance, solver=d.solver, condition=d.told
        )

    return draw


def teacher_rows(teacher: Backbone, a: argparse.Namespace) -> list[dict[str, Any]]:
    """The teacher at its best and at the students' costs, under both protocols."""
    found = []
    for protocol in (a.curve, a.protocol):
        rows = [
            Row("teacher", k, Guidance(scale=w), k * (2 if w != 1 else 1), _sampler(teacher, Draw(k), w))
            for k, w in ((50, a.guidance), (4, a.guidance), (4, 1.0), (2, 1.0), (1, 1.0))
        ]
        found = evaluate(rows, protocol_named(protocol), a.out / "teacher")["rows"]
    return found


def verdict(relation: Relation, own: Mapping[str, float], other: Mapping[str, float]) -> str:
    """Whether one FD stands to another as claimed, and by how much: the mean difference over the seeds that both have, which begin with the same noise and batches."""
    gaps = [own[seed] - other[seed] for seed in own if seed in other]
    gap, error = statistics.mean(gaps), statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else 0.0
    seen = "level" if abs(gap) <= max(NOISE, 2 * error) else "worse" if gap > 0 else "better"
    return f"{'yes' if seen == relation else 'no'}: {seen}, {gap:+.2f}"


def write(teachers: Sequence[dict[str, Any]], a: argparse.Namespace) -> None:
    """The table, the rows and the plot of whatever is finished."""
    found = finished(a)
    results = {v.key: [r for k, r in sorted(found.items()) if k.rsplit("-", 1)[0] == v.key] for v in VARIANTS}
    measured = [
        (
            v,
            d,
            {
                k.rsplit("-", 1)[1]: r["rows"][i]["fd_real"]
                for k, r in sorted(found.items())
                if k.rsplit("-", 1)[0] == v.key
            },
        )
        for v in VARIANTS
        if results[v.key]
        for i, d in enumerate(v.draws)
    ]
    fd = {(v.key, v.called(d)): values for v, d, values in measured} | {(v.key, d): values for v, d, values in measured}
    lines, timed = [], of_one_machine(results)
    for variant in (v for v in VARIANTS if results[v.key]):
        for i, d in enumerate(variant.draws):
            own = [r["rows"][i] for r in results[variant.key]]
            here = "-"
            # a student that is called its own way stands beside the other's own way; where a solver is named, beside the same solver
            other = fd.get((variant.against, d)) or fd.get((variant.against, variant.called(d)))
            if variant.expect and other and other.keys() & fd[variant.key, d].keys():
                here = f"{verdict(variant.expect[min(i, len(variant.expect) - 1)], fd[variant.key, d], other)} beside {variant.against}"
            cells = [str(d.steps), *(spread([row[k] for row in own]) for k in ("fd_real", "fd_teacher")), spread([100 * row["retrieval_top1"] for row in own]), spread([row["diversity_ratio"] for row in own]), spread([r["seconds"] / 60 for r in timed[variant.key] or results[variant.key]]), f"{results[variant.key][0]['calls']:.1f}"]  # fmt: skip
            lines.append(
                f"| {variant.label} | `{variant.key}` | {d.title} | {' | '.join(cells)} | {len(own)} | {variant.table} | {variant.claim} | {here} |"
            )
    command = command_of(a, [k for k, own in results.items() if own], sorted({k.rsplit("-", 1)[1] for k in found}))
    write_json(a.to / "tdm.json", {"results": found, "teacher": list(teachers), "command": command})
    shown = [
        f"| teacher, {Draw(t['steps']).title}, guidance {t['guidance']:g} | | | {t['nfe']} | {t['fd_real']:.2f} | {t['fd_teacher'] or 0:.2f} | {100 * t['retrieval_top1']:.2f} | {t['diversity_ratio'] or 1:.2f} | | | | | | |"
        for t in teachers
    ]
    commits, machines = (sorted({r[k] for r in found.values()}) for k in ("commit", "hardware"))
    if len(machines) > 1:  # minutes of one are not those of another
        machines = [f"{m} ({', '.join(k for k, r in sorted(found.items()) if r['hardware'] == m)})" for m in machines]
    # Over fewer names than the rows have, the noise is wider than what lies between TDM and DMD2.
    said = chr(10).join(f"- {line}" for line in race(found)) if a.curve == a.protocol else RACE
    text = f"""# TDM, its variants and its rivals on the bundled teacher

`{command}`, {"; ".join(machines)}, commit {", ".join(commits)}, {time.strftime("%Y-%m-%d")}. Protocol `{a.protocol}`; FD is FD-efflite0, lower is better; retrieval top-1 in
percent; diversity relative to the teacher's. `calls` are the network's for one picture, `training calls` those of one iteration for each picture of its batch, forward, of whatever role. Minutes are of training, on a CPU those of the processor, of the machine that trained TDM's last seed where it trained others. Mean ± deviation over seeds. Students take no guidance. {rates(results)} `claim` is the paper's, on SD-v1.5 (HPS, higher is better); `here` says whether its ordering holds in FD, where differences up to
{NOISE:g} count as none (and up to two standard errors of the difference seed by seed, with several). LCM, progressive distillation and the adversarial term start from {"real pictures" if a.pictures else "the teacher's own pictures, which take minutes that are not among theirs"}.

| model | key | called with | calls | FD to real | FD to teacher | retrieval | diversity | minutes | training calls | seeds | table | claim | here |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join([*shown, *lines])}

{said}

![FD to real over training time](tdm.png)
"""
    (a.to / "tdm.md").write_text(text)
    plot(results, a.to / "tdm.png", a.curve)


def command_of(a: argparse.Namespace, variants: Sequence[str], seeds: Sequence[str]) -> str:
    """The command that makes a table of these: how long, which seeds, and every option that has another value than its default."""
    said = ["python", "benchmarks/tdm.py"]
    default = vars(options().parse_args([]))
    for option, value in (vars(a) | {"seeds": [int(seed) for seed in seeds], "only": list(variants)}).items():
        if option in ("iterations", "seeds") or value != default[option]:
            said += [f"--{option}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(said)


def rates(results: Mapping[str, list[dict[str, Any]]]) -> str:
    """Whose learning rates are other than the base's, and how it was found."""
    default, tuned = (
        "Learning rates are the defaults of `tdm_variants.py`",
        [v for v in VARIANTS if results[v.key] and v.rate != 1],
    )
    if not tuned:
        return f"{default}."
    times = (
        f"times {rate:g} for {', '.join(f'`{v.key}`' for v in tuned if v.rate == rate)}"
        for rate in sorted({v.rate for v in tuned})
    )
    return f"{default}, {', '.join(times)}: what brought more than noise with one seed (docs/log.md)."


def of_one_machine(results: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Those whose minutes stand beside TDM's: of the machine of its last result."""
    on = {r["hardware"] for r in results["tdm-4"][-1:]}
    return {k: [r for r in of if not on or r["hardware"] in on] for k, of in results.items()}


def race(found: dict[str, dict[str, Any]]) -> list[str]:
    """The paper's fig. 9 in numbers: when TDM is as good as each rival's best, as a share of the rival's time to it, and how much lower it ends.

    Once to the letter, and once where no further above the best than the noise is as good, for both: whoever improves slowly is there sooner.
    """
    said = []
    for variant in (v for v in VARIANTS if v.key in RIVALS):
        both = [
            (own, rival)
            for seed in "0123456789"
            if (own := found.get(f"tdm-4-{seed}"))
            and (rival := found.get(f"{variant.key}-{seed}"))
            and own["hardware"] == rival["hardware"]  # a race is run on one track
        ]
        if both:
            to_the_letter, about = (
                [_share(own["curve"], rival["curve"], slack) for own, rival in both] for slack in (0.0, NOISE)
            )
            ends = [
                [next(row["fd_real"] for row in r["rows"] if row["draw"] == Draw(4).title) for r in pair]
                for pair in both
            ]
            lower = spread([100 * (1 - own / rival) for own, rival in ends])
            said.append(
                f"{variant.label}: TDM has its best FD {_when(to_the_letter)}, to within {NOISE:g} of it (both) {_when(about)}, and ends {lower} % lower (the paper, of DMD2: 4 % of the time, 20 % lower)."
            )
    return said


def _share(own: Sequence[Mapping[str, float]], rival: Sequence[Mapping[str, float]], slack: float) -> float:
    """Percent of the rival's time to its best FD that the other takes to it; `slack` above it is as good."""
    level = min(p["fd_real"] for p in rival) + slack
    reached, needed = (
        next((p["seconds"] for p in curve if p["fd_real"] <= level), float("inf")) for curve in (own, rival)
    )
    return 100 * reached / needed


def _when(shares: Sequence[float]) -> str:
    return f"in {spread(shares)} % of the time" if max(shares) < float("inf") else "never"


def plot(results: dict[str, list[dict[str, Any]]], path: Path, curve: str) -> None:
    """FD to real over minutes of training, a line a seed: rivals (the paper's fig. 9), then TDM's variants and ablations. Of one machine, TDM's last one."""
    results = of_one_machine(results)
    figure, panels = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    for axes, rivals in zip(panels, (True, False), strict=True):
        shown = [
            v
            for v in VARIANTS
            if results[v.key] and v.draws != (Draw(1),) and (v.key == "tdm-4" or (v.key in RIVALS) == rivals)
        ]
        for i, variant in enumerate(shown):
            for j, result in enumerate(results[variant.key]):
                axes.plot(
                    [p["seconds"] / 60 for p in result["curve"]],
                    [p["fd_real"] for p in result["curve"]],
                    color="black" if variant.key == "tdm-4" else plt.get_cmap("tab20")(i % 20),
                    lw=2 if variant.key == "tdm-4" else 1.2,
                    label=variant.label if j == 0 else None,
                )
        axes.set(xlabel="minutes of training", title="rivals" if rivals else "variants and ablations")
        if shown:
            axes.legend(fontsize=7, frameon=False)
    panels[0].set_ylabel(f"FD-efflite0 to real, {protocol_named(curve).names} names")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", choices=[v.key for v in VARIANTS], default=[v.key for v in VARIANTS], metavar="VARIANT"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=BASE["train"]["iterations"])
    parser.add_argument(
        "--rate",
        type=float,
        default=1.0,
        help="times every learning rate that the variants have: the table of another goes to another folder (--out and --to)",
    )
    parser.add_argument(
        "--every",
        type=int,
        default=52,
        help="iterations between two points of the curve, which has one at half of the first as well",
    )
    parser.add_argument("--protocol", default="emoji-medium")
    parser.add_argument("--curve", default="emoji-quick", help="protocol of the curve")
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument(
        "--pictures", help="folder of real pictures for the adversarial term; the teacher's own if not given"
    )
    parser.add_argument("--prompts", type=Path, default=Path("src/fewstep/zoo/emoji/prompts.txt"))
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench-tdm"), help="where students and measurements are kept"
    )
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    return parser


def main() -> None:
    a = options().parse_args()
    quiet()
    a.to.mkdir(parents=True, exist_ok=True)
    teacher = load_teacher("emoji")
    teachers = teacher_rows(teacher, a)
    for seed in a.seeds:
        for variant in VARIANTS:
            if variant.key in a.only:
                began = time.monotonic()
                train(variant, seed, teacher, a.out, a)
                write(teachers, a)
                print(f"{variant.key}-{seed} done in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
