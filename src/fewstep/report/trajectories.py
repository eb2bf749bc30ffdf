"""What a teacher's trajectories look like: their common shape and its fit, and how far few steps of a solver stray from them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.schedule import Schedule
from ..heads.curve import Curve, fit_curve, own_coordinates

SHOWN = 48  # samples of which a report has the curves
DIGITS = 6  # of their coordinates, whose unit is the length of the way


def shape_of(schedule: Schedule, whole: Tensor, grid: Tensor, curve: Curve | None = None) -> dict[str, Any]:
    """Of trajectories `whole [n, F, ...]` at the teacher's `grid [F]`, as plain numbers for a report.

    `s`: how far along; `mean`, `fit` and some `samples`: coordinates [F, 3]; `r2` of each fit; `unexplained`: what share of the part
    orthogonal to x_T - x_0 its first one, two and three principal components leave over. `curve` is their fit where there is one.
    """
    s = 1 - schedule.fraction(grid)
    own, left = own_coordinates(whole.flatten(2))
    c = own.mean(0)
    curve = curve or fit_curve(s, c)
    return {
        "s": s.tolist(), "mean": c.tolist(), "fit": curve.at(s).tolist(), "r2": curve.r2.tolist(),
        "samples": own[:SHOWN].round(decimals=DIGITS).tolist(), "unexplained": left.mean(0).tolist(),
    }  # fmt: skip


def trajectory_errors(
    schedule: Schedule, goals: Tensor, times: Tensor, walks: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[str, dict[str, list[float]]]:
    """Cumulative error of walks along the way: `||x - x_teacher|| / ||x_teacher, clean||`, averaged over samples.

    goals [n, J, ...] at times [J]; each walk is (its times [K + 1], states [n, K + 1, ...]) from the same noise.
    """
    found = {}
    size = goals[:, -1].flatten(1).norm(dim=1)
    for name, (own, states) in walks.items():
        places = [int((times - t).abs().argmin()) for t in own]
        apart = (states - goals[:, places]).flatten(2).norm(dim=2) / size[:, None]
        found[name] = {"s": (1 - schedule.fraction(own)).tolist(), "error": apart.mean(0).tolist()}
    return found
