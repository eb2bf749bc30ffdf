"""What one training iteration costs beyond the network calls that it contains, measured side by side.

    python benchmarks/step_cost.py            # writes benchmarks/step_cost.md and .json

An iteration of TDM (alg. 1, shared draw) contains: the no-gradient rollout to the drawn segments, one student step with
its backward pass, one guided teacher call on the double batch, one fake-score call with its backward pass. The same calls
are made here bare, on the same networks with the same adapters active, the same batch shapes and nothing else around them. The iteration is
the training loop's own, prompts, clipping, optimisers and averaging included. Both are repeated in turn and the minimum of each is taken:
these machines are shared.
"""

import argparse
import json
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
from origin import commit, hardware


def bare(
    roles: Roles, method: DistributionMatching, cond: dict[str, Tensor], null: dict[str, Tensor], batch: int
) -> None:
    """The network calls of one iteration and nothing else."""
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
    torch.autograd.grad(
        backbone.predict(roles.networks["fake"], x, t, cond).sum(), list(roles.trained["fake"].values())
    )


def minimum(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Seconds of each, the least of `repeats`, taken in turn."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - began)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="emoji")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    a = parser.parse_args()
    torch.manual_seed(0)
    found = []
    for share in (True, False):
        teacher = load_teacher(a.teacher)
        prompts = ["rocket"] * a.batch
        cond, null = dict(teacher.encode(prompts)), dict(teacher.encode([""]))
        roles = make_roles(teacher, RolesConfig(lora=share, rank=a.rank))
        method = DistributionMatching(steps=4, warmup=0)
        config = TrainConfig(iterations=a.repeats, batch=a.batch, lr=1e-6, fake_lr=1e-6)
        loop = distill(roles, method, embed(teacher, prompts, None, a.teacher), config)
        best = minimum(
            {
                "iteration": lambda: next(loop),  # noqa: B023
                "bare": lambda: bare(roles, method, cond, null, a.batch),  # noqa: B023
            },
            a.repeats,
        )
        found.append(
            {
                "roles": "shared LoRA" if share else "copies",
                "batch": a.batch,
                **{k: round(v, 4) for k, v in best.items()},
                "ratio": round(best["iteration"] / best["bare"], 3),
            }
        )
        print(found[-1], flush=True)
    command = (
        f"python benchmarks/step_cost.py --teacher {a.teacher} --batch {a.batch} --rank {a.rank} --repeats {a.repeats}"
    )
    record = {"rows": found, "hardware": hardware(), "commit": commit(), "seeds": [0], "command": command}
    (a.out / "step_cost.json").write_text(json.dumps(record, indent=2) + "\n")
    table = "\n".join(
        f"| {r['roles']} | {r['batch']} | {r['bare']:.3f} | {r['iteration']:.3f} | {r['ratio']:.3f} |" for r in found
    )
    (a.out / "step_cost.md").write_text(
        f"# The cost of an iteration over its bare network calls\n\n`{command}` on {hardware()}, commit {commit()}.\n\n"
        f"| roles | batch | bare calls, s | iteration, s | ratio |\n|---|---|---|---|---|\n{table}\n"
    )


if __name__ == "__main__":
    main()
