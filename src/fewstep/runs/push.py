"""A student as a repository on the hub."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..backbones.load import bundled, called, hub_id, seen_from, source_of
from ..backbones.meta import meta_teacher
from ..evaluation.metric import Metric
from ..evaluation.metrics import METRICS
from ..names import visible
from ..report.images import load_images, png, to_pil
from ..report.markdown import markdown_table
from ..report.run import IMAGES, read_evaluation
from ..report.table import table
from ..report.words import finite, plural
from ..student.base import require_own
from ..student.card import StudentCard
from ..student.folder import files_for_others, is_whole_pipeline, page_of, read_card, require_folder
from ..student.hub import Base, Licence, base_on_hub, is_hub_id
from ..student.metadata import Result, Shown

GALLERY, MOST_IMAGES = "images", 8  # folder of the card's images, and how many there are
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
NO_DERIVATIVES = re.compile(r"(^|-)nd(-|$)")
NON_COMMERCIAL = re.compile(r"(^|-)nc(-|$)|non-?commercial", re.IGNORECASE)


@dataclass(frozen=True)
class Pushed:
    """What an upload consists of.

    `files` are paths or contents by their place. `left_out` are the places of files that are no part of the student;
    `notes` say what the reader should know before.
    """

    name: str
    files: Mapping[str, Path | bytes]
    card: str
    left_out: tuple[str, ...]
    notes: tuple[str, ...]


def to_push(source: str, name: str, base: str | None, licence: str | None, public: bool, dry: bool) -> Pushed:
    """Return the repository of a student, with nothing sent.

    `base` is the hub id of a base that the student names by a path, and `licence` that of such a base. In a `dry` run
    the hub need not be reached. Raises ValueError.
    """
    if not is_hub_id(name):
        raise ValueError(f"USER/NAME: got {visible(name, lines=False)!r}, allowed are names as the hub has them")
    if base is not None and (not is_hub_id(base) or base in bundled()):
        raise ValueError(f"--base: got {visible(base, lines=False)!r}, allowed are hub ids such as owner/name")
    folder = require_folder(source, "RUN")
    card = read_card(folder)
    told, notes = licence_of(card, base, licence, dry)
    if told is not None and public and NO_DERIVATIVES.search(told.id):
        raise ValueError(f"--public: the base's licence {told} forbids to share what is made from it; push it private")
    shared = replace(card, base=base or called(card.base), licence=card.licence if told is None else told.id)
    images = gallery_of(folder, card)
    results, section = measured(folder)
    shown = Shown(told, tuple((text or "-", place) for text, place, _ in images), results, section)
    page = page_of(folder, shared, name, None if card.own_network else _base_of(folder, card, base), shown)
    files, left = files_for_others(folder, shared, page)
    return Pushed(name, files | {place: data for _, place, data in images}, page, tuple(left), tuple(notes))


def _base_of(folder: Path, card: StudentCard, base: str | None) -> Any:
    """Return the base of a student without its weights."""
    if is_whole_pipeline(folder):
        return meta_teacher(folder)
    own = seen_from(card.base, folder)
    try:
        backbone = meta_teacher(own)
    except ValueError as error:
        if base is None:
            raise ValueError(f"{error}; or say where its base is on the hub: --base OWNER/NAME") from error
        backbone = meta_teacher(base)
    require_own(card, backbone, folder)
    return backbone


def licence_of(card: StudentCard, base: str | None, given: str | None, dry: bool) -> tuple[Licence | None, list[str]]:
    """Return the licence of a student, which is its base's, and notes.

    A base on the hub says it there. None where a `dry` run cannot ask. Raises ValueError where nobody says it, and
    where what is `given` is not the base's.
    """
    if given is not None and NAME.fullmatch(given) is None:
        raise ValueError(
            f"--licence: got {visible(given, lines=False)!r}, allowed are the hub's names, "
            "such as apache-2.0, openrail++ or other"
        )
    place, named = source_of(card.base).place, base or ("" if card.own_network else hub_id(card.base))
    if place in bundled() and base is None:
        known = Base(Licence(card.licence), gated=False)
    elif named:
        try:
            known = base_on_hub(named)
        except ValueError as error:
            if dry:
                return (None if given is None else Licence(given)), [f"its licence was not compared: {error}"]
            raise ValueError(f"push: {error}") from error
    else:
        known = Base(None if card.licence == "other" else Licence(card.licence), gated=False)
    if known.licence is None and given is None:
        where = f"{named} on the hub names none" if named else f"its base is {called(card.base)}, of this machine"
        raise ValueError(f"--licence: got none, and {where}; pass the base's, such as apache-2.0, openrail++ or other")
    if known.licence is not None and given not in (None, known.licence.id):
        raise ValueError(
            f"--licence: got {given}, the base {named or place} has {known.licence}, which its students have too; "
            "leave it out"
        )
    licence = known.licence or Licence(given or "")
    notes = list[str]()
    if not named and place not in bundled() and not card.own_network:
        notes.append(
            f"its base is {called(card.base)}, of this machine, which others need to use it; "
            "--base OWNER/NAME names one on the hub"
        )
    if known.gated:
        notes.append(f"its base {named} is gated: who uses the student has to accept the base's terms")
    if NON_COMMERCIAL.search(licence.id) or NON_COMMERCIAL.search(licence.name):
        notes.append(f"the base's licence {licence} is non-commercial, and so is the student's")
    return licence, notes


def gallery_of(folder: Path, card: StudentCard) -> list[tuple[str, str, bytes]]:
    """Return images of a finished run's student: prompt, place and PNG.

    They are those of the run's report, in the default step count. Empty where no run is around the folder.
    """
    path = folder.parent / IMAGES
    if folder.name != "final" or not path.is_file():
        return []
    images = load_images(path)
    start = f"student, {plural(card.steps[0], 'step')} ("
    row = next((images.rows[label] for label in images.rows if label.startswith(start)), None)
    pairs = [] if row is None else list(zip(images.prompts, row, strict=True))[:MOST_IMAGES]
    return [(text, f"{GALLERY}/{i}.png", png(to_pil(image))) for i, (text, image) in enumerate(pairs)]


def measured(folder: Path) -> tuple[tuple[Result, ...], str]:
    """Return what `fewstep evaluate` measured.

    Once for the hub's table, and once as a section of the card. Both are empty where nothing was measured.
    """
    found = read_evaluation(folder / "eval.json")
    rows, protocol = found.get("rows", []), found.get("protocol", "")
    if not rows:
        return (), ""
    results = tuple(
        Result(protocol, metric.key, _named(metric, row), round(float(row[metric.key]) * metric.factor, 4))
        for row in rows
        if row.get("model") == "student"
        for metric in METRICS.values()
        if metric.shown and finite(row.get(metric.key))
    )
    seen = table(rows)
    lines = markdown_table([c.heading for c in seen.columns], [[c.text for c in cells] for cells in seen.cells])
    version = found.get("versions", {}).get("fewstep", "")
    said = f"`fewstep evaluate --protocol {protocol}`, fewstep {version}." if version else ""
    return results, "\n".join(["\n## Evaluation\n", *lines, f"\n{said}\n"])


def _named(metric: Metric, row: Mapping[str, Any]) -> str:
    return f"{metric.heading}{metric.unit and f', {metric.unit}'} ({plural(row['steps'], 'step')})"
