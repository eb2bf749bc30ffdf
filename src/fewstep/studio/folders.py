"""What lies under the studio's folder: runs with their state, and students."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..names import visible
from ..reading import object_in, reading, text_in
from ..report.words import duration, finite
from ..student.card import StudentCard
from ..student.folder import card_time, holds_student, read_card
from ..training.lock import LOCK, Holder, holder_in, lives

RECORD, METRICS, REPORT, ERROR = "run.json", "metrics.jsonl", "report.html", "error.log"
WARM, FINAL, BEST = "warm_start", "final", "best"
STARTED, LOG = "studio.json", "studio.log"  # the process that the studio started in a run's folder, and what it said
MARKS = (RECORD, LOCK, STARTED)
DEEP = 4  # folders below the studio's in which runs are looked for
TAIL = 2**16  # bytes at a file's end that are read for the newest lines
RECENT = 20  # iterations by which the pace is judged
AGAIN = "move it away and run the same command again"


@dataclass(frozen=True)
class Facts:
    """What a run's folder says.

    `asked` and `done` are iterations, `seconds` those of training so far, `pace` seconds per iteration lately.
    `held` is who works in the folder, `alive` whether that process runs. `error` is the line with which it ended.
    """

    asked: int = 0
    done: int = 0
    seconds: float = 0.0
    pace: float = 0.0
    held: Holder | None = None
    alive: bool = False
    student: bool = False
    reported: bool = False
    early: bool = False
    warm: bool = False
    error: str = ""


@dataclass(frozen=True)
class State:
    """The state of a run.

    A word, and a sentence that explains the word.
    """

    word: str
    said: str


def state_of(facts: Facts) -> State:
    """Return the state of a run from what its folder says."""
    step = f"iteration {facts.done:,} of {facts.asked:,}" if facts.asked else "nothing trained yet"
    stage = "warm start, " if facts.warm else ""
    ended = facts.asked > 0 and (facts.done >= facts.asked or facts.early)
    if facts.alive and not facts.asked:
        return State("preparing", "It loads the teacher and checks what could fail later.")
    if facts.alive and facts.done >= facts.asked and not facts.warm:
        return State("finishing", "The training is done; the student is written, measured and reported.")
    if facts.alive:
        return State("training", f"{stage}{step}".capitalize() + ".")
    if facts.held is not None:
        return State(
            "died",
            f"Its process {facts.held.pid} on {facts.held.host} has ended without a word at {stage}{step}. "
            "Resume goes on from its last checkpoint.",
        )
    if facts.error:
        return State("failed", facts.error)
    if facts.student and facts.reported and ended and not facts.warm:
        return State("finished", f"Trained for {facts.done:,} iterations.")
    return State("stopped", f"Stopped at {stage}{step}. Resume goes on from its last checkpoint.")


def left_of(facts: Facts) -> float | None:
    """Return the seconds until the last iteration, None where nobody knows."""
    if not facts.alive or not facts.pace or facts.done >= facts.asked:
        return None
    return facts.pace * (facts.asked - facts.done)


def summary(name: str, facts: Facts) -> str:
    """Return name, state and progress of a run in two lines."""
    state, left = state_of(facts), left_of(facts)
    parts = [state.word]
    if facts.asked:
        parts.append(f"{min(100, 100 * facts.done // facts.asked)} % of {facts.asked:,}")
    if left is not None:
        parts.append(f"{duration(left)} left")
    if facts.seconds:
        parts.append(f"{duration(facts.seconds)} of training")
    return f"{visible(name, lines=False)}\n{' · '.join(parts)}"


def find_runs(folder: Path) -> list[Path]:
    """Return the runs under a folder, the newest first."""
    found = [place for place, names in _walk(folder, DEEP) if _is_run(place, names)]
    return sorted(found, key=lambda run: (-_begun(run), str(run)))


def _is_run(place: Path, names: frozenset[str]) -> bool:
    if RECORD in names and record_of(place).get("recipe", {}).get("kind", "distill") != "distill":
        return False
    return bool(names & set(MARKS)) or (WARM in names and (place / WARM / RECORD).is_file())


def _walk(folder: Path, deep: int) -> Iterator[tuple[Path, frozenset[str]]]:
    """Yield folders with the names in them.

    What is inside a run or a student is passed over.
    """
    try:
        with os.scandir(folder) as entries:
            here = list(entries)
    except OSError:
        return
    names = frozenset(entry.name for entry in here)
    yield folder, names
    if deep and not names & {*MARKS, WARM} and not holds_student(folder):
        for entry in sorted(here, key=lambda e: e.name):
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                yield from _walk(folder / entry.name, deep - 1)


def _begun(run: Path) -> float:
    return max((_stamp(run / name)[0] for name in (RECORD, STARTED, WARM)), default=0.0)


def _stamp(path: Path) -> tuple[float, int]:
    """Return when a file was changed, and its size.

    Zeros where there is no file.
    """
    try:
        found = path.stat()
    except OSError:
        return 0.0, 0
    return found.st_mtime, found.st_size


def stamp(run: Path) -> str:
    """Return a text that changes whenever a run's folder says something new."""
    part = stage_of(run)
    files = [part / METRICS, run / RECORD, run / LOG, run / ERROR, run / REPORT, run / LOCK, run / FINAL, run / BEST]
    return repr([_stamp(p) for p in (*files, part / "samples")])


def record_of(run: Path) -> Mapping[str, Any]:
    """Read `run.json`; empty where it is missing or damaged."""
    try:
        with reading(run / RECORD, AGAIN):
            return object_in(run / RECORD)
    except ValueError:
        return {}


def stage_of(run: Path) -> Path:
    """Return the folder of the stage that trains.

    The run, or its warm start.
    """
    warm = run / WARM
    return warm if (warm / RECORD).is_file() and not (run / RECORD).is_file() else run


def facts_of(run: Path) -> Facts:
    """Read what a run's folder says."""
    part = stage_of(run)
    recipe = record_of(part).get("recipe") or {}
    asked, patience = (recipe.get("train") or {}).get("iterations"), (recipe.get("preview") or {}).get("patience")
    lines = _newest(part / METRICS)
    timed = [(n["iteration"], n["seconds"]) for n in lines if finite(n.get("seconds"))]
    done = max((n["iteration"] for n in lines), default=0)
    recent = timed[-RECENT:]
    pace = (recent[-1][1] - recent[0][1]) / max(1, recent[-1][0] - recent[0][0]) if len(recent) > 1 else 0.0
    held, alive = holder_in(run)
    own = started(run)
    if not alive and own is not None and lives(own):
        held, alive = own, True
    student = holds_student(run / FINAL)
    return Facts(
        asked=asked if isinstance(asked, int) else 0,
        done=done,
        seconds=float(timed[-1][1]) if timed else 0.0,
        pace=max(0.0, pace),
        held=held,
        alive=alive,
        student=student,
        reported=student and _reported(run, done),
        early=patience is not None,
        warm=part != run,
        error="" if alive else error_of(run),
    )


def _reported(run: Path, done: int) -> bool:
    """Return whether a run's report is of its student.

    A copied run has lost the times of its files; then the card says whether the student is of the last iteration.
    """
    if not (run / REPORT).is_file():
        return False
    if _stamp(run / REPORT)[0] * 1e9 >= card_time(run / FINAL):
        return True
    try:
        return read_card(run / FINAL).iterations >= done
    except ValueError:
        return False


def _newest(path: Path) -> list[dict[str, Any]]:
    """Read the newest lines of a log, those that are whole."""
    found = []
    for line in tail(path).splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue  # cut off at its begin, or not written to its end yet
        if isinstance(value, dict) and isinstance(value.get("iteration"), int):
            found.append(value)
    return found


def tail(path: Path, most: int = TAIL) -> str:
    """Read the end of a text file; empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - most))
            return file.read().decode("utf-8", "replace")
    except OSError:
        return ""


def started(run: Path) -> Holder | None:
    """Return the process that the studio last started in a run's folder."""
    try:
        with reading(run / STARTED, AGAIN):
            return Holder(**object_in(run / STARTED))
    except ValueError:
        return None


def error_of(run: Path) -> str:
    """Return the error with which a run ended, empty for none.

    An error that is older than what the run has logged since is none any more.
    """
    newest = max(_stamp(run / METRICS)[0], _stamp(run / RECORD)[0], _stamp(run / WARM / METRICS)[0])
    lines = [line for line in tail(run / LOG).splitlines() if line.strip()]
    if lines and lines[-1].startswith("error:") and _stamp(run / LOG)[0] >= newest:
        return visible(lines[-1], lines=False)
    if _stamp(run / ERROR)[0] > newest:
        said = [line for line in tail(run / ERROR).splitlines() if line.strip()]
        return f"{visible(said[-1] if said else 'an error', lines=False)}; the traceback is in {run / ERROR}"
    return ""


def find_students(folder: Path) -> list[Path]:
    """Return the students under a folder.

    Of runs the last and the best, and exported ones.
    """
    found = []
    for place, _ in _walk(folder, DEEP):
        found += [p for p in (place, place / FINAL, place / BEST) if holds_student(p)]
    return list(dict.fromkeys(found))


def cards_in(folder: Path) -> Iterator[tuple[Path, StudentCard]]:
    """Yield (place, card) of every student under a folder.

    Students whose card cannot be read are passed over.
    """
    for place in find_students(folder):
        with suppress(ValueError):
            yield place, read_card(place)


def student_names(folder: Path) -> list[tuple[str, str]]:
    """Return (name, folder) of every student under a folder."""
    found = []
    for place, card in cards_in(folder):
        steps = ", ".join(map(str, card.steps))
        found.append((f"{shown_name(place, folder)} ({card.method}, {steps} steps)", str(place)))
    return found


def shown_name(place: Path, folder: Path) -> str:
    """Return a path below the studio's folder, without `final`."""
    own = place.relative_to(folder) if place.is_relative_to(folder) else place
    own = own.parent if own.name == FINAL else own
    return visible(str(own), lines=False)


def log_of(run: Path) -> str:
    """Return what a run has printed, as far as the studio knows."""
    said = tail(run / LOG)
    fault = tail(run / ERROR)
    return f"{said}\n{ERROR}:\n{fault}" if fault else said


def report_of(run: Path) -> str:
    """Read a run's report; empty where there is none."""
    try:
        with reading(run / REPORT, AGAIN):
            return text_in(run / REPORT)
    except ValueError:
        return ""
