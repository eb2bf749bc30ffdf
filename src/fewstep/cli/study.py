"""`fewstep study`: a page of blind pairs for people to vote on."""

import secrets
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from ..atomic import write_text
from ..backbones.load import quiet
from ..names import quoted, visible
from ..report.words import plural, size
from ..study.key import KEY, Key, make_key, read_key, write_key
from ..study.page import study_page
from .lineup import KEPT, Lineup, bases_of, draw_lineup, names_of, sources_of, stacked, wished_prompts
from .preflight import require_output
from .progress import console, put_result

PAGE = "study.html"


def run_study(given: Sequence[str], prompts: str, teacher: bool, base: str | None, out: Path) -> None:
    """Sample the models, and write a page and its key.

    The same command again goes on where it stopped and writes the same study. Raises ValueError for models
    that cannot be compared blind, and where the folder has another study.
    """
    quiet()
    if not given:
        raise ValueError("RUN: got none; name the runs of students, e.g. fewstep study runs/a runs/b")
    for name in (PAGE, KEY):
        require_output(out / name, "--out")
    sources = sources_of(given)
    if len(sources) < 2 and not teacher:
        raise ValueError("RUN: got one student and --no-teacher; name two students, or leave --no-teacher out")
    if base is None and teacher and len(bases := bases_of(sources)) > 1:
        raise ValueError(
            f"RUN: these students have different teachers ({', '.join(bases)}); pass --no-teacher to compare them with "
            "each other alone, or students of one teacher"
        )
    wished = wished_prompts(prompts)
    if (out / KEY).exists() and list(read_key(out).models[: len(sources)]) != names_of(sources):
        raise ValueError(another_study(out))
    lineup = draw_lineup(sources, wished, teacher, base, out / KEPT)
    key = key_for(lineup, out)
    images = _of_one_size(lineup)
    write_key(out, key)
    page = write_text(out / PAGE, study_page(key, lambda item, model: images[model][item]))
    console.print(str(page.resolve()))
    console.print(
        f"{size(page.stat().st_size)}, {len(key.pairs)} pairs, {plural(len(key.questions), 'question')} each; "
        f"the page works offline. Send {PAGE} alone: {KEY} and {KEPT}/ say whose images they are"
    )
    console.print(f"count the answers: {quoted('fewstep', 'study', '--count')} answers-*.json{_where(out)}")
    put_result({"page": page.resolve(), "key": (out / KEY).resolve(), "pairs": len(key.pairs)})


def _where(out: Path) -> str:
    return "" if out == Path("study") else f" {quoted('--out', out)}"


def key_for(lineup: Lineup, out: Path) -> Key:
    """Return the key of a study of these images.

    The key of the folder where it has one. Raises ValueError where that is of other images, which people
    may have voted on.
    """
    made_from = lineup.identity
    if (out / KEY).exists():
        key = read_key(out)
        if key.made_from != made_from:
            raise ValueError(another_study(out))
        return key
    questions = ("better", "follows") if any(lineup.shots.prompts) else ("better",)
    names = [d.entry.name for d in lineup.drawn]
    return make_key(names, lineup.shots.prompts, questions, made_from, secrets.token_hex(16))


def another_study(out: Path) -> str:
    """Say that a folder holds the key of another study."""
    return (
        f"--out: {visible(str(out), lines=False)} has a study of other images, whose answers need its {KEY}; "
        "choose another folder"
    )


def _of_one_size(lineup: Lineup) -> list[Tensor]:
    """Return the images of every model.

    Raises ValueError where their size would tell the models apart.
    """
    sizes = {tuple(d.images.shape[-2:]) for d in lineup.drawn}
    if len(sizes) > 1:
        raise ValueError(
            f"RUN: their images are {' and '.join(f'{w}x{h}' for h, w in sorted(sizes))}, by which they would be "
            "known; choose students of one size"
        )
    return stacked(lineup)
