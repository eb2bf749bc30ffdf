"""What a GPU does faster is on in an iteration alone; weights laid out for it train, resume and are saved as ever."""

import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fewstep.data.prompts import embed
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.student.student import Origin, Student
from fewstep.training.loop import Step, TrainConfig, distill
from fewstep.training.precision import (
    WORKSPACE,
    Precision,
    channels_last,
    computing,
    fix_workspace,
    lay_out,
    require_workspace,
)

from .. import tiny
from .common import METHOD, metrics, run

ORIGIN = Origin("tiny", "", 4, 0.0, "tdm")
CONFIG = TrainConfig(iterations=4, batch=2, lr=1e-3, fake_lr=1e-3, checkpoint_every=2)


def switches() -> tuple[bool, str]:
    return torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()


def determinism() -> tuple[bool, bool, bool]:
    cudnn = torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark


@pytest.mark.parametrize(
    ("device", "kind", "expected"),
    [("cuda", "bf16", (True, "high")), ("cuda", "no", (True, "highest")), ("cpu", "bf16", (False, "highest"))],
)
def test_a_gpu_s_switches_are_on_within_the_block(
    device: str, kind: Precision, expected: tuple[bool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is no GPU
    before = switches()
    with computing(kind, torch.device(device)):
        assert switches() == expected
    assert switches() == before == (False, "highest")


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_deterministic_training_tries_no_kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # there is no GPU
    before = determinism()
    with computing("bf16", torch.device(device), deterministic=True):
        assert determinism() == (True, True, False)
    assert determinism() == before == (False, False, False)


def test_an_operation_without_a_deterministic_algorithm_is_named() -> None:
    before = determinism()
    with (
        pytest.raises(ValueError, match=r"^train.deterministic: got true, but the network calls put_, which has no "),
        computing("no", torch.device("cpu"), deterministic=True),
    ):
        torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    with pytest.raises(RuntimeError, match=r"^another"), computing("no", torch.device("cpu"), deterministic=True):
        raise RuntimeError("another")
    assert determinism() == before


def test_cublas_gets_its_workspace_before_it_starts_or_the_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setenv(WORKSPACE, "x")  # restored after the test, whatever it sets
    monkeypatch.delenv(WORKSPACE)
    fix_workspace(False)
    assert WORKSPACE not in os.environ
    require_workspace(True, cpu)
    require_workspace(False, cuda)
    with pytest.raises(ValueError, match=rf"^train.deterministic: got true, but {WORKSPACE} is not set, allowed are "):
        require_workspace(True, cuda)
    with monkeypatch.context() as started:
        started.setattr(torch.cuda, "is_initialized", lambda: True)
        fix_workspace(True)  # too late
        assert WORKSPACE not in os.environ
    fix_workspace(True)
    require_workspace(True, cuda)
    assert os.environ[WORKSPACE] == ":4096:8"
    os.environ[WORKSPACE] = ":16:8"  # the user's own
    fix_workspace(True)
    assert os.environ[WORKSPACE] == ":16:8"
    os.environ[WORKSPACE] = ":0:0"
    with pytest.raises(ValueError, match=f"{WORKSPACE} is :0:0"):
        require_workspace(True, cuda)


class Casts(TorchDispatchMode):
    """Counter of casts of the parameters in `of`, by their memory."""

    def __init__(self, of: Iterable[Tensor]) -> None:
        super().__init__()
        self.counts = {p.data_ptr(): 0 for p in of}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].data_ptr() in self.counts:
            self.counts[args[0].data_ptr()] += 1
        return func(*args, **(kwargs or {}))


def test_in_bf16_no_weight_of_full_copies_is_cast_twice_in_an_iteration() -> None:
    """The frozen teacher's neither, and the student's not at every step of its rollout."""
    backbone = tiny.stable_diffusion()
    roles = make_roles(backbone, RolesConfig(lora=False))
    config = replace(CONFIG, precision="bf16", batch=4)
    steps = distill(roles, DistributionMatching(steps=4, warmup=0), embed(backbone, tiny.WORDS, None, "tiny"), config)
    next(steps)
    with Casts(p for network in roles.networks.values() for p in network.parameters()) as casts:
        next(steps)
    assert max(casts.counts.values()) == 1


@pytest.mark.parametrize("kind", ["no", "bf16"])
def test_on_a_cpu_deterministic_training_is_that_without(kind: Precision) -> None:
    """Digit for digit: on a CPU every algorithm that a training uses is deterministic."""
    config = replace(CONFIG, precision=kind, iterations=3)
    (_, plain), (_, same) = (run(config=replace(config, deterministic=on)) for on in (False, True))
    assert metrics(plain) == metrics(same)


@pytest.mark.parametrize(
    ("device", "kind", "laid"), [("cuda", "bf16", True), ("cuda", "no", False), ("cpu", "bf16", False)]
)
def test_weights_are_laid_out_for_a_gpu_in_bf16(device: str, kind: Precision, laid: bool) -> None:
    roles = make_roles(tiny.stable_diffusion(), RolesConfig(rank=2))
    lay_out(roles, kind, torch.device(device))
    weights = [*roles.backbone.module.parameters(), *roles.average.values()]
    wide = [w for w in weights if w.ndim == 4 and min(w.shape[1:]) > 1]
    assert wide and {w.is_contiguous(memory_format=torch.channels_last) for w in wide} == {laid}
    other = make_roles(tiny.denoiser(), RolesConfig(rank=2))
    lay_out(other, "bf16", torch.device("cuda"))  # one's own network is left as it is
    assert all(w.is_contiguous() for w in other.backbone.module.parameters())


def trained(share: bool, out: Path, lay: Callable[[Roles], None], stop: int = 9) -> tuple[Roles, list[Step]]:
    backbone = tiny.stable_diffusion()
    roles, steps = make_roles(backbone, RolesConfig(lora=share, rank=2)), list[Step]()
    lay(roles)
    for step in distill(roles, METHOD, embed(backbone, tiny.WORDS, None, "tiny"), CONFIG, out):
        steps.append(step)
        if step.iteration == stop:
            break
    return roles, steps


@pytest.mark.parametrize("share", [True, False])
def test_weights_laid_out_channels_last_train_resume_bit_for_bit_and_are_saved_as_ever(
    share: bool, tmp_path: Path
) -> None:
    _, expected = trained(share, tmp_path / "plain", lambda roles: None)
    roles, steps = trained(share, tmp_path / "laid", channels_last)
    for (_, own), (_, wanted) in zip(metrics(steps), metrics(expected), strict=True):
        assert own == pytest.approx(wanted, rel=1e-3)
    trained(share, tmp_path / "stopped", channels_last, stop=3)
    resumed, rest = trained(share, tmp_path / "stopped", channels_last)
    assert metrics(rest) == metrics(steps)[3:]
    assert all(torch.equal(t, roles.average[n]) for n, t in resumed.average.items())
    assert all(torch.equal(p, roles.trained["student"][n]) for n, p in resumed.trained["student"].items())
    written = []
    for order in (torch.channels_last, torch.contiguous_format):
        for network in roles.networks.values():
            network.to(memory_format=order)  # type: ignore[call-overload]
        folder = Student.of(roles, METHOD, ORIGIN).write(tmp_path / str(order))
        written.append(
            {f"{p.name}/{n}": t for p in sorted(folder.rglob("*.safetensors")) for n, t in load_file(p).items()}
        )
    assert written[0] and written[0].keys() == written[1].keys()
    assert all(torch.equal(t, written[1][n]) for n, t in written[0].items())
