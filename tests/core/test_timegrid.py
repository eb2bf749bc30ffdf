"""Grids land where the papers' students land; draws stay in their segment."""

import pytest
import torch
from diffusers import DDIMScheduler

from fewstep.core import timegrid
from fewstep.core.schedule import EDM, VP, Flow, Schedule

TABLE = VP(torch.linspace(0.999, 0.005, 1000, dtype=torch.float64))


@pytest.mark.parametrize(
    ("steps", "times"),
    [
        (1, [999, -1]),
        (2, [999, 499, -1]),
        (4, [999, 749, 499, 249, -1]),
        (5, [999, 799, 599, 399, 199, -1]),
        (8, [999, 874, 749, 624, 499, 374, 249, 124, -1]),
    ],
)
def test_uniform_on_a_table(steps: int, times: list[int]) -> None:
    assert timegrid.uniform(TABLE, steps).tolist() == times


def test_uniform_is_diffusers_trailing_for_every_step_count_in_use() -> None:
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    for steps in range(1, 33):  # beyond, diffusers' own sums round the other way here and there
        scheduler.set_timesteps(steps)
        assert timegrid.uniform(TABLE, steps)[:-1].tolist() == scheduler.timesteps.tolist()


def test_uniform_on_a_continuum() -> None:
    torch.testing.assert_close(timegrid.uniform(Flow(), 4), torch.tensor([1, 0.75, 0.5, 0.25, 0], dtype=torch.float64))


def test_shift_moves_towards_noise() -> None:
    """`s u / (1 + (s - 1) u)`: the ends stay, the rest rises for s > 1."""
    shifted = timegrid.uniform(Flow(), 4, shift=2.0)
    torch.testing.assert_close(shifted, torch.tensor([1, 6 / 7, 2 / 3, 2 / 5, 0], dtype=torch.float64))
    assert timegrid.uniform(TABLE, 4, shift=2.0).tolist() == [999, 856, 666, 399, -1]
    assert bool((timegrid.uniform(Flow(), 4, shift=0.5) <= timegrid.uniform(Flow(), 4)).all())


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_step_counts_that_cannot_be(steps: int) -> None:
    with pytest.raises(ValueError, match=f"steps: got {steps}, allowed are 1 to 1000"):
        timegrid.uniform(TABLE, steps)


def test_edms_grid_is_even_in_the_seventh_root_and_ends_clean() -> None:
    """EDM eq. 5 with points i = 0 .. K, the last of which is clean data."""
    times = timegrid.uniform(EDM(), 4)
    published = torch.tensor(
        [(80 ** (1 / 7) + i / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(4)], dtype=torch.float64
    )
    torch.testing.assert_close(times[:-1], published)
    assert times[-1].item() == 0
    assert timegrid.uniform(EDM(), 1).tolist() == [pytest.approx(80), 0]


@pytest.mark.parametrize("schedule", [TABLE, Flow(), EDM()])
def test_a_fraction_of_the_way_and_back(schedule: Schedule) -> None:
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(schedule.fraction(schedule.at(u)), u)
    ends = schedule.at(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([schedule.t_clean, schedule.t_max], dtype=torch.float64))
    assert bool((schedule.at(u).diff() > 0).all())


def test_check_takes_grids_and_nothing_else() -> None:
    good = timegrid.uniform(TABLE, 4)
    assert timegrid.check(TABLE, good) is good
    for bad in ([999, 999, -1], [999, 499], [1000, -1], [-1], [499, 999, -1], [[999, -1]]):
        with pytest.raises(ValueError, match="times: got"):
            timegrid.check(TABLE, torch.tensor(bad, dtype=torch.float64))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batch", [1, 2, 5, 16, 48])
def test_segments_are_even_and_sorted(batch: int, steps: int) -> None:
    for seed in range(50):
        segments = timegrid.draw_segments(batch, steps, torch.Generator().manual_seed(seed))
        counts = torch.bincount(segments, minlength=steps)
        assert len(counts) == steps
        assert segments.tolist() == sorted(segments.tolist())
        assert batch // steps <= counts.min() <= counts.max() <= -(-batch // steps)


@pytest.mark.parametrize(("batch", "steps"), [(1, 4), (3, 8), (5, 4)])
def test_every_segment_is_as_likely_over_time(batch: int, steps: int) -> None:
    n = 4000
    segments = torch.cat([timegrid.draw_segments(batch, steps, torch.Generator().manual_seed(i)) for i in range(n)])
    share, p = torch.bincount(segments, minlength=steps) / (n * batch), 1 / steps
    assert bool(((share - p).abs() < 5 * (p * (1 - p) / (n * batch)) ** 0.5).all())


@pytest.mark.parametrize("schedule", [TABLE, Flow(), EDM()])
def test_times_between_stay_in_the_segment(schedule: Schedule) -> None:
    times = timegrid.uniform(schedule, 4)
    segment = torch.arange(4).repeat_interleave(3000)
    low, high = times[segment + 1], times[segment]
    tau = timegrid.draw_between(schedule, low, high, torch.Generator().manual_seed(0))
    assert bool((tau > low).all())
    assert bool((tau <= high).all())
    bottom, top = schedule.fraction(low), schedule.fraction(high)
    u = (schedule.fraction(tau) - bottom) / (
        top - bottom
    )  # uniform, standard error 0.29 / sqrt(3000); on a table half a step of 250 higher
    means = torch.stack([u[segment == k].mean() for k in range(4)])
    assert bool((means - 0.5 - schedule.resolution / 500).abs().max() < 5 * 0.29 / 3000**0.5)


def test_times_on_a_table_are_all_of_its_integers() -> None:
    low, high = torch.full((2000,), 249.0, dtype=torch.float64), torch.full((2000,), 259.0, dtype=torch.float64)
    tau = timegrid.draw_between(TABLE, low, high, torch.Generator().manual_seed(0))
    assert sorted(set(tau.tolist())) == [float(i) for i in range(250, 260)]
