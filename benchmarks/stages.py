"""Compare imitation followed by matching with either alone, at equal cost.

    python benchmarks/stages.py    # trains what is missing, then writes benchmarks/stages.md, .json and .png
    torchrun --nproc_per_node 2 benchmarks/stages.py --batch 16    # the same in two processes
    python benchmarks/stages.py --only stages-half --to runs/stages    # one way; what the table in --to has is kept

Every row is a recipe as a user runs it, in 4 steps on the bundled teacher, measured under `emoji-medium`. Minutes are
those of the run: trajectories, which rows share, count, and evaluation does not. `tdm` is TDM alone to its recipe's
end. `tdm-200` to `tdm-520` are shorter, each with its own decay; `tdm-same` has the stages' uneven times, and their
guidance with `apg_eta` 0. `stages-half` and `stages-quarter` have fewer trajectories and iterations than `stages`.
`tdm-equal`, `imitation-equal` and `trajpl-equal` (with a span head) cost about as much as `stages`. In `head` the first
stage trains a span head, and the student keeps it. In `absorb` the student absorbs that head into its LoRA.
"""

import argparse
import json
import statistics
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
from fewstep.runs.recipe import DistillRecipe, validate
from fewstep.student.folder import read_card
from records import (
    Facts,
    Record,
    about,
    markdown,
    new_record,
    origin,
    provenance,
    spread,
    stored_rows,
    wrapped,
    write_record,
)
from tdm_variants import merged

Settings = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """A recipe with a few settings changed."""

    key: str
    label: str
    recipe: str
    changed: Settings = field(default_factory=dict)
    alone: bool = False  # the recipe's first stage is the only one


def shorter(count: int, imitation: int, matching: int, warmup: int) -> Settings:
    """Return `stages` with other lengths; as there, the rates decay over about the last two thirds."""
    data = {"count": count}
    return {
        "warm_start": {"data": data, "train": {"iterations": imitation, "decay": 2 * imitation // 3}},
        "data": data,
        "method": {"warmup": warmup},
        "train": {"iterations": matching, "decay": 2 * matching // 3},
    }


TDM_200: Settings = {"method": {"warmup": 40}, "train": {"iterations": 200, "decay": 100, "ema": 0.97}}
TDM_520: Settings = {"train": {"iterations": 520, "decay": 260}}
SAME: Settings = {"method": {"shift": 0.5, "guidance": {"scale": 4.5, "apg_eta": 0}}}
ALONE_EQUAL: Settings = {"train": {"iterations": 300, "decay": 200}}
SPAN: Settings = {"method": {"head": "span"}}
ABSORB: Settings = {"method": {"init_head": "absorb", "warmup": 100}, "train": {"iterations": 170}}
WAYS = (
    Way("tdm", "TDM alone, to its end", "tdm4"),
    Way("tdm-200", "TDM alone", "tdm4", TDM_200),
    Way("tdm-350", "TDM alone", "tdm4", {"train": {"iterations": 350, "decay": 175, "ema": 0.98}}),
    Way("tdm-520", "TDM alone", "tdm4", TDM_520),
    Way("tdm-same", "TDM alone, with the stages' times and guidance", "tdm4", TDM_520 | SAME),
    Way("tdm-equal", "TDM alone", "tdm4", {"train": {"iterations": 650, "decay": 325}}),
    Way("imitation-equal", "imitation alone", "stages", ALONE_EQUAL, alone=True),
    Way("trajpl-equal", "TrajP-L alone", "stages", ALONE_EQUAL | SPAN, alone=True),
    Way("stages-quarter", "imitation, then TDM", "stages", shorter(count=1024, imitation=50, matching=30, warmup=15)),
    Way("stages-half", "imitation, then TDM", "stages", shorter(count=1536, imitation=80, matching=45, warmup=20)),
    Way("stages", "imitation, then TDM", "stages"),
    Way("head", "TrajP-L, then TDM with its head", "stages", {"warm_start": SPAN}),
    Way("absorb", "TrajP-L, its head absorbed, then TDM", "stages", ABSORB | {"warm_start": SPAN}),
)

ALONE = ("tdm-200", "tdm-350", "tdm-520", "tdm-equal", "tdm")
STAGED = ("stages-quarter", "stages-half", "stages")
MEASURED = (("fd_real", 1), ("retrieval_top1", 100), ("retrieval_top5", 100))


def recipe_of(way: Way, folder: Path, batch: int, seed: int) -> Settings:
    """Return a way's recipe; all ways share the trajectories in `folder`."""
    value: Settings = yaml.safe_load(recipe_path(way.recipe).read_text(encoding="utf-8"))
    if way.alone:
        value |= value.pop("warm_start")
    value = merged(value, way.changed)
    if "name" not in value["method"]:  # TDM; the bundled teacher predicts v, so v is its own weighting
        value = merged(value, {"method": {"fake": {"weight": "v"}}})
    value |= {"name": way.key, "preview": {"every": 10_000, "prompts": ["rocket"]}, "evaluate": None}
    for stage in (value, value.get("warm_start", {})):
        if stage:  # a second stage has its own seed, and draws other batches
            stage["train"] |= {"batch": batch, "seed": stage["train"].get("seed", 0) + 10 * seed}
        if "data" in stage:
            stage["data"] |= {"folder": str(folder / "trajectories")}
    return value


def settings_of(way: Way, a: argparse.Namespace) -> Settings:
    """Return a way's settings, without the seed."""
    return {"processes": this_process().num_processes} | recipe_of(way, Path(), a.batch, 0)


def measured_as(row: Facts, way: Way, a: argparse.Namespace) -> bool:
    """Return whether a stored row has a way's settings of today, named or by default."""
    stored, today = (
        (value["processes"], validate({k: v for k, v in value.items() if k != "processes"}, DistillRecipe, way.key))
        for value in (row["settings"], settings_of(way, a))
    )
    return stored == today


def kept(a: argparse.Namespace) -> dict[tuple[str, int], Facts]:
    """Return the table's rows by key and seed."""
    return {(r["key"], r["seed"]): r for r in stored_rows(a.to / "stages.json")}


def run(way: Way, seed: int, a: argparse.Namespace) -> Facts | None:
    """Train and measure, unless it is finished. Returns the row in the first process."""
    out = a.out / f"{way.key}-{seed}"
    result = out.with_suffix(".json")
    if not result.exists():
        recipe = out.with_suffix(".yaml")
        if is_first():
            out.parent.mkdir(parents=True, exist_ok=True)
            recipe.write_text(yaml.safe_dump(recipe_of(way, a.out, a.batch, seed), sort_keys=False))
        run_distill(str(recipe), [], out, False, [])
        if is_first():
            write_json(result, measure(way, seed, out / "final", a))
    return json.loads(result.read_text()) if is_first() else None


def measure(way: Way, seed: int, final: Path, a: argparse.Namespace) -> Facts:
    """Return the row of a finished student."""
    student, teacher = load_student(final), load_teacher("emoji")
    guidance = Guidance(scale=4.5)
    rows = [
        Row("teacher", 50, guidance, 100, lambda p, s: sample(teacher, list(p), list(s), steps=50, guidance=4.5)),
        Row("student", 4, Guidance(), 4, lambda p, s: sample(student, list(p), list(s), steps=4)),
    ]
    cache = a.out / "teacher" if a.teacher is None else a.teacher
    measured = evaluate(rows, protocol_named("emoji-medium"), None, shipped=cache)["rows"]
    return {
        "key": way.key,
        "seed": seed,
        "seconds": read_card(final).train_seconds,
        "settings": settings_of(way, a),
        "teacher": measured[0],
        "row": measured[1],
        **origin(),
    }


def by_way(rows: Sequence[Facts]) -> dict[str, list[Facts]]:
    """Return the rows of each way."""
    return {way.key: [r for r in rows if r["key"] == way.key] for way in WAYS}


def page(record: Record) -> str:
    """Return the page of a record."""
    teacher, of = record.rows[0]["teacher"], by_way(record.rows)
    top1, top5 = (100 * teacher[key] for key in ("retrieval_top1", "retrieval_top5"))
    name = "the teacher, 50 guided steps"
    lines = [[name, "", "", "100", f"{teacher['fd_real']:.2f}", f"{top1:.1f} % / {top5:.1f} %", ""]]
    for way in (w for w in WAYS if of[w.key]):
        own = of[way.key]
        fd, first, five = ([scale * r["row"][k] for r in own] for k, scale in MEASURED)
        retrieval = f"{spread(first, 1)} % / {spread(five, 1)} %"
        cells = [f"{statistics.mean(minutes(own)):.1f}", "4", spread(fd), retrieval, str(len(own))]
        lines.append([way.label, f"`{way.key}`", *cells])
    what = f"""{provenance(record)}. Mean ± deviation over seeds. FD of one student has a noise of 0.1, its retrieval a
        standard error of 2.1 points."""
    return f"""# Imitate, then match

{about(__doc__)}

{wrapped(what)}

{markdown(["student", "key", "minutes", "NFE", "FD to real", "retrieval top-1 / top-5", "seeds"], lines)}

{chr(10).join(f"- {line}" for line in costs(of))}

![FD to real over minutes](stages.png)
"""


def minutes(rows: Sequence[Facts]) -> list[float]:
    """Return the minutes of every row."""
    return [r["seconds"] / 60 for r in rows]


def costs(of: dict[str, list[Facts]]) -> list[str]:
    """Say for each length of TDM alone which staged way is the cheapest with as low a mean FD."""
    mean = {
        key: (statistics.mean(minutes(own)), statistics.mean(r["row"]["fd_real"] for r in own))
        for key, own in of.items()
        if own
    }
    said = []
    for alone in (k for k in ALONE if k in mean):
        cost, fd = mean[alone]
        found = "no staged way is as good"
        if staged := [(*mean[k], k) for k in STAGED if k in mean and mean[k][1] <= fd]:
            least, level, key = min(staged)
            found = f"`{key}` has {level:.2f} in {least / cost:.0%} of the minutes"
        said.append(f"`{alone}` has FD {fd:.2f} in {cost:.1f} minutes; {found}.")
    return said


def plot(of: dict[str, list[Facts]], teacher: float, path: Path) -> None:
    """Draw FD to real over the minutes of a whole training: a point for each student, lines through means."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for keys, label, color in ((ALONE, "TDM alone", "black"), (STAGED, "imitation, then TDM", "tab:red")):
        shown = [of[k] for k in keys if of[k]]
        line = sorted(
            (statistics.mean(minutes(own)), statistics.mean(r["row"]["fd_real"] for r in own)) for own in shown
        )
        axes.plot([x for x, _ in line], [y for _, y in line], color=color, label=label)
        for own in shown:
            axes.scatter(minutes(own), [r["row"]["fd_real"] for r in own], color=color, s=12)
    axes.axhline(teacher, color="grey", ls=":", label="the teacher, NFE 100")
    axes.set(xlabel="minutes on one core, trajectories included", ylabel="FD-efflite0 to real, NFE 4")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(rows: dict[tuple[str, int], Facts], a: argparse.Namespace) -> None:
    """Write the table and the plot."""
    count, seeds = this_process().num_processes, sorted({seed for _, seed in rows})
    launcher = "python" if count == 1 else f"torchrun --nproc_per_node {count}"
    command = f"{launcher} benchmarks/stages.py --batch {a.batch} --seeds {' '.join(map(str, seeds))}"
    record = new_record("stages", command, [rows[at] for at in sorted(rows)], seeds, {})
    write_record(record, page(record), a.to)
    plot(by_way(record.rows), record.rows[0]["teacher"]["fd_real"], a.to / "stages.png")


def main() -> None:
    """Train, measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", choices=[w.key for w in WAYS], default=[w.key for w in WAYS], metavar="WAY"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--batch", type=int, default=32, help="of every process")
    parser.add_argument("--teacher", type=Path, help="folder with measurements of the teacher, read only")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-stages"), help="where runs are kept")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    quiet()
    for seed in a.seeds:
        for way in (w for w in WAYS if w.key in a.only):
            row = kept(a).get((way.key, seed))
            if row is None or not measured_as(row, way, a):
                row = run(way, seed, a)
            if row is not None:  # in the first process
                write(kept(a) | {(way.key, seed): row}, a)


if __name__ == "__main__":
    main()
