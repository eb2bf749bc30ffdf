"""The studio's page, put together from its tabs, and its server."""

import hmac
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr

from .. import __version__
from . import compare, export, new, runs, sample, words
from .faults import guard
from .look import css, theme
from .place import Place
from .queue import Line

HELLO = "Distil, watch, sample, compare and export. Every button is a command that a terminal takes, too."


def page(place: Place) -> gr.Blocks:
    """Build the page."""
    with gr.Blocks(title="fewstep studio", analytics_enabled=False, delete_cache=(3600, 86400)) as blocks:
        gr.HTML(
            f'<div class="fs-head"><h1>fewstep studio</h1><p>{words.text(HELLO)}</p>'
            f"<p>Folder: {words.text(place.folder)} · fewstep {__version__}</p></div>"
        )
        with gr.Tabs(elem_id="tabs") as tabs:
            with gr.Tab("Runs", id="runs"):
                own_runs = runs.build(place, blocks)
            with gr.Tab("New", id="new"):
                own_new = new.build(place)
            with gr.Tab("Sample", id="sample") as own_sample:
                sample.build(place, own_sample)
            with gr.Tab("Compare and vote", id="compare") as own_compare:
                compare.build(place, own_compare)
            with gr.Tab("Export", id="export") as own_export:
                export.build(place, own_export)
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        fields = [own_new.recipe, own_new.teacher, own_new.source, own_new.more, own_new.name, own_new.about]
        own_runs.duplicate.click(
            lambda run: [*new.duplicated(place, run), gr.Tabs(selected="new")],
            own_runs.chosen, [*fields, *own_new.boxes, tabs], **private,
        )  # fmt: skip
        own_new.started.change(
            lambda run: [gr.update(choices=runs.listed(place), value=run), gr.Tabs(selected="runs")],
            own_new.started, [own_runs.chosen, tabs], **private,
        )  # fmt: skip
    guard(blocks, place.told)
    return blocks


def serve(
    folder: Path, host: str, port: int | None, password: str | None, browser: bool, told: Callable[[Exception], str]
) -> tuple[gr.Blocks, str]:
    """Start the server, and return the page and its address.

    The server runs in threads of its own. The queue is looked at until the process ends. `told` returns the line for
    an error. Raises OSError where the port is taken.
    """
    place = Place(folder, Line(folder), told)
    blocks = page(place)

    def known(user: str, given: str) -> bool:
        return hmac.compare_digest(given.encode(), (password or "").encode())

    _, address, _ = blocks.launch(
        server_name=host,
        server_port=port,
        auth=known if password else None,
        auth_message="Any name, and the password that the studio was started with.",
        inbrowser=browser,
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        footer_links=["settings"],
        theme=theme(),
        css=css(),
        allowed_paths=[str(place.downloads)],
    )
    threading.Thread(target=place.line.watch, daemon=True).start()
    return blocks, str(address)
