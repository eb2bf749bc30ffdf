"""Write and read the benchmarks' records, and say where numbers come from.

Every benchmark writes `NAME.json`, a record of this one shape, and `NAME.md`, a page made of the record alone:

    {"benchmark", "command", "hardware", "versions", "date", "seeds", "common", "rows"}

`common` holds what belongs to all rows: settings, and measurements that rows are compared with. Rows of several
runs name their own hardware and versions; the record then names what all rows share. Null stands for what is
unknown, and for what differs from row to row.
"""

import json
import statistics
import subprocess
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fewstep.atomic import write_bytes, write_json

Facts = dict[str, Any]

CLOCK = time.perf_counter if torch.cuda.is_available() else time.process_time  # other processes share the processors
WIDEST = (
    "amx_bf16",
    "avx512_bf16",
    "avx512f",
    "avx2",
)  # instructions; processors of one name differ threefold in speed


@dataclass(frozen=True, kw_only=True)
class Record:
    """Rows of a benchmark, and where they come from."""

    benchmark: str
    command: str
    hardware: Facts  # device, instructions, threads
    versions: Facts  # commit, torch
    date: str | None  # of the last row
    seeds: list[int] | None
    common: Facts
    rows: list[Facts]


def hardware() -> Facts:
    """Return the GPU, or the processor with its widest instructions and the number of threads."""
    if torch.cuda.is_available():
        return {"device": torch.cuda.get_device_name(0), "instructions": None, "threads": None}
    listed = Path("/proc/cpuinfo")  # Linux
    lines = [line.partition(":") for line in (listed.read_text().splitlines() if listed.exists() else [])]
    found = {name.strip(): value.strip() for name, _, value in lines}
    flags = found.get("flags", "").split()
    return {
        "device": found.get("model name", "CPU"),
        "instructions": next((name for name in WIDEST if name in flags), None),
        "threads": torch.get_num_threads(),
    }


def versions() -> Facts:
    """Return this project's commit, null outside its repository, and the version of torch."""
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {"commit": found.stdout.strip() or None, "torch": str(torch.__version__)}


def origin() -> dict[str, Facts]:
    """Return hardware and versions, for a row of its own run."""
    return {"hardware": hardware(), "versions": versions()}


def new_record(
    benchmark: str, command: str, rows: Sequence[Facts], seeds: Sequence[int] | None, common: Mapping[str, Any]
) -> Record:
    """Return a record of today.

    Rows without hardware and versions of their own were measured here and now.
    """
    here = origin()
    shared = {key: _shared([row.get(key, value) for row in rows] or [value]) for key, value in here.items()}
    return Record(
        benchmark=benchmark,
        command=command,
        **shared,
        date=time.strftime("%Y-%m-%d"),
        seeds=None if seeds is None else sorted(seeds),
        common=json.loads(json.dumps(common)),
        rows=json.loads(json.dumps(rows)),  # keys as JSON keeps them
    )


def _shared(found: Sequence[Facts]) -> Facts:
    return {key: value if all(other[key] == value for other in found) else None for key, value in found[0].items()}


def read_record(file: Path) -> Record | None:
    """Return a stored record, None where there is none."""
    return Record(**json.loads(file.read_text(encoding="utf-8"))) if file.exists() else None


def stored_rows(file: Path) -> list[Facts]:
    """Return the rows of a stored record, none where there is none."""
    found = read_record(file)
    return [] if found is None else found.rows


def write_record(record: Record, page: str, to: Path) -> None:
    """Write a record and its page to the folder `to`."""
    to.mkdir(parents=True, exist_ok=True)
    write_json(to / f"{record.benchmark}.json", asdict(record))
    write_bytes(to / f"{record.benchmark}.md", page.encode())


def about(doc: str | None) -> str:
    """Return the third paragraph of a benchmark's docstring, which its page repeats."""
    return (doc or "").split("\n\n")[2].strip()


def provenance(record: Record) -> str:
    """Return the command, the hardware, the commits and the date of a record, as far as they are known."""
    where = "; ".join(machines(record))
    parts = [f"`{record.command}`", where, commits(record), torch_of(record), record.date or ""]
    return ", ".join(part for part in parts if part)


def machines(record: Record) -> list[str]:
    """Return the machines of all rows."""
    return sorted({machine(row.get("hardware", record.hardware)) for row in record.rows})


def machine(found: Facts) -> str:
    """Return hardware in words."""
    instructions = f" with {found['instructions']}" if found["instructions"] else ""
    count = found["threads"]
    threads = "" if count is None else f", {count} thread{'' if count == 1 else 's'}"
    return f"{found['device']}{instructions}{threads}"


def commits(record: Record) -> str:
    """Return the commits of all rows."""
    found = {row.get("versions", record.versions)["commit"] for row in record.rows} - {None}
    return f"commit {', '.join(sorted(found))}" if found else ""


def torch_of(record: Record) -> str:
    """Return the version of torch that all rows share."""
    version = record.versions["torch"]
    return f"torch {version}" if version else ""


def wrapped(text: str) -> str:
    """Return a paragraph in lines of at most 120 columns, except for longer words."""
    return textwrap.fill(" ".join(text.split()), 120, break_long_words=False, break_on_hyphens=False)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean ± deviation; of one value the value, of none a dash."""
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table without a line break at its end."""
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (head, ["---"] * len(head), *rows))
