"""Measure the memory in which sharded processes start.

    python benchmarks/start.py                 # under a minute; writes benchmarks/start.md and .json

Four processes on one CPU make student and fake score as copies of a denoiser of 51 million weights, and shard all
three. `each reads`: every process has the whole denoiser and copies it before it is sharded. `first reads`: the first
process has it, the others have dropped theirs and receive their parts, and the copies begin as copies of parts. Peaks
are resident memory (VmHWM) from there on, above that before the denoiser was made, relative to the denoiser's size. A
quarter of three networks and the average is 1.00.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from accelerate import debug_launcher
from torch import Tensor, distributed, nn

from fewstep.backbones.base import Denoiser
from fewstep.core.schedule import Flow
from fewstep.processes import mesh_of
from fewstep.roles.roles import RolesConfig, make_roles
from fewstep.roles.sharding import empty
from records import Facts, Record, about, markdown, new_record, provenance, wrapped, write_record

COUNT, BLOCKS, WIDTH = 4, 8, 1792
WAYS = ("each reads", "first reads")


class Network(nn.Module):
    """A denoiser of states [B, 1792]."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)) for _ in range(BLOCKS)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def resident(which: str) -> int:
    """Return the resident memory of this process, in bytes: VmRSS now, VmHWM at its peak."""
    line = next(li for li in Path("/proc/self/status").read_text().splitlines() if li.startswith(which))
    return int(line.split()[1]) * 1024


def start(way: str, folder: str) -> None:
    """Make and shard the roles, and write the peak."""
    torch.set_num_threads(1)
    mesh, first, before = mesh_of(1), distributed.get_rank() == 0, resident("VmRSS")
    backbone = Denoiser(Network().requires_grad_(False), Flow(), (WIDTH,), "flow")
    size = sum(p.nbytes for p in backbone.module.parameters())
    if way == WAYS[1] and not first:
        empty(backbone.module)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is that from now on
    roles = make_roles(backbone, RolesConfig(lora=False), on_meta=way == WAYS[1])
    roles.shard(mesh, torch.device("cpu"), from_first=way == WAYS[1])
    found = {"process": distributed.get_rank(), "peak": resident("VmHWM") - before, "denoiser": size}
    Path(folder, f"{distributed.get_rank()}.json").write_text(json.dumps(found))


def measured(way: str) -> list[Facts]:
    """Return a row for each process."""
    with tempfile.TemporaryDirectory() as folder:
        debug_launcher(start, args=(way, folder), num_processes=COUNT)
        return [{"way": way, **json.loads(Path(folder, f"{k}.json").read_text())} for k in range(COUNT)]


def page(record: Record) -> str:
    """Return the page of a record."""
    lines = []
    for way in WAYS:
        peaks = [r["peak"] / r["denoiser"] for r in record.rows if r["way"] == way]
        lines.append([way, f"{peaks[0]:.2f}", f"{max(peaks[1:]):.2f}", f"{sum(peaks):.2f}"])
    return f"""# How much memory sharded processes start in

{about(__doc__)}

{wrapped(provenance(record))}

{markdown(["way", "first process", "largest of the others", "all four"], lines)}
"""


def main() -> None:
    """Measure both ways and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    rows = [row for way in WAYS for row in measured(way)]
    record = new_record("start", "python benchmarks/start.py", rows, None, {"processes": COUNT})
    write_record(record, page(record), a.to)


if __name__ == "__main__":
    main()
