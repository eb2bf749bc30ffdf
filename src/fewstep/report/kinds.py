"""The types of the files of a run.

Anything else in a file is damage, which is reported where the file is read.
"""

from typing import Any, TypedDict

Number = float | None


class Stage(TypedDict, total=False):
    """The part of a recipe that a report names."""

    method: dict[str, Any] | None
    train: dict[str, Any] | None


class Recipe(Stage, total=False):
    """A run's settings, from a recipe or from `fewstep.distill`."""

    warm_start: Stage | None


class About(TypedDict, total=False):
    """The content of `run.json`."""

    title: str
    recipe: Recipe
    hardware: str
    command: str
    versions: dict[str, str]
    next: list[tuple[str, str]]


class Row(TypedDict, total=False):
    """A row of `eval.json`.

    All other values are numbers, truth values or null.
    """

    model: str


class Evaluation(TypedDict, total=False):
    """The content of `eval.json`."""

    rows: list[Row]
    protocol: str
    versions: dict[str, str]


class ErrorCurve(TypedDict):
    """An error along the trajectory."""

    s: list[float]
    error: list[float]


class Shape(TypedDict, total=False):
    """The content of a run's `trajectories.json`.

    The values are those of `report.trajectories`.
    """

    errors: dict[str, ErrorCurve]
    s: list[float]
    mean: list[list[float]]
    fit: list[list[float]]
    samples: list[list[list[float]]]
    r2: list[float]
    unexplained: list[float]
    sampled_from: str | None


class BestPreview(TypedDict):
    """The content of `best/preview.json`."""

    iteration: int
    value: float
    measured: str


class _Counted(TypedDict):
    iteration: int


class Line(_Counted, total=False):
    """A line of `metrics.jsonl`.

    All other values are numbers.
    """

    seconds: float
    warnings: list[str]
    quality: dict[str, Number]
    preview: dict[str, Number]
    watch: dict[str, Any]


class _Shown(TypedDict):
    prompts: list[str]
    rows: list[str]
    trajectories: dict[str, list[float]]


class ImagesHeader(_Shown, total=False):
    """The metadata of `images.safetensors`.

    Older files have no `grid`.
    """

    grid: tuple[list[int], list[int]] | None
