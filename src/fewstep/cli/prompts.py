"""The prompts of a run, and what is printed about them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from ..backbones.base import Backbone, takes_prompts
from ..backbones.load import BUNDLED, bundled, source_of
from ..data.prompt_lengths import said_of_prompts
from ..data.prompts import find_prompts, ignore
from ..data.texts import Found
from ..runs.recipe import DistillRecipe
from .progress import console


def training_prompts(recipe: DistillRecipe, teacher: Backbone) -> list[str]:
    """Return the recipe's prompts.

    `bundled` stands for the prompts of a bundled teacher. A model without conditions has the empty prompt
    alone.
    """
    if not takes_prompts(teacher):
        return [""]
    return prompts_from(recipe.prompts.source, recipe.prompts.column, recipe.teacher, say_found)


def prompts_from(source: str, column: str | None, teacher: str, say: Callable[[Found], None] = ignore) -> list[str]:
    """Read prompts of a file, a data set or a bundled teacher.

    `bundled` stands for the prompts of the teacher. For any other source `say` is called with what was
    found. Raises ValueError.
    """
    if source != "bundled":
        prompts, found = find_prompts(source, column)
        say(found)
        return prompts
    place = source_of(teacher).place
    shipped = (BUNDLED / place if place in bundled() else Path(place)) / "prompts.txt"
    if not shipped.is_file():
        raise ValueError(
            f"prompts: teacher {teacher} brings no prompts of its own; "
            "pass --prompts FILE (.txt, .jsonl, .csv, .tsv) or a hub data set id"
        )
    return find_prompts(str(shipped))[0]


def say_of_prompts(teacher: Backbone, prompts: Sequence[str]) -> None:
    """Print what encoders cut, and which characters they do not know."""
    for line in said_of_prompts(teacher, prompts):
        console.print(line, markup=False)


def say_found(found: Found) -> None:
    """Print one line on what a source has."""
    console.print(found.line, markup=False)
