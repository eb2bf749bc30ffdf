"""Compare TrajP-L with its ablations and rivals on teachers of several kinds.

    python benchmarks/trajpl.py                    # trains what is missing, then writes benchmarks/trajpl.md and .json
    python benchmarks/trajpl.py --only exact       # one part; --seeds 0: one seed; --iterations N: another budget

One student serves all step counts. The error is `||x - x_teacher|| / ||x_teacher||` at the end of the trajectory, from
the same noise, averaged over trajectories that no student has seen. Seconds are of training, on a CPU those of the
processor.

- `exact`: a mixture of Gaussians in 128 dimensions, whose closed form is the teacher. A LoRA has nothing to train, so
  heads stand alone. The Fréchet distance is that of 1,000 ends to 100,000 draws, in the data's own 128 dimensions.
- `network`: the teacher is a small network, trained on draws of that mixture. It has more trajectories, because a LoRA
  learns 3,000 by heart. `data`: the same with fewer trajectories and one seed.
- `pixel`: the bundled Fashion-MNIST teacher in 50 steps of DDIM; students learn from 24 steps of DPM-Solver++. Fréchet
  distances are of 1,000 images to as many of the test set (Debian's dataset-fashion-mnist), in 32 components of two
  sets of features: of a small network that classifies the set, trained here in a minute, and of EfficientNet-lite0.
  Students "for 2 steps alone" serve no other count.
- `emoji`: the bundled text-to-image teacher with guidance 4.5. Students have the guidance distilled in, solvers alone
  do without. FD-efflite0 is of 256 names to all real emoji.

What `benchmarks/trajpl.json` holds with the same settings is not run again.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import TrajectoryConfig, TrajectoryImitation
from fewstep.api import trajectory_times
from fewstep.backbones.base import denoiser
from fewstep.backbones.generate import device_of
from fewstep.core.guidance import Guidance
from fewstep.data.prompts import Embeddings, embed
from fewstep.data.trajectories import Trajectories, generate_trajectories, guided_teacher, run_to_completion
from fewstep.methods.method import Method, student_of
from fewstep.methods.presets import preset
from fewstep.roles.roles import RolesConfig
from fewstep.runs.init import roles_for
from fewstep.training.loop import TrainConfig, distill
from records import (
    CLOCK,
    Facts,
    Record,
    commits,
    machines,
    markdown,
    new_record,
    origin,
    spread,
    stored_rows,
    write_record,
)
from trajpl_teachers import Part, make_part

COUNTS = (1, 2, 3, 4, 5, 6)
CHUNK = {"pixel": 125, "emoji": 32}  # trajectories at once, where not 500


@dataclass(frozen=True)
class Student:
    """A few-step student: changed settings of the method and the roles; untrained it is a solver alone."""

    label: str
    method: dict[str, Any] = field(default_factory=dict)
    roles: dict[str, Any] = field(default_factory=dict)
    trained: bool = True
    trajectories: int = 0  # 0: as many as its part has
    iterations: int = 0  # 0: as many as its part has
    rate: float = 1.0  # times its part's learning rate
    matching: dict[str, Any] = field(default_factory=dict)  # settings of TDM, which continues the student


ALONE: dict[str, Any] = {"rank": 0}
SOLVERS = {
    name: Student(label, {"solver": name, "head": "none"}, trained=False)
    for name, label in (("ddim", "DDIM"), ("ipndm", "iPNDM"), ("dpmpp", "DPM-Solver++(2M)"))
}
HEADS = {
    "pas": Student("shared weights (PAS)", {"head": "shared"}, ALONE),
    "head": Student("span head alone", {"head": "span"}, ALONE),
    "curve": Student("curve head alone", {"head": "curve"}, ALONE),
}
LORAS = {
    "lora": Student("LoRA alone", {"head": "none"}, {"rank": 8}),
    "trajp-l": Student("LoRA and span head (TrajP-L)", {"head": "span"}, {"rank": 8}),
    "trajp-l-curve": Student("LoRA and curve head", {"head": "curve"}, {"rank": 8}),
}
REGRESSED: dict[str, Any] = {"steps": 2, "regression_weight": 32.0, "warmup": 40, "fake": {"weight": "v"}}
MATCHING = TrainConfig(iterations=160, batch=32, lr=1e-4, fake_lr=1e-3, decay=80, ema=0.95)
SFD = Student("all weights, no head (SFD)", {"head": "none"}, {"lora": False})


def of_rank(rank: int) -> dict[str, Student]:
    """Return the students of an image teacher; a LoRA of this rank has 4 % of the teacher's weights."""
    return {
        **SOLVERS,
        **HEADS,
        **{k: replace(v, roles={"rank": rank}) for k, v in LORAS.items()},
        "sfd": replace(SFD, rate=0.2),
    }


PARTS: dict[str, dict[str, Student]] = {
    "exact": {
        **SOLVERS,
        **HEADS,
        "head-ipndm": Student("span head on iPNDM", {"head": "span", "solver": "ipndm"}, ALONE),
    },
    "network": {
        **SOLVERS,
        **HEADS,
        "lora": LORAS["lora"],
        "sfd": SFD,
        "lora-pas": Student("LoRA and shared weights", {"head": "shared"}, {"rank": 8}),
        "trajp-l": LORAS["trajp-l"],
        "trajp-l-curve": LORAS["trajp-l-curve"],
        "trajp-l-2": replace(LORAS["trajp-l"], label="LoRA of rank 2 and span head (TrajP-L)", roles={"rank": 2}),
    },
    "data": {
        f"{key}-{n}": replace(student, label=f"{student.label}, {n:,} trajectories", trajectories=n)
        for key, student in (("head", HEADS["head"]), ("trajp-l", LORAS["trajp-l"]))
        for n in (50, 200, 1000, 5000)
    }
    | {
        "trajp-l-2-5000": Student(
            "LoRA of rank 2 and span head (TrajP-L), 5,000 trajectories",
            {"head": "span"},
            {"rank": 2},
            trajectories=5000,
        )
    },
    "pixel": of_rank(2)
    | {
        "two": Student("TrajP-L for 2 steps alone", {"head": "span", "steps": 2}, {"rank": 2}, iterations=600),
        "two-matched": Student(
            "LoRA for 2 steps alone, then TDM with a regression term",
            {"head": "none", "steps": 2},
            {"rank": 2},
            iterations=420,
            matching=REGRESSED,
        ),
    },
    "emoji": of_rank(6),
}


def generated(
    part: Part, data: Embeddings, config: TrajectoryConfig, times: Tensor, folder: Path, name: str
) -> Trajectories:
    """Return the teacher's trajectories, which the folder keeps."""
    null = data.unconditional(device_of(part.teacher.module))
    source = guided_teacher(part.teacher, null, config, times, Guidance(scale=part.guidance))
    chunk = CHUNK.get(name, 500)
    return run_to_completion(
        generate_trajectories(part.teacher, data, config, times, source, folder, name, chunk=chunk)
    )


def settings_of(student: Student, part: Part) -> Facts:
    """Return the settings that a run must share with a stored row, as JSON keeps them."""
    own: Facts = {"samples": len(part.noise), "method": student.method}
    if student.trained:
        trajectories = asdict(replace(part.trajectories, count=student.trajectories or part.trajectories.count))
        own |= {
            "train": {k: v for k, v in asdict(train_config(student, part)).items() if k != "seed"},
            "trajectories": {k: v for k, v in trajectories.items() if k not in ("student", "folder")},
            "roles": student.roles,
        }
    if student.matching:
        own |= {"matching": student.matching, "matching_train": asdict(MATCHING)}
    value: Facts = json.loads(json.dumps(own))
    return value


def completed(settings: Mapping[str, Any]) -> Facts:
    """Return stored settings; training settings that they do not name are at their defaults."""
    default = json.loads(json.dumps(asdict(TrainConfig(iterations=1))))
    missing = {k: v for k, v in default.items() if k not in ("iterations", "seed")}
    return {k: missing | v if k in ("train", "matching_train") else v for k, v in settings.items()}


def train_config(student: Student, part: Part) -> TrainConfig:
    """Return the settings of a student's imitation."""
    its, lr = student.iterations or part.train.iterations, student.rate * part.train.rates(True)[0]
    return replace(part.train, iterations=its, decay=its // 2, lr=lr, fake_lr=lr)


def run(
    name: str, key: str, part: Part, trajectories: Callable[[], Trajectories], data: Embeddings, seed: int
) -> Facts:
    """Train one student, and measure it in every step count that it serves."""
    student, teacher = PARTS[name][key], part.teacher
    method = TrajectoryImitation(**{"steps": COUNTS, "guidance": part.guidance, **student.method})
    row: Facts = {
        "part": name,
        "key": key,
        "label": student.label,
        "seed": seed,
        "teacher": part.floors,
        "settings": settings_of(student, part),
        **origin(),
    }
    if not student.trained:
        with torch.no_grad():
            measured = part.measure(lambda _, cond: denoiser(teacher, teacher.module, cond), method, None)
        return row | {"measured": measured, "seconds": 0.0, "trained": 0, "share": 0.0}
    paths, config = trajectories(), RolesConfig(**student.roles)
    roles = roles_for(teacher, method, config, seed, paths)
    began = CLOCK()
    stages: list[tuple[Method, TrainConfig]] = [(method, train_config(student, part))]
    if student.matching:
        stages.append((preset("tdm", guidance=part.guidance, **student.matching), MATCHING))
    for i, (stage, lengths) in enumerate(stages):
        if i:
            with roles.averaged():
                state = roles.student_state()
            roles = roles_for(teacher, stage, config, seed, paths)
            roles.start_from(state)
        for step in distill(roles, stage, data, replace(lengths, seed=seed), paths=paths):
            if step.iteration % 100 == 0:
                print(f"{name} {key}-{seed} {step.iteration}/{lengths.iterations} {CLOCK() - began:.0f} s", flush=True)
    seconds = CLOCK() - began
    with roles.averaged(), torch.no_grad():
        measured = part.measure(lambda count, cond: student_of(method, roles, cond, count), method, roles.head)
    trained = sum(p.numel() for p in roles.trained["student"].values())
    share = trained / sum(p.numel() for n, p in teacher.module.named_parameters() if "lora_" not in n)
    return row | {"measured": measured, "seconds": seconds, "trained": trained, "share": share}


def kept(a: argparse.Namespace) -> dict[tuple[str, str, int], Facts]:
    """Return the table's rows by part, key and seed; another process may have written some."""
    return {(r["part"], r["key"], r["seed"]): r for r in stored_rows(a.to / "trajpl.json")}


def measured_as(row: Facts, student: Student, part: Part) -> bool:
    """Return whether a stored row has a student's settings of today and all measures of its part."""
    same = completed(row["settings"]) == settings_of(student, part)
    return same and row["measured"].keys() == {"error", *part.distances}


def page(record: Record) -> str:
    """Return the page of a record: means and deviations over seeds."""
    what = "\n\n".join((__doc__ or "").split("\n\n")[2:4])
    lines = ["# TrajP-L", "", what, ""]
    for name in dict.fromkeys(r["part"] for r in record.rows):
        rows = [r for r in record.rows if r["part"] == name]
        lines += [f"## Teacher: {name}", ""]
        for measure in dict.fromkeys(m for r in rows for m in r["measured"]):
            has_it = [r for r in rows if measure in r["measured"]]  # later measures are not in all rows
            lines += [*_table(has_it, PARTS[name], measure, trained=name != "exact"), ""]
        own, seeds = replace(record, rows=rows), sorted({r["seed"] for r in rows if r["trained"]})
        where = "; ".join([*machines(own), commits(own)])
        lines += [f"Seeds {', '.join(map(str, seeds))}; {where}: `{record.command} --only {name}`.", ""]
    return "\n".join(lines)


TITLES = {
    "error": "relative error of the end",
    "fd": "FD-efflite0 to real images",
    "fd_data": "Fréchet distance to draws of the mixture",
    "fd_classes": "FD to real images, features of a classifier",
}


def _table(rows: Sequence[Facts], students: Mapping[str, Student], measure: str, trained: bool) -> list[str]:
    """Return one measure of one part: its students' means over seeds.

    A distance is shown for the teacher, too, and at two steps as a share of DDIM's excess over the teacher's.
    """
    counts = list(rows[0]["measured"][measure])
    head = [TITLES[measure], "trained weights", "seconds", *(f"NFE {k}" for k in counts)]
    floor: float | None = rows[0]["teacher"].get(measure)
    ddim = next((r["measured"][measure]["2"] for r in rows if r["key"] == "ddim"), None)
    lines = []
    for key, student in students.items():
        if own := [r for r in rows if r["key"] == key]:
            weights = f"{own[0]['trained']}" + (f" ({own[0]['share']:.1%})" if own[0]["trained"] and trained else "")
            found = [r["measured"][measure] for r in own]
            cells = [spread([m[k] for m in found], 3) if k in found[0] else "" for k in counts]
            if ddim is not None and floor is not None:
                left = statistics.mean((m["2"] - floor) / (ddim - floor) for m in found)
                cells[counts.index("2")] += f" ({left:.1%})"
            lines.append([student.label, weights, f"{statistics.mean(r['seconds'] for r in own):.0f}", *cells])
    table = [markdown(head, lines)]
    if floor is not None:
        table += ["", f"The teacher has {floor:.3f}. In brackets: what is left of DDIM's excess over it at two steps."]
    return table


def write(rows: Sequence[Facts], a: argparse.Namespace) -> None:
    """Write the table, in the order of `PARTS`."""
    order = [(part, key) for part, students in PARTS.items() for key in students]
    known = [r for r in rows if (r["part"], r["key"]) in order]
    known.sort(key=lambda r: (order.index((r["part"], r["key"])), r["seed"]))
    seeds = sorted({r["seed"] for r in known})
    record = new_record("trajpl", "python benchmarks/trajpl.py", known, seeds, {})
    write_record(record, page(record), a.to)


def main() -> None:
    """Train, measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS), help="parts to run")
    parser.add_argument("--keys", nargs="*", default=None, help="students to run")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--count", type=int, default=3000, help="trajectories of the mixture")
    parser.add_argument("--network-count", type=int, default=20000, help="trajectories of the small network")
    parser.add_argument("--teacher-steps", type=int, default=6000, help="training steps of the small network")
    parser.add_argument("--pixels", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--pixel-iterations", type=int, default=350)
    parser.add_argument("--emoji-iterations", type=int, default=300)
    parser.add_argument("--emoji-count", type=int, default=2048, help="trajectories of the text-to-image teacher")
    parser.add_argument("--names", type=int, default=256, help="names of emoji whose images are measured")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-trajpl"), help="where trajectories are kept")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    for name in a.only:
        part = make_part(name, a)
        data = embed(part.teacher, list(part.prompts), None, name)
        times = trajectory_times(TrajectoryImitation(steps=COUNTS), part.teacher)
        for key, student in PARTS[name].items():
            if a.keys and key not in a.keys:
                continue
            config, folder = part.trajectories, a.out / name
            if student.trajectories:
                config, folder = replace(config, count=student.trajectories), a.out / f"{name}-{student.trajectories}"
            trajectories = partial(generated, part, data, config, times, folder, name)
            for seed in a.seeds if student.trained and not student.trajectories else a.seeds[:1]:
                row = kept(a).get((name, key, seed))
                if row is None or not measured_as(row, student, part):
                    row = run(name, key, part, trajectories, data, seed)
                    write(list((kept(a) | {(name, key, seed): row}).values()), a)
                for measure, numbers in row["measured"].items():
                    seen = {k: round(v, 4) for k, v in numbers.items()}
                    print(name, key, seed, measure, seen, f"{row['seconds']:.0f} s", flush=True)
    write(list(kept(a).values()), a)


if __name__ == "__main__":
    main()
