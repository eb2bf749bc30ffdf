"""The rows of `eval.json` as a table.

The table has headings with units and formatted numbers; the best of each column is marked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..evaluation.metrics import METRICS
from .words import finite, plural

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A column of the table.

    `better` says which values are good, None where neither end is. `factor` turns a stored value into the
    shown unit.
    """

    key: str
    heading: str
    digits: int = 0
    better: Literal["low", "high"] | None = None
    unit: str = ""
    factor: float = 1.0


@dataclass(frozen=True)
class Cell:
    """A cell of the table.

    `value` is what eval.json holds, `text` what is shown, `between` its interval.
    """

    text: str
    value: float | None = None
    best: bool = False
    between: str = ""


NAMED = (Column("model", "Model"), Column("steps", "Steps"), Column("guidance", "Guidance", 1))
COLUMNS = (
    *NAMED,
    Column("nfe", "Network evaluations"),
    Column("n", "Images measured"),
    *(Column(m.key, m.heading, m.digits, m.better, m.unit, m.factor) for m in METRICS.values() if m.shown),
)
DRIFT = tuple(Column(m.key, m.heading, m.digits) for m in METRICS.values() if m.kind == "drift")


@dataclass(frozen=True)
class Table:
    """The columns and cells of a table.

    `cells[r][c]` belongs to `columns[c]`. Columns that no row fills are left out.
    """

    columns: tuple[Column, ...]
    cells: tuple[tuple[Cell, ...], ...]


def table(rows: Sequence[Row], columns: Sequence[Column] = COLUMNS) -> Table:
    """Return the rows as a table, in their own order.

    A value that is missing or not finite is shown as a dash and is never the best.
    """
    filled = tuple(c for c in columns if any(row.get(c.key) is not None for row in rows))
    return Table(filled, tuple(tuple(_cell(c, row, rows) for c in filled) for row in rows))


def drift(rows: Sequence[Row]) -> Table:
    """Return how the rows' images look, next to the teacher's.

    Without cells where nothing was compared.
    """
    measured = any(finite(row.get(c.key)) for row in rows for c in DRIFT)
    return table(rows, (*NAMED, *DRIFT)) if measured else Table((), ())


def _cell(column: Column, row: Row, rows: Sequence[Row]) -> Cell:
    value = row.get(column.key)
    if isinstance(value, str):
        return Cell(value)
    if not finite(value):
        return Cell("–")
    others = [r[column.key] for r in rows if finite(r.get(column.key))]
    best = len(others) > 1 and (
        (column.better == "low" and value == min(others)) or (column.better == "high" and value == max(others))
    )
    low, high = (row.get("intervals") or {}).get(column.key, (None, None))
    between = f"{_number(column, low)} to {_number(column, high)}" if finite(low) and finite(high) else ""
    unit = column.unit and chr(0xA0) + column.unit
    return Cell(_number(column, value) + unit, value, best, between)


def _number(column: Column, value: float) -> str:
    return f"{value * column.factor:,.{column.digits}f}"


def sentences(rows: Sequence[Row], paired: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return each paired comparison as a sentence."""
    found = []
    for one in paired:
        own, other = (f"{r['model']}, {plural(r['steps'], 'step')}" for r in (rows[one["row"]], rows[one["against"]]))
        low, high = one["wins_interval"]
        heading = METRICS[one["metric"]].heading if one["metric"] in METRICS else one["metric"]
        found.append(
            f"{own} against {other}: better at {100 * one['wins']:.0f} % of the images "
            f"({100 * low:.0f} to {100 * high:.0f} %) in: {heading}."
        )
    return found
