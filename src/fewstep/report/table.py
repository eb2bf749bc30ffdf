"""The rows of `eval.json` as a table.

The table has headings with units and formatted numbers; the best of each column is marked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..evaluation.metrics import METRICS
from .words import finite

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

    `value` is what eval.json holds, `text` what is shown.
    """

    text: str
    value: float | None = None
    best: bool = False


COLUMNS = (
    Column("model", "Model"),
    Column("steps", "Steps"),
    Column("guidance", "Guidance", 1),
    Column("nfe", "Network evaluations"),
    Column("n", "Images measured"),
    *(Column(m.key, m.heading, m.digits, m.better, m.unit, m.factor) for m in METRICS.values() if m.shown),
)


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
    return Cell(f"{value * column.factor:,.{column.digits}f}{column.unit and chr(0xA0) + column.unit}", value, best)
