"""Reading `metrics.jsonl` of a run that may still be running."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Metrics = Mapping[str, Any]


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """One record for each iteration, in order; empty where the file is not there yet.

    Lines of one iteration (training, `quality`, `warnings`) become one record. After a resume the same iterations stand
    there twice: the later line counts. A half-written line, the last one or one that a crash left, is passed over.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    records: dict[int, dict[str, Any]] = {}
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            iteration = int(entry["iteration"])
        except (ValueError, KeyError, TypeError):
            continue
        records.setdefault(iteration, {}).update(entry)
    return [records[i] for i in sorted(records)]


def series(metrics: Sequence[Metrics], key: str) -> tuple[list[int], list[float]]:
    """(iterations, values) of the records that have a finite `key`; `quality.fd_real` reaches into `quality`."""
    outer, _, inner = key.rpartition(".")
    found = [(m["iteration"], (m.get(outer) or {} if outer else m).get(inner)) for m in metrics]
    finite = [(int(i), float(v)) for i, v in found if isinstance(v, int | float) and math.isfinite(v)]
    return [i for i, _ in finite], [v for _, v in finite]
