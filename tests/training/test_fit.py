"""The supervised loop: its learning rate, its average, and a resumed run that is the straight run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fewstep.training.fit import FitConfig, fit
from fewstep.training.state import checkpoints, seeded

from .. import tiny

CONFIG = FitConfig(steps=6, batch=4, lr=1e-2, warmup=2, decay=3, ema=0.9, checkpoint_every=3)


def parts() -> tuple[nn.Module, nn.Module, Callable[[int], Tensor]]:
    net, average = tiny.denoiser().module, tiny.denoiser().module

    def loss_at(step: int) -> Tensor:
        rng = seeded(0, step, "data")
        x = torch.randn((4, 2, 4, 4), generator=rng)
        return (net(x, torch.rand(4, generator=rng) * 1000) - x.tanh()).square().mean()

    return net, average, loss_at


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_resumed_is_straight_bit_for_bit(tmp_path: Path) -> None:
    net, average, loss_at = parts()
    straight = [s.loss for s in fit(net, average, loss_at, CONFIG, tmp_path / "straight")]
    first, _, loss_first = parts()
    stopped = []
    for step in fit(first, parts()[1], loss_first, CONFIG, tmp_path / "stopped"):
        stopped.append(step.loss)
        if step.step == 4:  # between two checkpoints: stopping makes one
            break
    again, again_average, loss_again = parts()
    resumed = list(fit(again, again_average, loss_again, CONFIG, tmp_path / "stopped"))
    assert [s.step for s in resumed] == [5, 6]
    assert stopped + [s.loss for s in resumed] == straight
    assert same(net, again)
    assert same(average, again_average)
    assert not same(net, average)
    assert list(fit(again, again_average, loss_again, CONFIG, tmp_path / "stopped")) == []


def test_average_and_steps_are_their_formulas(tmp_path: Path) -> None:
    """A step equals one that is made by hand.

    It is AdamW at the warm-up's rate, with clipped gradients. The average forgets faster while it is young.
    """
    net, average, loss_at = parts()
    hand, _, loss_hand = parts()
    expected = {n: p.detach().clone() for n, p in hand.named_parameters()}
    optimizer = torch.optim.AdamW(hand.parameters(), betas=(0.9, 0.99), weight_decay=CONFIG.weight_decay, fused=True)
    rates = []
    for step in fit(net, average, loss_at, CONFIG, tmp_path):
        i = step.step - 1
        optimizer.param_groups[0]["lr"] = rate = CONFIG.lr * min(1, (i + 1) / 2) * min(1, (6 - i) / 3)
        rates.append(rate)
        optimizer.zero_grad()
        loss_hand(i).backward()
        nn.utils.clip_grad_norm_(hand.parameters(), CONFIG.clip)
        optimizer.step()
        keep = min(0.9, (i + 1) / (i + 10))
        expected = {n: keep * expected[n] + (1 - keep) * p.detach() for n, p in hand.named_parameters()}
    assert same(net, hand)
    for n, p in average.named_parameters():
        torch.testing.assert_close(p, expected[n])
    assert rates == pytest.approx([5e-3, 1e-2, 1e-2, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3])
    assert [CONFIG.lr_at(i) for i in range(6)] == pytest.approx(rates)


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    net, average, loss_at = parts()
    steps = fit(net, average, lambda i: loss_at(i) * (float("nan") if i == 4 else 1), CONFIG, tmp_path)
    with pytest.raises(FloatingPointError, match=r"loss is nan at step 4; lower this fit's lr"):
        list(steps)
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000003"]
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())
