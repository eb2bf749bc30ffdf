"""Compare a training iteration with the bare network calls in it, and count what a GPU would wait for.

    python benchmarks/step_cost.py                      # writes benchmarks/step_cost.md and .json
    python benchmarks/step_cost.py --before CHECKOUT    # measures an older checkout as well, next to this one

An iteration of TDM (alg. 1, shared draw) has these calls: the rollout to the drawn segments without gradient, one
student step with its backward pass, one guided teacher call on the double batch, one fake-score call with its backward
pass. The bare calls run on the same networks, with the same active adapters and batch shapes, and nothing else. The
iteration is the training loop's own, with prompts, clipping, optimizers and averaging. Both are timed in turn, in CPU
seconds, and the fastest of each counts, because other processes share the machine. What a GPU would do is counted on a
card made of the CPU's memory (`card.py`). A read is a number that the CPU asks a GPU for, and waits. A copy from
ordinary memory is waited for, too; the other copies, from pinned memory, are not. Kernels are operations on the GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import card
from fewstep.api import Denoiser, DistributionMatching, load_teacher
from fewstep.backbones.base import rows
from fewstep.core import timegrid
from fewstep.core.schedule import VP
from fewstep.data.images import ImageData
from fewstep.data.prompts import embed
from fewstep.data.trajectories import Trajectories
from fewstep.methods.matching_settings import GanConfig
from fewstep.methods.method import Method
from fewstep.methods.presets import PRESETS, ROLES
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.runs.init import roles_for
from fewstep.training.loop import Step, TrainConfig, distill
from fewstep.training.state import seeded
from records import Facts, Record, about, markdown, new_record, origin, provenance, wrapped, write_record

ASKED = {"kernels": "kernels", "reads": "reads", "copies": "copies waited for", "sent": "other copies"}
COST = {"bare": "bare calls, s", "iteration": "iteration, s", "ratio": "ratio", "bare_kernels": "kernels, bare"}


def bare(
    roles: Roles,
    method: DistributionMatching,
    cond: Mapping[str, Tensor],
    null: Mapping[str, Tensor],
    batch: int,
    segments: Tensor | None = None,
) -> None:
    """Make the network calls of one iteration and nothing else.

    `segments` [batch], ascending, are those that the iteration drew; by default a draw of their own.
    """
    backbone, module = roles.backbone, roles.networks["student"]
    device = next(module.parameters()).device
    segments = timegrid.draw_segments(batch, method.counts[0], seeded(0, 0, "draw")) if segments is None else segments
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
    fake = backbone.predict(roles.networks["fake"], x, t, cond)
    torch.autograd.grad(fake.sum(), list(roles.trained["fake"].values()))


def minimum(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the CPU seconds of each, the least of `repeats`, taken in turn."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            began = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - began)
    return best


def asked(stalls: card.Stalls) -> Facts:
    """Return the counts so far, and set them to zero."""
    counts = (stalls.kernels, stalls.reads.total(), stalls.copies.total(), stalls.sent.total())
    stalls.clear()
    return dict(zip(ASKED, counts, strict=True))


def last(stalls: card.Stalls, steps: Iterator[Step]) -> Facts:
    """Return what the last iteration asks of the card."""
    return [asked(stalls) for _ in steps][-1]


def measure(share: bool, a: argparse.Namespace) -> Facts:
    """Return one row: CPU seconds, and counts on the card, of an iteration and of its bare calls."""
    teacher = load_teacher(a.teacher)
    prompts = ["rocket"] * a.batch
    cond, null = dict(teacher.encode(prompts)), dict(teacher.encode([""]))
    roles = make_roles(teacher, RolesConfig(lora=share, rank=a.rank))
    method, data = DistributionMatching(steps=4, warmup=0), embed(teacher, prompts, None, a.teacher)
    config = TrainConfig(iterations=a.repeats, batch=a.batch, lr=1e-6, fake_lr=1e-6)
    loop = distill(roles, method, data, config)
    best = minimum(
        {"iteration": lambda: next(loop), "bare": lambda: bare(roles, method, cond, null, a.batch)}, a.repeats
    )
    loop.close()
    with card.counted() as stalls:
        card.move(roles)
        bare(roles, method, cond, null, a.batch)
        of_bare = asked(stalls)
        counts = last(stalls, distill(roles, method, data, replace(config, iterations=2)))
    return {
        "network": a.teacher,
        "method": "tdm",
        "roles": "shared LoRA" if share else "copies",
        "batch": a.batch,
        **{k: round(v, 4) for k, v in best.items()},
        "ratio": round(best["iteration"] / best["bare"], 3),
        "bare_kernels": of_bare["kernels"],
        **counts,
        **origin(),
    }


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


def small(prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return conditions of `Small`."""
    return {"label": torch.tensor([[len(p) / 8, p.count("e"), p.count("a")] for p in prompts])}


def methods() -> dict[str, Method]:
    """Return every method by its name, and TDM with an adversarial term."""
    named = {n: replace(m, warmup=0) if isinstance(m, DistributionMatching) else m for n, m in PRESETS.items()}
    return named | {"tdm, gan": DistributionMatching(steps=4, warmup=0, gan=GanConfig(weight=1.0))}


def count(name: str, method: Method, batch: int = 8) -> Facts:
    """Return one row: what an iteration of a method asks of the card."""
    torch.manual_seed(0)
    table = VP((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))
    backbone = Denoiser(Small(), table, (2, 4, 4), "v", small, time_layer="time", feature_layers=("inp", "mid"))
    prompts = ["red cat", "blue dog", "green house"]
    data, times = embed(backbone, prompts, None, "small"), method.times(table, max(method.counts))
    states = torch.randn(len(prompts), len(times), *backbone.shape)
    real = ImageData(states[:, 0], data, "") if method.needs.images else None
    paths = Trajectories(states, times, data, states, times, "") if method.needs.trajectories else None
    how = replace(RolesConfig(rank=4), **ROLES.get(name, {}))  # type: ignore[arg-type]
    roles, config = roles_for(backbone, method, how, paths=paths), TrainConfig(iterations=3, batch=batch)
    with card.counted() as stalls:
        card.move(roles)
        counts = last(stalls, distill(roles, method, data, config, real=real, paths=paths))
    adapters = "shared LoRA" if how.lora else "copies"
    return {"network": "five layers", "method": name, "roles": adapters, "batch": batch, **counts, **origin()}


def paired(found: Sequence[Facts], columns: Mapping[str, str]) -> list[list[str]]:
    """Return lines of a table, one for each method and arrangement.

    Where two commits were measured, a cell has the older one's number first.
    """
    of: dict[tuple[str, str], list[Facts]] = {}
    for r in found:
        of.setdefault((r["method"], r["roles"]), []).append(r)
    return [
        [*key, str(own[-1]["batch"]), *(" → ".join(str(r[c]) for r in own) for c in columns)] for key, own in of.items()
    ]


def page(record: Record) -> str:
    """Return the page of a record."""
    head, timed = ["method", "roles", "batch"], COST | ASKED
    networks = [r for r in record.rows if "ratio" in r], [r for r in record.rows if "ratio" not in r]
    commits = list(dict.fromkeys(r["versions"]["commit"] for r in record.rows))
    before = f" Numbers before an arrow are those of commit {commits[0]}, the others of {commits[-1]}."
    return f"""# The cost of an iteration over its bare network calls

{about(__doc__)}

{wrapped(f"{provenance(record)}.{before if len(commits) > 1 else ''}")}

{markdown([*head, *timed.values()], paired(networks[0], timed))}

An iteration of every method, on a network of five layers with LoRA of rank 4:

{markdown([*head, *ASKED.values()], paired(networks[1], ASKED))}
"""


def measured(a: argparse.Namespace) -> list[Facts]:
    """Return the rows of the fewstep that Python finds."""
    found = []
    for share in (True, False):
        found.append(measure(share, a))
        print(found[-1], flush=True)
    return found + [count(name, method) for name, method in methods().items()]


def of_checkout(checkout: Path, settings: Sequence[str]) -> list[Facts]:
    """Return the rows of another checkout, measured by this file in its own process."""
    own = Path(__file__).resolve()
    with tempfile.TemporaryDirectory() as to:
        path = os.pathsep.join([str(checkout.resolve() / "src"), str(own.parent)])
        command = [sys.executable, str(own), *settings, "--to", to]
        subprocess.run(command, cwd=checkout, env=os.environ | {"PYTHONPATH": path}, check=True)
        rows_found: list[Facts] = json.loads((Path(to) / "step_cost.json").read_text())["rows"]
    return rows_found


def main() -> None:
    """Measure shared and copied networks, count every method, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="emoji")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--before", type=Path, help="the folder of an older checkout")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the tables go")
    a = parser.parse_args()
    torch.manual_seed(0)
    settings = [t for name in ("teacher", "batch", "rank", "repeats") for t in (f"--{name}", str(getattr(a, name)))]
    found = [] if a.before is None else of_checkout(a.before, settings)
    found += measured(a)
    command = " ".join(
        ["python benchmarks/step_cost.py", *settings, *([] if a.before is None else ["--before CHECKOUT"])]
    )
    record = new_record("step_cost", command, found, [0], {})
    write_record(record, page(record), a.to)


if __name__ == "__main__":
    main()
