"""TDM's parts where the truth is known: eight modes on a ring, a small network of one's own as the teacher.

    python benchmarks/ring.py                    # trains what is missing, then writes benchmarks/ring.md and .json

Every variant is `examples/own_network.py` with a few settings changed, the same iterations for all. `distance` is the energy distance to the
data, as a multiple of that between two draws of the data: 1 is perfect. `rarest mode` is the share of points at the mode that is drawn
least, as a multiple of its due: 1 is perfect, 0 a lost mode (the paper's fig. 11).
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
from fewstep.methods.presets import preset
from origin import commit, hardware
from tables import spread

BASE: dict[str, Any] = {
    "steps": 2,
    "guidance": 1.0,
    "shift": 0.35,
    "loss": "l2",
    "fake_updates": 3,
    "warmup": 50,
    "snr_clip": 50.0,
}
DRAWS = 8
TEACHER_STEPS = 2000


@dataclass(frozen=True)
class Variant:
    """What is changed in the base, and what the paper says of it."""

    key: str
    label: str
    claim: str = ""
    method: dict[str, Any] = field(default_factory=dict)
    counts: tuple[int, ...] = (2,)  # steps that the student is sampled in


VARIANTS = (
    Variant("tdm", "TDM, 2 steps"),
    Variant("tdm-4", "TDM, 4 steps", "", {"steps": 4}, (4,)),
    Variant("no-importance", "fake score drawn around the clean estimate", "worse, modes are lost (tab. 5, fig. 11)", {"fake_draw": "clean"}),
    Variant("no-importance-4", "the same in 4 steps", "", {"steps": 4, "fake_draw": "clean"}, (4,)),
    Variant("no-segments", "tau beyond its segment", "biased (eq. 5, 9)", {"tau": "above"}),
    Variant("clean", "clean samples matched, tau over all times", "much worse (tab. 7)", {"match": "clean", "tau": "whole"}),
    Variant("clean-segment", "clean samples matched, tau in its segment", "not in the paper", {"match": "clean"}),
    Variant("fisher", "Fisher divergence", "a little better (tab. 8)", {"divergence": "fisher"}),
    Variant("huber", "Huber loss without normaliser", "better (eq. 11, tab. 5)", {"loss": "huber"}),
    Variant("transition", "fake score on the transition noise", "not in the paper", {"fake_target": "transition"}),
    Variant("one-fake", "one fake update", "enough (alg. 1)", {"fake_updates": 1}),
    Variant("no-warmup", "no warm-up of the fake score", "not in the paper", {"warmup": 0}),
    Variant("unify", "TDM-unify", "one student serves all (eq. 8)", {"name": "tdm-unify", "steps": (2, 1)}, (2, 1)),
    Variant("no-condition", "TDM-unify, step count not told", "worse (tab. 5)", {"name": "tdm-unify", "steps": (2, 1), "condition": False}, (2, 1)),
    Variant("dmd2", "DMD2, 10 fake updates", "", {"name": "dmd2", "match": "clean", "tau": "whole", "solver": "renoise", "fake_updates": 10, "warmup": 15}),
)  # fmt: skip


def shares(points: Tensor, means: Tensor) -> Tensor:
    """Of the points nearest to each mode."""
    return torch.bincount(torch.cdist(points.double(), means).argmin(1), minlength=len(means)) / len(points)


def run(
    variant: Variant, seed: int, teacher: fewstep.Denoiser, example: dict[str, Any], iterations: int
) -> dict[str, Any]:
    """Train one student and measure it in each of its step counts."""
    settings = BASE | variant.method
    own = vars(preset(settings.get("name", "tdm"))) | settings
    method, began = fewstep.DistributionMatching(**own), time.perf_counter()
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


def write(results: list[dict[str, Any]], floor: float, a: argparse.Namespace) -> None:
    """The table and the rows."""
    command = f"python benchmarks/ring.py --iterations {a.iterations} --seeds {' '.join(map(str, a.seeds))}"
    command += f" --teacher-steps {a.teacher_steps}" if a.teacher_steps != TEACHER_STEPS else ""
    write_json(
        a.to / "ring.json",
        {
            "rows": results,
            "floor": floor,
            "hardware": hardware(),
            "commit": commit(),
            "seeds": a.seeds,
            "command": command,
        },
    )
    lines = []
    for variant in VARIANTS:
        own = [r for r in results if r["key"] == variant.key]
        for i, count in enumerate(variant.counts if own else ()):
            cells = [
                spread([r["rows"][i]["distance"] / floor for r in own]),
                spread([r["rows"][i]["rarest"] for r in own]),
                spread([r["seconds"] for r in own]),
            ]
            lines.append(f"| {variant.label} | {count} | {' | '.join(cells)} | {variant.claim} |")
    (a.to / "ring.md").write_text(f"""# TDM's parts where the truth is known

{(__doc__ or "").split(chr(10) * 2)[2].strip()}

`{command}`, {hardware()}, commit {commit()}; mean ± deviation over seeds; the energy distance between two draws of the data is {floor:.5f}.

| variant | steps | distance | rarest mode | seconds | the paper |
|---|---|---|---|---|---|
{chr(10).join(lines)}
""")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="*", choices=[v.key for v in VARIANTS], default=[v.key for v in VARIANTS], metavar="VARIANT"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--iterations", type=int, default=600)
    parser.add_argument("--teacher-steps", type=int, default=TEACHER_STEPS, help="training steps of the teacher")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-ring"), help="where measurements are kept")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent)
    a = parser.parse_args()
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "own_network.py"))
    floor = example["mean_distance"](
        [example["DATA"].draw(example["POINTS"], torch.Generator().manual_seed(i)) for i in range(64)]
    )
    teacher = fewstep.Denoiser(
        example["train_teacher"](a.teacher_steps),
        example["PROCESS"],
        shape=(2,),
        prediction="x0",
        name="ring",
        time_layer="layers.0",
    )
    results: list[dict[str, Any]] = []
    for variant in VARIANTS:
        for seed in a.seeds if variant.key in a.only else ():
            file = a.folder / f"{variant.key}-{seed}.json"
            if not file.exists():
                write_json(file, run(variant, seed, teacher, example, a.iterations))
            results.append(json.loads(file.read_text()))
            print(
                variant.key,
                seed,
                [(r["steps"], round(r["distance"] / floor, 2), round(r["rarest"], 2)) for r in results[-1]["rows"]],
                flush=True,
            )
            write(results, floor, a)


if __name__ == "__main__":
    main()
