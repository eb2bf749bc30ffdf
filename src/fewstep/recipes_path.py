"""The folder of the shipped recipes.

The folder is inside an installed package, or next to `src/` in a checkout.
"""

from difflib import get_close_matches
from pathlib import Path


def recipes_folder() -> Path:
    """Return the folder of shipped recipes, `NAME.yaml` each."""
    packaged = Path(__file__).parent / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "recipes"


def recipe_names() -> list[str]:
    """Return the names that `recipe_path` takes, sorted.

    `demo` stands for `demo.yaml`.
    """
    return sorted(file.stem for file in recipes_folder().glob("*.yaml"))


def recipe_path(recipe: str) -> Path:
    """Return the file of a recipe.

    `recipe` is a path that ends in .yaml or .yml, or the name of a shipped recipe. Raises ValueError where
    there is no such file or name.
    """
    if recipe.endswith((".yaml", ".yml")):
        if (file := Path(recipe)).is_file():
            return file
        raise ValueError(
            f"recipe: there is no file {recipe}; pass the path of a YAML file or a name: {', '.join(recipe_names())}"
        )
    if recipe in (names := recipe_names()):
        return recipes_folder() / f"{recipe}.yaml"
    near = get_close_matches(recipe, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ValueError(
        f"recipe: no shipped recipe is called {recipe}; "
        f"{hint}pass a name ({', '.join(names)}) or the path of a YAML file"
    )
