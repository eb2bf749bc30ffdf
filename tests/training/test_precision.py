"""What a GPU does faster is on in an iteration alone; weights laid out for it train, resume and are saved as ever."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fewstep.data.prompts import embed
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.student.student import Origin, Student
from fewstep.training import precision
from fewstep.training.loop import Step, TrainConfig, distill
from fewstep.training.precision import Precision, channels_last, computing, lay_out

from .. import tiny
from .common import METHOD, metrics

ORIGIN = Origin("tiny", "", 4, 0.0, "tdm")
CONFIG = TrainConfig(iterations=4, batch=2, lr=1e-3, fake_lr=1e-3, checkpoint_every=2)


def switches() -> tuple[bool, str]:
    return torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()


@pytest.mark.parametrize(
    ("device", "kind", "expected"),
    [("cuda", "bf16", (True, "high")), ("cuda", "no", (True, "highest")), ("cpu", "bf16", (False, "highest"))],
)
def test_a_gpu_s_switches_are_on_within_the_block(
    device: str, kind: Precision, expected: tuple[bool, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: precision.keep_input_dtype(()))  # there is no GPU
    before = switches()
    with computing(kind, torch.device(device)):
        assert switches() == expected
    assert switches() == before == (False, "highest")


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
    for own, straight in ((resumed.average, roles.average), (resumed.trained["student"], roles.trained["student"])):
        assert all(torch.equal(t, straight[n]) for n, t in own.items())
    written = []
    for order in (torch.channels_last, torch.contiguous_format):
        for network in roles.networks.values():
            network.to(memory_format=order)
        folder = Student.of(roles, METHOD, ORIGIN).write(tmp_path / str(order))
        written.append(
            {f"{p.name}/{n}": t for p in sorted(folder.rglob("*.safetensors")) for n, t in load_file(p).items()}
        )
    assert written[0] and written[0].keys() == written[1].keys()
    assert all(torch.equal(t, written[1][n]) for n, t in written[0].items())
