"""HTML of the studio: every text from outside is escaped."""

import html
from collections.abc import Sequence

from ..names import visible
from ..reading import reason

WIDE = 18  # letters of a value that one column holds


def text(value: object) -> str:
    """Return a value as text for a page, whatever it holds."""
    return html.escape(visible(str(value)), quote=True)


def note(said: object, kind: str = "") -> str:
    """Return a sentence in a box: plain, `warn` or `bad`."""
    told = reason(said) if isinstance(said, OSError) else said
    return f'<p class="fs-note {kind}" role="status">{text(told)}</p>'


def lines(said: str, empty: str = "") -> str:
    """Return output of a program, line by line."""
    if not said.strip():
        return note(empty) if empty else ""
    return f'<pre class="fs-log" tabindex="0" aria-label="Output">{text(said)}</pre>'


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """Return names and values as a list.

    Long values have a line of their own.
    """
    kinds = (' class="fs-wide"' if len(str(value)) > WIDE else "" for _, value in pairs)
    inner = "".join(
        f"<div{kind}><dt>{text(name)}</dt><dd>{text(value)}</dd></div>"
        for kind, (name, value) in zip(kinds, pairs, strict=True)
    )
    return f'<dl class="fs-facts">{inner}</dl>' if pairs else ""


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table that scrolls on a narrow screen."""
    head = "".join(f'<th scope="col">{text(h)}</th>' for h in heads)
    body = "".join(
        "<tr>" + "".join(f'<th scope="row">{text(c)}</th>' if not i else f"<td>{text(c)}</td>" for i, c in enumerate(r))
        + "</tr>" for r in rows
    )  # fmt: skip
    return (
        '<div class="fs-scroll" tabindex="0" role="region" aria-label="Table"><table class="fs-table">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def bar(share: float, label: str) -> str:
    """Return a progress bar."""
    percent = max(0.0, min(100.0, 100 * share))
    return (
        f'<div class="fs-bar" role="progressbar" aria-label="{text(label)}" aria-valuemin="0" aria-valuemax="100" '
        f'aria-valuenow="{percent:.0f}"><div style="width: {percent:.1f}%"></div></div>'
    )


def frame(page: str, title: str) -> str:
    """Return one of fewstep's own pages inside this one."""
    return f'<iframe class="fs-frame" title="{text(title)}" srcdoc="{html.escape(page, quote=True)}"></iframe>'


def image(url: str, label: str, pixels: bool) -> str:
    """Return an image with what it shows."""
    kind = ' class="fs-pixels"' if pixels else ""
    return f'<figure><img src="{url}" alt="{text(label)}"{kind}><figcaption>{text(label)}</figcaption></figure>'


def strip(title: str, figures: Sequence[str]) -> str:
    """Return images in a row, with a title at its left."""
    return (
        f'<section class="fs-strip"><h4>{text(title)}</h4><div class="fs-scroll" tabindex="0" role="region" '
        f'aria-label="{text(title)}">{"".join(figures)}</div></section>'
    )
