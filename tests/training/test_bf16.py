"""Training in bf16 gives every trained tensor a gradient.

What autocast keeps of the weights is never what they were.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fewstep.data.images import ImageData
from fewstep.data.prompts import embed
from fewstep.data.trajectories import Trajectories
from fewstep.heads.head import make_head, unknown
from fewstep.methods.consistency import ConsistencyDistillation
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.methods.matching_settings import FakeScoreConfig, GanConfig
from fewstep.methods.method import Loss, Method
from fewstep.methods.presets import PRESETS, ROLES
from fewstep.methods.progressive import ProgressiveDistillation
from fewstep.methods.trajectory_imitation import TrajectoryImitation
from fewstep.roles.roles import RolesConfig, make_roles
from fewstep.runs.init import roles_for
from fewstep.training.gradients import Gradients
from fewstep.training.loop import TrainConfig, distill

from .. import tiny

CONFIG = TrainConfig(iterations=3, batch=4, lr=1e-2, fake_lr=1e-2, precision="bf16")
# Every method by name, and what only some settings reach.
METHODS: dict[str, Method] = {
    **{name: replace(m, warmup=1) if isinstance(m, DistributionMatching) else m for name, m in PRESETS.items()},
    "several-updates": DistributionMatching(steps=4, warmup=1, fake=FakeScoreConfig(updates=3)),
    "gan": DistributionMatching(steps=2, warmup=1, gan=GanConfig(weight=1.0)),
    "anchor": DistributionMatching(steps=2, regression_weight=1.0, warmup=1),
    "scales": ConsistencyDistillation(steps=2, guidance_scales=(5.0,)),
    "stages": ProgressiveDistillation(steps=1, loss="l2", solver="ddim", name="progressive"),
    "free-first": TrajectoryImitation(steps=2, head="none", analytic_first_step=True),
}


def seen(name: str, share: bool) -> list[dict[str, float]]:
    """What a run of three iterations logs: losses, and gradients of what the updates before made of the weights."""
    method, backbone = METHODS[name], replace(tiny.denoiser(), feature_layers=("inp", "to_q"))
    data = embed(backbone, tiny.WORDS, None, "tiny")
    rng = torch.Generator().manual_seed(1)
    states = torch.randn(len(tiny.WORDS), *backbone.shape, generator=rng)
    real = ImageData(states, data, "") if method.needs.images else None
    times = method.times(backbone.schedule, max(method.counts))
    walked = torch.randn(len(tiny.WORDS), len(times), *backbone.shape, generator=rng)
    paths = Trajectories(walked, times, data, walked, times, "") if method.needs.trajectories else None
    config = replace(RolesConfig(lora=share, rank=4), **ROLES.get(name, {}))  # type: ignore[arg-type]
    roles = roles_for(backbone, method, config, paths=paths)
    return [dict(step.metrics) for step in distill(roles, method, data, CONFIG, real=real, paths=paths)]


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Autocast that casts weights at every call, when it is called."""
    plain = torch.autocast

    def without(kind: str, dtype: torch.dtype, enabled: bool = True, cache_enabled: bool = True) -> torch.autocast:
        return plain(kind, dtype, enabled=enabled, cache_enabled=False)

    return lambda: monkeypatch.setattr(torch, "autocast", without)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_what_autocast_keeps_is_what_the_weights_are(name: str, share: bool, no_cache: Callable[[], None]) -> None:
    if ROLES.get(name, {}).get("lora", share) != share:
        pytest.skip("its name stands for other roles")
    kept = seen(name, share)
    no_cache()
    for one, other in zip(
        kept, seen(name, share), strict=True
    ):  # a cast that two calls share adds their gradients in bf16
        assert one == pytest.approx(other, rel=2e-2, abs=1e-3)


def test_folding_a_head_away_learns_from_what_the_student_was(no_cache: Callable[[], None]) -> None:
    def losses() -> list[float]:
        method, backbone = DistributionMatching(steps=2, warmup=3, init_head="absorb"), tiny.denoiser()
        head = make_head("span", backbone.schedule, unknown(backbone.shape, [method.times(backbone.schedule)]), 0)
        with torch.no_grad():
            for p in head.parameters():
                p.add_(0.1)
        roles = make_roles(backbone, RolesConfig(rank=4), head_to_absorb=head)
        steps = distill(roles, method, embed(backbone, tiny.WORDS, None, "tiny"), replace(CONFIG, iterations=4))
        return [step.metrics["absorb_loss"] for step in steps if "absorb_loss" in step.metrics]

    kept = losses()
    no_cache()
    assert len(kept) == 3
    assert kept == losses()


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_trained_tensor_gets_a_gradient(share: bool, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the rollout, which is without gradient, came first and its casts were kept."""
    backbone, reached, add = tiny.denoiser(), set[tuple[str, str]](), Gradients.add

    def watched(gradients: Gradients, loss: Loss, last: bool) -> None:
        add(gradients, loss, last)
        reached.update(
            (loss.role, n) for n, p in roles.trained[loss.role].items() if p.grad is not None and bool(p.grad.any())
        )

    monkeypatch.setattr(Gradients, "add", watched)
    roles = make_roles(backbone, RolesConfig(lora=share, rank=4))
    method = DistributionMatching(steps=4, warmup=0)
    config = TrainConfig(iterations=3, batch=8, lr=1e-2, fake_lr=1e-2, precision=precision)  # type: ignore[arg-type]
    list(distill(roles, method, embed(backbone, tiny.WORDS, None, "tiny"), config))
    assert {(role, n) for role, own in roles.trained.items() for n in own} - reached == set()


@pytest.mark.parametrize(("share", "layer"), [(False, "to_q"), (True, "out")])
def test_gradients_that_are_lost_on_the_way_end_a_training(share: bool, layer: str) -> None:
    """As casts without history lost them: all, or all but the last layer's."""
    backbone = tiny.denoiser()
    roles = make_roles(backbone, RolesConfig(lora=share, rank=4))
    for network in {id(n): n for n in roles.networks.values()}.values():
        network.get_submodule(layer).register_forward_hook(lambda _, __, output: output.detach())
    data = embed(backbone, tiny.WORDS, None, "tiny")
    with pytest.raises(ValueError, match=r"^train: the fake's loss reaches (none|\d+) of (its )?\d+ trained tensors"):
        list(
            distill(roles, DistributionMatching(steps=4, warmup=0), data, replace(CONFIG, precision="no", iterations=9))
        )
