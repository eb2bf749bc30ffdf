"""Orders of convergence on an exact flow, and equality with diffusers' schedulers step for step."""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from torch import Tensor

from fewstep.backbones.miniature import scheduler as zero_snr_scheduler
from fewstep.backbones.toy import Gaussian
from fewstep.core import timegrid
from fewstep.core.prediction import ROWS, Split, split
from fewstep.core.schedule import EDM, VP, Flow, Schedule, expand
from fewstep.core.solvers import (
    DDIM,
    SOLVERS,
    Denoise,
    Solver,
    SolverHistory,
    State,
    heun,
    sample,
    solver_named,
    with_analytic_first_step,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = (1, 2, 4, 5, 8)
ROW_OF = {"epsilon": "eps", "v_prediction": "v"}

DATA = Gaussian(torch.tensor([0.3, -0.2], dtype=torch.float64), torch.tensor([0.25, 0.04], dtype=torch.float64))


def exact(schedule: Schedule) -> Denoise:
    return lambda x, t: DATA.denoise(schedule, x, t)


def by(solver: Solver) -> Callable[[Denoise, Schedule, Tensor, Tensor], Iterator[State]]:
    return lambda denoise, schedule, x, times: sample(denoise, schedule, x, times, solver)


WALKS = {"ddim": (by(DDIM), 1), "heun": (heun, 2), "dpmpp": (by(SOLVERS["dpmpp"]), 2)}


@pytest.mark.parametrize("process", ["edm", "flow"])
@pytest.mark.parametrize("name", WALKS)
def test_order_of_convergence(name: str, process: str) -> None:
    """Halving the step divides the error on the exact Gaussian flow by 2^order."""
    walk, order = WALKS[name]
    schedule, high, low = (EDM(), 5.0, 0.05) if process == "edm" else (Flow(), 0.9, 0.05)
    x = torch.randn((8, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t, s = (torch.full((8,), u, dtype=torch.float64) for u in (high, low))
    x = expand(schedule.sigma(t), x) * x
    truth = DATA.flow(schedule, x, t, s)
    errors = []
    for n in (64, 128, 256):
        times = torch.linspace(high ** (1 / 3), low ** (1 / 3), n + 1, dtype=torch.float64) ** 3
        *_, last = walk(exact(schedule), schedule, x, times)
        errors.append((last.x - truth).abs().max().item())
    seen = [math.log2(a / b) for a, b in pairwise(errors)]
    assert seen == pytest.approx([order, order], abs=0.15), errors


NO_SIGNAL = VP(torch.linspace(1, 0, 1001, dtype=torch.float64)[1:] ** 2)


@pytest.mark.parametrize("schedule", [Flow(), NO_SIGNAL])
def test_heun_from_noise_without_signal(schedule: Schedule) -> None:
    """alpha is 0 at the first time: finite, from the exact start, and still of second order."""
    x = torch.randn((8, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ends = (torch.full((8,), float(schedule.at(torch.tensor(u))), dtype=torch.float64) for u in (1.0, 0.2))
    truth, errors = DATA.flow(schedule, x, *ends), []
    for n in (10, 20, 40):
        times = timegrid.time_at(schedule, torch.linspace(1, 0.2, n + 1, dtype=torch.float64))
        *_, last = heun(exact(schedule), schedule, x, times)
        errors.append((last.x - truth).abs().max().item())
    assert [math.log2(a / b) for a, b in pairwise(errors)] == pytest.approx([2, 2], abs=0.3), errors


def network(x: Tensor, t: Tensor) -> Tensor:
    """An arbitrary output that depends on all that it may: nothing here is a sensible denoiser."""
    return torch.sin(3 * x + t[:, None] / 200) + 0.3 * x.roll(1, 1)


def ours(schedule: VP, prediction: str, steps: int, solver: Solver) -> list[State]:
    def denoise(x: Tensor, t: Tensor) -> Split:
        return split(network(x, t), x, expand(schedule.alpha(t), x), expand(schedule.sigma(t), x), ROWS[prediction])

    x = torch.randn((4, 3), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return list(sample(denoise, schedule, x, timegrid.uniform(schedule, steps), solver))


def theirs(scheduler: Any, steps: int) -> list[Tensor]:
    x = torch.randn((4, 3), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    scheduler.set_timesteps(steps)
    states = [x]
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t.double().expand(4)), t, x).prev_sample
        states.append(x)
    return states


def largest_gap(a: list[State], b: list[Tensor]) -> float:
    """Of all states, in units of the largest value."""
    assert len(a) == len(b)
    return max(((s.x - x).abs().max() / x.abs().max()).item() for s, x in zip(a, b, strict=True))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("prediction", ROW_OF)
def test_ddim_is_diffusers_ddim(prediction: str, steps: int) -> None:
    theirs_ = DDIMScheduler(
        **SD, prediction_type=prediction, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False
    )
    mine = ours(VP(theirs_.alphas_cumprod.double()), ROW_OF[prediction], steps, DDIM)
    assert largest_gap(mine, theirs(theirs_, steps)) < 2e-6  # their tables are float32


@pytest.mark.parametrize("steps", STEPS)
def test_ddim_is_diffusers_ddim_from_pure_noise(steps: int) -> None:
    """The schedule of the bundled teacher: zero terminal SNR, v-prediction."""
    theirs_ = zero_snr_scheduler()
    assert theirs_.alphas_cumprod[-1] == 0
    mine = ours(VP(theirs_.alphas_cumprod.double()), "v", steps, DDIM)
    assert largest_gap(mine, theirs(theirs_, steps)) < 2e-6


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("prediction", ROW_OF)
def test_dpmpp_is_diffusers_dpmpp(prediction: str, order: int, steps: int) -> None:
    theirs_ = DPMSolverMultistepScheduler(
        **SD, prediction_type=prediction, timestep_spacing="trailing", solver_order=order
    )
    mine = ours(
        VP(theirs_.alphas_cumprod.double()), ROW_OF[prediction], steps, DDIM if order == 1 else SOLVERS["dpmpp"]
    )
    assert largest_gap(mine, theirs(theirs_, steps)) < 5e-6  # their sigmas are float32


def zero_snr_dpmpp(order: int) -> Any:
    return DPMSolverMultistepScheduler.from_config(zero_snr_scheduler().config, solver_order=order)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("order", [1, 2])
def test_dpmpp_is_diffusers_dpmpp_on_its_own_table(order: int, steps: int) -> None:
    """diffusers writes 2^-24 where alpha_bar is zero; with that table the two agree."""
    theirs_ = zero_snr_dpmpp(order)
    assert theirs_.alphas_cumprod[-1] == 2**-24
    mine = ours(VP(theirs_.alphas_cumprod.double()), "v", steps, DDIM if order == 1 else SOLVERS["dpmpp"])
    assert largest_gap(mine, theirs(theirs_, steps)) < 5e-6


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("order", [1, 2])
def test_dpmpp_from_pure_noise_is_diffusers(order: int, steps: int) -> None:
    """DPM-Solver++ from pure noise is that of diffusers.

    On the true table only the first clean estimate differs, by alpha = 2^-12; the log-SNR of pure noise is diffusers'
    stand-in.
    """
    mine = ours(VP(zero_snr_scheduler().alphas_cumprod.double()), "v", steps, DDIM if order == 1 else SOLVERS["dpmpp"])
    assert largest_gap(mine, theirs(zero_snr_dpmpp(order), steps)) < 5e-4


def test_one_network_call_a_step_and_two_for_heun() -> None:
    times = torch.tensor([5, 1, 0.2, 0], dtype=torch.float64)
    x = torch.ones((2, 2), dtype=torch.float64)
    for walk, calls in ((by(DDIM), 3), (by(SOLVERS["dpmpp"]), 3), (heun, 5)):
        seen: list[float] = []

        def denoise(x: Tensor, t: Tensor, seen: list[float] = seen) -> Split:
            seen.append(t[0].item())
            return DATA.denoise(EDM(), x, t)

        states = list(walk(denoise, EDM(), x, times))
        assert len(seen) == calls
        assert [s.t[0].item() for s in states] == times.tolist()
        assert states[0].x0 is None
        assert states[-1].x0 is not None
        torch.testing.assert_close(states[-1].x, states[-1].x0)  # the last step lands on the clean estimate


def test_renoise_has_the_marginal_of_each_time() -> None:
    """With the exact denoiser of a point, every state is the diffused point: mean and variance to 5 standard errors."""
    point, schedule, times = 0.7, Flow(), torch.tensor([1, 0.6, 0.3, 0], dtype=torch.float64)
    x = torch.randn((20_000, 1), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def denoise(x: Tensor, t: Tensor) -> Split:
        return Split(torch.full_like(x, point), torch.full_like(x, float("nan")))  # its noise is not used

    rng = torch.Generator().manual_seed(1)
    fresh = solver_named("renoise", lambda like: torch.randn(like.shape, generator=rng, dtype=like.dtype))
    states = list(sample(denoise, schedule, x, times, fresh))
    for state in states[1:]:
        alpha, sigma = schedule.alpha(state.t)[0], schedule.sigma(state.t)[0]
        assert abs(state.x.mean() - alpha * point) <= 5 * sigma / len(x) ** 0.5 + 1e-12
        assert abs(state.x.var() - sigma**2) <= 5 * sigma**2 * (2 / len(x)) ** 0.5 + 1e-12
    assert len(states) == 4


def test_unknown_solver_lists_the_known() -> None:
    assert solver_named("dpmpp") == SOLVERS["dpmpp"]
    with pytest.raises(ValueError, match="solver: got 'euler', allowed are ddim, dpmpp, ipndm, renoise"):
        solver_named("euler")


def test_ipndm_integrates_cubic_noise_exactly_once_it_has_three_visits() -> None:
    """With `eps = t^3` on an even grid every step after the third is the exact integral; the first is Euler's."""

    def denoise(x: Tensor, t: Tensor) -> Split:
        eps = expand(t**3, x).expand_as(x)
        return Split(x - expand(t, x) * eps, eps)

    times = torch.linspace(4, 0, 9, dtype=torch.float64)
    states = list(sample(denoise, EDM(), torch.ones((2, 3), dtype=torch.float64), times, SOLVERS["ipndm"]))
    assert (states[1].x - states[0].x).unique().item() == pytest.approx(-0.5 * 4**3)
    for before, after in pairwise(states[3:]):
        exact_step = (after.t[0] ** 4 - before.t[0] ** 4) / 4
        torch.testing.assert_close(after.x - before.x, exact_step.expand(2, 3), atol=1e-12, rtol=1e-12)


def test_ipndm_keeps_the_state_that_it_steps_from() -> None:
    """iPNDM's direction splits the state that it steps from.

    Where pure noise holds no signal, its first estimate is the network's own.
    """
    schedule, seen = Flow(), []

    def watch(way: Split, t: Tensor, t_next: Tensor, past: SolverHistory) -> Split:
        seen.append((way, t))
        return way

    x = torch.randn((4, 3), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    states = list(sample(exact(schedule), schedule, x[:, :2], timegrid.uniform(schedule, 6), SOLVERS["ipndm"], watch))
    for (way, t), state in zip(seen, states[:-1], strict=True):
        torch.testing.assert_close(
            expand(schedule.alpha(t), x) * way.x0 + expand(schedule.sigma(t), x) * way.eps, state.x
        )


def test_a_correction_sees_the_whole_past_and_has_the_last_word() -> None:
    schedule, times = Flow(), timegrid.uniform(Flow(), 4)
    x, lengths = torch.ones((2, 2), dtype=torch.float64), []

    def shift(way: Split, t: Tensor, t_next: Tensor, past: SolverHistory) -> Split:
        lengths.append(len(past.steps))
        assert torch.equal(past.noise, x)
        assert all(bool((newer.t < older.t).all()) for newer, older in pairwise(past.steps))
        return Split(way.x0 + 1, way.eps)

    plain, moved = (list(sample(exact(schedule), schedule, x, times, DDIM, c)) for c in (None, shift))
    assert lengths == [0, 1, 2, 3]
    torch.testing.assert_close(moved[1].x - plain[1].x, torch.full((2, 2), 0.25, dtype=torch.float64))  # alpha at 0.75
    torch.testing.assert_close(moved[-1].x, moved[-1].x0)


@pytest.mark.parametrize("schedule", [EDM(), Flow(), VP(torch.linspace(0.999, 0.0, 1000, dtype=torch.float64))])
def test_the_first_direction_may_be_free(schedule: Schedule) -> None:
    calls = []

    def denoise(x: Tensor, t: Tensor) -> Split:
        calls.append(t[0].item())
        return exact(schedule)(x, t)

    x = schedule.start_std * torch.randn((3, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    list(sample(with_analytic_first_step(denoise, schedule), schedule, x, timegrid.uniform(schedule, 3)))
    assert len(calls) == 2
    t = torch.full((3,), schedule.t_max, dtype=torch.float64)
    first = with_analytic_first_step(denoise, schedule)(x, t)
    alpha, sigma = schedule.alpha(t)[0], schedule.sigma(t)[0]
    torch.testing.assert_close(first.eps, x / (alpha**2 + sigma**2).sqrt())
    torch.testing.assert_close(alpha * first.x0 + sigma * first.eps, x)
    later = torch.where(torch.arange(3) == 1, schedule.at(torch.tensor(0.5)), t)
    mixed, asked = with_analytic_first_step(denoise, schedule)(x, later), exact(schedule)(x, later)
    for got, own, network in zip(mixed, first, asked, strict=True):
        assert torch.equal(got[[0, 2]], own[[0, 2]])
        assert torch.equal(got[1], network[1])
    calls.clear()
    for got, own in zip(with_analytic_first_step(denoise, schedule, always=True)(x, t), first, strict=True):
        assert torch.equal(got, own)
    assert len(calls) == 1  # asked, and not heeded
