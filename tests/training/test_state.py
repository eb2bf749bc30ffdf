"""Checkpoints come back bit for bit, or say what is wrong; a failed write leaves everything as it was."""

import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from fewstep.backbones.base import Denoiser
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.training import saving
from fewstep.training import state as module
from fewstep.training.ledger import MemoryTracker
from fewstep.training.loop import save_run
from fewstep.training.optimizer import make_optimizer
from fewstep.training.saving import CheckpointWriter
from fewstep.training.state import (
    checkpoints,
    latest_checkpoint,
    load_checkpoint,
    load_optimizer_tensors,
    optimizer_tensors,
    require_optimizer_tensors,
    save_checkpoint,
    seeded,
)

from .. import tiny

GROUPS = {
    "student": {"a.weight": torch.arange(4.0), "b": torch.ones(2, 2, dtype=torch.float16)},
    "optimizer": {"a.weight.step": torch.tensor(3.0)},
}


def truncate(path: Path, keep: float = 0.5) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def test_seeds_depend_on_all_their_arguments_and_nothing_else() -> None:
    def first(*args: Any, **options: Any) -> float:
        return torch.rand((), generator=seeded(*args, **options)).item()

    torch.manual_seed(1)
    assert first(0, 5, "draw") == first(0, 5, "draw")
    assert (
        len(
            {
                first(0, 5, "draw"),
                first(1, 5, "draw"),
                first(0, 6, "draw"),
                first(0, 5, "prompts"),
                first(0, 5, "draw", rank=1),
            }
        )
        == 5
    )


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 7, GROUPS, {"fingerprint": "x"})
    assert folder.name == "checkpoint-000007"
    assert sorted(p.name for p in folder.iterdir()) == ["optimizer.safetensors", "state.json", "student.safetensors"]
    groups, state = load_checkpoint(folder)
    assert (state["step"], state["fingerprint"]) == (7, "x")
    assert {g: set(t) for g, t in groups.items()} == {g: set(t) for g, t in GROUPS.items()}
    for group, tensors in GROUPS.items():
        for name, tensor in tensors.items():
            assert torch.equal(groups[group][name], tensor)
            assert groups[group][name].dtype == tensor.dtype


def test_views_and_strides_are_no_obstacle(tmp_path: Path) -> None:
    groups, _ = load_checkpoint(save_checkpoint(tmp_path, 1, {"g": {"t": torch.arange(6.0).reshape(2, 3).T}}, {}))
    assert groups["g"]["t"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path) is None
    for step in (2, 9, 10, 11):
        save_checkpoint(tmp_path, step, GROUPS, {})
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000010", "checkpoint-000011"]
    found = latest_checkpoint(tmp_path)
    assert found is not None
    assert found[1]["step"] == 11
    save_checkpoint(tmp_path, 11, GROUPS, {"again": True})
    assert (latest_checkpoint(tmp_path) or ({}, {}))[1]["again"]


def remove(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [truncate, remove, empty])
@pytest.mark.parametrize("file", ["student.safetensors", "optimizer.safetensors", "state.json"])
def test_damage_is_one_clear_error_and_the_older_one_is_whole(
    tmp_path: Path, file: str, damage: Callable[[Path], None]
) -> None:
    older = save_checkpoint(tmp_path, 1, GROUPS, {})
    damage(save_checkpoint(tmp_path, 2, GROUPS, {}) / file)
    with pytest.raises(
        ValueError,
        match=r"^checkpoint .*checkpoint-000002 is damaged or incomplete .*; "
        r"delete that folder to go on from checkpoint-000001$",
    ):
        latest_checkpoint(tmp_path)
    assert load_checkpoint(older)[1]["step"] == 1


def test_damage_of_the_only_checkpoint(tmp_path: Path) -> None:
    truncate(save_checkpoint(tmp_path, 2, GROUPS, {}) / "student.safetensors")
    with pytest.raises(ValueError, match=r"; choose another --out to start again$"):
        latest_checkpoint(tmp_path)


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, GROUPS, {})
    written: list[str] = []

    def full(file: BinaryIO, *_: object) -> str:
        written.append(file.name)
        file.write(b"half")
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        return ""

    monkeypatch.setattr(module, "stream_tensors", full)
    with pytest.raises(
        OSError,
        match=r"cannot write checkpoint .*checkpoint-000002: .*No space left on device.*; "
        r"free some space or choose another --out",
    ):
        save_checkpoint(tmp_path, 2, GROUPS, {})
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000001"]
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) is not None
    save_checkpoint(tmp_path, 2, GROUPS, {})


def test_what_a_killed_process_left_is_no_checkpoint_and_no_obstacle(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, GROUPS, {})
    left = tmp_path / ".checkpoint-000002.tmp"
    left.mkdir()
    (left / "student.safetensors").write_bytes(b"half")
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000001"]
    save_checkpoint(tmp_path, 2, GROUPS, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-000001", "checkpoint-000002"]


def test_an_optimiser_goes_on_bit_for_bit() -> None:
    def make() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        return net, torch.optim.AdamW(net.parameters(), lr=0.1, betas=(0.0, 0.999))

    def step(net: nn.Module, optimizer: torch.optim.Optimizer, i: int) -> None:
        optimizer.zero_grad()
        net(torch.full((2, 3), float(i))).square().sum().backward()
        optimizer.step()

    net, optimizer = make()
    names = [n for n, _ in net.named_parameters()]
    for i in range(3):
        step(net, optimizer, i)
    kept = {n: p.detach().clone() for n, p in net.named_parameters()}
    tensors = optimizer_tensors(optimizer, names)
    assert set(tensors) == {f"{n}.{k}" for n in names for k in ("step", "exp_avg", "exp_avg_sq")}
    other, fresh = make()
    other.load_state_dict(kept)
    load_optimizer_tensors(fresh, names, tensors)
    for i in range(3, 6):
        step(net, optimizer, i)
        step(other, fresh, i)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert optimizer_tensors(make()[1], names) == {}


def counted_saving(roles: Roles, run: Path) -> tuple[int, int]:
    """The bytes that tensors and Python take while a checkpoint is saved, beyond those that are there anyway."""
    optimizers = {
        r: make_optimizer(list(p.values()), "adamw", 1e-3, (0.0, 0.999), 0.0) for r, p in roles.trained.items()
    }
    states = [v for o in optimizers.values() for state in o.state.values() for v in state.values()]
    held = [*roles.average.values(), *states, *(p for own in roles.trained.values() for p in own.values())]
    tracemalloc.start()
    with MemoryTracker() as ledger:
        ledger.add(*held)
        before = ledger.now
        save_run(roles, optimizers, CheckpointWriter(run, 2), 1, {})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (run / "checkpoint-000001" / "optimizer_student.safetensors").is_file()
    return ledger.peak - before, peak


class Wide(nn.Module):
    """Blocks whose weights are large beside everything else."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(512, 512) for _ in range(4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


LARGEST = 512 * 512 * 4


@pytest.mark.parametrize("lora", [True, False])
def test_saving_holds_nothing_beside_what_is_there(lora: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of weights or of optimiser states would be made on the card: gigabytes at the first checkpoint."""
    monkeypatch.setattr(saving, "free_memory", lambda: 0)
    roles = make_roles(Denoiser(Wide(), tiny.TABLE, (512,), "v"), RolesConfig(lora=lora, rank=2))
    tensors, other = counted_saving(roles, tmp_path)
    assert tensors == 0 and other < LARGEST


@pytest.fixture
def two() -> Iterator[DeviceMesh]:
    """This process as the first of two, whose messages go nowhere."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    distributed.destroy_process_group()


def test_saving_sharded_weights_holds_one_whole_tensor(
    two: DeviceMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor is gathered, with what gathering takes, and gone before the next one comes: 28 are saved."""
    monkeypatch.setattr(saving, "free_memory", lambda: 0)
    roles = make_roles(Denoiser(Wide(), tiny.TABLE, (512,), "v"), RolesConfig(lora=False))
    roles.shard(two, torch.device("cpu"))
    tensors, other = counted_saving(roles, tmp_path)
    assert LARGEST <= tensors <= 3 * LARGEST and other < LARGEST


def read(folder: Path) -> dict[str, Any] | str:
    """The state of a checkpoint without its own hash, under whatever name, or what is said of it."""
    try:
        return {
            k: v
            for k, v in load_checkpoint(folder)[1].items()
            if k in ("step", "groups", "fingerprint", "metrics", "sha256")
        }
    except ValueError as error:
        return str(error)


def test_one_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 2, GROUPS, {"fingerprint": "x", "metrics": {"loss": 0.5}})
    whole, damage = read(folder), f"checkpoint {folder} is damaged or incomplete ("
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        for at in range(0, len(data), 3):
            file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            found = read(folder)
            assert found == whole or (isinstance(found, str) and found.startswith(damage)), (file.name, at)
            assert found != whole or data[at : at + 1] in b" \n" or b"state_sha" in data[at - 12 : at + 12], (
                file.name,
                at,
            )
        file.write_bytes(data)


def test_a_checkpoint_without_hashes_is_read(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, 2, GROUPS, {})
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    (folder / "state.json").write_text(json.dumps({"step": 2, "groups": state["groups"]}), encoding="utf-8")
    assert load_checkpoint(folder)[1] == {"step": 2, "groups": ["optimizer", "student"]}


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        '{"step": "2", "groups": []}',
        '{"step": true, "groups": []}',
        '{"step": 2, "groups": 3}',
        '{"step": 2, "groups": [], "sha256": []}',
    ],
)
def test_a_state_of_another_kind_is_damage(text: str, tmp_path: Path) -> None:
    (save_checkpoint(tmp_path, 2, {}, {}) / "state.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="is damaged or incomplete"):
        latest_checkpoint(tmp_path)


def test_copies_that_somebody_made_are_no_checkpoints_and_stay(tmp_path: Path) -> None:
    first = save_checkpoint(tmp_path, 3, GROUPS, {})
    mine = [
        "checkpoint-000003-good",
        "checkpoint-000009 (copy)",
        "checkpoint-9",
        "checkpoint-0000003",
        "checkpoint-000003.bak",
        "checkpoint-best",
        "checkpoint-٠٠٠٠٠٣",
    ]
    for name in mine:
        shutil.copytree(first, tmp_path / name)
    (tmp_path / "checkpoint-000012").symlink_to("checkpoint-000003-good")
    for step in (4, 5, 6):
        save_checkpoint(tmp_path, step, GROUPS, {})
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-000005", "checkpoint-000006"]
    assert (latest_checkpoint(tmp_path) or ({}, {}))[1]["step"] == 6
    assert all((tmp_path / name / "student.safetensors").is_file() for name in mine)
    shutil.copytree(tmp_path / "checkpoint-000005", tmp_path / "checkpoint-000099")
    with pytest.raises(
        ValueError,
        match=r"it is of iteration 5: a copy under another name\); delete that folder to go on from checkpoint-000006",
    ):
        latest_checkpoint(tmp_path)


def test_checkpoints_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000, 1_000_001):
        save_checkpoint(tmp_path, step, {}, {})
    assert [p.name for p in checkpoints(tmp_path)] == ["checkpoint-1000000", "checkpoint-1000001"]


def test_optimiser_state_is_that_of_the_optimiser() -> None:
    """Of parameters with other keys too, as 8-bit optimisers have for small ones."""
    one, other = {"a.step": torch.tensor(1), "a.exp": torch.ones(2)}, {"b.x.step": torch.tensor(1)}
    wanted = [*one, *other]
    require_optimizer_tensors(wanted, one | other, "it")
    for there, said in (
        (one, "it lacks optimiser state of b.x"),
        ({"a.step": torch.tensor(1)} | other, "it lacks optimiser state of a"),
        ({}, "it lacks optimiser state of a"),
        (one | other | {"c.step": torch.ones(1)}, "of c, which is not trained here"),
    ):
        with pytest.raises(ValueError, match=said):
            require_optimizer_tensors(wanted, there, "it")
