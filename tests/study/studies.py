"""A study of small images, whose answers the tests make themselves."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.report.page import small_url
from fewstep.study.key import Key, make_key, write_key
from fewstep.study.page import study_page

MODELS = ("runs/secret-student, 4 steps", "tdm-other, 1 step", "teacher emoji, 50 guided steps")
HOSTILE = "<img src=x onerror=\"document.title='broken'\"></script><b>bold</b> & 'quoted' {{ 7 * 7 }}"
PROMPTS = ("red cat", HOSTILE)


def image(item: int, model: int, size: int = 8) -> Tensor:
    """An image of its own colours for every prompt and model."""
    return torch.rand(3, size, size, generator=torch.Generator().manual_seed(100 * item + model))


def key_of(prompts: tuple[str, ...] = PROMPTS, questions: tuple[str, ...] = ("better", "follows")) -> Key:
    return make_key(MODELS, prompts, questions, "made-from", "salt")


def write_study(folder: Path, key: Key) -> Path:
    """The page of a study, with its key beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_key(folder, key)
    page = folder / "study.html"
    page.write_text(study_page(key, image), encoding="utf-8")
    return page


def shown(key: Key) -> dict[str, tuple[int, int]]:
    """Which (prompt, model) the address of an image belongs to."""
    return {small_url(image(i, m)): (i, m) for i in range(len(key.prompts)) for m in range(len(key.models))}


def sheet(key: Key, rater: str, answers: list[dict[str, Any]], **other: Any) -> dict[str, Any]:
    """A file of answers as the page saves it."""
    return {"format": 1, "study": key.study, "rater": rater, "name": "", "saved": "2026", "answers": answers, **other}


def written(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value), encoding="utf-8")
    return path
