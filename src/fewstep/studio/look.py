"""The studio's look: the report's colours on gradio's page."""

import re
from importlib.resources import files

import gradio as gr

from .. import report

ROOT = re.compile(r":root \{([^}]*)\}")
SANS = ("ui-sans-serif", "system-ui", "sans-serif")
MONO = ("ui-monospace", "SF Mono", "Menlo", "Consolas", "monospace")

STYLE = """
.gradio-container { max-width: 84rem !important; margin: 0 auto; font-variant-numeric: tabular-nums; }
.fs-head h1 { margin: 0; font-size: 1.35rem; font-weight: 650; letter-spacing: -.01em; }
.fs-head p { margin: .1rem 0 0; color: var(--muted); font-size: .875rem; overflow-wrap: anywhere; }
.fs-note { margin: 0; padding: .6rem .85rem; border-radius: .5rem; background: var(--tint); overflow-wrap: anywhere; }
.fs-note.warn { background: var(--warn-tint); color: var(--warn); }
.fs-note.bad { background: var(--bad-tint); color: var(--bad); }
.fs-log { margin: 0; max-height: 24rem; overflow: auto; padding: .7rem .9rem; border: 1px solid var(--line);
  border-radius: .5rem; background: var(--card); color: var(--ink); font: .8rem/1.5 var(--mono);
  white-space: pre-wrap; overflow-wrap: anywhere; }
.fs-facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .7rem 1.2rem; margin: .8rem 0 0; }
.fs-facts dt { font-size: .78rem; color: var(--muted); }
.fs-facts dd { margin: 0; overflow-wrap: anywhere; }
.fs-bar { height: .5rem; margin: .7rem 0 .3rem; border-radius: .25rem; background: var(--line); overflow: hidden; }
.fs-bar div { height: 100%; background: var(--student); }
.fs-state { display: flex; gap: .6rem; align-items: baseline; flex-wrap: wrap; }
.fs-state h2 { margin: 0; font-size: 1.15rem; overflow-wrap: anywhere; }
.fs-word { padding: .1rem .55rem; border-radius: 1rem; font-size: .8rem; font-weight: 600; background: var(--tint); color: var(--student); }
.fs-word.died, .fs-word.failed { background: var(--bad-tint); color: var(--bad); }
.fs-word.stopped, .fs-word.waiting { background: var(--warn-tint); color: var(--warn); }
.fs-scroll { overflow-x: auto; max-width: 100%; }
.fs-strip h4 { margin: .7rem 0 .3rem; font-size: .85rem; font-weight: 600; }
.fs-strip .fs-scroll { display: flex; gap: .5rem; }
.fs-strip figure { margin: 0; width: 6.5rem; flex: none; }
.fs-strip img { width: 6.5rem; height: 6.5rem; object-fit: contain; border-radius: .35rem; background: var(--card); }
.fs-strip figcaption { font-size: .72rem; line-height: 1.3; color: var(--muted); overflow-wrap: anywhere; max-height: 3.9em; overflow: hidden; }
.fs-pixels, .fs-wipe img { image-rendering: pixelated; }
.fs-charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
.fs-charts figure { margin: 0; padding: .8rem; border: 1px solid var(--line); border-radius: .6rem; background: var(--card); min-width: 0; }
.fs-charts h4 { margin: 0 0 .4rem; font-size: .95rem; }
.fs-charts figcaption { font-size: .78rem; color: var(--muted); }
.fs-charts svg { width: 100%; height: auto; display: block; font-family: var(--font); }
.fs-table { border-collapse: collapse; width: 100%; font-size: .875rem; }
.fs-table th, .fs-table td { padding: .4rem .7rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
.fs-frame { display: block; width: 100%; height: min(80vh, 52rem); border: 1px solid var(--line); border-radius: .6rem; background: var(--paper); }
.fs-runs .wrap { display: grid !important; grid-template-columns: 1fr; gap: .4rem; }
.fs-runs label { width: 100%; align-items: flex-start; }
.fs-runs label span { white-space: pre-line; overflow-wrap: anywhere; min-width: 0; }
.gradio-container :focus-visible { outline: 2px solid var(--student); outline-offset: 2px; }
@media (max-width: 640px) {
  .gradio-container main.app { padding: .7rem !important; }
  .fs-facts { grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); }
}
"""


def css() -> str:
    """Return the style sheet: the report's colours in light and dark, then the studio's own rules."""
    sheet = files(report.__name__).joinpath("style.css").read_text(encoding="utf-8")
    light, dark = ROOT.findall(sheet)[:2]
    return (
        f".gradio-container {{{light} --bad: #a3261b; --bad-tint: #fdecea; }}\n"
        f".dark .gradio-container, .gradio-container.dark {{{dark} --bad: #ff9c92; --bad-tint: #33191a; }}\n{STYLE}"
    )


def theme() -> gr.themes.Base:
    """Return the theme: system fonts, so that nothing is loaded from anywhere."""
    return gr.themes.Default(primary_hue="blue", neutral_hue="zinc", font=SANS, font_mono=MONO, radius_size="md")
