"""Compare a training iteration with the bare network calls in it.

    python benchmarks/step_cost.py            # writes benchmarks/step_cost.md and .json

An iteration of TDM (alg. 1, shared draw) has these calls: the rollout to the drawn segments without gradient, one
student step with its backward pass, one guided teacher call on the double batch, one fake-score call with its backward
pass. The bare calls run on the same networks, with the same active adapters and batch shapes, and nothing else. The
iteration is the training loop's own, with prompts, clipping, optimizers and averaging. Both are timed in turn, and the
fastest of each counts, because other processes share the machine.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fewstep.api import DistributionMatching, load_teacher
from fewstep.backbones.base import rows
from fewstep.core import timegrid
from fewstep.data.prompts import embed
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.training.loop import TrainConfig, distill
from fewstep.training.state import seeded
from records import Facts, Record, about, markdown, new_record, provenance, wrapped, write_record


def bare(
    roles: Roles, method: DistributionMatching, cond: dict[str, Tensor], null: dict[str, Tensor], batch: int
) -> None:
    """Make the network calls of one iteration and nothing else."""
    backbone, module = roles.backbone, roles.networks["student"]
    segments = timegrid.draw_segments(batch, method.counts[0], seeded(0, 0, "draw"))
    x, t = torch.randn(batch, *backbone.shape), torch.full((batch,), 500.0, dtype=torch.float64)
    roles.activate("student")
    with torch.no_grad():
        for k in range(int(segments.max())):
            part = slice(int((segments <= k).sum()), None)
            backbone.predict(module, x[part], t[part], rows(cond, part))
    torch.autograd.grad(backbone.predict(module, x, t, cond).sum(), list(roles.trained["student"].values()))
    roles.activate("teacher")
    both = {k: torch.cat([null[k].expand_as(v), v]) for k, v in cond.items()}
    with torch.no_grad():
        backbone.predict(module, torch.cat([x, x]), torch.cat([t, t]), both)
    roles.activate("fake")
    fake = backbone.predict(roles.networks["fake"], x, t, cond)
    torch.autograd.grad(fake.sum(), list(roles.trained["fake"].values()))


def minimum(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the seconds of each, the least of `repeats`, taken in turn."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def measure(share: bool, a: argparse.Namespace) -> Facts:
    """Return one row: an iteration next to its bare calls."""
    teacher = load_teacher(a.teacher)
    prompts = ["rocket"] * a.batch
    cond, null = dict(teacher.encode(prompts)), dict(teacher.encode([""]))
    roles = make_roles(teacher, RolesConfig(lora=share, rank=a.rank))
    method = DistributionMatching(steps=4, warmup=0)
    config = TrainConfig(iterations=a.repeats, batch=a.batch, lr=1e-6, fake_lr=1e-6)
    loop = distill(roles, method, embed(teacher, prompts, None, a.teacher), config)
    best = minimum(
        {"iteration": lambda: next(loop), "bare": lambda: bare(roles, method, cond, null, a.batch)}, a.repeats
    )
    return {
        "roles": "shared LoRA" if share else "copies",
        "batch": a.batch,
        **{k: round(v, 4) for k, v in best.items()},
        "ratio": round(best["iteration"] / best["bare"], 3),
    }


def page(record: Record) -> str:
    """Return the page of a record."""
    numbers = ("bare", "iteration", "ratio")
    lines = [[r["roles"], r["batch"], *(f"{r[key]:.3f}" for key in numbers)] for r in record.rows]
    return f"""# The cost of an iteration over its bare network calls

{about(__doc__)}

{wrapped(f"{provenance(record)}.")}

{markdown(["roles", "batch", "bare calls, s", "iteration, s", "ratio"], lines)}
"""


def main() -> None:
    """Measure shared and copied networks and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="emoji")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    torch.manual_seed(0)
    found = []
    for share in (True, False):
        found.append(measure(share, a))
        print(found[-1], flush=True)
    settings = " ".join(f"--{name} {getattr(a, name)}" for name in ("teacher", "batch", "rank", "repeats"))
    record = new_record("step_cost", f"python benchmarks/step_cost.py {settings}", found, [0], {})
    write_record(record, page(record), a.to)


if __name__ == "__main__":
    main()
