"""A recipe's settings with their texts, and training commands."""

import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from ..atomic import write_text
from ..backbones.load import absolute
from ..config_fields import allowed_text, field_texts
from ..names import require_name
from ..reading import reading, text_in
from ..recipes_path import recipe_names, recipe_path
from ..runs.recipe import DistillRecipe, read_recipe

# The settings that most trainings change, in the order in which they are asked for.
MAIN = (
    "train.iterations", "train.batch", "train.lr", "train.fake_lr", "train.decay", "method.steps",
    "method.guidance.scale", "roles.rank", "preview.every",
)  # fmt: skip
ELSEWHERE = ("kind", "name", "teacher", "prompts.source")  # asked for by name
WIDE = 10**6


@dataclass(frozen=True)
class Setting:
    """One setting of a recipe.

    `value` is written as in YAML, `text` says what it is, and `allowed` which values it takes.
    """

    key: str
    value: str
    text: str
    allowed: str


@dataclass(frozen=True)
class Wish:
    """What the fields of a new training hold.

    Without a `teacher`, or `pasted`, `source` and `dropped` prompts, those of the recipe are meant. `main` are the
    settings of `MAIN`; `lines` are settings `a.b=c`, which count over them.
    """

    recipe: str
    teacher: str = ""
    name: str = ""
    pasted: str = ""
    source: str = ""
    dropped: str = ""
    lines: str = ""
    main: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Sequence[str | None]) -> "Wish":
        """Read the page's fields, of which an empty one may be None.

        Raises ValueError without a recipe.
        """
        recipe, *rest = ((text or "").strip() for text in given)
        if not recipe:
            raise ValueError("recipe: got none; choose one")
        teacher, name, pasted, source, dropped, lines, *main = rest
        return cls(recipe, teacher, name, pasted, source, dropped, lines, dict(zip(MAIN, main, strict=True)))

    @property
    def own_teacher(self) -> str:
        """The teacher that is asked for, or the recipe's."""
        return self.teacher or read_recipe(self.recipe, [], DistillRecipe).teacher


@dataclass(frozen=True)
class Order:
    """What a training is asked to be.

    `changed` are settings as `a.b=c`. An empty `teacher` or `prompts` is the recipe's.
    """

    recipe: str
    run: Path
    teacher: str = ""
    prompts: str = ""
    changed: tuple[str, ...] = ()

    @property
    def given(self) -> list[str]:
        """The options that say what is trained."""
        options = [part for item in self.changed for part in ("--set", item)]
        return [*options, *(["--teacher", self.teacher] if self.teacher else [])]

    def distill(self, dry: bool = False) -> list[str]:
        """Return the command of the training, or of its dry run."""
        prompts = ["--prompts", self.prompts] if self.prompts else []
        return ["distill", self.recipe, *self.given, *prompts, "--out", str(self.run), *(["--dry-run"] if dry else [])]

    def plan(self, memory: str) -> list[str]:
        """Return the command that counts the training's memory."""
        return ["plan", self.recipe, *self.given, *(["--memory", memory] if memory else [])]


def written(value: Any) -> str:
    """Return a setting as YAML on one line."""
    if isinstance(value, str):
        return value  # `--set` takes the texts of settings literally
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, width=WIDE, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("...").strip()


def settings_of(recipe: DistillRecipe) -> list[Setting]:
    """Return every setting of a recipe, in its order."""
    return [s for s in _settings(recipe, "") if s.key not in ELSEWHERE]


def _settings(block: Any, above: str) -> Iterator[Setting]:
    kind: type = type(block)
    names = _names(block)
    texts = field_texts(kind)
    for name in names:
        value, key = getattr(block, name), f"{above}{name}"
        if isinstance(value, BaseModel) or (is_dataclass(value) and not isinstance(value, type)):
            yield from _settings(value, f"{key}.")
        else:
            allowed = "" if isinstance(block, BaseModel) else allowed_text(kind, name)
            yield Setting(key, written(value), " ".join(texts.get(name, "").split()), allowed)


def _names(block: Any) -> list[str]:
    if isinstance(block, BaseModel):
        return list(type(block).model_fields)
    return [f.name for f in fields(block)]


def recipes() -> list[str]:
    """Return the shipped recipes of distillations."""
    return [name for name in recipe_names() if _kind(recipe_path(name)) == "distill"]


def _kind(path: Path) -> str:
    with reading(path, "install fewstep again"):
        return next((line[5:].strip() for line in text_in(path).splitlines() if line.startswith("kind:")), "")


def about_recipe(source: str) -> list[str]:
    """Return the lines at a recipe's head.

    Raises ValueError where there is no such recipe.
    """
    path = recipe_path(source)
    with reading(f"recipe: {path}", "choose another"):
        head = text_in(path, lenient=True).splitlines()
    kept = []
    for line in head:
        if not line.startswith("#"):
            break
        kept.append(line.removeprefix("#").strip())
    return kept


def changes(base: Mapping[str, str], asked: Mapping[str, str], more: str) -> list[str]:
    """Return the settings that differ from the recipe's, as `a.b=c`.

    `base` and `asked` are the main settings; `more` are lines `a.b=c`, which count over the others. Raises
    ValueError for a line that sets nothing.
    """
    lines = [line.strip() for line in more.splitlines() if line.strip()]
    if odd := next((line for line in lines if "=" not in line or line.startswith("=")), None):
        raise ValueError(f"more settings: got {odd}, allowed are lines such as train.lr=1e-5")
    known = {line.partition("=")[0] for line in lines}
    own = [
        f"{key}={value.strip()}"
        for key, value in asked.items()
        if key in base and value.strip() and value.strip() != base[key] and key not in known
    ]
    return [*own, *lines]


def prompts_file(wish: Wish, kept: Path) -> str:
    """Return the file or the data set of the prompts.

    Empty for the recipe's. Pasted and dropped ones are written to `KEPT-prompts` first, with an ending.
    """
    name = f"{kept.name}-prompts"
    if wish.pasted:
        return str(write_text(kept.with_name(f"{name}.txt"), f"{wish.pasted}\n").resolve())
    if wish.dropped:
        file = kept.with_name(f"{name}{Path(wish.dropped).suffix}")
        file.parent.mkdir(parents=True, exist_ok=True)
        return str(Path(shutil.copyfile(wish.dropped, file)).resolve())
    return str(Path(wish.source).resolve()) if wish.source and Path(wish.source).is_file() else wish.source


def order_of(folder: Path, wish: Wish, prompts: str) -> Order:
    """Return what is asked for.

    Paths are whole, so that the training can be resumed from anywhere. Raises ValueError for a name that no folder
    may have, and for settings that the recipe does not take.
    """
    name, teacher = require_name(wish.name, "name"), absolute(wish.teacher) if wish.teacher else ""
    own = str(Path(wish.recipe).resolve()) if wish.recipe.endswith((".yaml", ".yml")) else wish.recipe
    changed = changes(main_settings(wish.recipe), wish.main, wish.lines)
    given = {k: v for k, v in {"teacher": teacher, "prompts.source": prompts}.items() if v}
    read_recipe(own, changed, DistillRecipe, given)
    return Order(own, folder / name, teacher, prompts, tuple(changed))


def main_settings(recipe: str, changed: Sequence[str] = ()) -> dict[str, str]:
    """Return the main settings of a recipe as they are written."""
    found = {s.key: s.value for s in settings_of(read_recipe(recipe, changed, DistillRecipe))}
    return {key: found.get(key, "") for key in MAIN}


def fitting(said: str) -> list[str]:
    """Return the settings that `fewstep plan --memory` found, as `a.b=c`.

    They stand in the command that it prints; empty where nothing has to be changed.
    """
    command = next((line.strip() for line in said.splitlines() if line.startswith("  fewstep distill ")), "")
    words = shlex.split(command)
    return [value for option, value in pairwise(words) if option == "--set"]


def verdict(said: str, code: int | None, memory: str) -> str:
    """Return what a plan says, in plain words."""
    if code:
        last = [line for line in said.splitlines() if line.strip()]
        return last[-1].removeprefix("error: ") if last else "the plan failed"
    if not memory:
        return "Name the memory of the card, e.g. 24GiB, to learn whether it fits."
    if "  fewstep distill " in said:
        return f"It does not fit {memory} as it is; with the settings in the last line it does."
    return f"It fits {memory} as it is."
