"""The log that a run writes, iteration by iteration."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..atomic import append_text, write_text
from ..reading import reading, text_in
from ..training.loop import Step

Listen = Callable[[int, dict[str, Any]], None]  # (iteration, what a line says)


class MetricsLog:
    """`metrics.jsonl`: JSON lines about each iteration.

    On resuming, lines after the checkpoint are dropped. Without a path nothing is written. `listen` is called
    with every new line.
    """

    def __init__(self, path: Path | None, start: int, listen: Listen = lambda iteration, values: None) -> None:
        self.path, self.iteration, self.seconds, self.listen = path, start, 0.0, listen
        self.known: dict[str, Any] = {}  # what the lines of iteration `start` say
        if path is None:
            return
        kept = [r for r in _records(path) if r["iteration"] <= start] if start else []
        self.seconds = max((r["seconds"] for r in kept if isinstance(r.get("seconds"), int | float)), default=0.0)
        self.known = {key: value for r in kept if r["iteration"] == start for key, value in r.items()}
        write_text(path, "".join(json.dumps(r) + "\n" for r in kept))

    def add(self, step: Step) -> None:
        self.iteration, self.seconds = step.iteration, self.seconds + step.seconds
        self.note(step.iteration, {"seconds": round(self.seconds, 4), **step.metrics})

    def note(self, iteration: int, values: dict[str, Any]) -> None:
        if self.path is None:
            return
        append_text(self.path, json.dumps({"iteration": iteration, **values}) + "\n")
        self.listen(iteration, values)


def _records(path: Path) -> list[dict[str, Any]]:
    """Read the complete lines of a log.

    A last line that was cut off by a kill is left out.
    """
    records = []
    with reading(path, "move it away and run the same command again"):
        text = text_in(path, lenient=True) if path.exists() else ""
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and isinstance(record.get("iteration"), int):
            records.append(record)
    return records
