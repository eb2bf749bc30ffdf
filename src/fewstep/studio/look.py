"""The studio's look: the report's colours on gradio's page."""

import re
from importlib.resources import files

import gradio as gr

from .. import report

REPORT = report.__name__
ROOT = re.compile(r":root \{([^}]*)\}")
SANS = ("ui-sans-serif", "system-ui", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace")


def css() -> str:
    """Return the style sheet.

    The report's colours in light and dark, then the studio's own rules.
    """
    sheet, own = (files(place).joinpath("style.css").read_text(encoding="utf-8") for place in (REPORT, __package__))
    light, dark = ROOT.findall(sheet)[:2]
    return (
        f".gradio-container {{{light} --bad: #a3261b; --bad-tint: #fdecea; }}\n"
        f".dark .gradio-container, .gradio-container.dark {{{dark} --bad: #ff9c92; --bad-tint: #33191a; }}\n{own}"
    )


def theme() -> gr.themes.Base:
    """Return the theme: system fonts, so that nothing is loaded from anywhere."""
    return gr.themes.Default(primary_hue="blue", neutral_hue="zinc", font=SANS, font_mono=MONO, radius_size="md")
