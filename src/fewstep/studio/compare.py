"""The tab of comparisons and blind votes."""

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ..atomic import write_text
from ..names import made_name
from ..reading import json_of, reading, text_in
from ..study.answers import read_ballots
from ..study.count import Count, count, percent
from ..study.key import KEY, read_key
from . import words
from .commands import stream
from .folders import cards_in, shown_name
from .place import Place

COMPARISONS, STUDIES = "comparisons", "studies"  # folders under the studio's
COMPARED, STUDY = "comparison.html", "study.html"
# The page keeps its answers in the browser; this makes of them what its own "Save answers" saves.
ANSWERS = """(chosen) => {
  const frame = document.querySelector("#vote iframe");
  if (!frame || !frame.contentDocument) return [chosen, ""];
  const {study} = JSON.parse(frame.contentDocument.getElementById("data").textContent);
  const kept = localStorage.getItem("study-" + study);
  if (!kept) return [chosen, ""];
  const state = JSON.parse(kept);
  const answers = Object.entries(state.answers).map(([pair, given]) => ({pair: Number(pair), ...given}));
  const sheet = {format: 1, study, rater: state.rater, name: state.name, saved: new Date().toISOString(), answers};
  return [chosen, JSON.stringify(sheet)];
}"""


def candidates(folder: Path) -> list[tuple[str, str]]:
    """Return (name, `FOLDER@STEPS`) of every student and step count under a folder."""
    found = []
    for place, card in cards_in(folder):
        found += [(f"{shown_name(place, folder)}, {k} steps", f"{place}@{k}") for k in card.steps]
    return found


def named(folder: Path, asked: str, kind: str) -> Path:
    """Return the folder of a comparison or a study.

    It is named after the time where no name is given.
    """
    return folder / kind / made_name(asked.strip() or time.strftime("%Y-%m-%d-%H%M%S"))


def options(students: Sequence[str], prompts: str, teacher: bool, out: Path, repeat: bool) -> list[str]:
    """Return the options that compare and study share.

    `prompts` are a number, the path of a file, or texts, one a line. `repeat` where a prompt may be given by `-p`.
    Raises ValueError for no student.
    """
    if not students:
        raise ValueError("students: got none; choose one or more")
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if len(lines) == 1 and (lines[0].isdecimal() or Path(lines[0]).is_file()):
        asked = ["--prompts", lines[0]]
    elif lines and repeat:
        asked = [part for line in lines for part in ("-p", line)]
    elif lines:
        asked = ["--prompts", str(write_text(out / "prompts.txt", "\n".join(lines) + "\n"))]
    else:
        asked = []
    return [*students, *asked, "--teacher" if teacher else "--no-teacher", "--out", str(out)]


def studies(folder: Path) -> list[tuple[str, str]]:
    """Return (name, folder) of every study, the newest first."""
    found = sorted(
        (p.parent for p in (folder / STUDIES).glob(f"*/{KEY}")), key=lambda p: p.stat().st_mtime, reverse=True
    )
    return [(p.name, str(p)) for p in found]


def own_page(path: Path) -> str:
    """Read a page that fewstep has written.

    Raises ValueError where there is none.
    """
    with reading(path, "make it again"):
        return text_in(path)


def counted(result: Count) -> str:
    """Return the count of a study as HTML."""
    parts = []
    for question in result.questions.values():
        rows = [
            (m.a, m.b, m.tally.wins, m.tally.ties, m.tally.losses, percent(m.tally.rate),
             f"{percent(m.low)} to {percent(m.high)}" if m.tally.votes else "–")
            for m in question.matches
        ]  # fmt: skip
        heads = ("A", "B", "A wins", "Ties", "B wins", "Win rate of A", "95 % interval")
        alpha = "not known yet" if question.alpha is None else f"{question.alpha:.2f}"
        parts.append(
            f"<h4>{words.text(question.asked)}</h4>{words.table(heads, rows)}"
            f"<p>{words.text(f'{len(result.raters)} raters; agreement (Krippendorff) {alpha}.')}</p>"
        )
    return "".join(parts)


def keep_answers(study: Path, answers: str) -> Path | None:
    """Write a rater's answers beside the key; None where there are none.

    Raises ValueError for answers that are none of this study.
    """
    if not answers:
        return None
    with reading("the answers", "open the study again"):
        sheet = json_of(answers)
        rater = made_name(str(sheet["rater"]))
        if not sheet["answers"]:
            return None
    return write_text(study / f"answers-{rater[:16]}.json", json.dumps(sheet, indent=1))


def count_votes(study: Path) -> Count:
    """Count all answers beside a study's key.

    Raises ValueError where there are none, or for another study's.
    """
    files = sorted(study.glob("answers-*.json"))
    if not files:
        raise ValueError("no vote yet: answer a pair first")
    key = read_key(study)
    return count(key, read_ballots(files, key))


def build(place: Place, tab: gr.Tab) -> None:
    """Build the tab."""
    folder = place.folder
    with gr.Row():
        students = gr.Dropdown(
            candidates(folder), value=[], multiselect=True, label="Students", elem_id="students", min_width=280,
            info="Up to eight; a student counts once for each of its step counts.",
        )  # fmt: skip
        prompts = gr.Textbox(
            "6", label="Prompts", lines=2, max_lines=8, elem_id="compare-prompts", min_width=240,
            info="A number of the first run's own, the path of a file, or texts, one a line.",
        )  # fmt: skip
    with gr.Row():
        teacher = gr.Checkbox(True, label="And their teacher", info="In 50 guided steps.", min_width=200)
        name = gr.Textbox(
            "", label="Name", info="Of the folder; the time of day if empty.", min_width=200, elem_id="compare-name"
        )
    with gr.Row():
        side = gr.Button("Compare", variant="primary", elem_id="compare-go", min_width=140)
        blind = gr.Button("Make a blind vote", elem_id="study-go", min_width=140)
    said = gr.HTML(elem_id="compare-said")
    compared = gr.HTML(elem_id="compared")
    with gr.Row():
        study = gr.Dropdown(
            studies(folder), value=None, label="Blind vote", elem_id="study", min_width=240,
            info="Made here. Nobody sees whose images they are.",
        )  # fmt: skip
        counting = gr.Button("Count the votes", elem_id="count-votes", min_width=140, elem_classes="fs-low")
    told = gr.HTML(elem_id="counted")
    vote = gr.HTML(words.note("Choose students and make a blind vote, or choose one that is there."), elem_id="vote")
    answers = gr.Textbox("", visible=False)

    def put_side_by_side(chosen: list[str], asked: str, with_teacher: bool, called: str) -> Iterator[list[Any]]:
        """Run `fewstep compare` and show its page."""
        try:
            out = named(folder, called, COMPARISONS)
            command = ["compare", *options(chosen, asked, with_teacher, out, True)]
            for one in stream(command):
                yield [ended(one.code, one.error, f"Written to {out}.") + words.lines(one.said), gr.skip()]
            page = words.frame(own_page(out / COMPARED), "Comparison") if one.code == 0 else ""
            yield [ended(one.code, one.error, f"Written to {out}."), page] if page else [gr.skip(), ""]
        except (ValueError, OSError) as error:
            yield [words.note(error, "bad"), ""]

    def make_blind(chosen: list[str], asked: str, with_teacher: bool, called: str) -> Iterator[list[Any]]:
        """Run `fewstep study` and show its page."""
        try:
            out = named(folder, called, STUDIES)
            command = ["study", *options(chosen, asked, with_teacher, out, False)]
            for one in stream(command):
                yield [ended(one.code, one.error, f"Written to {out}.") + words.lines(one.said), gr.skip()]
            if one.code == 0:
                yield [words.note(f"Written to {out}. Vote below."), gr.update(choices=studies(folder), value=str(out))]
        except (ValueError, OSError) as error:
            yield [words.note(error, "bad"), gr.skip()]

    def ended(code: int | None, error: str, done: str) -> str:
        return words.note("It samples.") if code is None else words.note(error or done, "bad" if error else "")

    def open_study(chosen: str | None) -> list[str]:
        """Show the page of a study."""
        if not chosen:
            return [words.note("Choose a blind vote."), ""]
        try:
            return [words.frame(own_page(Path(chosen) / STUDY), "Blind vote"), ""]
        except (ValueError, OSError) as error:
            return [words.note(error, "bad"), ""]

    def tell(chosen: str | None, sheet: str) -> str:
        """Count the votes."""
        if not chosen:
            return words.note("Choose a blind vote first.")
        try:
            keep_answers(Path(chosen), sheet)
            return counted(count_votes(Path(chosen)))
        except (ValueError, OSError) as error:
            return words.note(error, "bad")

    private: dict[str, Any] = {"api_visibility": "private"}
    tab.select(lambda: [gr.update(choices=candidates(folder)), gr.update(choices=studies(folder))], None,
               [students, study], show_progress="hidden", **private)  # fmt: skip
    asked = [students, prompts, teacher, name]
    side.click(put_side_by_side, asked, [said, compared], **private)
    blind.click(make_blind, asked, [said, study], **private)
    study.change(open_study, study, [vote, told], **private)
    counting.click(tell, [study, answers], told, js=ANSWERS, **private)
