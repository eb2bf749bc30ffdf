"""Reading `metrics.jsonl` of a run that may still be running."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..reading import reading, text_in
from ..typed import typed
from .kinds import Line, Number

Metrics = Mapping[str, Any]
CURE = "delete that line, or the file, and run the same command again"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """One record for each iteration, in order; empty where the file is not there yet.

    Lines of one iteration (training, `quality`, `warnings`) become one record. After a resume the same iterations stand
    there twice: the later line counts. A half-written line, the last one or one that a crash left, is passed over. Raises ReadError for a line
    that is whole and holds something else.
    """
    if not path.exists():
        return []
    with reading(path, CURE):
        text = text_in(path, lenient=True)
    records: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        with reading(f"{path}, line {number},", CURE):
            entry = _record(line)
        if entry is not None:
            records.setdefault(entry["iteration"], {}).update(entry)
    return [records[i] for i in sorted(records)]


def _record(line: str) -> dict[str, Any] | None:
    """What a line holds; None where it has not been written to its end. Raises ValueError for what no line of such a file begins with."""
    try:
        entry = json.loads(line)
    except ValueError:
        if line.strip("\0 ") and not line.startswith("{"):
            raise
        return None
    found: dict[str, Any] = typed(Line, entry)
    for key in found.keys() - Line.__annotations__.keys():
        typed(Number, found[key], key)
    return found


def series(metrics: Sequence[Metrics], key: str) -> tuple[list[int], list[float]]:
    """(iterations, values) of the records that have a finite `key`; `quality.fd_real` reaches into `quality`."""
    outer, _, inner = key.rpartition(".")
    found = [(m["iteration"], (m.get(outer) or {} if outer else m).get(inner)) for m in metrics]
    finite = [(int(i), float(v)) for i, v in found if isinstance(v, int | float) and math.isfinite(v)]
    return [i for i, _ in finite], [v for _, v in finite]
