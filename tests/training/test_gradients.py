"""Gradients of several processes: in place, summed while the backward pass goes on, and only in an update's last batch.

One process is enough to see it.
"""

import pytest
import torch
from torch import Tensor, nn

from fewstep.methods.method import Loss
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.training import gradients
from fewstep.training.gradients import Buckets, Gradients
from fewstep.training.loop import Reach

from .. import tiny


def summed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every sum over processes, as they begin."""
    seen: list[int] = []

    class Done:
        def wait(self) -> None:
            """Nothing to wait for."""

    def note(tensor: Tensor) -> Done:
        seen.append(tensor.nbytes)
        return Done()

    monkeypatch.setattr(gradients, "sum_of_all", note)
    return seen


def layers(count: int) -> tuple[nn.Sequential, dict[str, nn.Parameter]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(count)))
    return network, dict(network.named_parameters())


def test_sums_begin_while_the_backward_pass_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = summed(monkeypatch)
    network, own = layers(6)
    at: list[int] = []
    own["0.weight"].register_hook(lambda _: at.append(len(sums)))
    buckets = Buckets(own, size=2 * 64)
    assert [flat.numel() for flat in buckets.flats] == [32, 32, 32]
    network(torch.ones(1, 4)).sum().backward()  # not the last: nothing is sent
    assert sums == [] and at == [0]
    buckets.final = True
    network(torch.ones(1, 4)).sum().backward()
    assert at == [0, 2] and sums == [128, 128, 128]  # two of three before the first layer has its gradient
    buckets.divide(1)
    assert len(sums) == 3


def test_gradients_are_written_where_they_are_summed() -> None:
    network, own = layers(3)
    conv = nn.Conv2d(4, 4, 3)
    conv.weight = nn.Parameter(conv.weight.detach().contiguous(memory_format=torch.channels_last))
    own["conv"] = conv.weight
    buckets = Buckets(own)
    before = {n: p.grad.data_ptr() for n, p in own.items() if p.grad is not None}
    memory = buckets.flats[0].untyped_storage()
    assert len(buckets.flats) == 1 and conv.weight.grad is not None
    assert conv.weight.grad.stride() == conv.weight.stride()
    for _ in range(2):
        (network(torch.ones(1, 4)).sum() + conv(torch.ones(1, 4, 3, 3)).sum()).backward()
    assert {n: p.grad.data_ptr() for n, p in own.items() if p.grad is not None} == before
    assert all(memory.data_ptr() <= place < memory.data_ptr() + memory.nbytes() for place in before.values())
    one = torch.autograd.grad(network(torch.ones(1, 4)).sum(), list(network.parameters()))
    for p, g in zip(network.parameters(), one, strict=True):
        torch.testing.assert_close(p.grad, 2 * g, rtol=0, atol=0)


def test_buckets_come_in_the_same_order_whatever_a_process_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = summed(monkeypatch)
    network, own = layers(3)
    buckets = Buckets(own, size=64)
    buckets.final = True
    network[:2](torch.ones(1, 4)).sum().backward()  # not the last layer, whose bucket is the first
    assert sums == [] and buckets.reached == {"0.weight", "1.weight"}
    buckets.divide(1)
    assert sums == [64, 64, 64] and float(own["2.weight"].grad.abs().sum()) == 0  # type: ignore[union-attr]


def roles() -> Roles:
    return make_roles(tiny.denoiser(), RolesConfig(rank=2))


def loss_of(made: Roles, scale: float) -> Loss:
    own = made.trained["student"].values()
    return Loss("student", scale * torch.stack([p.square().sum() + p.sum() for p in own]).sum(), {})


@pytest.mark.parametrize("batches", [1, 3, 4])
def test_several_processes_add_what_one_adds(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    summed(monkeypatch)
    one, two = roles(), roles()
    single, shared = (Gradients(made, batches, 1, 1, False, Reach()) for made in (one, two))
    shared.processes = 2
    for k in range(batches):
        single.add(loss_of(one, k + 1.0), last=k == batches - 1)
        shared.add(loss_of(two, k + 1.0), last=k == batches - 1)
    shared.finish("student")
    for p, q in zip(one.trained["student"].values(), two.trained["student"].values(), strict=True):
        assert p.grad is not None and q.grad is not None
        # Nothing is summed: half of the mean over two processes.
        torch.testing.assert_close(2 * q.grad, p.grad, rtol=1e-6 if batches == 3 else 0, atol=0)


def test_two_losses_of_one_role_together_are_refused_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    summed(monkeypatch)
    made = roles()
    shared = Gradients(made, 1, 2, 2, False, Reach())
    shared.add(loss_of(made, 1.0), last=True)
    with pytest.raises(ValueError, match=r"two losses of the student together.*; yield their sum"):
        shared.add(loss_of(made, 1.0), last=True)
