"""What a run is given to learn from: its prompts, and a word on what was found and on what is going to be written."""

from collections.abc import Callable, Sequence

from ..backbones.base import Backbone
from ..backbones.load import BUNDLED, source_of
from ..data.prompt_lengths import said_of_prompts
from ..data.prompts import find_prompts, ignore
from ..data.texts import Found
from ..runs.recipe import DistillRecipe
from .progress import console


def training_prompts(recipe: DistillRecipe, teacher: Backbone) -> list[str]:
    """The recipe's prompts; `bundled` means those that came with a bundled teacher. A model without conditions has the empty one."""
    if not teacher.encode([""]):
        return [""]
    return prompts_from(recipe.prompts.source, recipe.prompts.column, recipe.teacher, say_found)


def prompts_from(source: str, column: str | None, teacher: str, say: Callable[[Found], None] = ignore) -> list[str]:
    """Prompts of a file, a data set, or `bundled` with this teacher; of all but these `say` hears what was found. Raises ValueError."""
    if source != "bundled":
        prompts, found = find_prompts(source, column)
        say(found)
        return prompts
    shipped = BUNDLED / source_of(teacher).place / "prompts.txt"
    if not shipped.is_file():
        raise ValueError(
            f"prompts: teacher {teacher} brings no prompts of its own; pass --prompts FILE (.txt, .jsonl, .csv, .tsv) or a hub data set id"
        )
    return find_prompts(str(shipped))[0]


def say_of_prompts(teacher: Backbone, prompts: Sequence[str]) -> None:
    """Print what encoders cut of them, and which signs they do not understand."""
    for line in said_of_prompts(teacher, prompts):
        console.print(line, markup=False)


def say_found(found: Found) -> None:
    """One line on what a source has."""
    console.print(found.line, markup=False)
