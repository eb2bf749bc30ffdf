"""What the files of a run hold, as types: anything else in them is damage, and is said where they are read."""

from typing import Any, TypedDict

Number = float | None


class Stage(TypedDict, total=False):
    """Of a recipe, what a report names."""

    method: dict[str, Any] | None
    train: dict[str, Any] | None


class Recipe(Stage, total=False):
    """A run's settings, as a recipe or the arguments of `fewstep.distill` said them."""

    warm_start: Stage | None


class About(TypedDict, total=False):
    """`run.json`."""

    title: str
    recipe: Recipe
    hardware: str
    command: str
    versions: dict[str, str]
    next: list[tuple[str, str]]


Row = dict[str, str | bool | float | None]  # one model of `eval.json`: texts and numbers by column


class Evaluation(TypedDict, total=False):
    """`eval.json`."""

    rows: list[Row]
    protocol: str
    versions: dict[str, str]


class ErrorCurve(TypedDict):
    """An error along the way."""

    s: list[float]
    error: list[float]


class Shape(TypedDict, total=False):
    """`trajectories.json` of a run: what `report.trajectories` says of them."""

    errors: dict[str, ErrorCurve]
    s: list[float]
    mean: list[list[float]]
    fit: list[list[float]]
    samples: list[list[list[float]]]
    r2: list[float]
    unexplained: list[float]
    sampled_from: str | None


class BestPreview(TypedDict):
    """`best/preview.json`."""

    iteration: int
    value: float
    measured: str


class Card(TypedDict, total=False):
    """Of a student's `fewstep.json`, what a report names."""

    method: str
    base: str
    steps: list[int]
    weights: str
    rank: int | None
    head: str


class _Counted(TypedDict):
    iteration: int


class Line(_Counted, total=False):
    """A line of `metrics.jsonl`; all other values are numbers."""

    seconds: float
    warnings: list[str]
    quality: dict[str, Number]
    preview: dict[str, Number]
    watch: dict[str, Any]


class _Shown(TypedDict):
    prompts: list[str]
    rows: list[str]
    trajectories: dict[str, list[float]]


class PicturesHeader(_Shown, total=False):
    """What `pictures.safetensors` says of itself; older ones say no `grid`."""

    grid: tuple[list[int], list[int]] | None
