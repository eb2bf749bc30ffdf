"""The shape of a teacher's trajectories, and errors of few steps.

The shape is what trajectories share, and its fit. The errors say how far few steps of a solver stray.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.schedule import Schedule
from ..heads.curve import Curve, fit_curve, own_coordinates

SHOWN = 48  # samples whose curves are in a report
DIGITS = 6  # of the coordinates, in units of ||x_T - x_0||


def shape_of(schedule: Schedule, whole: Tensor, grid: Tensor, curve: Curve | None = None) -> dict[str, Any]:
    """Return the common shape of trajectories, for a report.

    The trajectories `whole` `[n, F, ...]` are given at the teacher's times `grid` `[F]`. `curve` is their
    fit, where there is one already. The result has plain numbers:

    - `s`: the fraction of the trajectory at each time.
    - `mean`, `fit` and some `samples`: coordinates [F, 3].
    - `r2`: that of each coordinate's fit.
    - `unexplained`: the share of the part orthogonal to x_T - x_0 that one, two and three principal
      directions of each trajectory leave over.
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
    """Return the cumulative error of few steps along the trajectory.

    The error is `||x - x_teacher|| / ||x_teacher, clean||`, averaged over samples. `goals` `[n, J, ...]` are
    the teacher's states at `times` `[J]`. Each of `walks` has its own times `[K + 1]` and its states
    `[n, K + 1, ...]` from the same noise.
    """
    found = {}
    size = goals[:, -1].flatten(1).norm(dim=1)
    for name, (own, states) in walks.items():
        places = [int((times - t).abs().argmin()) for t in own]
        apart = (states - goals[:, places]).flatten(2).norm(dim=2) / size[:, None]
        found[name] = {"s": (1 - schedule.fraction(own)).tolist(), "error": apart.mean(0).tolist()}
    return found
