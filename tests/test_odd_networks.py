"""Networks that are no plain stack of layers.

Each is distilled right, or refused in one line before anything is trained.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fewstep
from fewstep.backbones.apart import apart
from fewstep.backbones.base import Denoiser
from fewstep.core.schedule import VP
from fewstep.roles.roles import RolesConfig, make_roles

from .odd import Net, started, trained, wrapped

TABLE = VP((1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0))


def right(make: Callable[[], Denoiser], out: Path, **roles: Any) -> None:
    """Train, write, load and merge a student: it moved, and all forms of it are it."""
    teacher = make()
    step = trained(teacher, out, **roles)
    drawn = fewstep.sample(step, [""] * 4)
    assert not torch.allclose(drawn, fewstep.sample(teacher, [""] * 4, steps=2), atol=1e-3)
    loaded = fewstep.load_student(out, base=make())
    torch.testing.assert_close(fewstep.sample(loaded, [""] * 4), drawn, rtol=0, atol=1e-6)
    fewstep.export_student(loaded, out / "merged", "merged")  # compares by itself


class Attention(nn.Module):
    """Two transformer encoder layers over the numbers of a state."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(1, 8)
        self.enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.out = nn.Linear(8, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(self.enc(self.inp(x[..., None]) + t[:, None, None]))[..., 0]


def test_an_encoder_layer_calls_its_adapters_also_without_gradient(tmp_path: Path) -> None:
    teacher = wrapped(started(Attention()))
    roles = make_roles(apart(teacher), RolesConfig(rank=2))
    for p in roles.trained["student"].values():
        nn.init.normal_(p, std=0.3)
    network, x, t = (
        roles.networks["student"],
        torch.randn(4, 2, generator=torch.Generator().manual_seed(0)),
        torch.full((4,), 0.5),
    )
    roles.activate("student")
    with_gradient = network(x, t)
    with torch.no_grad():
        without = network(x, t)
    torch.testing.assert_close(with_gradient, without, rtol=0, atol=1e-6)
    right(lambda: wrapped(started(Attention())), tmp_path / "run")


def test_fewstep_leaves_the_fast_path_of_the_users_own_network() -> None:
    net = started(Attention())
    fewstep.sample(wrapped(net), [""], steps=2)
    trained(wrapped(net))
    layers = [m for m in net.modules() if isinstance(m, nn.TransformerEncoderLayer)]
    assert all(m.activation_relu_or_gelu == 1 for m in layers)
    assert torch.backends.mha.get_fastpath_enabled()


class Telling(Net):
    """A perceptron that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[torch.dtype, torch.dtype, float]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.told.append((x.dtype, t.dtype, float(t.max())))
        return super().forward(x, t / 1000)


class HalfFirst(Telling):
    """One whose first parameter is in half precision and used by nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.version = nn.Parameter(torch.tensor([3]), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(2, dtype=torch.float16), requires_grad=False)


@pytest.mark.parametrize(
    ("net", "states", "times"),
    [
        (lambda: Telling().bfloat16(), torch.bfloat16, torch.float32),
        (lambda: Telling().half(), torch.float16, torch.float32),
        (lambda: Telling().double(), torch.float64, torch.float64),
        (HalfFirst, torch.float32, torch.float32),
    ],
)
def test_times_keep_their_precision_and_states_have_the_type_of_most_weights(
    net: Callable[[], Telling], states: torch.dtype, times: torch.dtype
) -> None:
    teacher = wrapped(started(net()), schedule=TABLE, prediction="v")
    own = apart(teacher)
    own.predict(own.module, torch.randn(2, 2), torch.tensor([999.0, 3.0], dtype=torch.float64), {})
    assert isinstance(own.module, Telling)
    assert own.module.told == [(states, times, 999.0)]


class Norm(Net):
    """A perceptron with batch norm, dropout and a count of its calls, in training mode as torch makes it."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        return self.out(self.drop(self.norm(self.hidden(x, t))))


@pytest.mark.parametrize("lora", [True, False])
def test_a_network_in_training_mode_is_used_at_rest_and_stays_what_it_was(lora: bool, tmp_path: Path) -> None:
    net = started(Norm()).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    teacher = wrapped(net)
    drawn = fewstep.sample(teacher, [""] * 4, steps=2)
    torch.testing.assert_close(drawn[:1], fewstep.sample(teacher, [""], steps=2))
    real = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fewstep.DistillationWarning)  # it was trained on nothing
        assert fewstep.check(teacher, real).times == fewstep.check(teacher, real).times
    step = trained(teacher, tmp_path / "run", lora=lora)
    fewstep.evaluate(step, count=32)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(m.training for m in net.modules()) and not any(p.grad is not None for p in net.parameters())
    resting = wrapped(started(Norm()).eval())
    assert torch.equal(drawn, fewstep.sample(resting, [""] * 4, steps=2))


class InPlace(Net):
    """One that scales the states that it is given."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x.mul_(0.5)
        return super().forward(x, t)


class Noisy(Net):
    """One with noise that no mode switches off."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x), t)


class OneTime(Net):
    """One that takes the first sample's time for all."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x, t[:1].expand(len(x)))


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (
            InPlace,
            "^teacher: the network of own-network changes the states that it is given, in place; let it work on a copy",
        ),
        (Noisy, "gives another answer to the same question the second time; take dropout and noise out of its forward"),
        (OneTime, "answers for a sample otherwise alone than in a batch"),
    ],
)
def test_a_network_that_is_no_function_of_its_rows_is_refused(net: type[Net], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        trained(wrapped(started(net())))
    with pytest.raises(ValueError, match=said):
        fewstep.check(wrapped(started(net())), real=torch.randn(64, 2))


class Tied(Net):
    """One of two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(16, 16)
        self.more.weight = self.mid.weight

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(torch.tanh(self.more(self.hidden(x, t))))


class Normed(Net):
    """One with weights that are computed from others."""

    def __init__(self) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # spectral norm keeps a vector of the weights as they were made
            super().__init__()
            self.mid = nn.utils.parametrizations.weight_norm(self.mid)
            self.inp = nn.utils.parametrizations.spectral_norm(self.inp)  # type: ignore[assignment]


class Masked(Net):
    """One with a causal mask and whole numbers among its parameters, the first of them."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.version = nn.Parameter(torch.tensor([3]), requires_grad=False)
        self.register_buffer("mask", torch.full((16, 16), float("-inf")).triu(1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.hidden(x, t)
        return self.out(((h[:, :, None] + self.mask).softmax(-1) @ h[..., None])[..., 0])


class Half(Net):
    """One that calculates in half precision by itself."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(x, t)


class Double(Net):
    """One of double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.double()


class Convolutions(nn.Module):
    """Convolutions of every kind, of states [B, 2, 4, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Conv2d(2, 8, 3, padding="same")
        self.round = nn.Conv2d(8, 8, 3, padding=1, padding_mode="circular")
        self.wide = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.grouped = nn.Conv2d(8, 8, 1, groups=2)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.inp(x) + t[:, None, None, None].to(x.dtype)
        return self.out(torch.tanh(self.grouped(self.depthwise(self.wide(self.round(h))))))


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("net", [Tied, Normed, Masked, Half, Double])
def test_odd_weights_are_trained_written_and_merged(net: type[Net], lora: bool, tmp_path: Path) -> None:
    right(lambda: wrapped(started(net())), tmp_path / "run", lora=lora)


def test_half_precision_with_a_norm_in_single_keeps_both(tmp_path: Path) -> None:
    def make() -> Denoiser:
        net = started(Net()).bfloat16()
        net.norm = nn.LayerNorm(16)
        return wrapped(net)

    right(make, tmp_path / "run")
    merged = fewstep.load_student(tmp_path / "run/merged", base=make()).network
    assert {n: p.dtype for n, p in merged.named_parameters()} == {
        n: p.dtype for n, p in make().module.named_parameters()
    }


def test_convolutions_that_lora_does_not_know_are_left_out(tmp_path: Path) -> None:
    def make() -> Denoiser:
        return wrapped(started(Convolutions()), shape=(2, 4, 4))

    right(make, tmp_path / "run")
    roles = make_roles(apart(make()), RolesConfig(rank=2))
    assert {n.split(".lora_")[0] for n in roles.trained["student"]} == {"inp", "out"}


class TiedByHand(Net):
    """One that reads the weight of a layer beside calling it."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h = self.hidden(x, t)
        return self.out(F.linear(h, self.mid.weight.t()))


class FastByHand(Net):
    """One with a fast path of its own."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(x, t)
        h = F.silu(self.inp(x) + self.time(t[:, None]))
        return self.out(F.silu(F.linear(h, self.mid.weight, self.mid.bias)))


class WithoutGradient(Net):
    """One that computes without gradient."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x, t)


def old_norm(net: Net) -> Net:
    net.mid = nn.utils.weight_norm(net.mid)
    return net


def lazy(net: Net) -> Net:
    net.mid = nn.LazyLinear(16)
    return net


def scripted(net: Net) -> Net:
    net.mid = torch.jit.script(net.mid)  # type: ignore[assignment]
    return net


@pytest.mark.parametrize(
    ("net", "said"),
    [
        (
            TiedByHand,
            r"^exclude: the weight of mid is used outside its layer, .*; add 'mid' to exclude, or set lora=False$",
        ),
        (
            FastByHand,
            "^teacher: .* answers otherwise where no gradient is asked for, so that what is sampled is not what is",
        ),
        (WithoutGradient, "^teacher: .* computes without gradients, so that nothing can be trained"),
    ],
)
def test_networks_past_whose_layers_their_weights_are_read_are_refused(net: type[Net], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        trained(wrapped(started(net())))
    if net is WithoutGradient:
        with pytest.raises(ValueError, match=said):
            trained(wrapped(started(net())), lora=False)
    if net is TiedByHand:
        trained(wrapped(started(net())), exclude=("mid",))
        trained(wrapped(started(net())), lora=False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (old_norm, r"^module: mid has a weight that torch\.nn\.utils\.weight_norm computes from others; take it out"),
        (lazy, r"^module: mid\.weight has no shape yet \(a lazy layer\); call the network once"),
        (scripted, r"^module: mid is scripted \(torch\.jit\)"),
        (lambda net: net.to("meta"), r"^module: time\.weight is on the meta device"),
        (
            lambda net: nn.ParameterList([nn.Parameter(torch.tensor([3]), requires_grad=False)]),
            "^module: got a ParameterList without parameters that are real numbers",
        ),
    ],
)
def test_weights_that_cannot_be_copied_are_refused_by_name(change: Callable[[Net], nn.Module], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        wrapped(change(Net()))


def test_full_copies_of_weights_that_lose_updates_are_refused_by_name() -> None:
    net = started(Net())
    net.scale = nn.Parameter(torch.ones(2, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"^lora: got False, which trains weights that are float16 here \(scale\)"):
        trained(wrapped(net), lora=False)


class Padded(Attention):
    """One whose last number is padding, which torch's fast path makes zero."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        padding = torch.zeros(x.shape, dtype=torch.bool)
        padding[:, -1] = True
        h = self.inp(x[..., None]) + t[:, None, None]
        return self.out(self.enc(h, src_key_padding_mask=padding))[..., 0]


@pytest.mark.parametrize("lora", [True, False])
def test_padding_is_the_same_in_every_form_of_a_student(lora: bool, tmp_path: Path) -> None:
    right(lambda: wrapped(started(Padded()), shape=(4,)), tmp_path / "run", lora=lora)


class Checkpointed(Net):
    """One that computes a part again for its gradients."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.out(checkpoint(self.hidden, x, t, use_reentrant=False))


def test_a_network_that_computes_again_by_itself_is_refused() -> None:
    """By then the network may be another role."""
    with pytest.raises(ValueError, match=r"computes a part again for its gradients .*; .* set checkpointing=True$"):
        trained(wrapped(started(Checkpointed())))
