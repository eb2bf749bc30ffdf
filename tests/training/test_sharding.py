"""Sharded weights train as whole ones do.

One process that shards with itself is enough to see most of it; two are in the slow tests.
"""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from fewstep.backbones.base import Backbone, Denoiser
from fewstep.backbones.parts import blocks_of
from fewstep.data.images import ImageData
from fewstep.data.prompts import embed
from fewstep.methods.consistency import ConsistencyDistillation
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.methods.matching_settings import FakeScoreConfig, GanConfig, MatchConfig
from fewstep.methods.method import Method
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.roles.sharding import whole
from fewstep.training.loop import TrainConfig, distill

from .. import tiny
from ..project import ROOT

CONFIG = TrainConfig(iterations=3, batch=2, lr=1e-3, fake_lr=1e-3, checkpoint_every=2, weight_decay=0.01)
METHODS: dict[str, Method] = {
    "unify": DistributionMatching(steps=(2, 1), warmup=1),
    "small batch": DistributionMatching(steps=4, warmup=0, fake=FakeScoreConfig(updates=2, share_noised_sample=False)),
    "fisher": DistributionMatching(steps=2, warmup=0, match=MatchConfig(divergence="fisher")),
    "gan": DistributionMatching(steps=2, warmup=0, gan=GanConfig(weight=0.1, r1=0.1)),
    "lcm": ConsistencyDistillation(guidance_scales=(2.0,)),
}


class Deep(nn.Module):
    """A denoiser of points [B, 6] made of blocks; the first one has a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.inp, self.out = nn.Linear(2, 8), nn.Linear(6, 8), nn.Linear(8, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 8, bias=False)) for _ in range(3)
        )

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        h = self.inp(x) + self.time(torch.stack([t / 1000, torch.cos(t)], 1)) + label.to(x).sum(1, keepdim=True)
        for block in self.blocks:
            h = h + block(h)
        return self.out(h)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """This process alone, as if it were several."""
    distributed.init_process_group(
        "gloo",
        store=distributed.HashStore(),  # type: ignore[attr-defined]
        rank=0,
        world_size=1,
    )
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


def deep(kind: type[Deep] = Deep) -> Denoiser:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = kind().double()  # AdamW makes steps of any noise where there is no gradient
    layers = ("blocks.0", "blocks.1.0")
    return Denoiser(network, tiny.TABLE, (6,), "v", tiny.Labels(), time_layer="time", feature_layers=layers)


def roles_of(backbone: Backbone, method: Method, share: bool, checkpointing: bool = False) -> Roles:
    against = method.counts if method.needs.adversary else ()
    config = RolesConfig(lora=share, rank=2, checkpointing=checkpointing)
    return make_roles(backbone, config, 0, method.condition_values, against, None, method.needs.fake)


def trained(
    roles: Roles, method: Method, run: Path | None = None, config: TrainConfig = CONFIG
) -> list[dict[str, float]]:
    """All metrics."""
    data = embed(roles.backbone, tiny.WORDS, None, "tiny")
    real = ImageData(torch.randn(3, *roles.backbone.shape, generator=torch.Generator().manual_seed(5)), data, "")
    return [dict(s.metrics) for s in distill(roles, method, data, config, run, real if method.needs.images else None)]


def weights(roles: Roles) -> dict[str, Tensor]:
    """All that is trained, and the average, whole."""
    own = {f"{role}/{n}": p.detach() for role, parameters in roles.trained.items() for n, p in parameters.items()}
    return dict(whole(own | {f"average/{n}": t for n, t in roles.average.items()}))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_a_sharded_training_is_the_whole_one(name: str, share: bool, mesh: DeviceMesh) -> None:
    method = METHODS[name]
    one, two = roles_of(deep(), method, share), roles_of(deep(), method, share)
    two.shard(mesh, torch.device("cpu"))
    for whole_metrics, metrics in zip(trained(one, method), trained(two, method), strict=True):
        assert metrics == pytest.approx(whole_metrics, rel=1e-5)
    found = weights(two)
    for n, expected in weights(one).items():
        torch.testing.assert_close(found[n], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("share", [True, False])
def test_blocks_fetched_in_bf16_compute_as_autocast_does(share: bool, mesh: DeviceMesh) -> None:
    method, config = METHODS["small batch"], replace(CONFIG, precision="bf16", iterations=2)
    one, two = (roles_of(replace(deep(), module=deep().module.float()), method, share) for _ in range(2))
    two.shard(mesh, torch.device("cpu"), torch.bfloat16)
    inside: list[torch.dtype] = []
    two.networks["student"].get_submodule("blocks.0.0").register_forward_hook(
        lambda layer, _, out: inside.append(layer.get_parameter("base_layer.bias" if share else "bias").dtype)
    )
    for whole_metrics, metrics in zip(
        trained(one, method, config=config), trained(two, method, config=config), strict=True
    ):
        assert metrics == pytest.approx(whole_metrics, rel=0.02)
    assert set(inside) == {torch.bfloat16}
    assert {t.dtype for t in weights(two).values()} == {torch.float32}


@pytest.mark.parametrize("share", [True, False])
def test_sharded_networks_compile(share: bool, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch's own backend that needs no C++ compiler."""
    network, function = nn.Module.compile, torch.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, dynamic: network(self, dynamic=dynamic, backend="aot_eager"))
    monkeypatch.setattr(torch, "compile", partial(function, backend="aot_eager"))
    method, config = METHODS["small batch"], replace(CONFIG, iterations=2)
    one, two = (roles_of(deep(), method, share) for _ in range(2))
    two.shard(mesh, torch.device("cpu"))
    expected = trained(one, method, config=config)
    found = trained(two, method, config=replace(config, shard=True, compile=True))
    assert found == [pytest.approx(metrics, rel=1e-5) for metrics in expected]


@pytest.mark.slow
def test_a_family_with_checkpointing_and_its_checkpoint_in_one_process(mesh: DeviceMesh, tmp_path: Path) -> None:
    """What a sharded run has written, another that is not sharded goes on with, and the other way round."""
    method = METHODS["unify"]
    first, second = replace(CONFIG, iterations=2, shard=True), replace(CONFIG, shard=True)

    def run(sharded: bool, config: TrainConfig, folder: str) -> list[dict[str, float]]:
        roles = roles_of(tiny.stable_diffusion(), method, share=True, checkpointing=True)
        if sharded:
            roles.shard(mesh, torch.device("cpu"))
        return trained(roles, method, tmp_path / folder, config)

    straight = run(False, second, "straight")
    assert run(True, first, "one") == [pytest.approx(m, rel=1e-4) for m in straight[:2]]
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert run(False, replace(second, shard=False), "one") == [pytest.approx(straight[2], rel=1e-4)]
    assert run(True, second, "two") == [pytest.approx(straight[2], rel=1e-4)]
    for file in (tmp_path / "straight" / "checkpoint-000003").glob("*.safetensors"):
        expected, found = load_file(file), load_file(tmp_path / "two" / "checkpoint-000003" / file.name)
        assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}


def test_blocks_are_those_that_diffusers_keeps_together_or_the_elements_of_lists() -> None:
    network = tiny.stable_diffusion().module
    kinds = [type(b).__name__ for b in blocks_of(network)]
    assert set(kinds) == {"ResnetBlock2D", "BasicTransformerBlock", "CrossAttnUpBlock2D", "UpBlock2D"}
    assert kinds.index("ResnetBlock2D") < kinds.index("UpBlock2D")  # inner ones first
    inside = {id(p) for b in blocks_of(network) for p in b.parameters()}
    assert sum(p.numel() for p in network.parameters() if id(p) in inside) > 0.8 * sum(
        p.numel() for p in network.parameters()
    )
    assert len(blocks_of(Deep())) == 3


TWO = """
import sys
import torch
from accelerate import debug_launcher
from safetensors.torch import save_file
from dataclasses import replace
from tests.training import test_sharding as t
from fewstep.processes import mesh_of
from fewstep.training.loop import distill

def work(folder, name, share):
    torch.set_num_threads(1)
    method = t.METHODS[name]
    roles = t.roles_of(t.deep(), method, share == "True")
    before = t.bytes_here(roles)
    roles.shard(mesh_of(1), torch.device("cpu"))
    t.trained(roles, method, config=replace(t.CONFIG, batch=1))
    found = t.weights(roles)
    sizes = torch.tensor([before, t.bytes_here(roles)])
    save_file(found | {"sizes": sizes}, f"{folder}/{torch.distributed.get_rank()}.safetensors")

debug_launcher(work, args=tuple(sys.argv[1:]), num_processes=2)
"""


def bytes_here(roles: Roles) -> int:
    """Of all weights and the average in this process, each storage once."""
    tensors = [*(p for n in roles.networks.values() for p in n.parameters()), *roles.average.values()]
    local = [(t.to_local() if isinstance(t, DTensor) else t).untyped_storage() for t in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in local}.values())


@pytest.mark.slow
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("name", METHODS)
def test_two_processes_that_share_the_weights_are_one_that_takes_both_batches(
    name: str, share: bool, tmp_path: Path
) -> None:
    """With a batch of one and four steps the processes need unlike many network calls, and must make as many."""
    done = subprocess.run(
        [sys.executable, "-c", TWO, str(tmp_path), name, str(share)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    one = roles_of(deep(), METHODS[name], share)
    trained(one, METHODS[name], config=replace(CONFIG, batch=1, accumulate=2))
    for rank in (0, 1):
        found = load_file(tmp_path / f"{rank}.safetensors")
        before, after = found.pop("sizes").tolist()
        assert after < 0.75 * before  # a third lies outside the blocks of this network
        for n, expected in weights(one).items():
            torch.testing.assert_close(found[n], expected, rtol=0, atol=1e-6)


def test_a_network_without_blocks_is_refused(mesh: DeviceMesh) -> None:
    roles = roles_of(tiny.denoiser(), METHODS["unify"], share=True)
    with pytest.raises(ValueError, match=r"train.shard: a Net has no blocks .* set it to false"):
        roles.shard(mesh, torch.device("cpu"))
