"""TDM with every variant, ablation and rival of the paper on the bundled teacher: the analogue of tables 1, 3, 5, 6, 7, 8 and figures 8, 9.

    python benchmarks/tdm.py                       # trains what is missing, then writes benchmarks/tdm.md, .json and .png
    python benchmarks/tdm.py --only tdm-4 dmd2     # some variants; --seeds 0 for one seed; --iterations N for another budget

Every variant is the same recipe with a few settings changed, trained for the same iterations, and measured on the same prompts and
seeds. A run that is stopped goes on where it was, and what `benchmarks/tdm.json` holds is not run again (`--to` another folder begins anew);
several processes, each with its `--only`, fill one table. `seconds` is training alone; evaluation along the way is not counted.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
from torch import Tensor

from fewstep.api import load_teacher, sample, start_from
from fewstep.atomic import write_json
from fewstep.backbones.base import Backbone
from fewstep.backbones.load import fingerprint, quiet
from fewstep.cli.distill import roles_of
from fewstep.cli.ending import write_student
from fewstep.cli.recipe import DistillRecipe, validate
from fewstep.evaluation.protocols import Row, evaluate, protocol_named
from fewstep.export.card import StudentCard
from fewstep.training.loop import Step, distill
from fewstep.training.pictures import encode_pictures
from fewstep.training.pool import teacher_pictures
from fewstep.training.prompts import embed, read_prompts
from origin import commit, hardware

Settings = dict[str, Any]
Relation = Literal["worse", "better", "level"]
NOISE = 0.15  # of FD, between draws and trainings of one student; with several seeds two standard errors, where that is more

BASE: Settings = {
    "kind": "distill",
    "name": "bench",
    "teacher": "emoji",
    "method": {"name": "tdm", "steps": 4, "guidance": 4.5, "loss": "huber", "fake_weight": "v", "warmup": 40},
    "roles": {"share": True, "rank": 32},
    "train": {"iterations": 260, "batch": 16, "lr": 1.0e-4, "fake_lr": 1.0e-3, "ema": 0.97, "checkpoint_every": 100},
}
POOL: Settings = {"data": {"source": "teacher", "count": 1024, "steps": 25}}
IMITATION: Settings = {"steps": 4, "guidance": 4.5}


@dataclass(frozen=True)
class Draw:
    """One way of calling a student: steps, solver (None: its own), and the step count that it is told (None: the one it takes)."""

    steps: int = 4
    solver: str | None = None
    told: int | None = None

    @property
    def title(self) -> str:
        parts = [f"{self.steps} step{'s' if self.steps > 1 else ''}"]
        return ", ".join(
            parts + [f"tested with {self.solver}"] * (self.solver is not None) + [f"told {self.told}"] * (self.told is not None)
        )


@dataclass(frozen=True)
class Variant:
    """One student: what is changed in the base recipe, how it is called, and the paper's claim about it.

    `expect` is that claim as an ordering of FD, for each of its draws or one for all, beside the variant `against`, called the same way.
    """

    key: str
    label: str
    table: str
    claim: str
    method: Settings = field(default_factory=dict)  # replaces the base's where it names another method
    other: Settings = field(default_factory=dict)
    draws: tuple[Draw, ...] = (Draw(),)
    start: str = ""  # the key of the variant whose student it begins as
    expect: tuple[Relation, ...] = ()
    against: str = ""

    def called(self, draw: Draw) -> tuple[int, str, int | None]:
        """What tells this way of calling it from others: (steps, solver, count it is told)."""
        return draw.steps, draw.solver or str(validate(recipe_value(self, 0, 1), DistillRecipe, self.key).method.solver), draw.told


FEW = (Draw(1), Draw(2), Draw(4))
SOLVERS = (Draw(4, "ddim"), Draw(4, "dpmpp"), Draw(4, "renoise"))
VARIANTS = (
    Variant("tdm-4", "TDM, 4 steps", "5, 6", "TDM-4step: 31.35 HPS; sampled in 1, 2 steps: 20.81, 29.08", draws=(*FEW, *SOLVERS[1:])),
    Variant("unify", "TDM-unify", "5", "28.90 / 30.52 / 31.31 HPS in 1 / 2 / 4 steps", {"name": "tdm-unify", "steps": [4, 2, 1]}, draws=(*FEW, Draw(4, None, 1), Draw(1, None, 4)), expect=("better", "better", "level"), against="tdm-4"),
    Variant("no-condition", "TDM-unify, step count not told", "5", "worse: 26.11 / 29.15 / 29.39", {"name": "tdm-unify", "steps": [4, 2, 1], "condition": False}, draws=FEW, expect=("worse",), against="unify"),
    Variant("no-surrogate", "TDM-unify, l2 with DMD's normaliser", "5", "worse: 28.23 / 30.20 / 30.85", {"name": "tdm-unify", "steps": [4, 2, 1], "loss": "l2"}, draws=FEW, expect=("worse",), against="unify"),
    Variant("no-importance", "TDM, fake score drawn around the clean estimate", "5, fig. 11", "worse: 29.27 against 31.35; modes are lost", {"fake_draw": "clean"}, expect=("worse",), against="tdm-4"),
    Variant("no-segments", "TDM, tau beyond its segment", "eq. 5, 9", "biased: one fake score for several distributions", {"tau": "above"}, expect=("worse",), against="tdm-4"),
    Variant("clean", "TDM, matching clean samples", "7", "much worse: 24.63 against 31.35", {"match": "clean"}, expect=("worse",), against="tdm-4"),
    Variant("fisher", "TDM, Fisher divergence", "8", "better: 31.70 against 31.35", {"divergence": "fisher"}, expect=("better",), against="tdm-4"),
    Variant("train-dpmpp", "TDM, DPM-Solver++ in training", "6", "level: 30.86 (tested with DDIM), 31.30 (DPM-Solver++)", {"solver": "dpmpp"}, draws=SOLVERS[:2], expect=("level",), against="tdm-4"),
    Variant("transition", "TDM, fake score on the transition noise", "-", "not in the paper", {"fake_target": "transition"}),
    Variant("gan", "TDM with adversarial term", "1", "SFT is better and cheaper", {"gan": 0.05, "gan_r1": 0.01}, POOL),
    Variant("dmd2", "DMD2, 10 fake updates", "fig. 9", "TDM reaches its best in 4 % of the time and ends 20 % lower", {"name": "dmd2"}, expect=("worse",), against="tdm-4"),
    Variant("dmd2-5", "DMD2, 5 fake updates", "fig. 9", "the original paper's setting", {"name": "dmd2", "fake_updates": 5}, expect=("worse",), against="tdm-4"),
    Variant("sid", "SiD", "1", "-", {"name": "sid"}, expect=("worse",), against="tdm-4"),
    Variant("diff-instruct", "Diff-Instruct", "1", "one step", {"name": "diff-instruct", "steps": 1}, draws=(Draw(1),), expect=("worse",), against="unify"),
    Variant("lcm", "LCM", "1, fig. 8", "stochastic only: poor under DDIM", {"name": "lcm", **IMITATION}, POOL, (Draw(4), Draw(4, "ddim")), expect=("worse",), against="tdm-4"),
    Variant("progressive", "progressive distillation", "1", "-", {"name": "progressive", **IMITATION}, POOL, expect=("worse",), against="tdm-4"),
    Variant("rescued", "LCM, then 100 iterations of TDM", "fig. 8", "deterministic sampling restored", {}, {"train": {"iterations": 140, "decay": 0}}, (Draw(4, "ddim"),), "lcm", expect=("better",), against="lcm"),
)  # fmt: skip


def recipe_value(variant: Variant, seed: int, iterations: int) -> Settings:
    """The variant's recipe. Settings of the base that its method does not have are left out."""
    own = BASE["method"] | variant.method
    if own["name"] in ("lcm", "progressive"):
        own = variant.method
    value = BASE | variant.other | {"method": own}
    value["train"] = BASE["train"] | {"iterations": iterations, "decay": iterations // 2} | variant.other.get("train", {}) | {"seed": seed}
    return value


def train(variant: Variant, seed: int, teacher: Backbone, folder: Path, a: argparse.Namespace) -> None:
    """Train and measure one student; what is finished is left alone."""
    run, known = folder / f"{variant.key}-{seed}", finished(a)
    begins = any(v.start == variant.key and f"{v.key}-{seed}" not in known for v in VARIANTS if v.key in a.only)
    if run.name in known and not (begins and not (run / "final").exists()):  # the table may outlive the student that another begins as
        return
    recipe = validate(recipe_value(variant, seed, a.iterations), DistillRecipe, variant.key)
    method, identity = recipe.method, fingerprint(teacher.module, *teacher.encoders)
    prompts = embed(teacher, read_prompts(str(a.prompts)), folder / "embeddings", identity)
    real = None
    if recipe.data is not None:
        own = a.pictures if variant.key == "gan" and a.pictures else None
        real = encode_pictures(teacher, own, folder / "embeddings", identity) if own else teacher_pictures(teacher, prompts, recipe.data.count, recipe.data.steps, method.guidance, folder / "embeddings", seed)  # fmt: skip
    roles = roles_of(recipe, teacher, None)
    if variant.start:
        start_from(roles, folder / f"{variant.start}-{seed}" / "final")
    curve: list[dict[str, float]] = json.loads((run / "curve.json").read_text()) if (run / "curve.json").exists() else []
    seconds = curve[-1]["seconds"] if curve else 0.0
    step = None
    for step in distill(roles, method, prompts, recipe.train, run, real):
        if curve and step.iteration <= curve[-1]["iteration"]:
            continue
        seconds += step.seconds
        if step.iteration % a.every == 0 or step.iteration == recipe.train.iterations:
            row = measure(step, teacher, [Draw(method.counts[0])], a.curve, run, a)[0]
            curve.append(
                {"iteration": step.iteration, "seconds": seconds, "fd_real": row["fd_real"], "diversity_ratio": row["diversity_ratio"]}
            )
            write_json(run / "curve.json", curve)
            print(
                f"{variant.key}-{seed} {step.iteration:4d} {seconds:6.0f} s  FD {row['fd_real']:.2f}  diversity {row['diversity_ratio']:.2f}",
                flush=True,
            )
    if step is None:  # everything was trained, not measured
        step = Step(recipe.train.iterations, {}, 0.0, roles, method)
    rows = measure(step, teacher, variant.draws, a.protocol, run, a)
    grids = {str(k): method.times(teacher.schedule, k).tolist() for k in method.counts}
    card = StudentCard(variant.key, method.name, "emoji", "", method.counts, grids, dict.fromkeys(grids, method.solver), "v_prediction", "lora", recipe.roles.rank, float(recipe.roles.rank), method.guidance, "other", recipe.train.iterations, seconds, "", "", time_layer=teacher.time_layer if roles.counts else "")  # fmt: skip
    with roles.averaged():
        write_student(run / "final", card, roles, method.times(teacher.schedule)[:-1])
    result = {
        "seconds": seconds,
        "iterations": recipe.train.iterations,
        "curve": curve,
        "rows": rows,
        "hardware": hardware(),
        "commit": commit(),
    }
    write_json(run / "result.json", result | {"asked": asked(a)})


def asked(a: argparse.Namespace) -> Settings:
    """What results must share to stand in one table."""
    return {"iterations": a.iterations, "protocol": a.protocol, "curve": a.curve, "guidance": a.guidance}


def finished(a: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """variant-seed -> result: of this folder's runs, and of the table as it was."""
    table = a.to / "tdm.json"
    found = json.loads(table.read_text())["results"] if table.exists() else {}
    for path in a.out.glob("*-[0-9]/result.json"):
        found[path.parent.name] = json.loads(path.read_text())
    return {k: v for k, v in found.items() if v["asked"] == asked(a)}


def measure(model: Any, teacher: Backbone, draws: Sequence[Draw], protocol: str, run: Path, a: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of these draws; the teacher's own pictures are measured once for all variants."""
    best = Row("teacher", 50, a.guidance, 100, lambda p, s: sample(teacher, list(p), list(s), steps=50, guidance=a.guidance))
    rows = [best, *(Row("student", d.steps, 1.0, d.steps, _sampler(model, d)) for d in draws)]
    found = evaluate(rows, protocol_named(protocol), None, shipped=a.out / "teacher")["rows"]
    return [{**row, "draw": d.title} for row, d in zip(found[1:], draws, strict=True)]


def _sampler(model: Any, d: Draw, guidance: float = 1.0) -> Any:
    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return sample(model, list(prompts), list(seeds), steps=d.steps, guidance=guidance, solver=d.solver, told=d.told)

    return draw


def teacher_rows(teacher: Backbone, a: argparse.Namespace) -> list[dict[str, Any]]:
    """The teacher at its best and at the students' costs, under both protocols."""
    found = []
    for protocol in (a.curve, a.protocol):
        rows = [
            Row("teacher", k, w, k * (2 if w != 1 else 1), _sampler(teacher, Draw(k), w))
            for k, w in ((50, a.guidance), (4, a.guidance), (4, 1.0), (2, 1.0), (1, 1.0))
        ]
        found = evaluate(rows, protocol_named(protocol), a.out / "teacher")["rows"]
    return found


def spread(values: Sequence[float]) -> str:
    """Mean and deviation over seeds."""
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


def verdict(relation: Relation, own: Sequence[float], other: Sequence[float]) -> str:
    """Whether one mean FD stands to another as claimed, and by how much."""
    gap = statistics.mean(own) - statistics.mean(other)
    errors = [statistics.variance(v) / len(v) if len(v) > 1 else 0.0 for v in (own, other)]
    seen = "level" if abs(gap) <= max(NOISE, 2 * sum(errors) ** 0.5) else "worse" if gap > 0 else "better"
    return f"{'yes' if seen == relation else 'no'}: {seen}, {gap:+.2f}"


def write(teachers: Sequence[dict[str, Any]], a: argparse.Namespace) -> None:
    """The table, the rows and the plot of whatever is finished."""
    found = finished(a)
    results = {v.key: [r for k, r in sorted(found.items()) if k.rsplit("-", 1)[0] == v.key] for v in VARIANTS}
    fd = {
        (v.key, v.called(d)): [r["rows"][i]["fd_real"] for r in results[v.key]]
        for v in VARIANTS
        if results[v.key]
        for i, d in enumerate(v.draws)
    }
    lines = []
    for variant in (v for v in VARIANTS if results[v.key]):
        for i, d in enumerate(variant.draws):
            own = [r["rows"][i] for r in results[variant.key]]
            here = "-"
            if variant.expect and (other := fd.get((variant.against, variant.called(d)))):
                here = f"{verdict(variant.expect[min(i, len(variant.expect) - 1)], fd[variant.key, variant.called(d)], other)} beside {variant.against}"
            cells = [spread([row["fd_real"] for row in own]), spread([row["fd_teacher"] for row in own]), spread([100 * row["retrieval_top1"] for row in own]), spread([row["diversity_ratio"] for row in own]), spread([r["seconds"] / 60 for r in results[variant.key]])]  # fmt: skip
            lines.append(
                f"| {variant.label} | `{variant.key}` | {d.title} | {' | '.join(cells)} | {len(own)} | {variant.table} | {variant.claim} | {here} |"
            )
    command = f"python benchmarks/tdm.py --iterations {a.iterations} --seeds {' '.join(map(str, a.seeds))}"
    write_json(a.to / "tdm.json", {"results": found, "teacher": list(teachers), "command": command})
    shown = [
        f"| teacher, {t['steps']} steps, guidance {t['guidance']:g} | | {t['nfe']} calls | {t['fd_real']:.2f} | {t['fd_teacher'] or 0:.2f} | {100 * t['retrieval_top1']:.2f} | {t['diversity_ratio'] or 1:.2f} | | | | | |"
        for t in teachers
    ]
    commits, machines = ({r[k] for r in found.values()} for k in ("commit", "hardware"))
    text = f"""# TDM, its variants and its rivals on the bundled teacher

`{command}`, {"; ".join(sorted(machines))}, commit {", ".join(sorted(commits))}, {time.strftime("%Y-%m-%d")}. Protocol `{a.protocol}`; FD is FD-efflite0, lower is better; retrieval top-1 in
percent; diversity relative to the teacher's. Mean ± deviation over seeds. Students take no guidance. `claim` is the paper's, on SD-v1.5 (HPS, higher is better); `here` says whether its ordering holds in FD, where differences up to
{NOISE:g} count as none (and up to two standard errors, with several seeds). LCM, progressive distillation and the adversarial term start from {"real pictures" if a.pictures else "the teacher's own pictures"}.

| model | key | called with | FD to real | FD to teacher | retrieval | diversity | minutes | seeds | table | claim | here |
|---|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join([*shown, *lines])}

{chr(10).join(f"- {line}" for line in race(results))}

![FD to real over training time](tdm.png)
"""
    (a.to / "tdm.md").write_text(text)
    plot({v.label: [r["curve"] for r in results[v.key]] for v in VARIANTS if results[v.key]}, a.to / "tdm.png")


def race(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The paper's fig. 9 in numbers: when TDM is as good as each rival's best, as a share of the rival's time to it, and how much lower it ends."""
    said = []
    for variant in (v for v in VARIANTS if v.key in ("dmd2", "dmd2-5", "sid", "lcm") and results[v.key] and results["tdm-4"]):
        for rival, own in zip(results[variant.key], results["tdm-4"], strict=False):
            best = min(rival["curve"], key=lambda p: p["fd_real"])
            reached = next((p["seconds"] for p in own["curve"] if p["fd_real"] <= best["fd_real"]), None)
            ends = min(p["fd_real"] for p in own["curve"])
            when = (
                "never reaches it"
                if reached is None
                else f"reaches it in {reached:.0f} s, {100 * reached / best['seconds']:.0f} % of the time"
            )
            said.append(f"{variant.label}: its best FD on the curve is {best['fd_real']:.2f} after {best['seconds']:.0f} s; TDM {when}; TDM's own best is {ends:.2f}, {100 * (1 - ends / best['fd_real']):.0f} % lower.")  # fmt: skip
    return said


def plot(curves: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """FD to real over seconds of training, a line a seed (the paper's fig. 9)."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for i, (label, runs) in enumerate(curves.items()):
        for j, run in enumerate(runs):
            axes.plot(
                [p["seconds"] / 60 for p in run],
                [p["fd_real"] for p in run],
                color=plt.get_cmap("tab20")(i % 20),
                lw=1.2,
                label=label if j == 0 else None,
            )
    axes.set_xlabel("minutes of training")
    axes.set_ylabel("FD-efflite0 to real")
    axes.legend(fontsize=7, frameon=False, ncols=2)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=[v.key for v in VARIANTS], default=[v.key for v in VARIANTS], metavar="VARIANT")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=BASE["train"]["iterations"])
    parser.add_argument("--every", type=int, default=52, help="iterations between two points of the curve")
    parser.add_argument("--protocol", default="emoji-medium")
    parser.add_argument("--curve", default="emoji-quick", help="protocol of the curve")
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--pictures", help="folder of real pictures for the adversarial term; the teacher's own if not given")
    parser.add_argument("--prompts", type=Path, default=Path("src/fewstep/zoo/emoji/prompts.txt"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench-tdm"), help="where students and measurements are kept")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    quiet()
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
