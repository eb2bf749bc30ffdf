"""Every prediction type is one row of a 2x2 system, and solving it undoes it."""

import math

import pytest
import torch
from torch import Tensor

from fewstep.core.prediction import ROWS, Row, edm_inputs, edm_row, row_named, split, target
from fewstep.core.schedule import EDM, VP, Flow, Schedule, diffuse, expand

TABLE = VP((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))
TIMES: dict[str, tuple[Schedule, Tensor]] = {
    "vp": (TABLE, torch.tensor([0.0, 19, 400, 749, 999])),
    "flow": (Flow(), torch.tensor([0.02, 0.25, 0.5, 0.75, 0.98], dtype=torch.float64)),
    "edm": (EDM(), torch.tensor([0.02, 0.5, 1, 10, 80], dtype=torch.float64)),
}
CASES = [(s, r) for s in TIMES for r in ROWS if r != "edm" or s == "edm"]


def made_up(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    x0, eps = torch.randn((2, len(t), 3, 4, 4), generator=rng, dtype=torch.float64)
    return x0, eps, diffuse(schedule, x0, t, eps), expand(schedule.alpha(t), x0), expand(schedule.sigma(t), x0)


@pytest.mark.parametrize(("process", "name"), CASES)
def test_split_undoes_target(process: str, name: str) -> None:
    schedule, t = TIMES[process]
    x0, eps, x, alpha, sigma = made_up(schedule, t)
    got = split(target(x0, eps, alpha, sigma, ROWS[name]), x, alpha, sigma, ROWS[name])
    torch.testing.assert_close(got.x0, x0, rtol=0, atol=1e-10)
    torch.testing.assert_close(got.eps, eps, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("process", "name"), CASES)
def test_an_estimate_always_adds_up_to_its_state(process: str, name: str) -> None:
    """Whatever the network says, alpha x0 + sigma eps is the state it was given."""
    schedule, t = TIMES[process]
    _, _, x, alpha, sigma = made_up(schedule, t)
    got = split(torch.sin(3 * x), x, alpha, sigma, ROWS[name])
    torch.testing.assert_close(alpha * got.x0 + sigma * got.eps, x, rtol=1e-11, atol=1e-10)


def test_rows_say_what_their_names_say() -> None:
    schedule, t = TIMES["vp"]
    x0, eps, x, alpha, sigma = made_up(schedule, t)
    said = {name: target(x0, eps, alpha, sigma, ROWS[name]) for name in ("x0", "eps", "v", "flow")}
    torch.testing.assert_close(said["x0"], x0)
    torch.testing.assert_close(said["eps"], eps)
    torch.testing.assert_close(said["v"], alpha * eps - sigma * x0)
    torch.testing.assert_close(said["flow"], eps - x0)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_row_is_the_preconditioning(sigma_data: float) -> None:
    """`D = c_skip x + c_out F` with the constants of EDM, tab. 1."""
    schedule, t = TIMES["edm"]
    _, _, x, alpha, sigma = made_up(schedule, t)
    raw = torch.sin(x)
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma_data**2 + sigma**2).sqrt()
    torch.testing.assert_close(
        split(raw, x, alpha, sigma, edm_row(sigma_data)).x0, c_skip * x + c_out * raw, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_s_network_sees_and_says_numbers_of_unit_size(sigma_data: float) -> None:
    """What the preconditioning is for (EDM, app. B.6): unit variance of inputs and of targets at every noise level."""
    n, rng = 40_000, torch.Generator().manual_seed(0)
    data, eps = torch.randn((2, n), generator=rng, dtype=torch.float64)
    for level in (0.01, 0.5, 80.0):
        x0, sigma = sigma_data * data[:, None], torch.full((n,), level, dtype=torch.float64)
        inputs, noise = edm_inputs(x0 + level * eps[:, None], sigma, sigma_data)
        wanted = target(x0, eps[:, None], torch.ones(n, 1, dtype=torch.float64), sigma[:, None], edm_row(sigma_data))
        assert inputs.var().item() == pytest.approx(1, abs=0.04)
        assert wanted.var().item() == pytest.approx(1, abs=0.04)
        assert noise.tolist()[:1] == [pytest.approx(math.log(level) / 4)]


def test_a_row_of_edm_has_the_sigma_data_that_is_said_and_the_sign() -> None:
    one, sigma = torch.ones(3, dtype=torch.float64), torch.tensor([0.1, 1.0, 9.0], dtype=torch.float64)
    assert all(
        torch.equal(p, q) for p, q in zip(row_named("edm", 1.3)(one, sigma), edm_row(1.3)(one, sigma), strict=True)
    )
    assert not torch.equal(row_named("edm")(one, sigma)[0], edm_row(1.3)(one, sigma)[0])
    assert all(
        torch.equal(p, -q) for p, q in zip(edm_row(1.3, -1.0)(one, sigma), edm_row(1.3)(one, sigma), strict=True)
    )


def test_guidance_commutes_with_the_solve() -> None:
    schedule, t = TIMES["vp"]
    _, _, x, alpha, sigma = made_up(schedule, t)
    null, cond, w = torch.sin(x), torch.cos(2 * x), 3.5

    def x0_of(m: Tensor, row: Row = ROWS["v"]) -> Tensor:
        return split(m, x, alpha, sigma, row).x0

    torch.testing.assert_close(x0_of(null + w * (cond - null)), x0_of(null) + w * (x0_of(cond) - x0_of(null)))


def test_v_at_pure_noise_is_minus_x0() -> None:
    """Zero terminal SNR: alpha = 0, where v still determines x0 and the rest is the state itself."""
    x, zero = torch.randn((2, 3), generator=torch.Generator().manual_seed(0)), torch.zeros(2, 1)
    got = split(torch.full_like(x, -0.3), x, zero, zero + 1, ROWS["v"])
    assert torch.equal(got.x0, torch.full_like(x, 0.3))
    assert torch.equal(got.eps, x)


def test_unknown_prediction_lists_the_known() -> None:
    with pytest.raises(ValueError, match="prediction: got 'velocity', allowed are x0, eps, v, flow, edm"):
        row_named("velocity")
