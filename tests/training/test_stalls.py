"""Nothing in an iteration stalls a card: the host asks for numbers once, and waits for nothing that it sends."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import transfer
from fewstep.backbones.base import Cond
from fewstep.data.images import ImageData
from fewstep.data.prompts import Embeddings, embed
from fewstep.data.trajectories import Trajectories
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.methods.matching_settings import FakeScoreConfig, GanConfig
from fewstep.methods.method import Method, TrainBatch
from fewstep.methods.presets import PRESETS, ROLES
from fewstep.roles.roles import TRAINED, Roles, RolesConfig
from fewstep.runs.init import roles_for
from fewstep.training import loop
from fewstep.training.loop import Step, TrainConfig, distill

from .. import tiny
from ..project import ROOT

MOST_READS = 3
CONFIG = TrainConfig(iterations=3, batch=8, lr=1e-3, fake_lr=1e-3)
TDM = DistributionMatching(steps=4, warmup=0)
MATCHING = {
    "tdm": TDM,
    "several step counts": replace(TDM, steps=(4, 2, 1)),
    "gan": replace(TDM, gan=GanConfig(weight=1.0, r1=0.1)),
    "several step counts, gan": replace(TDM, steps=(4, 2, 1), gan=GanConfig(weight=1.0)),
}
OTHERS = {
    **{name: replace(m, warmup=0) if isinstance(m, DistributionMatching) else m for name, m in PRESETS.items()},
    "several fake updates": replace(TDM, fake=FakeScoreConfig(updates=3, share_noised_sample=False)),
    "regression": replace(TDM, regression_weight=1.0),
    "analytic first step": replace(TDM, analytic_first_step=True),
    "dpmpp": replace(TDM, solver="dpmpp"),
}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import card

    return card


def training(
    card: ModuleType | None, method: Method, share: bool, config: TrainConfig = CONFIG, name: str = ""
) -> tuple[Roles, Iterator[Step]]:
    """A training on the card, within `card.counted()`, or on the CPU."""
    backbone = replace(tiny.denoiser(), feature_layers=("inp", "to_q"))
    data, rng = embed(backbone, tiny.WORDS, None, "tiny"), torch.Generator().manual_seed(1)
    states = torch.randn(len(tiny.WORDS), *backbone.shape, generator=rng)
    times = method.times(backbone.schedule, max(method.counts))
    walked = torch.randn(len(tiny.WORDS), len(times), *backbone.shape, generator=rng)
    real = ImageData(states, data, "") if method.needs.images else None
    paths = Trajectories(walked, times, data, walked, times, "") if method.needs.trajectories else None
    how = replace(RolesConfig(lora=share, rank=4), **ROLES.get(name, {}))  # type: ignore[arg-type]
    roles = roles_for(backbone, method, how, paths=paths)
    if card is not None:
        card.move(roles)
    return roles, distill(roles, method, data, config, real=real, paths=paths)


def of_an_iteration(card: ModuleType, method: Method, share: bool, name: str = "") -> tuple[int, list[str], int]:
    """Reads, places of copies that the host waited for, and copies that it did not, of the last of three."""
    with card.counted() as stalls:
        for step in training(card, method, share, name=name)[1]:
            found = stalls.reads.total(), list(stalls.copies), stalls.sent.total()
            assert all(value == value for value in step.metrics.values())
            stalls.clear()
    return found


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", MATCHING)
def test_an_iteration_asks_once_and_waits_for_no_copy(card: ModuleType, name: str, share: bool) -> None:
    reads, copies, sent = of_an_iteration(card, MATCHING[name], share)
    assert reads <= MOST_READS
    assert (reads, copies) == (1, [])  # as it is today
    assert 0 < sent < 8


@pytest.mark.parametrize("name", OTHERS)
def test_so_do_the_other_methods(card: ModuleType, name: str) -> None:
    reads, copies, _ = of_an_iteration(card, OTHERS[name], True, name)
    assert (reads, copies) == (1, [])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_card_leaves_its_updates_out_from_the_first_number_that_is_not_finite(card: ModuleType, what: str) -> None:
    """The host learns of it at the end of the iteration: by then nothing may have been updated."""
    with card.counted():
        roles, steps = training(card, TDM, share=False, config=replace(CONFIG, iterations=9))
        next(steps)
        before = {r: {n: p.held.clone() for n, p in roles.trained[r].items()} for r in TRAINED}  # type: ignore[attr-defined]
        if what == "loss":
            roles.networks["fake"].register_forward_hook(lambda _, __, output: output * float("nan"))
        else:
            next(iter(roles.trained["fake"].values())).register_hook(lambda g: g * float("inf"))
        with pytest.raises(
            FloatingPointError, match=rf"^the fake {what} is (nan|inf) at iteration 2; lower train.lr or"
        ):
            next(steps)
        assert all(torch.equal(p.held, before[r][n]) for r in TRAINED for n, p in roles.trained[r].items())  # type: ignore[attr-defined]


def test_an_update_before_the_number_that_is_not_finite_is_made(card: ModuleType) -> None:
    """As where the host looks at every number: the fake score's own update was good."""
    with card.counted():
        roles, steps = training(card, TDM, share=False, config=replace(CONFIG, iterations=9))
        next(steps)
        before = {r: {n: p.held.clone() for n, p in roles.trained[r].items()} for r in TRAINED}  # type: ignore[attr-defined]
        next(iter(roles.trained["student"].values())).register_hook(lambda g: g * float("inf"))
        with pytest.raises(FloatingPointError, match=r"^the student gradient is "):
            next(steps)
        moved = {
            r: any(not torch.equal(p.held, before[r][n]) for n, p in roles.trained[r].items())  # type: ignore[attr-defined]
            for r in TRAINED
        }
        assert moved == {"student": False, "fake": True}


def test_the_next_batches_are_drawn_while_the_card_still_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn and sent before the host asks for this iteration's numbers, which it then waits for."""
    events, draw, fetch = list[str](), Embeddings.at, transfer.fetched

    def drawn(self: Embeddings, *arguments: Any) -> Cond:
        events.append("draw")
        return draw(self, *arguments)

    def fetched(values: Sequence[Tensor]) -> list[float]:
        events.append("wait")
        return fetch(values)

    monkeypatch.setattr(Embeddings, "at", drawn)
    monkeypatch.setattr(loop, "fetched", fetched)
    list(training(None, TDM, share=True)[1])
    assert events == ["draw", "draw", "wait", "draw", "wait", "wait"]


def on(card: ModuleType, tensor: Tensor) -> Tensor:
    moved: Tensor = tensor.to(card.CARD)
    return moved


def test_the_card_notices_what_a_card_would_wait_for(card: ModuleType) -> None:
    x = torch.arange(6.0).reshape(2, 3)
    with card.counted() as stalls:
        there = on(card, x)
        assert stalls.copies.total() == 1
        for read in (
            lambda: float(there.sum()),
            lambda: bool((there > 0).all()),
            lambda: there.cpu(),
            lambda: there[there > 2],
            lambda: torch.nonzero(there),
        ):
            stalls.clear()
            read()
            assert (stalls.reads.total(), stalls.copies.total()) == (1, 0)
        for copy in (
            lambda: there[torch.tensor([0, 1])],
            lambda: torch.tensor([1.0], device=card.CARD),
            lambda: there.copy_(x),
        ):
            stalls.clear()
            copy()
            assert (stalls.reads.total(), stalls.copies.total()) == (0, 1)
        stalls.clear()
        arrived = x.pin_memory().to(card.CARD, non_blocking=True) + there[0] + torch.ones(3, device=card.CARD) * 2
        assert (stalls.stalls, stalls.sent.total()) == (0, 1)
        with pytest.raises(RuntimeError, match="two devices"):
            there + x
        assert torch.equal(arrived.cpu(), x + x[0] + 2)


def test_a_training_on_the_card_is_that_on_the_cpu(card: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Digit for digit, if both draw from one generator: updates that the card may leave out are the same updates."""
    method = replace(TDM, gan=GanConfig(weight=1.0))
    plain = list(training(None, method, True)[1])
    monkeypatch.setattr(TrainBatch, "host_rng", property(lambda batch: batch.rng))
    with card.counted():
        roles, steps = training(card, method, True)
        found = list(steps)
        weights = {n: p.held.clone() for n, p in roles.trained["student"].items()}  # type: ignore[attr-defined]
    assert [dict(s.metrics) for s in found] == [dict(s.metrics) for s in plain]
    assert all(torch.equal(p, weights[n]) for n, p in plain[-1].roles.trained["student"].items())
