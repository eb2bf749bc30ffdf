"""The fake score's regression: what it converges to on laws that are known."""

import pytest
import torch
from torch import Tensor

from fewstep.backbones.toy import Gaussian
from fewstep.core.prediction import Split
from fewstep.core.schedule import VP, Flow, Schedule, diffuse, expand, transition
from fewstep.core.solvers import ddim_step
from fewstep.objectives.denoising import denoising, transition_target

TABLE = VP((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))
N = 200_000


def line(x: Tensor, y: Tensor) -> tuple[float, float]:
    """Slope and intercept of the least-squares line: the minimiser of `denoising` over linear functions."""
    solution = torch.linalg.lstsq(torch.stack([x, torch.ones_like(x)], 1), y[:, None]).solution
    return solution[0].item(), solution[1].item()


def constant(value: float) -> Tensor:
    return torch.full((N,), value, dtype=torch.float64)


def test_weights_are_per_sample_and_pixels_are_averaged() -> None:
    pred, goal = torch.zeros(2, 3, 2, 2), torch.stack([torch.full((3, 2, 2), 2.0), torch.full((3, 2, 2), 1.0)])
    assert denoising(pred, goal, torch.tensor([1.0, 10.0], dtype=torch.float64)).tolist() == pytest.approx([4, 10])


@pytest.mark.parametrize(("schedule", "tau"), [(TABLE, 300.0), (TABLE, 700.0), (Flow(), 0.6)])
def test_fake_score_of_a_gaussian_student(schedule: Schedule, tau: float) -> None:
    """Samples `N(0.4, 0.3)` diffused from clean data: least squares on the clean target finds their score, to 1 %."""
    student = Gaussian(torch.tensor([0.4], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64))
    rng, t = torch.Generator().manual_seed(0), constant(tau)
    x0, eps = student.draw(N, rng)[:, 0], torch.randn(N, generator=rng, dtype=torch.float64)
    x = diffuse(schedule, x0, t, eps)
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    at0, at1 = student.denoise(schedule, probe, t[:2]).x0[:, 0].tolist()
    f_star, _ = transition_target(schedule, x0, eps, constant(schedule.t_clean), t)
    for goal in (x0, f_star):  # from clean data the two targets are one
        slope, intercept = line(x, goal)
        assert slope == pytest.approx(at1 - at0, rel=0.01)
        assert intercept == pytest.approx(at0, abs=0.01)
    torch.testing.assert_close(f_star, x0)


def landed(schedule: Schedule, high: float, landing: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Landing state and clean estimate of a student that is the exact flow map of Gaussian data, under DDIM.

    `x_m` is a function of `x0_hat`, not a draw from q around it: the posterior that the clean target needs is a delta.
    """
    data = Gaussian(torch.tensor([0.4], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64))
    t, s = constant(high), constant(landing)
    x = diffuse(schedule, data.draw(N, rng), t, torch.randn((N, 1), generator=rng, dtype=torch.float64))
    x0 = data.flow(schedule, x, t, constant(schedule.t_clean))
    eps = (x - expand(schedule.alpha(t), x) * x0) / expand(schedule.sigma(t), x)
    return ddim_step(schedule, Split(x0, eps), s)[:, 0], x0[:, 0]


@pytest.mark.parametrize(
    ("schedule", "high", "landing", "tau"),
    [(TABLE, 999.0, 499.0, 750.0), (TABLE, 749.0, 499.0, 600.0), (Flow(), 1.0, 0.5, 0.75)],
)
def test_transition_target_finds_the_score_where_the_clean_one_does_not(
    schedule: Schedule, high: float, landing: float, tau: float
) -> None:
    """The transition target has the true slope; the clean target has another.

    The law of x_tau is Gaussian, so `f = (x_tau + sigma^2 score)/alpha` is a line. Its slope by least squares on
    either target:

    (999, 499, 750): true 0.404, transition 0.405, clean 0.259; (749, 499, 600): 0.467, 0.464, 0.413;
    flow: 0.531, 0.531, 0.324.
    """
    rng = torch.Generator().manual_seed(0)
    x_m, x0 = landed(schedule, high, landing, rng)
    t, s, e = constant(tau), constant(landing), torch.randn(N, generator=rng, dtype=torch.float64)
    r, beta = transition(schedule, s, t)
    x = r * x_m + beta * e
    alpha, sigma = schedule.alpha(t)[0], schedule.sigma(t)[0]
    true = ((1 - sigma**2 / (r[0] ** 2 * x_m.var() + beta[0] ** 2)) / alpha).item()
    f_star, weight = transition_target(schedule, x_m, e, s, t)
    assert bool((weight > 0).all())
    slopes = {"true": true, "transition": line(x, f_star)[0], "clean": line(x, x0)[0]}
    print({k: round(v, 3) for k, v in slopes.items()})
    assert slopes["transition"] == pytest.approx(true, rel=0.02)
    assert slopes["clean"] < 0.9 * true


def test_transition_target_is_the_noise_in_x0_form_and_its_weight_the_share_of_fresh_noise() -> None:
    t, tau = torch.tensor([499.0, 499, 499]), torch.tensor([500.0, 600, 749])
    x_m, e = torch.randn((2, 3, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    r, beta = transition(TABLE, t, tau)
    sigma, alpha = TABLE.sigma(tau), TABLE.alpha(tau)
    share = beta / sigma
    f_star, weight = transition_target(TABLE, x_m, e, t, tau, floor=0.2)
    assert share[0] < 0.2 < share[1]
    assert weight.tolist() == pytest.approx([0, share[1].item() ** 2, share[2].item() ** 2])
    assert torch.equal(f_star[0], x_m[0])  # unused, and finite

    x_tau = expand(r, x_m) * x_m + expand(beta, e) * e
    eps = expand(sigma / beta, e) * e
    torch.testing.assert_close(f_star[1:], ((x_tau - expand(sigma, e) * eps) / expand(alpha, e))[1:])


def test_transition_target_at_pure_noise_is_the_landing_state_made_clean() -> None:
    """alpha_tau = 0: x_tau says nothing about x_m, and the target is `x_m/alpha_m`, whose mean is the best there is."""
    zero_snr = VP(torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64))
    x_m, e = torch.randn((2, 2, 3), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    f_star, weight = transition_target(zero_snr, x_m, e, torch.tensor([1.0, 1.0]), torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(f_star[0], x_m[0] / 0.5**0.5)
    assert bool(torch.isfinite(f_star[1]).all())
    assert weight.tolist() == pytest.approx([1, 0])


def test_the_density_ratio_of_eq_7_is_a_weight_of_zero() -> None:
    """The density ratio of eq. 7 is zero in single precision.

    Its logarithm, drawn, is `-d log(sigma/beta)`. No time of four steps leaves anything of it for SD 1.5's latents,
    so it is dropped.
    """
    rng = torch.Generator().manual_seed(0)
    for low, high in ((249.0, 499.0), (499.0, 749.0), (749.0, 999.0)):
        t, tau = torch.tensor([low]), torch.tensor([high])
        r, beta = transition(TABLE, t, tau)
        sigma, alpha = TABLE.sigma(tau), TABLE.alpha(tau)
        x0, e_t, e = (torch.randn(16384, generator=rng, dtype=torch.float64) for _ in range(3))
        x_t = TABLE.alpha(t) * x0 + TABLE.sigma(t) * e_t
        x_tau = r * x_t + beta * e
        near, far = (
            (x_tau - mean).square() / (2 * s**2) + s.log() for mean, s in ((r * x_t, beta), (alpha * x0, sigma))
        )
        drawn, expected = float((near - far).sum()), float(-16384 * (sigma / beta).log())
        assert drawn == pytest.approx(expected, rel=0.2)
        assert (
            drawn < -400 and torch.tensor(drawn).float().exp() == 0
        )  # at its likeliest, the noisiest time of the segment
