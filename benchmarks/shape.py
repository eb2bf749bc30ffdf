"""Sample by the shape that a teacher's trajectories share, without any training.

    python benchmarks/shape.py      # a minute; writes benchmarks/shape.md and .json

The teacher is the exact mixture of `trajpl.py`. What all trajectories share is taken as second moments over time: those
of clean estimates and states, both less the data's mean, and of the starting noise. The clean estimate with which a
step of any length lands is then predicted from the present estimate, the earlier ones and the noise by least squares
(kriging): closed-form weights for any times, from a few trajectories, with nothing trained and nothing kept per step.
`coordinates` keeps so many leading functions of time of the normalised moments. The error is
`||x - x_teacher|| / ||x_teacher||` at the end, from the same noise, over 1,000 trajectories that were not used. Rows of
heads are trained, and stand in `trajpl.md`, whose teacher walks 64 steps instead of 60.
"""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fewstep.core import timegrid
from fewstep.core.prediction import Split
from fewstep.core.solvers import heun, sample, solver_named
from records import CLOCK, Facts, Record, about, markdown, new_record, provenance, read_record, wrapped, write_record
from trajpl_teachers import PROCESS, D, mixture

FINE, COUNTS, FRESH, SEEDS = 60, (1, 2, 3, 4, 5, 6), 1000, (0, 1, 2)  # FINE: steps, which all counts divide
GRID = timegrid.uniform(PROCESS, FINE)
MIXTURE = mixture()


def estimate(x: Tensor, t: Tensor) -> Split:
    """Return the exact prediction at x [N, D] and t [N]."""
    return MIXTURE.denoise(PROCESS, x.double(), t.double())


def walked(count: int, seed: int) -> Tensor:
    """Return the teacher's trajectories from fresh noise, [count, FINE + 1, D]."""
    rng = torch.Generator().manual_seed(seed)
    x = PROCESS.t_max * torch.randn((count, D), generator=rng, dtype=torch.float64)
    return torch.stack([s.x for s in heun(estimate, PROCESS, x, GRID)], 1)


@dataclass(frozen=True)
class Shape:
    """Second moments that trajectories share, over estimates [FINE], states [FINE + 1] and the noise [1]."""

    centre: Tensor  # mean of clean states [D]
    second: Tensor  # [2 FINE + 2, 2 FINE + 2]

    def weights(self, start: int, end: int, seen: Sequence[int]) -> Tensor:
        """Return the weights of the estimates at `seen` and of the noise, for a step from `start` to `end`.

        Indices are of the fine grid. They minimise the mean square error of the clean estimate that lands.
        """
        use = [*seen, 2 * FINE + 1]
        size = self.second.diagonal()[use].sqrt()
        gram = self.second[use][:, use] / (size[:, None] * size) + 1e-5 * torch.eye(len(use))
        r = PROCESS.sigma(GRID[end]) / PROCESS.sigma(GRID[start])
        wanted = (self.second[FINE + end] - r * self.second[FINE + start])[use] / (1 - r)
        return torch.linalg.solve(gram, wanted / size) / size

    def of_rank(self, rank: int) -> "Shape":
        """Return the shape of the leading functions of time alone."""
        size = self.second.diagonal().sqrt()
        values, vectors = torch.linalg.eigh(self.second / (size[:, None] * size))
        low = (vectors[:, -rank:] * values[-rank:]) @ vectors[:, -rank:].T
        return Shape(self.centre, low * (size[:, None] * size))

    def kept(self, rank: int) -> float:
        """Return the share of the normalised moments that the leading functions hold."""
        size = self.second.diagonal().sqrt()
        values = torch.linalg.eigvalsh(self.second / (size[:, None] * size))
        return float(values[-rank:].sum() / values.sum())


def shape_of(trajectories: Tensor) -> Shape:
    """Return the shape of trajectories [n, FINE + 1, D]."""
    n, centre = len(trajectories), trajectories[:, -1].mean(0)
    estimates = [estimate(trajectories[:, j], GRID[j].expand(n)).x0 - centre for j in range(FINE)]
    parts = [torch.stack(estimates, 1), trajectories - centre, trajectories[:, :1] / PROCESS.t_max]
    whole = torch.cat(parts, 1)
    return Shape(centre, torch.einsum("nid,njd->ij", whole, whole) / n)


def drawn(shape: Shape, noise: Tensor, steps: int) -> Tensor:
    """Sample in so many steps, [N, D], by the shape's weights."""
    x, tokens, seen, stride = noise, list[Tensor](), list[int](), FINE // steps
    for start in range(0, FINE, stride):
        t, t_next = GRID[start], GRID[start + stride]
        tokens.append(estimate(x, t.expand(len(x))).x0 - shape.centre)
        seen.append(start)
        parts = zip(shape.weights(start, start + stride, seen), [*tokens, noise / PROCESS.t_max], strict=True)
        x0 = shape.centre + sum(w * z for w, z in parts)
        r = PROCESS.sigma(t_next) / PROCESS.sigma(t)
        x = r * x + (1 - r) * x0
    return x


def error(x: Tensor, goal: Tensor) -> float:
    """Return the mean relative distance to the teacher's end."""
    return float(((x - goal).norm(dim=1) / goal.norm(dim=1)).mean())


def rows() -> list[Facts]:
    """Measure solvers and shapes."""
    fresh = walked(FRESH, 10**6)
    noise, goal = fresh[:, 0], fresh[:, -1]
    found: list[Facts] = []
    for name, label in (("ddim", "DDIM"), ("ipndm", "iPNDM"), ("dpmpp", "DPM-Solver++(2M)")):
        ends = {
            k: list(sample(estimate, PROCESS, noise, timegrid.uniform(PROCESS, k), solver_named(name)))[-1].x
            for k in COUNTS
        }
        found.append({"method": label, "seed": None, "error": {k: error(x, goal) for k, x in ends.items()}})
    for count in (50, 500, 3000):
        for seed in SEEDS:
            began = CLOCK()
            whole = shape_of(walked(count, seed))
            seconds = CLOCK() - began
            for rank in (0, 3, 4, 6):
                shape = whole.of_rank(rank) if rank else whole
                found.append({
                    "method": f"{count:,} trajectories, {f'{rank} coordinates' if rank else 'all moments'}",
                    "seed": seed, "seconds": seconds, "kept": whole.kept(rank) if rank else 1.0,
                    "error": {k: error(drawn(shape, noise, k), goal) for k in COUNTS},
                })  # fmt: skip
    return found


def page(record: Record) -> str:
    """Return the page of a record, with the trained heads of `trajpl.json` beside it."""
    lines, heads = [], read_record(Path(__file__).parent / "trajpl.json")
    for method in dict.fromkeys(r["method"] for r in record.rows):
        own = [r for r in record.rows if r["method"] == method]
        cells = [f"{statistics.mean(r['error'][str(k)] for r in own):.3f}" for k in COUNTS]
        kept = f"{100 * statistics.mean(r['kept'] for r in own):.2f}" if "kept" in own[0] else ""
        seconds = f"{statistics.mean(r['seconds'] for r in own):.1f}" if "seconds" in own[0] else "0"
        lines.append([method, kept, seconds, *cells, len(own)])
    for key, label in (("pas", "trained: a row of weights per step (PAS)"), ("head", "trained: span head")):
        own = [r for r in (heads.rows if heads else []) if (r["part"], r["key"]) == ("exact", key)]
        if own:
            cells = [f"{statistics.mean(r['measured']['error'][str(k)] for r in own):.3f}" for k in COUNTS]
            lines.append([label, "", f"{statistics.mean(r['seconds'] for r in own):.0f}", *cells, len(own)])
    head = ["method", "moments kept, %", "seconds", *(f"{k} call{'s' if k > 1 else ''}" for k in COUNTS), "seeds"]
    return f"""# The shape that trajectories share

{about(__doc__)}

{wrapped(provenance(record))}

{markdown(head, lines)}
"""


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    torch.set_num_threads(1)
    record = new_record("shape", "python benchmarks/shape.py", rows(), SEEDS, {"samples": FRESH})
    write_record(record, page(record), a.to)


if __name__ == "__main__":
    main()
