"""Answers of raters, as the page of a study saves them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from ..names import visible
from ..reading import object_in, reading
from ..typed import typed
from .key import Key

SCORES = {"first": 1.0, "tie": 0.5, "second": 0.0}  # of the first image
CURE = "pass the files that the page of this study saved"


class _Answer(TypedDict):
    pair: int
    left: str


class Answer(_Answer, total=False):
    """The answer to one pair, with the side of its first image."""

    better: str
    follows: str
    seconds: float


class Sheet(TypedDict):
    """The content of one file of answers."""

    format: int
    study: str
    rater: str
    name: str
    saved: str
    answers: list[Answer]


@dataclass(frozen=True)
class Vote:
    """One rater's answer to one question about one pair.

    `score` is that of the pair's first image: 1, 0.5 or 0. `left` is the score of the image on the left.
    """

    rater: str
    pair: int
    question: str
    score: float
    left: float


@dataclass(frozen=True)
class Ballots:
    """All votes of a study, and the names of its raters.

    `notes` say which files were left out.
    """

    votes: tuple[Vote, ...]
    raters: dict[str, str]
    notes: tuple[str, ...] = ()


def read_sheet(path: Path, key: Key) -> Sheet:
    """Read one file of answers.

    Raises ReadError for a file that is missing or damaged, and ValueError with one line for answers of
    another study.
    """
    shown = visible(str(path), lines=False)
    with reading(f"--count: {path}", CURE, "holds no answers"):
        sheet: Sheet = typed(Sheet, object_in(path))
    if sheet["study"] != key.study:
        raise ValueError(
            f"--count: {shown} answers study {visible(sheet['study'], lines=False)[:40]}, the key is that of "
            f"{key.study}; pass --out FOLDER of that study"
        )
    with reading(f"--count: {path}", CURE, "holds no answers"):
        seen = set[int]()
        for answer in sheet["answers"]:
            if not 0 <= answer["pair"] < len(key.pairs) or answer["pair"] in seen:
                raise ValueError(f"pair {answer['pair']} is none of the study's {len(key.pairs)}, or is there twice")
            seen.add(answer["pair"])
            chosen = [given for question in key.questions if (given := _given(answer, question))]
            if odd := [value for value in chosen if value not in SCORES]:
                raise ValueError(f"an answer to pair {answer['pair']} is {odd[0][:40]!r}, not {', '.join(SCORES)}")
            if answer["left"] not in ("first", "second"):
                raise ValueError(f"pair {answer['pair']} has {answer['left'][:40]!r} on its left")
    return sheet


def _given(answer: Answer, question: str) -> str:
    """Return the answer to a question, empty where there is none."""
    return answer.get("better", "") if question == "better" else answer.get("follows", "")


def read_ballots(paths: Sequence[Path], key: Key) -> Ballots:
    """Read all files of answers of one study.

    Of several files of one rater the one that was saved last counts. Raises ValueError for answers of another
    study.
    """
    sheets, notes = dict[str, Sheet](), list[str]()
    for path in paths:
        sheet = read_sheet(path, key)
        earlier = sheets.get(sheet["rater"])
        if earlier is not None:
            notes.append(f"note: {sheet['name'] or sheet['rater']} is there twice; what was saved last counts")
        if earlier is None or sheet["saved"] >= earlier["saved"]:
            sheets[sheet["rater"]] = sheet
    votes = [
        Vote(rater, a["pair"], q, score := SCORES[given], score if a["left"] == "first" else 1 - score)
        for rater, sheet in sheets.items()
        for a in sheet["answers"]
        for q in key.questions
        if (given := _given(a, q))
    ]
    return Ballots(tuple(votes), _names(sheets), tuple(notes))


def _names(sheets: dict[str, Sheet]) -> dict[str, str]:
    """Return a name for every rater; raters of one name get numbers."""
    given = {rater: sheet["name"].strip() or f"rater {i}" for i, (rater, sheet) in enumerate(sheets.items(), 1)}
    names = list(given.values())
    return {
        rater: name if names.count(name) == 1 else f"{name} ({i})" for i, (rater, name) in enumerate(given.items(), 1)
    }
