"""Imitate, then match: against matching alone and imitation alone, at equal cost, on the bundled teacher.

    python benchmarks/stages.py    # trains what is missing, then writes benchmarks/stages.md, .json and .png
    torchrun --nproc_per_node 2 benchmarks/stages.py --batch 16    # the same in two processes
    python benchmarks/stages.py --only stages-half --to runs/stages    # one way anew: what the table in --to holds is not run again

Every row is a recipe as a user runs it, in 4 steps, measured under `emoji-medium`. Minutes are those of the run, the walking of trajectories (which rows share)
included, evaluation not. `tdm` is matching alone to its recipe's end, `tdm-200` to `tdm-520` are shorter trainings of it, each with its own decay, `tdm-same` one with uneven times and unsaturated guidance as the stages have them; `stages-half` and `stages-quarter` have
fewer trajectories and iterations than `stages`. `tdm-equal`, `imitation-equal` and `trajpl-equal` (with a span head) have about what `stages` costs (the minutes say how nearly). With `head` such a head comes from the first stage and is kept, with `fold` it is folded into the LoRA.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import yaml

from fewstep.api import load_student, load_teacher, sample
from fewstep.atomic import write_json
from fewstep.backbones.load import quiet
from fewstep.cli.distill import run_distill
from fewstep.core.guidance import Guidance
from fewstep.evaluation.protocols import Row, evaluate, protocol_named
from fewstep.processes import is_first, this_process
from fewstep.recipes_path import recipe_path
from fewstep.student.folder import read_card
from origin import commit, hardware
from tables import spread
from tdm_variants import merged

Settings = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """A recipe with a few settings changed; `alone` makes its first stage all there is."""

    key: str
    label: str
    recipe: str
    changed: Settings = field(default_factory=dict)
    alone: bool = False


def shorter(count: int, imitation: int, matching: int, warmup: int) -> Settings:
    """`stages` with so many trajectories and iterations, the rates falling over about the last two thirds, as there."""
    data = {"count": count}
    return {
        "warm_start": {"data": data, "train": {"iterations": imitation, "decay": 2 * imitation // 3}},
        "data": data,
        "method": {"warmup": warmup},
        "train": {"iterations": matching, "decay": 2 * matching // 3},
    }


WAYS = (
    Way("tdm", "TDM alone, to its end", "tdm4"),
    Way(
        "tdm-200",
        "TDM alone",
        "tdm4",
        {"method": {"warmup": 40}, "train": {"iterations": 200, "decay": 100, "ema": 0.97}},
    ),
    Way("tdm-350", "TDM alone", "tdm4", {"train": {"iterations": 350, "decay": 175, "ema": 0.98}}),
    Way("tdm-520", "TDM alone", "tdm4", {"train": {"iterations": 520, "decay": 260}}),
    Way(
        "tdm-same",
        "TDM alone, with the stages' times and guidance",
        "tdm4",
        {
            "method": {"shift": 0.5, "guidance": {"scale": 4.5, "apg_eta": 0}},
            "train": {"iterations": 520, "decay": 260},
        },
    ),
    Way("tdm-equal", "TDM alone", "tdm4", {"train": {"iterations": 650, "decay": 325}}),
    Way("imitation-equal", "imitation alone", "stages", {"train": {"iterations": 300, "decay": 200}}, alone=True),
    Way(
        "trajpl-equal",
        "TrajP-L alone",
        "stages",
        {"method": {"head": "span"}, "train": {"iterations": 300, "decay": 200}},
        alone=True,
    ),
    Way("stages-quarter", "imitation, then TDM", "stages", shorter(count=1024, imitation=50, matching=30, warmup=15)),
    Way("stages-half", "imitation, then TDM", "stages", shorter(count=1536, imitation=80, matching=45, warmup=20)),
    Way("stages", "imitation, then TDM", "stages"),
    Way("head", "TrajP-L, then TDM with its head", "stages", {"warm_start": {"method": {"head": "span"}}}),
    Way(
        "fold",
        "TrajP-L, its head folded, then TDM",
        "stages",
        {
            "warm_start": {"method": {"head": "span"}},
            "method": {"init_head": "absorb", "warmup": 100},
            "train": {"iterations": 170},
        },
    ),
)

ALONE = ("tdm-200", "tdm-350", "tdm-520", "tdm-equal", "tdm")
STAGED = ("stages-quarter", "stages-half", "stages")
MEASURED = (("fd_real", 1), ("retrieval_top1", 100), ("retrieval_top5", 100))


def recipe_of(way: Way, folder: Path, batch: int, seed: int) -> Settings:
    """What is trained. Trajectories are walked once for all."""
    value: Settings = yaml.safe_load(recipe_path(way.recipe).read_text())
    if way.alone:
        value |= value.pop("warm_start")
    value = merged(value, way.changed)
    value |= {"name": way.key, "preview": {"every": 10_000, "prompts": ["rocket"]}, "evaluate": None}
    for stage in (value, value.get("warm_start", {})):
        if stage:
            stage["train"] |= {
                "batch": batch,
                "seed": stage["train"].get("seed", 0) + 10 * seed,
            }  # a second stage draws other batches
        if "data" in stage:
            stage["data"] |= {"folder": str(folder / "trajectories")}
    return value


def asked(way: Way, a: argparse.Namespace) -> Settings:
    """Settings that a run must share with one that is kept."""
    return {"processes": this_process().num_processes} | recipe_of(way, Path(), a.batch, 0)


def kept(a: argparse.Namespace) -> dict[tuple[str, int], Settings]:
    """(key, seed) -> the row that the table holds."""
    table = a.to / "stages.json"
    return {(r["key"], r["seed"]): r for r in (json.loads(table.read_text())["rows"] if table.exists() else [])}


def run(way: Way, seed: int, a: argparse.Namespace) -> Settings | None:
    """Train and measure; what is finished is left alone. The result in the first process."""
    out = a.out / f"{way.key}-{seed}"
    result = out.with_suffix(".json")
    if not result.exists():
        recipe = out.with_suffix(".yaml")
        if is_first():
            out.parent.mkdir(parents=True, exist_ok=True)
            recipe.write_text(yaml.safe_dump(recipe_of(way, a.out, a.batch, seed), sort_keys=False))
        run_distill(str(recipe), [], out, False, [])
        if is_first():
            student = load_student(out / "final")
            teacher = load_teacher("emoji")
            rows = [
                Row(
                    "teacher",
                    50,
                    Guidance(scale=4.5),
                    100,
                    lambda p, s: sample(teacher, list(p), list(s), steps=50, guidance=4.5),
                ),
                Row("student", 4, Guidance(), 4, lambda p, s: sample(student, list(p), list(s), steps=4)),
            ]
            measured = evaluate(
                rows,
                protocol_named("emoji-medium"),
                None,
                shipped=a.out / "teacher" if a.teacher is None else a.teacher,
            )["rows"]
            write_json(
                result,
                {"key": way.key, "seed": seed, "seconds": read_card(out / "final").train_seconds, "asked": asked(way, a), "commit": commit(), "hardware": hardware(), "teacher": measured[0], "row": measured[1]},
            )  # fmt: skip
    return json.loads(result.read_text()) if is_first() else None


def write(rows: dict[tuple[str, int], Settings], a: argparse.Namespace) -> None:
    """The table, the rows and the plot."""
    results = [rows[at] for at in sorted(rows)]
    count = this_process().num_processes
    command = f"{'python' if count == 1 else f'torchrun --nproc_per_node {count}'} benchmarks/stages.py --batch {a.batch} --seeds {' '.join(sorted({str(seed) for _, seed in rows}))}"
    write_json(a.to / "stages.json", {"rows": results, "command": command})
    teacher = results[0]["teacher"]
    lines = [
        f"| the teacher, 50 guided steps | | | 100 | {teacher['fd_real']:.2f} | {100 * teacher['retrieval_top1']:.1f} % / {100 * teacher['retrieval_top5']:.1f} % | |"
    ]
    of = {way.key: [r for r in results if r["key"] == way.key] for way in WAYS}
    for way in (w for w in WAYS if of[w.key]):
        own = of[way.key]
        fd, top1, top5 = ([scale * r["row"][k] for r in own] for k, scale in MEASURED)
        lines.append(
            f"| {way.label} | `{way.key}` | {statistics.mean(minutes(own)):.1f} | 4 | {spread(fd)} | {spread(top1, 1)} % / {spread(top5, 1)} % | {len(own)} |"
        )
    text = f"""# Imitate, then match

{(__doc__ or "").split(chr(10) * 2)[2].strip()}

`{command}`, {"; ".join(sorted({r["hardware"] for r in results}))}, commit {", ".join(sorted({r["commit"] for r in results}))}, {time.strftime("%Y-%m-%d")}. Mean ± deviation over seeds; one student's FD has a noise of 0.1, its retrieval a standard error of 2.1 points.

| student | key | minutes | calls | FD to real | retrieval top-1 / top-5 | seeds |
|---|---|---|---|---|---|---|
{chr(10).join(lines)}

{chr(10).join(f"- {line}" for line in costs(of))}

![FD to real over minutes](stages.png)
"""
    (a.to / "stages.md").write_text(text)
    plot(of, teacher["fd_real"], a.to / "stages.png")


def minutes(results: Sequence[Settings]) -> list[float]:
    return [r["seconds"] / 60 for r in results]


def costs(of: dict[str, list[Settings]]) -> list[str]:
    """For each length of TDM alone the cheapest staged way whose mean FD is as low, and its share of the minutes."""
    mean = {
        key: (statistics.mean(minutes(own)), statistics.mean(r["row"]["fd_real"] for r in own))
        for key, own in of.items()
        if own
    }
    said = []
    for alone in (k for k in ALONE if k in mean):
        cost, fd = mean[alone]
        staged = [(*mean[k], k) for k in STAGED if k in mean and mean[k][1] <= fd]
        found = (
            f"`{min(staged)[2]}`, {min(staged)[1]:.2f}, {min(staged)[0] / cost:.0%} of the minutes"
            if staged
            else "no staged way"
        )
        said.append(f"What `{alone}` has in {cost:.1f} minutes, FD {fd:.2f}, has {found}.")
    return said


def plot(of: dict[str, list[Settings]], teacher: float, path: Path) -> None:
    """FD to real over the minutes of a whole training: every point is a student, the lines join means."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for keys, label, color in ((ALONE, "TDM alone", "black"), (STAGED, "imitation, then TDM", "tab:red")):
        shown = [of[k] for k in keys if of[k]]
        line = sorted(
            (statistics.mean(minutes(own)), statistics.mean(r["row"]["fd_real"] for r in own)) for own in shown
        )
        axes.plot([x for x, _ in line], [y for _, y in line], color=color, label=label)
        for own in shown:
            axes.scatter(minutes(own), [r["row"]["fd_real"] for r in own], color=color, s=12)
    axes.axhline(teacher, color="grey", ls=":", label="the teacher, 100 calls")
    axes.set(xlabel="minutes of a core, trajectories included", ylabel="FD-efflite0 to real, 4 calls")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", choices=[w.key for w in WAYS], default=[w.key for w in WAYS], metavar="WAY"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=32, help="of every process")
    parser.add_argument("--teacher", type=Path, help="folder with measurements of the teacher, read only")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-stages"))
    parser.add_argument("--to", type=Path, default=Path(__file__).parent)
    a = parser.parse_args()
    quiet()
    for seed in a.seeds:
        for way in (w for w in WAYS if w.key in a.only):
            row = kept(a).get((way.key, seed))
            if row is None or row["asked"] != asked(way, a):
                row = run(way, seed, a)
            if row is not None:  # in the first process
                write(kept(a) | {(way.key, seed): row}, a)


if __name__ == "__main__":
    main()
