"""Compare two ways to sum gradients over processes.

    python benchmarks/gradients.py             # half a minute; writes benchmarks/gradients.md and .json

A network of 32 layers and 33 million weights, whose last layer comes first in a backward pass. `flat`: after the
backward pass all gradients are copied into one tensor, which is copied, summed and divided. `buckets`: the training's
own way; a bucket is being summed as soon as its gradients are there. Peaks are bytes that tensors take above weights
and activations, relative to the gradients. `begun` is the share of all bytes whose sum begins before the backward pass
ends. One process sums with itself (gloo), so that seconds are those of copies and not of a network; medians of 7.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, distributed, nn
from torch.distributed import Work

from fewstep.processes import sum_of_all
from fewstep.training import gradients
from fewstep.training.gradients import Buckets
from fewstep.training.ledger import MemoryTracker
from records import Facts, Record, about, markdown, new_record, provenance, wrapped, write_record

LAYERS, WIDTH, REPEATS = 32, 1024, 7


def network() -> nn.Sequential:
    """Return the network."""
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


def flat(module: nn.Module, loss: Tensor) -> int:
    """Sum all gradients after the backward pass, and return the bytes that were begun before it ended."""
    own = list(module.parameters())
    for p, grad in zip(own, torch.autograd.grad(loss, own), strict=True):
        p.grad = grad
    total = torch.cat([p.grad.flatten() for p in own if p.grad is not None]).clone()
    distributed.all_reduce(total)
    for p, part in zip(own, (total / 1).split([p.numel() for p in own]), strict=True):
        p.grad = part.view_as(p)
    return 0


def in_buckets(module: nn.Module, loss: Tensor) -> int:
    """Sum gradients as the training does, and return the bytes that were begun before the backward pass ended."""
    begun, last = [0], next(module.parameters())

    def count(tensor: Tensor) -> Work:
        begun[0] += tensor.nbytes
        return sum_of_all(tensor)

    gradients.sum_of_all = count  # type: ignore[attr-defined]
    at_end: list[int] = []
    hook = last.register_hook(lambda _: at_end.append(begun[0]))  # the first layer, whose gradient comes last
    buckets = Buckets(dict(module.named_parameters()))
    buckets.final = True
    torch.autograd.backward(loss, inputs=list(module.parameters()))
    buckets.divide(1)
    hook.remove()
    gradients.sum_of_all = sum_of_all  # type: ignore[attr-defined]
    return at_end[0]


WAYS: dict[str, Callable[[nn.Module, Tensor], int]] = {"flat": flat, "buckets": in_buckets}


def row(way: str) -> Facts:
    """Return what one way takes."""
    module, x = network(), torch.randn(8, WIDTH)
    size = sum(p.nbytes for p in module.parameters())
    seconds, peak, begun = [], 0, 0
    for k in range(REPEATS + 1):
        module.zero_grad(set_to_none=True)
        loss = module(x).square().mean()
        if k == 0:  # to warm up, and to count
            with MemoryTracker() as tracker:
                begun = WAYS[way](module, loss)
            peak = tracker.peak
            continue
        began = time.process_time()
        WAYS[way](module, loss)
        seconds.append(time.process_time() - began)
    return {"way": way, "gradients": size, "peak": peak, "begun": begun, "seconds": statistics.median(seconds)}


def page(record: Record) -> str:
    """Return the page of a record."""
    lines = [
        [r["way"], f"{r['peak'] / r['gradients']:.2f}", f"{r['begun'] / r['gradients']:.2f}", f"{r['seconds']:.3f}"]
        for r in record.rows
    ]
    return f"""# Two ways to sum gradients over processes

{about(__doc__)}

{wrapped(provenance(record))}

{markdown(["way", "peak", "begun", "CPU s of a backward pass and its sum"], lines)}
"""


def main() -> None:
    """Measure both ways and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    torch.set_num_threads(1)
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    record = new_record("gradients", "python benchmarks/gradients.py", [row(way) for way in WAYS], None, {})
    distributed.destroy_process_group()
    write_record(record, page(record), a.to)


if __name__ == "__main__":
    main()
