"""TrajP-L, its ablations and its rivals where the truth is known: a mixture of Gaussians in 128 dimensions.

    python benchmarks/trajpl.py                    # trains what is missing, then writes benchmarks/trajpl.md and .json
    python benchmarks/trajpl.py --only exact       # one part; --seeds 0 for one seed; --iterations N for another budget

`exact`: the teacher is the closed form, so there is nothing for a LoRA to train and heads stand alone. `network`: a small network that
was trained on draws of the mixture is the teacher, of more trajectories, for LoRA learn 3,000 by heart. `data`: the same with fewer, one seed. One student serves all step counts. The error is `||x - x_teacher|| / ||x_teacher||`
at the end of the trajectory, from the same noise, averaged over trajectories that no student has seen; the Frechet distance there is that of 1,000 ends to 100,000 draws, in the data's own 128 dimensions.
`pixel`: the bundled Fashion-MNIST teacher, whose way has 50 steps of DDIM (students learn from 24 of DPM-Solver++), and beside the error Frechet distances of 1,000 pictures
to as many of the test set from Debian's dataset-fashion-mnist: in the features of a small network that tells the set's classes apart, trained here in a minute, and in those of EfficientNet-lite0
(32 components of each); `two` and `two-matched` are students of two steps alone. `emoji`: the bundled text-to-image
teacher with guidance 4.5, which students have distilled in and solvers alone go without; FD-efflite0 of 256 names to all real emoji.

Seconds are of training, on a CPU those of the processor. Runs that `benchmarks/trajpl.json` holds, made with the same settings, are not run again.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep import TrajectoryConfig, TrajectoryImitation
from fewstep.api import trajectory_times
from fewstep.atomic import write_json
from fewstep.backbones.base import denoiser
from fewstep.backbones.generate import device_of
from fewstep.core.guidance import Guidance
from fewstep.data.prompts import Embeddings, embed
from fewstep.data.trajectories import Trajectories, generate_trajectories, guided_teacher, run_to_completion
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.methods.method import Method, student_of
from fewstep.roles.roles import RolesConfig
from fewstep.runs.init import roles_for
from fewstep.training.loop import TrainConfig, distill
from origin import CLOCK, commit, hardware
from tables import spread
from trajpl_teachers import Part, make_part

COUNTS = (1, 2, 3, 4, 5, 6)
CHUNK = {"pixel": 125, "emoji": 32}  # trajectories that are walked together, where not 500


@dataclass(frozen=True)
class Student:
    """A way to few steps: settings of the method and of the roles; without training a solver alone."""

    label: str
    method: dict[str, Any] = field(default_factory=dict)
    roles: dict[str, Any] = field(default_factory=dict)
    trained: bool = True
    trajectories: int = 0  # 0: as many as its part has
    iterations: int = 0  # 0: as its part has
    rate: float = 1.0  # times its part's learning rate
    matching: dict[str, Any] = field(default_factory=dict)  # settings of TDM after it, from its student


ALONE = {"rank": 0}
SOLVERS = {name: Student(label, {"solver": name, "head": "none"}, trained=False) for name, label in (("ddim", "DDIM"), ("ipndm", "iPNDM"), ("dpmpp", "DPM-Solver++(2M)"))}  # fmt: skip
HEADS = {
    "pas": Student("shared weights (PAS)", {"head": "shared"}, ALONE),
    "head": Student("span head alone", {"head": "span"}, ALONE),
}
LORAS = {
    "lora": Student("LoRA alone", {"head": "none"}, {"rank": 8}),
    "trajp-l": Student("LoRA and span head (TrajP-L)", {"head": "span"}, {"rank": 8}),
}
ANCHORED = {"steps": 2, "anchor": 32.0, "warmup": 40, "fake_weight": "v"}
MATCHING = TrainConfig(iterations=160, batch=32, lr=1e-4, fake_lr=1e-3, decay=80, ema=0.95)
SFD = Student("all weights, no head (SFD)", {"head": "none"}, {"share": False})


def of_rank(rank: int) -> dict[str, Student]:
    """Students of a teacher of pictures, whose LoRA have so many components: 4 % of its weights."""
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
    },
    "data": {
        f"{key}-{n}": replace(student, label=f"{student.label}, {n:,} trajectories", trajectories=n)
        for key, student in (("head", HEADS["head"]), ("trajp-l", LORAS["trajp-l"]))
        for n in (50, 200, 1000, 5000)
    },
    "pixel": of_rank(2)
    | {
        "film": Student("LoRA and FiLM convolution head", {"head": "film"}, {"rank": 2}),
        "two": Student("TrajP-L for 2 steps alone", {"head": "span", "steps": 2}, {"rank": 2}, iterations=600),
        "two-matched": Student(
            "LoRA for 2 steps alone, then anchored TDM",
            {"head": "none", "steps": 2},
            {"rank": 2},
            iterations=420,
            matching=ANCHORED,
        ),
    },
    "emoji": of_rank(6),
}


def walked(
    part: Part, data: Embeddings, config: TrajectoryConfig, times: Tensor, folder: Path, name: str
) -> Trajectories:
    """The teacher's trajectories, kept in the folder."""
    null = data.unconditional(device_of(part.teacher.module))
    source = guided_teacher(part.teacher, null, config, times, Guidance(scale=part.guidance))
    return run_to_completion(
        generate_trajectories(part.teacher, data, config, times, source, folder, name, chunk=CHUNK.get(name, 500))
    )


def asked_of(student: Student, part: Part) -> dict[str, Any]:
    """Settings that a run must share with one that is kept."""
    train = {k: v for k, v in asdict(training_of(student, part)).items() if k != "seed"}
    trajectories = asdict(replace(part.paths, count=student.trajectories or part.paths.count))
    own: dict[str, Any] = (
        {
            "train": train,
            "trajectories": {k: v for k, v in trajectories.items() if k not in ("student", "folder")},
            "roles": student.roles,
            "samples": len(part.noise),
        }
        if student.trained
        else {"samples": len(part.noise)}
    )
    own |= {"matching": student.matching, "matching_train": asdict(MATCHING)} if student.matching else {}
    value: dict[str, Any] = json.loads(json.dumps(own | {"method": student.method}))
    return value


def training_of(student: Student, part: Part) -> TrainConfig:
    """Of its imitation."""
    its, lr = student.iterations or part.train.iterations, student.rate * part.train.rates(True)[0]
    return replace(part.train, iterations=its, decay=its // 2, lr=lr, fake_lr=lr)


def run(
    name: str, key: str, student: Student, part: Part, walks: Callable[[], Trajectories], data: Embeddings, seed: int
) -> dict[str, Any]:
    """Train one student on what `walks` gives, and measure it at every count that it serves."""
    teacher, method = (
        part.teacher,
        TrajectoryImitation(**{"steps": COUNTS, "guidance": part.guidance, **student.method}),
    )
    about: dict[str, Any] = {"commit": commit(), "hardware": hardware()}
    about |= {
        "part": name,
        "key": key,
        "label": student.label,
        "seed": seed,
        "teacher": part.floors,
        "asked": asked_of(student, part),
    }
    if not student.trained:
        with torch.no_grad():
            measured = part.measure(lambda _, cond: denoiser(teacher, teacher.module, cond), method, None)
        return about | {"measured": measured, "seconds": 0.0, "trained": 0, "share": 0.0}
    paths = walks()
    roles = roles_for(teacher, method, RolesConfig(**student.roles), seed, paths)
    began = CLOCK()
    stages: list[tuple[Method, TrainConfig]] = [(method, training_of(student, part))]
    if student.matching:
        stages.append((DistributionMatching(**{"guidance": part.guidance, **student.matching}), MATCHING))
    for i, (stage, config) in enumerate(stages):
        if i:
            with roles.averaged():
                state = roles.student_state()
            roles = roles_for(teacher, stage, RolesConfig(**student.roles), seed, paths)
            roles.start_from(state)
        for step in distill(roles, stage, data, replace(config, seed=seed), paths=paths):
            if step.iteration % 100 == 0:
                print(f"{name} {key}-{seed} {step.iteration}/{config.iterations} {CLOCK() - began:.0f} s", flush=True)
    seconds = CLOCK() - began
    with roles.averaged(), torch.no_grad():
        measured = part.measure(lambda count, cond: student_of(method, roles, cond, count), method, roles.head)
    trained = sum(p.numel() for p in roles.trained["student"].values())
    share = trained / sum(p.numel() for n, p in teacher.module.named_parameters() if "lora_" not in n)
    return about | {"measured": measured, "seconds": seconds, "trained": trained, "share": share}


def main() -> None:
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
    parser.add_argument("--names", type=int, default=256, help="names of emoji whose pictures are measured")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-trajpl"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    a = parser.parse_args()
    for name in a.only:
        part = make_part(name, a)
        data = embed(part.teacher, list(part.prompts), None, name)
        times = trajectory_times(TrajectoryImitation(steps=COUNTS), part.teacher)
        for key, student in PARTS[name].items():
            if a.keys and key not in a.keys:
                continue
            config, folder = part.paths, a.folder / name
            if student.trajectories:
                config, folder = (
                    replace(config, count=student.trajectories),
                    a.folder / f"{name}-{student.trajectories}",
                )
            walks = partial(walked, part, data, config, times, folder, name)
            for seed in a.seeds if student.trained and not student.trajectories else a.seeds[:1]:
                row = kept(a).get((name, key, seed))
                if (
                    row is None
                    or row["asked"] != asked_of(student, part)
                    or row["measured"].keys() != {"error", *part.distances}
                ):
                    row = run(name, key, student, part, walks, data, seed)
                    write(list((kept(a) | {(name, key, seed): row}).values()), a)
                for measure, numbers in row["measured"].items():
                    print(
                        name,
                        key,
                        seed,
                        measure,
                        {k: round(v, 4) for k, v in numbers.items()},
                        f"{row['seconds']:.0f} s",
                        flush=True,
                    )
    write(list(kept(a).values()), a)


def kept(a: argparse.Namespace) -> dict[tuple[str, str, int], dict[str, Any]]:
    """(part, key, seed) -> the run that the table holds, which another process may have put there."""
    table = a.out / "trajpl.json"
    return {
        (r["part"], r["key"], r["seed"]): r for r in (json.loads(table.read_text())["rows"] if table.exists() else [])
    }


def write(results: list[dict[str, Any]], a: argparse.Namespace) -> None:
    """`trajpl.json` with every run, and `trajpl.md` with means and deviations over seeds."""
    results = json.loads(json.dumps(results))  # step counts are names in json
    order = [(part, key) for part, students in PARTS.items() for key in students]
    results = sorted(
        (r for r in results if (r["part"], r["key"]) in order),
        key=lambda r: (order.index((r["part"], r["key"])), r["seed"]),
    )
    write_json(a.out / "trajpl.json", {"rows": results, "command": "python benchmarks/trajpl.py"})
    lines = ["# TrajP-L", "", (__doc__ or "").split("\n\n")[2].strip(), ""]
    for name in dict.fromkeys(r["part"] for r in results):
        rows = [r for r in results if r["part"] == name]
        lines += [f"## Teacher: {name}", ""]
        for measure in dict.fromkeys(m for r in rows for m in r["measured"]):
            has_it = [r for r in rows if measure in r["measured"]]  # all but those of before it was measured
            lines += [*_table(has_it, PARTS[name], measure, trained=name != "exact"), ""]
        lines += [f"Seeds {', '.join(sorted({str(r['seed']) for r in rows if r['trained']}))}; {', '.join(sorted({r['hardware'] for r in rows}))}; commit {', '.join(sorted({r['commit'] for r in rows}))}: `python benchmarks/trajpl.py --only {name}`.", ""]  # fmt: skip
    (a.out / "trajpl.md").write_text("\n".join(lines))


def _table(rows: list[dict[str, Any]], students: dict[str, Student], measure: str, trained: bool) -> list[str]:
    """One measure of one part: its students' means over seeds. Of distances also the teacher's, and at two steps the share of DDIM's excess over it."""
    counts = list(rows[0]["measured"][measure])
    titles = {
        "error": "relative error of the end",
        "fd": "FD-efflite0 to real pictures",
        "fd_data": "Frechet distance to draws of the mixture",
        "fd_classes": "FD to real pictures, features of a classifier",
    }
    head = [titles[measure], "trained weights", "seconds", *(f"{k} NFE" for k in counts)]
    lines, floor = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"], rows[0]["teacher"].get(measure)
    ddim = next((r["measured"][measure]["2"] for r in rows if r["key"] == "ddim"), None) if floor is not None else None
    for key, student in students.items():
        if own := [r for r in rows if r["key"] == key]:
            weights = f"{own[0]['trained']}" + (f" ({own[0]['share']:.1%})" if own[0]["trained"] and trained else "")
            cells = [
                spread([r["measured"][measure][k] for r in own], 3) if k in own[0]["measured"][measure] else ""
                for k in counts
            ]
            if ddim is not None and floor is not None:
                cells[counts.index("2")] += (
                    f" ({statistics.mean((r['measured'][measure]['2'] - floor) / (ddim - floor) for r in own):.1%})"
                )
            seconds = f"{statistics.mean(r['seconds'] for r in own):.0f}"
            lines.append(f"| {' | '.join([student.label, weights, seconds, *cells])} |")
    if floor is not None:
        lines += [
            "",
            f"The teacher's own way: {floor:.3f}. In brackets: what is left of DDIM's excess over it at two steps.",
        ]
    return lines


if __name__ == "__main__":
    main()
