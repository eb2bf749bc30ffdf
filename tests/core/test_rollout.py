"""The rollout to a drawn segment is the sampler's own trajectory, and costs no more than it must."""

import pytest
import torch
from torch import Tensor

from fewstep.core import timegrid
from fewstep.core.prediction import Split
from fewstep.core.rollout import segment_starts
from fewstep.core.schedule import VP, Flow, expand
from fewstep.core.solvers import SOLVERS, Denoise, SolverHistory, sample, step

TABLE = VP(torch.linspace(0.999, 0.005, 1000, dtype=torch.float64))
DETERMINISTIC = [name for name, solver in SOLVERS.items() if not solver.stochastic]


def network(cond: Tensor, calls: list[int]) -> Denoise:
    """A nonlinear denoiser that depends on each sample's condition and counts the rows that it is asked for."""

    def denoise(x: Tensor, t: Tensor) -> Split:
        assert len(x) == len(t) == len(cond)
        assert not torch.is_grad_enabled()
        calls.append(len(x))
        x0 = torch.tanh(x + cond) + expand(t, x) / 2000
        return Split(x0, (x - expand(TABLE.alpha(t), x) * x0) / expand(TABLE.sigma(t), x))

    return denoise


def run(update: str, segments: Tensor, steps: int) -> tuple[Tensor, list[Tensor], list[int]]:
    rng = torch.Generator().manual_seed(0)
    noise, cond = torch.randn((2, len(segments), 3), generator=rng, dtype=torch.float64)
    kept = noise.clone()
    times, calls = timegrid.uniform(TABLE, steps), list[int]()
    with torch.no_grad():
        full = [s.x for s in sample(network(cond, []), TABLE, noise, times, SOLVERS[update])]
    starts, _ = segment_starts(
        lambda _, rows: network(cond[rows], calls), TABLE, noise, times, segments, SOLVERS[update]
    )
    assert torch.equal(noise, kept)
    return starts, full, calls


@pytest.mark.parametrize("update", DETERMINISTIC)
@pytest.mark.parametrize("segments", [[0, 1, 1, 2, 2, 3], [0, 0, 0], [3, 3], [0, 3], [1], [2, 2, 3]])
def test_starts_are_the_full_rollout(update: str, segments: list[int]) -> None:
    starts, full, _ = run(update, torch.tensor(segments), steps=4)
    for i, k in enumerate(segments):
        torch.testing.assert_close(starts[i], full[k][i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("update", DETERMINISTIC)
def test_the_next_step_lands_on_the_full_rollout(update: str) -> None:
    """A multistep solver goes on from the estimate that came with the start."""
    segments, times = torch.tensor([0, 0, 1, 2, 3]), timegrid.uniform(TABLE, 4)
    noise, cond = torch.randn((2, 5, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        full = [s.x for s in sample(network(cond, []), TABLE, noise, times, SOLVERS[update])]
        starts, past = segment_starts(
            lambda _, rows: network(cond[rows], []), TABLE, noise, times, segments, SOLVERS[update]
        )
        here = network(cond, [])(starts, times[segments])
        landed = step(SOLVERS[update], TABLE, here, times[segments], times[segments + 1], past)[0]
    for i, k in enumerate(segments.tolist()):
        torch.testing.assert_close(landed[i], full[k + 1][i], rtol=0, atol=1e-12)


@pytest.mark.parametrize("segments", [[0, 1, 1, 2, 2, 3], [0, 0, 0], [3, 3], [0, 3], [1]])
def test_only_the_rows_that_need_it_are_evaluated(segments: list[int]) -> None:
    _, _, calls = run("ddim", torch.tensor(segments), steps=4)
    assert calls == [sum(s > k for s in segments) for k in range(max(segments))]
    assert sum(calls) == sum(segments)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_balanced_batch_costs_half_of_k_minus_one(steps: int) -> None:
    segments = timegrid.draw_segments(16, steps, torch.Generator().manual_seed(0))
    _, _, calls = run("ddim", segments, steps)
    assert sum(calls) / 16 == (steps - 1) / 2


def test_there_is_no_gradient() -> None:
    noise, weight = torch.randn((4, 2), generator=torch.Generator().manual_seed(0)), torch.ones(2, requires_grad=True)
    times = timegrid.uniform(Flow(), 2)
    starts, past = segment_starts(
        lambda _, __: lambda x, t: Split(x * weight, x), Flow(), noise, times, torch.tensor([0, 0, 1, 1])
    )
    assert not starts.requires_grad


@pytest.mark.parametrize("solver", DETERMINISTIC)
def test_a_correction_meets_the_same_past_in_a_segment_as_on_the_way(solver: str) -> None:
    """Its answer depends on all that it is given: starting noise, times, and every visit."""

    def correct(way: Split, t: Tensor, t_next: Tensor, past: SolverHistory) -> Split:
        extra = 0.1 * past.noise + expand(t_next / 1e4, way.x0)
        for age, visit in enumerate(past.steps, 1):
            extra = extra + expand((visit.t > t) / (10 * age), way.x0) * (visit.used.x0 - 0.5 * visit.pred.eps)
        return Split(way.x0 + extra, way.eps)

    segments, times = torch.tensor([0, 0, 1, 2, 3, 3]), timegrid.uniform(TABLE, 4)
    noise, cond = torch.randn((2, 6, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        full = [s.x for s in sample(network(cond, []), TABLE, noise, times, SOLVERS[solver], correct)]
        starts, past = segment_starts(
            lambda _, rows: network(cond[rows], []), TABLE, noise, times, segments, SOLVERS[solver], correct
        )
        here = network(cond, [])(starts, times[segments])
        landed, _ = step(SOLVERS[solver], TABLE, here, times[segments], times[segments + 1], past, correct)
    for i, k in enumerate(segments.tolist()):
        torch.testing.assert_close(starts[i], full[k][i], rtol=0, atol=1e-12)
        torch.testing.assert_close(landed[i], full[k + 1][i], rtol=0, atol=1e-12)
