"""Ask of heads on the arena's teacher what they know of steps that were not trained.

    python benchmarks/arena_heads.py    # after arena.py's teacher; minutes; writes benchmarks/arena_heads.md and .json

A head corrects the directions of the frozen, unguided teacher of `arena.py`, or of its LoRA of rank 4, which is trained
with it: together they have less than 5 % of the teacher's weights. It is trained for 2 and 4 steps on the guided
teacher's trajectories and measured in 1 to 6. The span head has a row of weights for every trained step and is told the
fitted curve's coordinates at both ends of a step, the curve head has no rows; an untrained step gets the nearest step's
row, and coordinates that are taken away are zero. The shape is that of `shape.py`, second moments of the same
trajectories, without training. The error is `||x - x_teacher|| / ||x_teacher||` at the end, from the same noise, over
500 trajectories that were not used. Heads alone train for 200 iterations of batch 64, a LoRA for three times as many.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from arena_teacher import teacher_of
from fewstep.backbones.base import Backbone, denoiser
from fewstep.backbones.load import fingerprint
from fewstep.core import timegrid
from fewstep.core.guidance import Guidance
from fewstep.core.solvers import sample, solver_named
from fewstep.data.prompts import embed
from fewstep.data.trajectories import (
    Trajectories,
    TrajectoryConfig,
    generate_trajectories,
    guided_teacher,
    run_to_completion,
)
from fewstep.heads.head import CurveHead, Head, Rows, SharedHead, SpanHead, facts_of
from fewstep.methods.trajectory_imitation import TrajectoryImitation
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.training.loop import TrainConfig, distill
from fewstep.zoo.pixel_data import FASHION
from records import (
    CLOCK,
    Record,
    about,
    markdown,
    new_record,
    origin,
    provenance,
    read_record,
    spread,
    wrapped,
    write_record,
)

TRAINED, COUNTS, FRESH, GUIDANCE, SEEDS = (2, 4), (1, 2, 3, 4, 5, 6), 500, Guidance(scale=1.5), (0, 1, 2)
FINE = 60  # steps of the trajectories, which all counts divide
RANK, LONGER = 4, 3  # of a LoRA, and its iterations next to a head's
AMOUNTS = (500, 50, 5000)


class Longer(Rows):
    """Weights of the nearest trained step, and none on tokens that no trained step has."""

    def forward(self, t: Tensor, t_next: Tensor, count: int) -> Tensor:
        """Return the weights of each step, [B, count]."""
        found = super().forward(t, t_next, count)
        return nn.functional.pad(found, (0, count - found.shape[1]))


class UntoldSpan(SpanHead):
    """A span head that is told no coordinates."""

    def place(self, t: Tensor) -> Tensor:
        return torch.zeros(len(t), 3, device=t.device)


class UntoldCurve(CurveHead):
    """A curve head that is told no coordinates."""

    def place(self, t: Tensor) -> Tensor:
        return torch.zeros(len(t), 3, device=t.device)


Kind = type[SpanHead | CurveHead | SharedHead]


def serving_any(head: Head) -> Head:
    """Return a head that serves any step, by the nearest trained step's row where it has rows."""
    if isinstance(head, SpanHead | SharedHead):
        head.rows = Longer(head.facts.grids)
    return head


HEADS: dict[str, Kind] = {
    "rows and coordinates (span head)": SpanHead,
    "rows, no coordinates": UntoldSpan,
    "coordinates, no rows (curve head)": CurveHead,
    "neither": UntoldCurve,
    "rows alone, the same for all samples (PAS)": SharedHead,
}


def walked(teacher: Backbone, count: int, seed: int) -> Trajectories:
    """Return trajectories of the guided teacher with their states at all fine times."""
    times = timegrid.uniform(teacher.schedule, FINE)
    config = TrajectoryConfig(count=count, steps=FINE, seed=seed)
    data = embed(teacher, list(FASHION), None, fingerprint(teacher.module))
    source = guided_teacher(teacher, data.unconditional(torch.device("cpu")), config, times, GUIDANCE)
    return run_to_completion(generate_trajectories(teacher, data, config, times, source, None, ""))


def error(x: Tensor, goal: Tensor) -> float:
    """Return the mean relative distance to the teacher's end."""
    return float(((x - goal).flatten(1).norm(dim=1) / goal.flatten(1).norm(dim=1)).mean())


def measured(
    teacher: Backbone, fresh: Trajectories, head: Head | None, solver: str = "ddim", roles: Roles | None = None
) -> dict[int, float]:
    """Return the errors of a head in every step count, on the teacher or on a student."""
    cond = fresh.embeddings.all(torch.device("cpu"))
    found = {}
    with torch.no_grad():
        for k in COUNTS:
            times, rule = timegrid.uniform(teacher.schedule, k), solver_named(solver)
            network = denoiser(teacher, teacher.module, cond) if roles is None else roles.denoise("student", cond)
            *_, last = sample(network, teacher.schedule, fresh.states[:, 0], times, rule, head)
            found[k] = error(last.x, fresh.states[:, -1])
    return found


def trained(teacher: Backbone, paths: Trajectories, kind: Kind | None, rank: int, seed: int, iterations: int) -> Roles:
    """Return a student with a head and a LoRA, or with one of them, that is trained on trajectories."""
    method = TrajectoryImitation(steps=TRAINED, condition=False, guidance=GUIDANCE)
    grids = [method.times(teacher.schedule, k) for k in TRAINED]
    torch.manual_seed(seed)
    facts = facts_of(teacher.schedule, paths.whole, paths.grid, paths.states[:, -1], grids)
    head = None if kind is None else serving_any(kind(teacher.schedule, facts))
    roles = make_roles(teacher, RolesConfig(rank=rank), seed, head=head, fake=False)
    train = TrainConfig(iterations=iterations, batch=64, lr=1e-3 if rank else 2e-3, decay=iterations // 2, seed=seed)
    for _ in distill(roles, method, paths.embeddings, train, paths=paths):
        pass
    with torch.no_grad():
        for name, p in roles.trained["student"].items():
            p.copy_(roles.average[name])
    return roles


def shape_errors(teacher: Backbone, paths: Trajectories, fresh: Trajectories, rank: int) -> dict[int, float]:
    """Return the errors of sampling by the second moments of trajectories.

    States x less alpha c and estimates less c of the mean clean state c; a step lands by DDIM with the estimate that
    least squares give. `rank` leading functions of time are kept, 0: all.
    """
    schedule, cpu = teacher.schedule, torch.device("cpu")
    grid, centre = paths.times, paths.states[:, -1].mean(0)
    alpha, sigma = schedule.alpha(grid), schedule.sigma(grid)

    def estimates(states: Tensor, of: Trajectories, j: int) -> Tensor:
        denoise = denoiser(teacher, teacher.module, of.embeddings.all(cpu))
        with torch.no_grad():
            return (denoise(states, grid[j].expand(len(states))).x0 - centre).double()

    seen = torch.stack([estimates(paths.states[:, j], paths, j) for j in range(FINE)], 1)
    moved = paths.states - alpha.view(1, -1, *[1] * centre.ndim).float() * centre
    whole = torch.cat([seen, moved.double(), paths.states[:, :1].double()], 1).flatten(2)
    second = torch.einsum("nid,njd->ij", whole, whole) / len(whole)
    size = second.diagonal().sqrt()
    if rank:
        values, vectors = torch.linalg.eigh(second / (size[:, None] * size))
        second = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T * (size[:, None] * size)
    found = {}
    for count in COUNTS:
        x, stride, tokens, used = fresh.states[:, 0], FINE // count, list[Tensor](), list[int]()
        for start in range(0, FINE, stride):
            end = start + stride
            tokens.append(estimates(x, fresh, start))
            used.append(start)
            use = [*used, 2 * FINE + 1]
            gram = second[use][:, use] / (size[use][:, None] * size[use]) + 1e-5 * torch.eye(len(use))
            r = sigma[end] / sigma[start]
            share = alpha[end] - r * alpha[start]
            wanted = (second[FINE + end] - r * second[FINE + start])[use] / share
            weights = torch.linalg.solve(gram, wanted / size[use]) / size[use]
            x0 = sum(w * z for w, z in zip(weights, [*tokens, fresh.states[:, 0].double()], strict=True))
            moved_x = x.double() - alpha[start] * centre
            x = (alpha[end] * centre + r * moved_x + share * x0).float()
        found[count] = error(x, fresh.states[:, -1])
    return found


def plans(a: argparse.Namespace) -> Iterator[tuple[str, int | None, int | None, Callable[[], Mapping[int, float]]]]:
    """Return (method, trajectories, seed, what measures it) of every row."""
    teacher = teacher_of(a.out / "painter")
    fresh = walked(teacher, FRESH, 10**6)
    for solver, label in (("ddim", "DDIM"), ("dpmpp", "DPM-Solver++(2M)"), ("ipndm", "iPNDM")):
        yield label, None, None, partial(measured, teacher, fresh, None, solver)
    for seed, count in ((seed, count) for count in AMOUNTS for seed in SEEDS):
        own = walked(teacher, count, 10_000 * (seed + 1))
        for rank in (3, 6) if count < max(AMOUNTS) else ():
            yield f"shape, {rank} coordinates", count, seed, partial(shape_errors, teacher, own, fresh, rank)
        for label, kind in HEADS.items():
            yield label, count, seed, partial(headed, teacher, own, fresh, kind, 0, seed, a.iterations)
        for label, tuned in {"alone": None, **HEADS}.items():
            one = partial(headed, teacher, own, fresh, tuned, RANK, seed, LONGER * a.iterations)
            yield f"LoRA {label}" if tuned is None else f"LoRA and {label}", count, seed, one


def headed(
    teacher: Backbone,
    paths: Trajectories,
    fresh: Trajectories,
    kind: Kind | None,
    rank: int,
    seed: int,
    iterations: int,
) -> dict[int, float]:
    """Train a student and return its errors."""
    roles = trained(teacher, paths, kind, rank, seed, iterations)
    head = roles.head
    assert head is None or isinstance(head, Head)
    return measured(teacher, fresh, head, roles=roles)


def page(record: Record) -> str:
    """Return the page of a record."""
    lines = []
    for method, count in dict.fromkeys((r["method"], r["trajectories"]) for r in record.rows):
        own = [r for r in record.rows if (r["method"], r["trajectories"]) == (method, count)]
        cells = [spread([r["error"][str(k)] for r in own], 3) for k in COUNTS]
        seconds = f"{statistics.mean(r['seconds'] for r in own):.0f}"
        lines.append([method, "" if count is None else count, seconds, *cells, len(own)])
    lines.sort(key=lambda line: int(line[1] or 0))
    steps = [f"{k} step{'s' if k > 1 else ''}{', trained' if k in TRAINED else ''}" for k in COUNTS]
    table = markdown(["method", "trajectories", "CPU s", *steps, "seeds"], lines)
    return f"# Heads and untrained steps\n\n{about(__doc__)}\n\n{wrapped(provenance(record))}\n\n{table}\n"


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("runs/arena"), help="where arena.py keeps its teacher")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    torch.set_num_threads(1)
    kept = read_record(a.to / "arena_heads.json")
    found = [] if kept is None else list(kept.rows)

    done = {(r["method"], r["trajectories"], r["seed"]) for r in found}
    for method, count, seed, measure in plans(a):
        if (method, count, seed) in done:
            continue
        began = CLOCK()
        row = {"method": method, "trajectories": count, "seed": seed, "error": measure(), "seconds": CLOCK() - began}
        found.append(json.loads(json.dumps(row | origin())))
        common = {"fresh": FRESH, "iterations": a.iterations}
        record = new_record("arena_heads", "python benchmarks/arena_heads.py", found, SEEDS, common)
        write_record(record, page(record), a.to)
        print(row, flush=True)


if __name__ == "__main__":
    main()
