"""`fewstep recipes`: the shipped recipes and what they train."""

from ..recipes_path import recipe_names, recipe_path
from .progress import console, put_result


def run_recipes(word: str | None = None) -> None:
    """Print the name and the first line of each shipped recipe.

    Only of those that contain `word`, in either case. Raises ValueError where none does.
    """
    lines = {
        name: recipe_path(name).read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for name in recipe_names()
    }
    found = {n: line for n, line in lines.items() if word is None or word.lower() in f"{n} {line}".lower()}
    if not found:
        raise ValueError(f"recipes: none has the word {word}; leave it out to see all {len(lines)}")
    put_result({"recipes": found})
    width = max(map(len, found))
    for name, line in found.items():
        console.print(f"{name:{width}}  {line}", markup=False, highlight=False, soft_wrap=True)
