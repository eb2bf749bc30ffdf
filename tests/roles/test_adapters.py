"""LoRA on chosen layers, a switch that changes nothing else, and files that either fit or say so."""

import copy
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fewstep.roles import adapters

from .. import tiny

LAYERS = ["inp", "time", "label", "to_q", "out"]


def net() -> nn.Module:
    return tiny.denoiser().module.requires_grad_(False)


def adapted(*names: str, rank: int = 2, alpha: float = 2) -> nn.Module:
    module = net()
    for i, name in enumerate(names):
        adapters.add_adapter(module, name, rank, alpha, LAYERS, seed=i)
    return module


def randomise(module: nn.Module, name: str, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in adapters.adapter_parameters(module, name).values():
            p.copy_(torch.randn(p.shape, generator=rng) / 4)


def run(module: nn.Module, name: str | None) -> Tensor:
    adapters.switch(adapters.adapter_layers(module), name)
    x = torch.randn((2, 2, 4, 4), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return module(x, torch.tensor([900.0, 10]), torch.ones(2, 3))


@pytest.mark.parametrize(
    ("kind", "skip", "expected"),
    [
        ("all", (), LAYERS),
        ("linear", (), ["time", "label", "to_q"]),
        ("conv", (), ["inp", "out"]),
        ("attention", (), ["to_q"]),
        ("all", ("time", "out"), ["inp", "label", "to_q"]),
    ],
)
def test_targets(kind: str, skip: tuple[str, ...], expected: list[str]) -> None:
    assert adapters.targets(net(), kind, skip) == expected


def test_targets_of_a_real_unet() -> None:
    unet = tiny.pipeline().unet
    attention = adapters.targets(unet, "attention")
    assert attention
    assert all(".attn" in n or "add_embedding" in n for n in attention)
    assert len(adapters.targets(unet, "all")) == len(adapters.targets(unet, "linear")) + len(
        adapters.targets(unet, "conv")
    )


def test_targets_that_are_not_there() -> None:
    with pytest.raises(ValueError, match=r"roles\.targets: got 'mlp', allowed are all, linear, conv, attention"):
        adapters.targets(net(), "mlp")
    with pytest.raises(
        ValueError, match=r"roles\.targets: the network has no conv layers to carry LoRA; .*roles\.lora=false"
    ):
        adapters.targets(nn.Sequential(nn.Linear(2, 2)), "conv")


def test_a_new_adapter_changes_nothing_and_its_start_depends_on_the_seed_alone() -> None:
    with torch.no_grad():
        bare = run(net(), None)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = adapted("student")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(run(one, "student"), bare)
    torch.manual_seed(6)
    for a, b in zip(
        adapters.adapter_state(one, "student").values(),
        adapters.adapter_state(adapted("student"), "student").values(),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("rank", "alpha"), [(2, 2.0), (2, 6.0), (3, 1.0)])
def test_the_adapter_adds_alpha_over_rank_times_b_a(rank: int, alpha: float) -> None:
    module = adapted("student", rank=rank, alpha=alpha)
    randomise(module, "student", 1)
    state = adapters.adapter_state(module, "student")
    plain = net()
    with torch.no_grad():
        for name in LAYERS:
            a, b = state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]
            weight = plain.get_parameter(f"{name}.weight")
            weight.add_(alpha / rank * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape))
    torch.testing.assert_close(run(module, "student"), run(plain, None), rtol=1e-5, atol=1e-5)


def test_the_switch_selects_and_never_touches_requires_grad() -> None:
    module = adapted("student", "fake")
    for seed, name in enumerate(("student", "fake")):
        randomise(module, name, seed)
    for p in module.parameters():
        p.requires_grad_(True)
    outputs = [run(module, name) for name in (None, "student", "fake", None, "fake", "student")]
    assert torch.equal(outputs[0], outputs[3])
    assert torch.equal(outputs[1], outputs[5])
    assert torch.equal(outputs[2], outputs[4])
    assert len({o.sum().item() for o in outputs}) == 3
    assert all(p.requires_grad for p in module.parameters())


def test_files_round_trip_and_name_no_adapter() -> None:
    module = adapted("student", "fake")
    randomise(module, "student", 1)
    state = {k: v.clone() for k, v in adapters.adapter_state(module, "student").items()}
    assert set(state) == {f"{n}.lora_{ab}.weight" for n in LAYERS for ab in "AB"}
    wanted = run(module, "student")
    adapters.load_adapter(module, "fake", state)
    assert all(torch.equal(v, state[k]) for k, v in adapters.adapter_state(module, "fake").items())
    torch.testing.assert_close(
        run(module, "fake"), wanted, rtol=0, atol=1e-6
    )  # sums of tensors that lie elsewhere may be in another order


@pytest.mark.parametrize("damage", ["missing", "unknown"])
def test_files_that_do_not_fit(damage: str) -> None:
    module = adapted("student")
    state = dict(adapters.adapter_state(module, "student"))
    if damage == "missing":
        del state["to_q.lora_A.weight"]
    else:
        state["elsewhere.lora_A.weight"] = torch.zeros(2, 8)
    with pytest.raises(
        ValueError,
        match=r"student: its LoRA does not fit this network .*load it on the base named in its fewstep\.json",
    ):
        adapters.load_adapter(module, "student", state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_come_back_even_after_an_error(dtype: torch.dtype) -> None:
    module = adapted("student")
    parameters = adapters.adapter_parameters(module, "student")
    kept = {n: p.detach().clone() for n, p in parameters.items()}
    ones = {n: torch.ones_like(p, dtype=dtype) for n, p in kept.items()}

    def within() -> None:
        with adapters.swapped_parameters(parameters, ones):
            assert all(torch.equal(p, torch.ones_like(p)) for p in parameters.values())
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        within()
    assert all(torch.equal(p, kept[n]) for n, p in parameters.items())
    assert all(torch.equal(t, torch.ones_like(t)) for t in ones.values())


def test_removing_adapters_gives_the_plain_network_back() -> None:
    module = adapted("student", "student_2", "fake")
    randomise(module, "student", 1)
    assert adapters.unused_name(module, "student") == "student_3"
    layers = adapters.adapter_layers(module)
    adapters.remove_adapters(module, ("student", "fake"))
    assert list(module.state_dict()) == list(net().state_dict())
    assert torch.equal(run(module, None), run(net(), None))
    assert adapters.unused_name(module, "student") == "student"
    with pytest.raises(ValueError, match="student: its network has gone to another run"):
        adapters.switch(layers, "student")
    adapters.switch(layers, None)


def test_adapters_of_others_are_not_thrown_away() -> None:
    module = adapted("style")
    with pytest.raises(
        ValueError, match="teacher: its network carries the adapter style; fuse it into the weights first"
    ):
        adapters.remove_adapters(module, ("student", "fake"))
    assert adapters.adapter_layers(module)


def test_uncast_is_the_same_under_autocast_and_keeps_no_second_copy_of_an_input() -> None:
    """A base in half precision, LoRA in single, as a training has them on a card."""
    module = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Conv1d(8, 8, 1)).bfloat16().requires_grad_(False)
    adapters.add_adapter(module, "student", 2, 2, ["0"], seed=0)
    randomise(module, "student", 1)
    layers = adapters.adapter_layers(module)
    adapters.switch(layers, "student")
    x = torch.randn(2, 8, 64, dtype=torch.bfloat16)

    def walk() -> tuple[Tensor, int]:
        made = 0

        def pack(t: Tensor) -> Tensor:
            nonlocal made
            made += (
                t.shape[-1] == 64
                and t.numel() == x.numel()
                and t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
            )
            return t

        with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            return module[0](x), made

    before, copies = walk()
    with adapters.keep_input_dtype(layers):
        after, fewer = walk()
    assert torch.equal(before, after)
    assert fewer < copies
    assert all(layer.cast_input_dtype_enabled for layer in layers)


def test_a_rank_fits_its_network() -> None:
    """The weights of a LoRA are counted as they are made.

    A large network gets rank 32, a small one a rank that trains at most a quarter of it, 4 at least.
    """
    teacher = tiny.stable_diffusion()
    names = adapters.targets(teacher.module, "all")
    counted = adapters.lora_weights(teacher.module, names, 3)
    adapters.add_adapter(teacher.module, "student", 3, 3, names, seed=0)
    assert counted == sum(p.numel() for p in adapters.adapter_parameters(teacher.module, "student").values())

    before = {
        kind: adapters.targets(tiny.stable_diffusion().module, kind) for kind in ("all", "linear", "conv", "attention")
    }
    assert {
        kind: adapters.targets(teacher.module, kind) for kind in before
    } == before  # whether it carries adapters by now or not
    assert adapters.lora_weights(teacher.module, names, 3) == counted

    wide, narrow = nn.Sequential(nn.Linear(1024, 1024)), nn.Sequential(nn.Linear(16, 16))
    assert (adapters.fitting_rank(wide, ["0"]), adapters.fitting_rank(narrow, ["0"])) == (32, 4)


class Deep(nn.Module):
    """A network of so many layers that carry adapters."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


@pytest.mark.parametrize("depth", [3, 300])
def test_a_switch_costs_the_same_for_any_network(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Deep(depth).requires_grad_(False)
    for i, name in enumerate(("student", "fake")):
        adapters.add_adapter(module, name, 2, 2, [f"layers.{n}" for n in range(depth)], seed=i)
        randomise(module, name, i)
    layers, x, written = adapters.adapter_layers(module), torch.randn(2, 4), list[str]()

    def outputs() -> dict[str | None, Tensor]:
        found: dict[str | None, Tensor] = {}
        for name in ("student", None, "fake", "student"):
            adapters.switch(layers, name)
            found[name] = module(x)
        return found

    asked = type(layers[0].lora_A)

    def seen(self: Any, name: str) -> bool:
        looked.append(name)
        return bool(contains(self, name))

    looked, contains = list[str](), asked.__contains__

    def contained(self: nn.ModuleDict, name: str) -> bool:
        looked.append(name)
        return contains(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(nn.Module, "__setattr__", lambda self, name, value: written.append(name))
        patched.setattr(asked, "__contains__", contained)
        for switched in ("student", None, "fake", "student", None):
            adapters.switch(layers, switched)
    assert not written and len(looked) <= 3
    shared = outputs()
    for adapter, value in shared.items():  # each layer told by itself, as PEFT keeps it
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = [adapter] if adapter else ["student"], adapter is None
        assert torch.equal(value, module(x))


def test_an_adapter_that_comes_later_is_switched_by_those_who_came_before() -> None:
    module = Deep(3).requires_grad_(False)
    adapters.add_adapter(module, "student", 2, 2, ["layers.1"], seed=0)
    randomise(module, "student", 0)
    before, x = adapters.adapter_layers(module), torch.randn(2, 4)
    adapters.switch(before, None)
    plain = module(x)
    adapters.switch(before, "student")
    own = module(x)
    adapters.add_adapter(module, "student_2", 2, 2, ["layers.0", "layers.1"], seed=1)
    randomise(module, "student_2", 1)
    after = adapters.adapter_layers(module)
    adapters.switch(after, "student_2")
    other = module(x)
    adapters.switch(before, "student")
    assert torch.equal(module(x), own)
    adapters.switch(after, "student_2")
    assert torch.equal(module(x), other)
    adapters.switch(before, None)
    assert torch.equal(module(x), plain)
    apart = copy.deepcopy(module)
    adapters.switch([m for m in apart.modules() if isinstance(m, LoraLayer)], "student")
    assert torch.equal(apart(x), own)
    assert torch.equal(module(x), plain)
