"""Tables in Markdown."""

from collections.abc import Sequence

from ..names import visible


def cell(text: str) -> str:
    """Return a text for a cell of a table.

    Nothing in it is read as markup.
    """
    return "".join(f"\\{c}" if c in "\\`*_[]<>|#" else c for c in visible(text, lines=False))


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines.

    Every text is shown as it is.
    """
    return [_row(headings), "|---" * len(headings) + "|", *map(_row, rows)]


def _row(texts: Sequence[str]) -> str:
    return f"| {' | '.join(map(cell, texts))} |"
