"""Weights over time."""

import pytest
import torch

from fewstep.core.prediction import Row, edm_row, row_named, split, target
from fewstep.core.schedule import EDM, VP, Flow, Schedule, diffuse
from fewstep.core.weighting import min_snr, own_output, truncated_v
from fewstep.methods.matching_settings import FakeScoreConfig

EPS = row_named("eps")
TABLE = VP((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))
ZERO_SNR = VP(torch.cat([TABLE.alpha_bar[:-1], torch.zeros(1, dtype=torch.float64)]))


@pytest.mark.parametrize(
    ("schedule", "row"),
    [
        *((TABLE, row_named(name)) for name in ("x0", "eps", "v")),
        *((ZERO_SNR, row_named(name)) for name in ("x0", "v")),
        (Flow(), row_named("flow")),
        (Flow(), row_named("v")),
        (EDM(), edm_row(0.5)),
        (EDM(), edm_row(1.5, -1.0)),
        (EDM(), EPS),
    ],
)
def test_an_error_of_the_networks_own_output_weighs_the_same_at_all_times(schedule: Schedule, row: Row) -> None:
    """An output that is off by dm everywhere gives the loss `dm^2` at every time, up to the clip."""
    t = schedule.at(torch.linspace(0.05, 1, 40, dtype=torch.float64)).round(decimals=0 if schedule.resolution else 9)
    x0, eps, dm = torch.randn(3, len(t), 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, alpha, sigma = diffuse(schedule, x0, t, eps), schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    off = split(target(x0, eps, alpha, sigma, row) + dm, x, alpha, sigma, row).x0 - x0
    exact = own_output(schedule, row, t, clip=float("inf"))
    torch.testing.assert_close(exact[:, None] * off.square(), dm.square())
    torch.testing.assert_close(own_output(schedule, row, t), exact.clamp(max=5))


def test_own_output_by_closed_form() -> None:
    t = torch.tensor([999.0, 600, 100])
    snr = TABLE.alpha(t) ** 2 / TABLE.sigma(t) ** 2
    for name, expected in {"x0": torch.ones(3, dtype=torch.float64), "eps": snr, "v": snr + 1}.items():
        torch.testing.assert_close(own_output(TABLE, row_named(name), t), expected.clamp(max=5))
    torch.testing.assert_close(
        own_output(Flow(), row_named("flow"), torch.tensor([1.0, 0.5])), torch.tensor([1.0, 4.0]).double()
    )


@pytest.mark.parametrize("row", ["eps", "v"])
def test_no_segment_of_four_drowns_the_others(row: str) -> None:
    """No segment of four takes most of the fake score's gradient.

    The shares are by the error of its own output, for a student of 4 steps.
    """
    t = torch.arange(20, 1000, dtype=torch.float64)
    alpha, sigma = TABLE.alpha(t), TABLE.sigma(t)
    a, b = row_named(row)(alpha, sigma)
    effective = own_output(TABLE, row_named(row), t) * (sigma / (alpha * b - sigma * a)).square()
    shares = torch.stack([part.mean() for part in effective.tensor_split([230, 480, 730])])
    assert float((shares / shares.sum()).max()) < 0.35
    if row == "eps":  # what the v-loss makes of it
        amiss = truncated_v(TABLE, EPS, t) * (sigma / alpha).square()
        assert float((torch.stack([p.mean() for p in amiss.tensor_split([230, 480, 730])]) / amiss.mean()).max()) > 3


def test_min_snr() -> None:
    t = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(min_snr(EDM(), EPS, t), torch.tensor([5.0, 4.0, 0.25], dtype=torch.float64))
    torch.testing.assert_close(min_snr(EDM(), EPS, t, clip=1.0), torch.tensor([1.0, 1.0, 0.25], dtype=torch.float64))


def test_min_snr_is_zero_at_pure_noise() -> None:
    assert min_snr(VP(torch.tensor([0.9, 0.0])), EPS, torch.tensor([1.0])).item() == 0


def test_truncated_v() -> None:
    """The v-loss in x0 terms, `(alpha^2 + sigma^2)/sigma^2` on a variance-preserving table; 1 at pure noise."""
    table = VP(torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64))
    torch.testing.assert_close(
        truncated_v(table, EPS, torch.tensor([0.0, 1, 2])), torch.tensor([5.0, 2, 1], dtype=torch.float64)
    )


def test_unknown_weighting_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"^fake\.weight: got 'snr', allowed are own, min-snr, v$"):
        FakeScoreConfig(weight="snr")
