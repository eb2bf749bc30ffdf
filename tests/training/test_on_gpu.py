"""What a GPU alone can show. `pytest -m gpu` runs it there, and with `--rehearse` all of it that a CPU can."""

import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.backbones.load import pipeline_of
from fewstep.core import timegrid
from fewstep.core.guidance import Guidance
from fewstep.core.solvers import sample
from fewstep.data.prompts import embed
from fewstep.roles.roles import TRAINED, Roles, RolesConfig, make_roles
from fewstep.training.loop import Step, TrainConfig, distill
from fewstep.training.precision import FIXED, WORKSPACE, Precision

from .. import tiny
from .common import METHOD, metrics

pytestmark = pytest.mark.gpu
CPU = torch.device("cpu")
TDM = replace(METHOD, warmup=1)
CONFIG = TrainConfig(iterations=4, batch=4, lr=1e-3, fake_lr=1e-3, checkpoint_every=2)
MOST_READS = 3  # numbers of an iteration that the CPU may wait for
KINDS = pytest.mark.parametrize("kind", ["no", "bf16"])
SHARED = pytest.mark.parametrize("share", [True, False])


@pytest.fixture(autouse=True)
def workspace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WORKSPACE, FIXED[0])


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def training(
    device: torch.device, share: bool = True, config: TrainConfig = CONFIG, out: Path | None = None
) -> tuple[Roles, list[Step]]:
    roles, steps = parts(device, share), list[Step]()
    for step in distill(roles, TDM, embed(roles.backbone, tiny.WORDS, None, "tiny"), config, out):
        steps.append(step)
    return roles, steps


def parts(device: torch.device, share: bool = True) -> Roles:
    backbone = tiny.stable_diffusion()
    pipeline_of(backbone).to(device)
    return make_roles(backbone, RolesConfig(lora=share, rank=4, checkpointing=share))


def weights(roles: Roles) -> dict[str, Tensor]:
    own = {f"{role}/{n}": p for role in TRAINED for n, p in roles.trained[role].items()}
    return {n: t.detach().cpu() for n, t in (own | {f"average/{n}": t for n, t in roles.average.items()}).items()}


def assert_equal(one: Roles, other: Roles) -> None:
    found, wanted = weights(one), weights(other)
    assert found.keys() == wanted.keys()
    assert [n for n, t in found.items() if not torch.equal(t, wanted[n])] == []


def reads(steps: list[warnings.WarningMessage]) -> list[str]:
    return [f"{w.filename}:{w.lineno}" for w in steps if "synchroniz" in str(w.message)]


@KINDS
@SHARED
def test_an_iteration_waits_at_most_three_times(device: torch.device, share: bool, kind: Precision) -> None:
    """As torch itself counts: reads, copies from ordinary memory, and whatever else synchronizes."""
    roles = parts(device, share)
    steps = distill(roles, TDM, embed(roles.backbone, tiny.WORDS, None, "tiny"), replace(CONFIG, precision=kind))
    next(steps), next(steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            next(steps)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert len(reads(caught)) <= MOST_READS, reads(caught)


@KINDS
@SHARED
def test_deterministic_training_resumes_bit_for_bit(
    device: torch.device, share: bool, kind: Precision, tmp_path: Path
) -> None:
    config = replace(CONFIG, precision=kind, deterministic=True)
    straight, steps = training(device, share, config, tmp_path / "straight")
    again, same = training(device, share, config)
    assert metrics(steps) == metrics(same)
    assert_equal(straight, again)
    training(device, share, replace(config, iterations=2), tmp_path / "stopped")
    resumed, rest = training(device, share, config, tmp_path / "stopped")
    assert metrics(rest) == metrics(steps)[2:]
    assert_equal(straight, resumed)


@SHARED
def test_other_training_resumes_to_rounding(device: torch.device, share: bool, tmp_path: Path) -> None:
    _, steps = training(device, share)
    training(device, share, replace(CONFIG, iterations=2), tmp_path)
    _, rest = training(device, share, CONFIG, tmp_path)
    for (_, own), (_, wanted) in zip(metrics(rest), metrics(steps)[2:], strict=True):
        assert own == pytest.approx(wanted, rel=5e-2)


@pytest.mark.parametrize("to_cpu", [True, False])
def test_a_checkpoint_goes_on_on_another_device(device: torch.device, to_cpu: bool, tmp_path: Path) -> None:
    first, then = (device, CPU) if to_cpu else (CPU, device)
    training(first, config=replace(CONFIG, iterations=2), out=tmp_path)
    roles, steps = training(then, out=tmp_path)
    assert [s.iteration for s in steps] == [3, 4]
    assert all(torch.isfinite(t).all() for t in weights(roles).values())


def test_the_guided_teacher_samples_what_it_samples_on_a_cpu(device: torch.device) -> None:
    found = []
    for where in (CPU, device):
        roles = parts(where)
        data, schedule = embed(roles.backbone, tiny.WORDS, None, "tiny"), roles.backbone.schedule
        cond = {k: v.to(where) for k, v in data.cond.items()}
        denoise = roles.teacher(cond, data.unconditional(where), Guidance(scale=3.0))
        noise = torch.randn(len(tiny.WORDS), *roles.backbone.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            *_, last = sample(denoise, schedule, noise.to(where), timegrid.uniform(schedule, 4))
        found.append(last.x.cpu())
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-2)  # a GPU's convolutions multiply in TF32


@SHARED
def test_a_number_that_is_not_finite_updates_nothing(device: torch.device, share: bool) -> None:
    roles = parts(device, share)
    steps = distill(roles, TDM, embed(roles.backbone, tiny.WORDS, None, "tiny"), CONFIG)
    next(steps)
    before = weights(roles)
    next(iter(roles.trained["fake"].values())).register_hook(lambda g: g * float("inf"))
    with pytest.raises(FloatingPointError, match=r"^the fake gradient is "):
        next(steps)
    assert all(torch.equal(t, before[n]) for n, t in weights(roles).items())


@KINDS
def test_compiled_blocks_are_the_same_training(device: torch.device, kind: Precision) -> None:
    if device.type == "cpu":
        pytest.skip("test_compiling.py shows it on a CPU")
    _, steps = training(device, config=replace(CONFIG, precision=kind))
    _, compiled = training(device, config=replace(CONFIG, precision=kind, compile=True))
    for (_, own), (_, wanted) in zip(metrics(compiled), metrics(steps), strict=True):
        assert own == pytest.approx(wanted, rel=5e-2)
