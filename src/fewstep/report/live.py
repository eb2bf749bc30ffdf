"""Reading `metrics.jsonl`, also of a run in progress."""

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
    """Read one record for each iteration, in order.

    Empty where the file is not there yet. Lines of one iteration (training, `quality`, `warnings`) become
    one record. After a resume the same iterations stand in the file twice: the later line counts. A
    half-written line, the last one or one that a crash left, is skipped.

    Raises ReadError for a line that is whole and holds something else.
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
    """Parse one line.

    Returns None for a line that was not written to its end. Raises ValueError for a whole line that is no
    record of a log.
    """
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
    """Return (iterations, values) of the records with a finite `key`.

    `quality.fd_real` reaches into `quality`.
    """
    outer, _, inner = key.rpartition(".")
    found = [(m["iteration"], (m.get(outer) or {} if outer else m).get(inner)) for m in metrics]
    finite = [(int(i), float(v)) for i, v in found if isinstance(v, int | float) and math.isfinite(v)]
    return [i for i, _ in finite], [v for _, v in finite]
