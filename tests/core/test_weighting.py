"""Weights over time."""

import pytest
import torch

from fewstep.core.schedule import EDM, VP
from fewstep.core.weighting import min_snr, truncated_v, weighting_named


def test_min_snr() -> None:
    t = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(min_snr(EDM(), t), torch.tensor([5.0, 4.0, 0.25], dtype=torch.float64))
    torch.testing.assert_close(min_snr(EDM(), t, clip=1.0), torch.tensor([1.0, 1.0, 0.25], dtype=torch.float64))


def test_min_snr_is_zero_at_pure_noise() -> None:
    assert min_snr(VP(torch.tensor([0.9, 0.0])), torch.tensor([1.0])).item() == 0


def test_truncated_v() -> None:
    """The v-loss in x0 terms, `(alpha^2 + sigma^2)/sigma^2` on a variance-preserving table; 1 at pure noise."""
    table = VP(torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64))
    torch.testing.assert_close(truncated_v(table, torch.tensor([0.0, 1, 2])), torch.tensor([5.0, 2, 1], dtype=torch.float64))


def test_unknown_weighting_lists_the_known() -> None:
    assert weighting_named("v") is truncated_v
    with pytest.raises(ValueError, match=r"method\.fake_weight: got 'snr', allowed are min-snr, v"):
        weighting_named("snr")
