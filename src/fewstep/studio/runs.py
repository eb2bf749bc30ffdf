"""The tab of runs.

Every run under the folder, and one of them opened.
"""

import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from ..reading import reading, text_in
from ..report.live import read_metrics
from ..report.plots import charts
from ..report.run import render_run
from ..report.words import duration, finite, size
from . import words
from .commands import resumed, stop
from .folders import (
    METRICS,
    Facts,
    facts_of,
    find_runs,
    left_of,
    log_of,
    record_of,
    report_of,
    shown_name,
    stage_of,
    stamp,
    state_of,
    summary,
)
from .images import grid_of, previews, prompts_of, strips, student_rows, wipe
from .place import PLOTS, Place
from .queue import Job

EVERY, SLOW = 2.0, 4.0  # seconds between two looks: at states, at curves and images
REDRAW = 15.0  # seconds between two drawings of the curves of a run that trains: they cost what it could use
NONE = "No run yet. Start one in the tab New, or with `fewstep distill` in a terminal: it appears here by itself."
CHOOSE = "Choose a run from the list."


@dataclass(frozen=True)
class Seen:
    """What a page shows of a run.

    Its folder, the number of previews, its `stamp`, and that of its curves with the time when they were drawn.
    """

    run: str = ""
    previews: int = 0
    marks: str = ""
    curves: str = ""
    when: float = 0.0


NOTHING = Seen()


@dataclass(frozen=True)
class RunsTab:
    """What the other tabs need of this one."""

    chosen: gr.Radio
    duplicate: gr.Button


def listed(place: Place) -> list[tuple[str, str]]:
    """Return (text, folder) of every run, waiting ones first."""
    waiting = [job.run for job in place.line.jobs()]
    rows = [(f"{shown_name(Path(run), place.folder)}\nwaiting · number {i + 1}", run) for i, run in enumerate(waiting)]
    return rows + [
        (summary(shown_name(run, place.folder), facts_of(run)), str(run))
        for run in find_runs(place.folder)
        if str(run) not in waiting
    ]


def recorded(run: Path) -> Mapping[str, Any]:
    """Return `run.json` of a run or of its warm start."""
    return record_of(run) or record_of(stage_of(run))


def memory_of(facts: Facts) -> str:
    """Return what the process of a run takes in memory.

    Empty where nobody knows.
    """
    if facts.held is None or not facts.alive:
        return ""
    found = []
    try:
        with reading("memory", "none"):
            told = dict(line.split(":", 1) for line in text_in(Path(f"/proc/{facts.held.pid}/status")).splitlines())
        now, peak = (int(told[key].split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
        found.append(f"{size(now)}, at most {size(peak)}")
    except (ValueError, KeyError):
        pass  # not on Linux, or it has just ended
    if card := _on_card(facts.held.pid):
        found.append(f"{card} of the card")
    return "; ".join(found)


def _on_card(pid: int) -> str:
    """Return what a process takes on NVIDIA's cards; empty without one."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    asked = [tool, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=5, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    rows = [line.split(",") for line in said.splitlines()]
    used = sum(int(row[1]) for row in rows if len(row) == 2 and row[0].strip() == str(pid) and row[1].strip().isdigit())
    return size(used * 2**20) if used else ""


def status(run: Path, folder: Path) -> str:
    """Return a run's state, progress, cost and facts as HTML."""
    facts, record = facts_of(run), recorded(run)
    state, left, recipe = state_of(facts), left_of(facts), record.get("recipe") or {}
    method = recipe.get("method") or {}
    steps = method.get("steps", "")
    pairs: list[tuple[str, object]] = [
        ("Time left", "" if left is None else duration(left)),
        ("Training so far", duration(facts.seconds) if facts.seconds else ""),
        ("Seconds an iteration", f"{facts.pace:.3g}" if facts.pace else ""),
        ("Teacher", recipe.get("teacher", "")),
        ("Method", method.get("name", "")),
        ("Steps", ", ".join(map(str, steps)) if isinstance(steps, list) else steps),
        ("Hardware", record.get("hardware", "")),
        ("Memory", memory_of(facts)),
        ("Process", f"{facts.held.pid} on {facts.held.host}" if facts.held is not None and facts.alive else ""),
        ("Folder", run),
    ]  # fmt: skip
    kind = "bad" if state.word in ("died", "failed") else ""
    head = (
        f'<div class="fs-state"><h2>{words.text(shown_name(run, folder))}</h2>'
        f'<span class="fs-word {state.word}">{state.word}</span></div>'
    )
    progress = words.bar(facts.done / facts.asked, "Iterations") if facts.asked else ""
    return head + progress + words.note(state.said, kind) + words.facts([(n, v) for n, v in pairs if v != ""])


@lru_cache(maxsize=4)
def drawn(run: Path, seen: str) -> tuple[str, str]:
    """Return (curves, warnings) of a run as HTML.

    `seen` says which state of its folder. Raises ReadError for a damaged log.
    """
    metrics = read_metrics(stage_of(run) / METRICS)
    made = "".join(
        f"<figure><h4>{words.text(c.title)}</h4>{c.svg}<figcaption>{words.text(c.caption)}</figcaption></figure>"
        for c in charts(metrics, ())
    )
    curves = f'<div class="fs-charts">{made}</div>' if made else words.note("Curves appear after two iterations.")
    told = [f"Iteration {m['iteration']:,}: {line}" for m in metrics for line in m.get("warnings", ())]
    said = "".join(words.note(line, "warn") for line in reversed(told[-20:])) or words.note("No warning so far.")
    distances = [(m["iteration"], (m.get("preview") or {}).get("distance")) for m in metrics]
    rows = [(f"{i:,}", f"{d:.4g}") for i, d in distances if finite(d)]
    if rows:
        said += "<h4>Distance of the previews to the teacher's</h4>" + words.table(("Iteration", "Distance"), rows)
    return curves, said


def shown_wipe(run: str, at: int, prompt: int | None, row: str | None) -> tuple[Any, str]:
    """Return (teacher beside student, all rows) of a preview."""
    found = previews(stage_of(Path(run))) if run else []
    if not found:
        return None, words.note("No preview yet: the first one comes before the first iteration.")
    grid = grid_of(found[min(max(int(at) - 1, 0), len(found) - 1)][1])
    if grid is None:
        return None, words.note("This preview cannot be taken apart; look into the run's folder samples/.", "warn")
    return wipe(grid, prompt or 0, row or ""), strips(grid)


def _list(choices: list[tuple[str, str]], run: str | None, before: list[tuple[str, str]]) -> Any:
    """Return the list of runs.

    What is chosen is left to the page where the runs are the same. A page forgets it where there are others; without
    a choice the newest run is opened.
    """
    values = [value for _, value in choices]
    if values == [value for _, value in before]:
        return gr.update(choices=choices)
    return gr.update(choices=choices, value=run if run in values else next(iter(values), None))


def _changed(old: Sequence[Any], new: Sequence[Any]) -> list[Any]:
    """Return the new outputs, those skipped that the page has already."""
    return [gr.skip() if i < len(old) and old[i] == value else value for i, value in enumerate(new)]


def build(place: Place, whole_page: gr.Blocks) -> RunsTab:
    """Build the tab."""
    folder = place.folder
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            chosen = gr.Radio(
                first := listed(place),
                value=first[0][1] if first else None,
                label="Runs",
                elem_classes="fs-runs",
                elem_id="runs",
                info="Those under the folder above.",
            )
            queue = gr.HTML(words.note(NONE), elem_id="queue")
            with gr.Accordion("Queue", open=False, visible=bool(place.line.jobs())) as waiting:
                out = gr.Dropdown([], label="Waits", info="One run trains at a time; the others begin by themselves.")
                take = gr.Button("Take it out of the queue", size="sm", elem_id="take-out")
        with gr.Column(scale=3, min_width=300):
            about = gr.HTML(words.note(CHOOSE), elem_id="about")
            with gr.Row():
                halt = gr.Button("Stop", size="md", variant="stop", interactive=False, elem_id="stop", min_width=110)
                go_on = gr.Button(
                    "Resume", size="md", variant="primary", interactive=False, elem_id="resume", min_width=110
                )
                duplicate = gr.Button(
                    "Duplicate with changes", size="md", interactive=False, elem_id="duplicate", min_width=180
                )
                report = gr.Button("Report", size="md", interactive=False, elem_id="report", min_width=110)
            done = gr.HTML(elem_id="done")
            with gr.Tabs():
                with gr.Tab("Images"):
                    with gr.Row():
                        at = gr.Slider(
                            1, 2, 1, step=1, label="Preview", info="From the first to the newest.", elem_id="preview"
                        )
                        prompt = gr.Dropdown([], label="Prompt", elem_id="shown-prompt")
                        row = gr.Dropdown([], label="Beside the teacher")
                    when = gr.HTML(elem_id="when")
                    slider = gr.ImageSlider(
                        label="Teacher | student: draw the line", format="png", type="pil", interactive=False,
                        elem_classes="fs-wipe", elem_id="wipe", max_height=420, buttons=["fullscreen"],
                    )  # fmt: skip
                    rows = gr.HTML(elem_id="strips")
                with gr.Tab("Curves"):
                    curves = gr.HTML(words.note(CHOOSE), elem_id="curves")
                with gr.Tab("Warnings"):
                    warned = gr.HTML(words.note(CHOOSE), elem_id="warnings")
                with gr.Tab("Log"):
                    log = gr.HTML(words.note(CHOOSE), elem_id="log")
                    command = gr.Code(
                        label="The same on the command line", language="shell", interactive=False, wrap_lines=True,
                        lines=1, show_line_numbers=False,
                    )  # fmt: skip
                with gr.Tab("Report"):
                    page = gr.HTML(words.note("Press Report to write it from what the run holds by now."))
    fast, slow = gr.Timer(EVERY), gr.Timer(SLOW)
    before, seen = gr.State([]), gr.State(NOTHING)

    def look(run: str | None, old: list[Any]) -> list[Any]:
        """Look at all runs and at the chosen one."""
        choices, jobs = listed(place), place.line.jobs()
        known = {value for _, value in choices}
        waits = [(shown_name(Path(job.run), folder), job.run) for job in jobs]
        own = Path(run) if run in known else None
        there = own is not None and own.is_dir()
        alive = own is not None and there and facts_of(own).alive
        whole = own is None or not there or state_of(facts_of(own)).word == "finished"
        can_resume = not whole and not alive and own is not None and bool(recorded(own).get("command"))
        told = words.note(place.line.said, "warn") if place.line.said else "" if choices else words.note(NONE)
        waiting_now = own is not None and any(job.run == run for job in jobs)
        if own is None:
            details, said = words.note(CHOOSE), words.note(CHOOSE)
        elif waiting_now:
            details, said = words.note("It waits in the queue until no other run trains."), ""
        else:
            details = status(own, folder)
            said = words.lines(
                log_of(own), "The studio did not start this run; what it prints is in the terminal that did."
            )
        line = "" if own is None else str(recorded(own).get("command", ""))
        new = [choices, told, waits, details, alive, can_resume, there, said, line]
        if new == old:
            return [gr.skip()] * 11 + [gr.skip()]
        fresh = _changed(old, new)
        outputs = [
            fresh[0] if fresh[0] is not new[0] else _list(choices, run, old[0] if old else []),
            fresh[1],
            gr.update(visible=bool(waits)),
            fresh[2] if fresh[2] is not new[2] else gr.update(choices=waits, value=waits[0][1] if waits else None),
            fresh[3],
            gr.update(interactive=alive),
            gr.update(interactive=can_resume),
            gr.update(interactive=there),
            gr.update(interactive=there),
            fresh[7],
            fresh[8],
        ]
        return [*outputs, new]

    looked = [chosen, queue, waiting, out, about, halt, go_on, duplicate, report, log, command, before]

    def look_slowly(run: str | None, old: Seen, now: float, asked: int | None, beside: str | None) -> list[Any]:
        """Look at curves and previews of the chosen run."""
        if not run or not Path(run).is_dir():
            none = words.note(CHOOSE)
            return [none, none, gr.skip(), gr.skip(), gr.skip(), "", None, words.note("No preview yet."), NOTHING]
        found, marks, now_ = previews(stage_of(Path(run))), stamp(Path(run)), time.monotonic()
        same = old.run == run
        due = not same or (old.curves != marks and now_ - old.when >= REDRAW)
        if same and not due and (old.previews, old.marks) == (len(found), marks):
            return [gr.skip()] * 9
        made: Any = gr.skip()
        said: Any = gr.skip()
        if due:
            try:
                made, said = drawn(Path(run), marks)
            except ValueError as error:
                made, said = words.note(error, "bad"), words.note(error, "bad")
        curves_, when_ = (marks, now_) if due else (old.curves, old.when)
        before = old.previews if same else 0  # previews of this run that the page has seen
        grid = grid_of(found[-1][1]) if found else None
        new = Seen(run, 0 if grid is None else len(found), marks, curves_, when_)
        if grid is None:
            return [made, said, gr.skip(), gr.skip(), gr.skip(), "", *shown_wipe(run, 1, None, None), new]
        if before == len(found):
            return [made, said, *[gr.skip()] * 6, new]
        at_end, own_rows = not before or int(now) >= before, student_rows(grid)
        place_of = len(found) if at_end else int(now)
        if not before:
            asked, beside = 0, own_rows[0] if own_rows else None
        turned = {"maximum": max(len(found), 2), "interactive": len(found) > 1} | (
            {"value": place_of} if at_end else {}
        )
        return [
            made,
            said,
            gr.update(**turned),
            gr.skip() if before else gr.update(choices=list(prompts_of(grid)), value=asked),
            gr.skip() if before else gr.update(choices=own_rows, value=beside),
            which(run, place_of),
            *shown_wipe(run, place_of, asked, beside),
            new,
        ]

    def turned_away() -> list[Any]:
        """Show nothing of the run before."""
        read = words.note("It is read.")
        return ["", words.note("Press Report to write it."), read, read, "", None, read, NOTHING]

    def which(run: str | None, at: float) -> str:
        found = previews(stage_of(Path(run))) if run else []
        if not found:
            return ""
        n = min(max(int(at), 1), len(found))
        return words.text(f"Preview {n} of {len(found)}: iteration {found[n - 1][0]:,}.")

    def turn(run: str | None, at: float, asked: int | None, beside: str | None) -> list[Any]:
        """Show another preview, prompt or row."""
        return [which(run, at), *shown_wipe(run or "", int(at), asked, beside)]

    def end(run: str) -> str:
        """Ask the run to stop."""
        try:
            return words.note(stop(Path(run)))
        except ValueError as error:
            return words.note(error, "bad")

    def resume(run: str) -> str:
        """Go on with the run, or let it wait."""
        own = Path(run)
        try:
            argv = resumed(str(recorded(own).get("command", "")), own)
            other = place.line.put(Job(run, tuple(argv)))
        except (ValueError, OSError) as error:
            return words.note(error, "bad")
        if other is None:
            return words.note("It goes on from its last checkpoint.")
        return words.note(f"{shown_name(other, folder)} is first; this run waits in the queue.")

    def write_report(run: str) -> tuple[str, str]:
        """Write the run's report and show it."""
        try:
            path = render_run(Path(run))
        except (ValueError, OSError) as error:
            return words.note(error, "bad"), words.note(error, "bad")
        return words.note(f"Written to {path}; it is in the tab Report."), words.frame(report_of(Path(run)), "Report")

    def leave_queue(run: str | None) -> None:
        """Take a waiting run out of the queue."""
        if run:
            place.line.take_out(run)

    quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    slow_out = [curves, warned, at, prompt, row, when, slider, rows, seen]
    slowly: dict[str, Any] = {
        "fn": look_slowly, "inputs": [chosen, seen, at, prompt, row], "outputs": slow_out, "concurrency_id": PLOTS,
        **quiet,
    }  # fmt: skip
    for begins in (whole_page.load, chosen.change, fast.tick):
        begins(look, [chosen, before], looked, **quiet)
    whole_page.load(**slowly)
    slow.tick(**slowly)
    chosen.change(turned_away, None, [done, page, curves, warned, when, slider, rows, seen], **quiet).then(**slowly)
    for part in (at, prompt, row):
        part.input(turn, [chosen, at, prompt, row], [when, slider, rows], trigger_mode="always_last", **quiet)
    halt.click(end, chosen, done, api_visibility="private")
    go_on.click(resume, chosen, done, api_visibility="private")
    report.click(write_report, chosen, [done, page], concurrency_id=PLOTS, api_visibility="private")
    take.click(leave_queue, out, None, api_visibility="private")
    return RunsTab(chosen, duplicate)
