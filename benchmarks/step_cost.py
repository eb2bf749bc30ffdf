"""What one training iteration costs beyond the network calls that it contains, measured side by side.

    python benchmarks/step_cost.py                       # writes benchmarks/step_cost.md and .json
    python benchmarks/step_cost.py --before OLD.json     # next to what an older commit wrote with --out

An iteration of TDM (alg. 1, shared draw) contains: the no-gradient rollout to the drawn segments, one student step with
its backward pass, one guided teacher call on the double batch, one fake-score call with its backward pass. The same
calls are made here bare, on the same networks with the same adapters active, the same batch shapes and nothing else
around them. The iteration is the training loop's own, prompts, clipping, optimizers and averaging included. Both are
repeated in turn and the minimum of each is taken, in CPU seconds: these machines are shared.

What a GPU would do is counted on `card.py`'s card: kernels, numbers that the host reads, copies that it waits for.
Every method is counted so, on a network of five layers.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from origin import commit, hardware
from torch import Tensor, nn

import card
from fewstep.api import Denoiser, DistributionMatching, load_teacher
from fewstep.backbones.base import rows
from fewstep.core import timegrid
from fewstep.core.schedule import VP
from fewstep.data.images import ImageData
from fewstep.data.prompts import embed
from fewstep.data.trajectories import Trajectories
from fewstep.methods.distribution_matching import GanConfig
from fewstep.methods.method import Method
from fewstep.methods.presets import PRESETS, ROLES
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.runs.init import roles_for
from fewstep.training.loop import Step, TrainConfig, distill
from fewstep.training.state import seeded

Row = dict[str, Any]


def bare(
    roles: Roles, method: DistributionMatching, cond: Mapping[str, Tensor], null: Mapping[str, Tensor], batch: int
) -> None:
    """The network calls of one iteration and nothing else."""
    backbone, module = roles.backbone, roles.networks["student"]
    device = next(module.parameters()).device
    segments = timegrid.draw_segments(batch, method.counts[0], seeded(0, 0, "draw"))
    x = torch.randn(batch, *backbone.shape).to(device)
    t = torch.full((batch,), 500.0, dtype=torch.float64, device=device)
    cond, null = ({k: v.to(device) for k, v in c.items()} for c in (cond, null))
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


def minimum(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """CPU seconds of each, the least of `repeats`, taken in turn."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - began)
    return best


def measured(source: str, batch: int, rank: int, repeats: int) -> Iterator[Row]:
    """CPU seconds, and counts on the card, of an iteration and of its bare calls."""
    for share in (True, False):
        teacher = load_teacher(source)
        prompts = ["rocket"] * batch
        cond, null = dict(teacher.encode(prompts)), dict(teacher.encode([""]))
        data = embed(teacher, prompts, None, source)
        method = DistributionMatching(steps=4, warmup=0)
        config = TrainConfig(iterations=repeats, batch=batch, lr=1e-6, fake_lr=1e-6)
        roles = make_roles(teacher, RolesConfig(lora=share, rank=rank))

        def calls(roles: Roles = roles, cond: Mapping[str, Tensor] = cond, null: Mapping[str, Tensor] = null) -> None:
            bare(roles, method, cond, null, batch)  # noqa: B023

        loop = distill(roles, method, data, config)
        best = minimum({"iteration": lambda: next(loop), "bare": calls}, repeats)  # noqa: B023
        loop.close()
        with card.counted() as stalls:
            card.move(roles)
            calls()
            kernels = stalls.kernels
            counts = counted_in(stalls, distill(roles, method, data, replace(config, iterations=2)))
        yield {
            "roles": "shared LoRA" if share else "copies",
            "batch": batch,
            **{k: round(v, 4) for k, v in best.items()},
            "ratio": round(best["iteration"] / best["bare"], 3),
            "bare_kernels": kernels,
            **counts,
        }


def counted_in(stalls: card.Stalls, steps: Iterator[Step]) -> Row:
    """What the last iteration asks of the card."""
    counts: Row = {}
    for _ in steps:
        counts = {
            "kernels": stalls.kernels,
            "reads": stalls.reads.total(),
            "copies": stalls.copies.total(),
            "sent": stalls.sent.total(),
        }
        stalls.clear()
    return counts


class Small(nn.Module):
    """A denoiser of [B, 2, 4, 4] under a condition [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 2, 3, padding=1)
        self.time, self.label, self.mid = nn.Linear(2, 8), nn.Linear(3, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        at = self.time(torch.stack([t / 1000, torch.cos(t)], 1).to(x)) + self.label(label)
        h = torch.tanh(self.inp(x) + at[:, :, None, None])
        return self.out(torch.tanh(self.mid(h.movedim(1, -1)).movedim(-1, 1)))


def methods() -> dict[str, Method]:
    """Every method by its name, and TDM with an adversarial term."""
    named = {n: replace(m, warmup=0) if isinstance(m, DistributionMatching) else m for n, m in PRESETS.items()}
    return named | {"tdm, gan": DistributionMatching(steps=4, warmup=0, gan=GanConfig(weight=1.0))}


def counted_methods(batch: int = 8) -> Iterator[Row]:
    """What an iteration of every method asks of the card."""
    table = VP((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))

    def encode(prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"label": torch.tensor([[len(p) / 8, p.count("e"), p.count("a")] for p in prompts])}

    for name, method in methods().items():
        torch.manual_seed(0)
        backbone = Denoiser(Small(), table, (2, 4, 4), "v", encode, time_layer="time", feature_layers=("inp", "mid"))
        prompts = ["red cat", "blue dog", "green house"]
        data, times = embed(backbone, prompts, None, "small"), method.times(table, max(method.counts))
        states = torch.randn(len(prompts), len(times), *backbone.shape)
        real = ImageData(states[:, 0], data, "") if method.needs.images else None
        paths = Trajectories(states, times, data, states, times, "") if method.needs.trajectories else None
        roles = roles_for(backbone, method, replace(RolesConfig(rank=4), **ROLES.get(name, {})), paths=paths)  # type: ignore[arg-type]
        config = TrainConfig(iterations=3, batch=batch)
        with card.counted() as stalls:
            card.move(roles)
            yield {"method": name, **counted_in(stalls, distill(roles, method, data, config, real=real, paths=paths))}


def table_of(rows_: Sequence[Row], columns: Mapping[str, str], before: Sequence[Row], key: str) -> str:
    """A table of rows, each number after that of the row before of the same `key`."""
    known = {r[key]: r for r in before}

    def cell(row: Row, column: str) -> str:
        old = known.get(row[key], {}).get(column)
        return f"{row[column]}" if old is None or column in (key, "batch") else f"{old} → {row[column]}"

    lines = [f"| {' | '.join(columns.values())} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*lines, *(f"| {' | '.join(cell(r, c) for c in columns)} |" for r in rows_)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", default="emoji")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--before", type=Path, help="the .json that an older commit wrote")
    a = parser.parse_args()
    torch.manual_seed(0)
    found = list(measured(a.teacher, a.batch, a.rank, a.repeats))
    counts = list(counted_methods())
    command = (
        f"python benchmarks/step_cost.py --teacher {a.teacher} --batch {a.batch} --rank {a.rank} --repeats {a.repeats}"
    )
    record = {"rows": found, "methods": counts, "hardware": hardware(), "commit": commit(), "command": command}
    old = json.loads(a.before.read_text()) if a.before else {}
    (a.out / "step_cost.json").write_text(json.dumps(record | ({"before": old} if old else {}), indent=2) + "\n")
    asked = {
        "bare_kernels": "kernels, bare",
        "kernels": "kernels",
        "reads": "reads",
        "copies": "copies waited for",
        "sent": "other copies",
    }
    cost = {"roles": "roles", "batch": "batch", "bare": "bare calls", "iteration": "iteration", "ratio": "ratio"}
    of_method = {"method": "method", **{k: v for k, v in asked.items() if k != "bare_kernels"}}
    since = f"Each number stands after that of commit {old['commit']}.\n\n" if old else ""
    (a.out / "step_cost.md").write_text(
        "# The cost of an iteration over its bare network calls\n\n"
        f"`{command}` on {hardware()}, commit {commit()}.\n\n{since}"
        "Seconds are CPU seconds. A read is a number that the CPU asks a GPU for, and waits; a copy from ordinary "
        "memory is waited for, too, others from pinned memory are not. Kernels are operations on the GPU.\n\n"
        f"{table_of(found, cost | asked, old.get('rows', []), 'roles')}\n\n"
        "An iteration of every method, on a network of five layers, LoRA of rank 4, batch 8:\n\n"
        f"{table_of(counts, of_method, old.get('methods', []), 'method')}\n"
    )


if __name__ == "__main__":
    main()
