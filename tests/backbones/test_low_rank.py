"""The low-rank part of a change is the best of its rank, and its energy is that of the singular values."""

import pytest
import torch

from fewstep.backbones.low_rank import of_matrix, of_product


@pytest.mark.parametrize("rank", [2, 5, 9])
def test_a_product_and_its_matrix_have_one_part(rank: int) -> None:
    rng = torch.Generator().manual_seed(0)
    up, down = torch.randn(40, 6, generator=rng), torch.randn(6, 30, generator=rng)
    s = torch.linalg.svdvals((up @ down).double())
    wanted = float(s[:rank].square().sum())
    for part in (of_product(up, down, rank), of_matrix(up @ down, rank)):
        assert part.kept == pytest.approx(wanted, rel=1e-4) and part.whole == pytest.approx(
            float(s.square().sum()), rel=1e-4
        )
        rest = (up @ down - part.up @ part.down).double().square().sum()
        assert float(rest) == pytest.approx(part.whole - part.kept, abs=1e-3 * part.whole)
    if rank >= 6:
        assert torch.equal(of_product(up, down, rank).up, up) and torch.equal(of_product(up, down, rank).down, down)


def test_a_large_matrix_is_decomposed_by_chance_and_the_same_each_time() -> None:
    rng = torch.Generator().manual_seed(0)
    change = torch.randn(300, 8, generator=rng) @ torch.randn(8, 400, generator=rng)
    change += 0.01 * torch.randn(300, 400, generator=rng)
    before = torch.random.get_rng_state()
    first, again = of_matrix(change, 8), of_matrix(change, 8)
    assert torch.equal(first.up, again.up) and torch.equal(before, torch.random.get_rng_state())
    best = torch.linalg.svdvals(change.double())[:8].square().sum()
    assert first.kept == pytest.approx(float(best), rel=1e-4)
