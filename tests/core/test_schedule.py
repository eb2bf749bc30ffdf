"""Forward processes and their transitions: q(x_t | x_s) q(x_s | x0) is q(x_t | x0)."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from fewstep.core.schedule import EDM, VP, Flow, Schedule, diffuse, expand, transition

TABLE = VP((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))
SPANS: dict[str, tuple[Schedule, list[float]]] = {
    "vp": (TABLE, [-1, 0, 249, 600, 999]),
    "flow": (Flow(), [0, 0.01, 0.25, 0.6, 1]),
    "edm": (EDM(), [0, 0.01, 0.5, 7, 80]),
}


@pytest.mark.parametrize("name", SPANS)
def test_ends(name: str) -> None:
    schedule, _ = SPANS[name]
    clean, noise = (torch.tensor([u], dtype=torch.float64) for u in (schedule.t_clean, schedule.t_max))
    assert schedule.alpha(clean).item() == 1
    assert schedule.sigma(clean).item() == 0
    assert schedule.start_std == pytest.approx(
        (schedule.alpha(noise) ** 2 + schedule.sigma(noise) ** 2).sqrt().item(), rel=1e-3
    )
    assert schedule.alpha(noise).item() < 0.07 * schedule.sigma(noise).item()


@pytest.mark.parametrize("most", [14.6146, 40.0, 80.0, 700.0])
def test_edm_s_grid_ends_exactly_where_it_is_said_to(most: float) -> None:
    """Not a rounding of a root and a power beyond it, where no time may lie."""
    schedule = EDM(t_max=most)
    assert schedule.at(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == [0, most]


def test_edm_may_start_with_the_spread_of_data() -> None:
    assert EDM(t_max=3.0).start_std == 3
    assert EDM(t_max=3.0, data_std=4.0).start_std == 5


@pytest.mark.parametrize("name", SPANS)
def test_coefficients_are_float64_whatever_the_time_is(name: str) -> None:
    schedule, times = SPANS[name]
    t = torch.tensor(times, dtype=torch.float32)
    assert schedule.alpha(t).dtype == schedule.sigma(t).dtype == torch.float64


@pytest.mark.parametrize("name", SPANS)
def test_transitions_compose(name: str) -> None:
    """For every s < u < t: s -> u -> t is s -> t, and clean -> s -> t is the marginal of t."""
    schedule, times = SPANS[name]
    triples = torch.combinations(torch.tensor(times, dtype=torch.float64), 3)
    s, u, t = triples.T
    (r_su, b_su), (r_ut, b_ut), (r_st, b_st) = (
        transition(schedule, s, u),
        transition(schedule, u, t),
        transition(schedule, s, t),
    )
    torch.testing.assert_close(r_su * r_ut, r_st)
    torch.testing.assert_close((r_ut * b_su) ** 2 + b_ut**2, b_st**2)
    torch.testing.assert_close(r_st * schedule.alpha(s), schedule.alpha(t))
    torch.testing.assert_close((r_st * schedule.sigma(s)) ** 2 + b_st**2, schedule.sigma(t) ** 2)


@pytest.mark.parametrize("name", SPANS)
def test_transition_samples_have_the_marginal(name: str) -> None:
    """The same as drawn numbers: mean and variance of x_t made in two steps, to 5 standard errors."""
    schedule, times = SPANS[name]
    n, rng = 40_000, torch.Generator().manual_seed(0)
    s, t = (torch.full((n,), times[i], dtype=torch.float64) for i in (2, 3))
    x0 = torch.full((n,), 0.7, dtype=torch.float64)
    first, second = torch.randn((2, n), generator=rng, dtype=torch.float64)
    r, beta = transition(schedule, s, t)
    x = expand(r, x0) * diffuse(schedule, x0, s, first) + expand(beta, x0) * second
    alpha, sigma = schedule.alpha(t)[0], schedule.sigma(t)[0]
    assert abs(x.mean() - alpha * 0.7) < 5 * sigma / n**0.5
    assert abs(x.var() / sigma**2 - 1) < 5 * (2 / n) ** 0.5


@pytest.mark.parametrize("name", SPANS)
def test_no_time_no_noise(name: str) -> None:
    """Exactly nothing happens from t to t (where there is a signal left to scale)."""
    schedule, times = SPANS[name]
    t = torch.tensor([u for u in times if schedule.alpha(torch.tensor(u)) > 0], dtype=torch.float64)
    r, beta = transition(schedule, t, t)
    assert torch.equal(r, torch.ones_like(t))
    assert torch.equal(beta, torch.zeros_like(t))


def test_table_is_read_at_its_indices() -> None:
    t = torch.tensor([0, 499, 999])
    torch.testing.assert_close(TABLE.alpha(t) ** 2, TABLE.alpha_bar[t])
    torch.testing.assert_close(TABLE.alpha(t) ** 2 + TABLE.sigma(t) ** 2, torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("table", [torch.tensor([0.1, 0.9]), torch.ones(2, 2), torch.tensor([0.9, float("nan")])])
def test_a_table_that_is_none_is_refused(table: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="schedule: alpha_bar must be a decreasing list of numbers"):
        VP(table)


def test_expand_multiplies_per_sample() -> None:
    x = torch.ones(2, 3, 4, 4)
    assert expand(torch.tensor([1.0, 2.0], dtype=torch.float64), x).shape == (2, 1, 1, 1)
    assert expand(torch.tensor([1.0, 2.0], dtype=torch.float64), x).dtype == x.dtype


def test_a_table_is_copied_to_a_device_once_and_never_from_a_fake_one() -> None:
    schedule = VP(TABLE.alpha_bar)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(schedule.alpha(torch.zeros(3, dtype=torch.float64)), FakeTensor)
    assert not schedule._levels
    there = torch.zeros(3, dtype=torch.float64, device="meta")
    schedule.alpha(there)
    kept = schedule._levels[there.device]
    schedule.sigma(there)
    assert schedule._levels[there.device] is kept
    assert "_levels" not in repr(schedule)
