"""What is said of trajectories whose shape is known, and of walks beside them."""

import json
import math

import pytest
import torch
from torch import Tensor

from fewstep.core.schedule import EDM
from fewstep.heads.head import unknown
from fewstep.report.trajectories import SHOWN, shape_of, trajectory_errors

SCHEDULE = EDM()
GRID = SCHEDULE.at(torch.linspace(1, 0, 41, dtype=torch.float64))
S = 1 - SCHEDULE.fraction(GRID)


def along(coordinates: Tensor, samples: int, length: float = 3.0) -> Tensor:
    """Trajectories [samples, F, 2, 4, 4] with these coordinates [F, k], each along k directions of its own."""
    rng = torch.Generator().manual_seed(0)
    frames = torch.linalg.qr(torch.randn((samples, 32, coordinates.shape[1]), generator=rng, dtype=torch.float64))[0]
    return (length * torch.einsum("fk,ndk->nfd", coordinates, frames)).unflatten(2, (2, 4, 4))


def test_what_lies_in_a_plane_bends_in_one_direction() -> None:
    """Through noise, data and one direction beside the line between them: nothing is left for a second."""
    arch = 0.2 * torch.sin(math.pi * S)
    shape = shape_of(SCHEDULE, along(torch.stack([1 - S, arch], 1), 60), GRID)
    assert shape["unexplained"] == pytest.approx([0, 0, 0], abs=1e-12)
    torch.testing.assert_close(
        torch.tensor(shape["mean"]).double(), torch.stack([1 - S, arch, torch.zeros_like(S)], 1), atol=1e-6, rtol=0
    )
    assert min(shape["r2"][:2]) > 0.999
    assert len(shape["samples"]) == SHOWN and len(shape["samples"][0]) == len(GRID)
    assert json.loads(json.dumps(shape, allow_nan=False)) == shape


def test_each_direction_explains_its_share() -> None:
    """Of three that do not correlate, with energies 6, 3 and 1, the first leaves 40 %, two 10 %, three nothing."""
    waves = [torch.sin(k * math.pi * torch.arange(41) / 40).double() * w**0.5 for k, w in ((1, 6), (2, 3), (3, 1))]
    straight = unknown((2, 4, 4), [GRID]).curve  # a fit is of no interest here, and takes its time
    shape = shape_of(SCHEDULE, along(torch.stack([1 - S, *(0.05 * w for w in waves)], 1), 5), GRID, straight)
    assert shape["unexplained"] == pytest.approx([0.4, 0.1, 0], abs=1e-6)
    assert shape["r2"] == [0, 0, 0]


def test_a_walk_strays_by_its_distance_in_units_of_the_data() -> None:
    goals = torch.randn((6, 4, 2, 4, 4), generator=torch.Generator().manual_seed(1))
    times = GRID[[0, 10, 20, 40]]
    beside = goals.clone()
    beside[:, 1] += 2 * goals[:, 3]
    found = trajectory_errors(
        SCHEDULE, goals, times, {"same": (times, goals), "beside": (times[[0, 1, 3]], beside[:, [0, 1, 3]])}
    )
    assert found["same"]["error"] == [0, 0, 0, 0]
    assert found["beside"]["error"] == pytest.approx([0, 2, 0])
    assert found["beside"]["s"] == pytest.approx([0, 0.25, 1])
