"""Weights over time."""

import torch

from fewstep.core.schedule import EDM, VP
from fewstep.core.weighting import min_snr


def test_min_snr() -> None:
    t = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(min_snr(EDM(), t), torch.tensor([5.0, 4.0, 0.25], dtype=torch.float64))
    torch.testing.assert_close(min_snr(EDM(), t, clip=1.0), torch.tensor([1.0, 1.0, 0.25], dtype=torch.float64))


def test_min_snr_is_zero_at_pure_noise() -> None:
    assert min_snr(VP(torch.tensor([0.9, 0.0])), torch.tensor([1.0])).item() == 0
