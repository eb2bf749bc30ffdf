"""Take TDM apart where the truth is known.

    python benchmarks/ring.py                    # trains what is missing, then writes benchmarks/ring.md and .json

The data are eight modes on a ring, and the teacher is a small network. Every variant is `examples/own_network.py` with
a few settings changed, trained for the same iterations. `distance` is the energy distance to the data, as a multiple of
the distance between two draws of the data: 1 is perfect. `rarest mode` is the share of points at the mode that is drawn
least, as a multiple of its due: 1 is perfect, 0 is a lost mode (the paper's fig. 11).
"""

import argparse
import json
import runpy
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep
from fewstep.atomic import write_json
from fewstep.methods.method import Method
from fewstep.methods.presets import preset
from records import Facts, Record, about, markdown, new_record, provenance, spread, wrapped, write_record
from tdm_variants import merged

BASE: dict[str, Any] = {
    "name": "tdm",
    "steps": 2,
    "guidance": 1.0,
    "shift": 0.35,
    "loss": "l2",
    "warmup": 50,
    "fake": {"updates": 3, "snr_clip": 50.0},
}
UNIFY: dict[str, Any] = {"name": "tdm-unify", "steps": (2, 1)}
CLEAN: dict[str, Any] = {"state": "clean", "tau_range": "full"}
DMD2: dict[str, Any] = {"name": "dmd2", "match": CLEAN, "solver": "renoise", "fake": {"updates": 10}, "warmup": 15}
DRAWS = 8
TEACHER_STEPS = 2000


@dataclass(frozen=True)
class Variant:
    """A student: what it changes in the base, and what the paper says of that."""

    key: str
    label: str
    claim: str = ""
    method: dict[str, Any] = field(default_factory=dict)
    counts: tuple[int, ...] = (2,)  # steps that the student is sampled in


VARIANTS = (
    Variant("tdm", "TDM, 2 steps"),
    Variant("tdm-4", "TDM, 4 steps", "", {"steps": 4}, (4,)),
    Variant(
        "no-importance",
        "no importance sampling for the fake score",
        "worse, modes are lost (tab. 5, fig. 11)",
        {"fake": {"input": "clean"}},
    ),
    Variant("no-importance-4", "the same in 4 steps", "", {"steps": 4, "fake": {"input": "clean"}}, (4,)),
    Variant("no-segments", "tau beyond its segment", "biased (eq. 5, 9)", {"match": {"tau_range": "to_noise"}}),
    Variant("clean", "clean samples matched, tau over all times", "much worse (tab. 7)", {"match": CLEAN}),
    Variant(
        "clean-segment",
        "clean samples matched, tau in its segment",
        "not in the paper",
        {"match": {"state": "clean"}},
    ),
    Variant("fisher", "Fisher divergence", "a little better (tab. 8)", {"match": {"divergence": "fisher"}}),
    Variant("huber", "Huber loss without normalizer", "better (eq. 11, tab. 5)", {"loss": "huber"}),
    Variant("transition", "fake score on the transition noise", "not in the paper", {"fake": {"target": "transition"}}),
    Variant("one-fake", "one fake update", "enough (alg. 1)", {"fake": {"updates": 1}}),
    Variant("no-warmup", "no warm-up of the fake score", "not in the paper", {"warmup": 0}),
    Variant("unify", "TDM-unify", "one student serves all (eq. 8)", UNIFY, (2, 1)),
    Variant("no-condition", "TDM-unify without the condition", "worse (tab. 5)", {**UNIFY, "condition": False}, (2, 1)),
    Variant("dmd2", "DMD2, 10 fake updates", "", DMD2),
)


def method_of(variant: Variant, iterations: int) -> Method:
    """Return the variant's method; a short training gets a shorter warm-up, so that the student is trained."""
    settings = merged(BASE, variant.method)
    settings["warmup"] = min(settings["warmup"], iterations - 1)
    return preset(**settings)


def shares(points: Tensor, means: Tensor) -> Tensor:
    """Return the share of the points nearest to each mode."""
    return torch.bincount(torch.cdist(points.double(), means).argmin(1), minlength=len(means)) / len(points)


def run(variant: Variant, seed: int, teacher: fewstep.Denoiser, example: dict[str, Any], iterations: int) -> Facts:
    """Train one student, and measure it in each of its step counts."""
    method, began = method_of(variant, iterations), time.perf_counter()
    *_, step = fewstep.distill(
        teacher,
        method,
        train=fewstep.TrainConfig(iterations=iterations, batch=256, lr=3e-4, fake_lr=1e-3, ema=0.995, seed=seed),
        roles=fewstep.RolesConfig(lora=False),
    )
    seconds, points, prompts = time.perf_counter() - began, example["POINTS"], [""] * example["POINTS"]
    rows = []
    for count in variant.counts:
        drawn = [fewstep.sample(step, prompts, range(i * points, (i + 1) * points), steps=count) for i in range(DRAWS)]
        rarest = 8 * float(shares(torch.cat(drawn), example["DATA"].means).min())
        rows.append({"steps": count, "distance": example["mean_distance"](drawn), "rarest": rarest})
    return {"key": variant.key, "seed": seed, "seconds": seconds, "rows": rows}


def page(record: Record) -> str:
    """Return the page of a record."""
    lines, floor = [], record.common["floor"]
    for variant in VARIANTS:
        own = [r for r in record.rows if r["key"] == variant.key]
        for i, count in enumerate(variant.counts if own else ()):
            cells = [
                spread([r["rows"][i]["distance"] / floor for r in own]),
                spread([r["rows"][i]["rarest"] for r in own]),
                spread([r["seconds"] for r in own]),
            ]
            lines.append([variant.label, count, *cells, variant.claim])
    what = f"""{provenance(record)}. Mean ± deviation over seeds. The energy distance between two draws of the data is
        {floor:.5f}."""
    return f"""# TDM's parts where the truth is known

{about(__doc__)}

{wrapped(what)}

{markdown(["variant", "steps", "distance", "rarest mode", "seconds", "the paper"], lines)}
"""


def write(rows: list[Facts], floor: float, a: argparse.Namespace) -> None:
    """Write the table."""
    command = f"python benchmarks/ring.py --iterations {a.iterations} --seeds {' '.join(map(str, a.seeds))}"
    command += f" --teacher-steps {a.teacher_steps}" if a.teacher_steps != TEACHER_STEPS else ""
    record = new_record("ring", command, rows, a.seeds, {"floor": floor})
    write_record(record, page(record), a.to)


def main() -> None:
    """Train, measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", choices=[v.key for v in VARIANTS], default=[v.key for v in VARIANTS], metavar="VARIANT"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--teacher-steps", type=int, default=TEACHER_STEPS, help="training steps of the teacher")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-ring"), help="where measurements are kept")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "own_network.py"))
    points = example["POINTS"]
    draws = [example["DATA"].draw(points, torch.Generator().manual_seed(i)) for i in range(64)]
    floor = example["mean_distance"](draws)
    network, process = example["train_teacher"](a.teacher_steps), example["PROCESS"]
    teacher = fewstep.Denoiser(network, process, shape=(2,), prediction="x0", name="ring", time_layer="layers.0")
    results: list[Facts] = []
    for variant in VARIANTS:
        for seed in a.seeds if variant.key in a.only else ():
            file = a.out / f"{variant.key}-{seed}.json"
            if not file.exists():
                write_json(file, run(variant, seed, teacher, example, a.iterations))
            results.append(json.loads(file.read_text()))
            seen = [(r["steps"], round(r["distance"] / floor, 2), round(r["rarest"], 2)) for r in results[-1]["rows"]]
            print(variant.key, seed, seen, flush=True)
            write(results, floor, a)


if __name__ == "__main__":
    main()
