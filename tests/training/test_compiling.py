"""Compiled networks: the same training, only while it trains, and one line where torch cannot."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from fewstep.data.prompts import embed
from fewstep.roles.roles import RolesConfig, make_roles
from fewstep.training.compiling import Compiled
from fewstep.training.loop import distill

from .. import pipelines, tiny
from .common import CONFIG, METHOD, metrics, parts, run

COMPILED = replace(CONFIG, compile=True)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("share", [pytest.param(True, marks=pytest.mark.slow), False])
def test_it_is_the_same_training(share: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Roles, guidance and adapters go through torch's tracing and its derivatives.

    The backend runs without a compiler.
    """
    plain, expected = run(share)
    made: list[object] = []
    traced = partial(torch.compile, backend="aot_eager")

    def compile(call: Callable[..., object], dynamic: bool) -> object:
        made.append(call)
        return traced(call, dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile)
    roles, steps = run(share, config=COMPILED)
    assert len(made) == 1 + len({id(n) for n in roles.networks.values()})
    for (_, a), (_, b) in zip(metrics(steps), metrics(expected), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    for p, q in zip(roles.trained["student"].values(), plain.trained["student"].values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


def test_images_are_drawn_by_the_networks_as_they_are() -> None:
    calls: list[str] = []

    class Network(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not torch.compiler.is_compiling():
                calls.append("as it is")
            return x * 2

    network, x = Network(), torch.ones(3)
    compiled = Compiled([network, network], x.device)
    with compiled.switched_on():
        torch.testing.assert_close(network(x), x * 2)
    assert not calls
    torch.testing.assert_close(network(x), x * 2)
    assert calls == ["as it is"]


def test_without_a_compiler_one_line_says_so() -> None:
    from torch._inductor import config

    roles, _ = parts()
    with (
        config.patch({"cpp.cxx": (None, "/nowhere/g++"), "fx_graph_cache": False}),
        pytest.raises(ValueError, match="compile") as error,
    ):
        Compiled(roles.networks.values(), torch.device("cpu"))
    assert str(error.value).startswith("train.compile: got true, but torch cannot compile here (")
    assert str(error.value).endswith("); install a C++ compiler (on a GPU: triton), or set it to false")
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_compiled_for_real_it_resumes_bit_for_bit(tmp_path: Path) -> None:
    straight, expected = run(config=COMPILED, out=tmp_path / "straight")
    run(config=COMPILED, out=tmp_path / "stopped", stop=4)
    torch._dynamo.reset()
    resumed, rest = run(config=COMPILED, out=tmp_path / "stopped")
    assert metrics(rest) == metrics(expected)[4:]
    for p, q in zip(resumed.trained["student"].values(), straight.trained["student"].values(), strict=True):
        assert torch.equal(p, q)
    assert METHOD.warmup < 4


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (lambda: tiny.pipeline().unet, {"ResnetBlock2D", "BasicTransformerBlock"}),
        (lambda: pipelines.pixart().transformer, {"BasicTransformerBlock"}),
        (lambda: pipelines.sd3().transformer, {"JointTransformerBlock"}),
        (lambda: tiny.Net(), set()),
    ],
)
def test_the_innermost_blocks_that_are_repeated_are_compiled(
    network: Callable[[], nn.Module], expected: set[str]
) -> None:
    whole = network()
    compiled = Compiled([whole, whole], torch.device("cpu"))
    assert {type(part).__name__ for part in compiled.parts} == (expected or {type(whole).__name__})
    inner = {id(m) for part in compiled.parts for m in part.modules() if m is not part}
    assert not inner & {id(part) for part in compiled.parts}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_network_of_compiled_blocks_is_the_same_training(
    checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced = partial(torch.compile, backend="aot_eager")
    found = []
    for config in (replace(CONFIG, iterations=4), replace(COMPILED, iterations=4)):
        backbone = tiny.stable_diffusion()
        roles = make_roles(backbone, RolesConfig(rank=2, checkpointing=checkpointing))
        with monkeypatch.context() as patched:
            patched.setattr(torch, "compile", lambda call, dynamic: traced(call, dynamic=dynamic))
            steps = list(distill(roles, METHOD, embed(backbone, tiny.WORDS, None, "tiny"), config))
        found.append((roles, metrics(steps)))
    (plain, expected), (compiled, got) = found
    for (_, a), (_, b) in zip(got, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    for name, p in compiled.trained["student"].items():
        torch.testing.assert_close(p, plain.trained["student"][name], rtol=1e-3, atol=1e-5)
