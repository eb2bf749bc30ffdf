"""Blind pairs of images, and the key that says whose they are.

The page of a study holds pairs without names; the key stays with whoever asks.
"""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

from .. import __version__
from ..atomic import write_json
from ..reading import object_in, reading
from ..typed import typed

FORMAT = 1
KEY = "key.json"
QUESTIONS = {"better": "Which image is better?", "follows": "Which follows the prompt better?"}
CURE = "without it the answers cannot be counted: copy it from where the study was made"


@dataclass(frozen=True)
class Pair:
    """Two images of one prompt.

    `item` is an index of `Key.prompts`; `first` and `second` are indices of `Key.models`.
    """

    item: int
    first: int
    second: int


@dataclass(frozen=True)
class Key:
    """What the page of a study does not say.

    `pairs` are in the page's order. `salt` is random, so that nobody can compute the order from the page.
    `made_from` tells models, prompts and seeds from others. `study` is the name that the page and the answers
    give.
    """

    study: str
    salt: str
    made_from: str
    models: tuple[str, ...]
    prompts: tuple[str, ...]
    questions: tuple[str, ...]
    pairs: tuple[Pair, ...]
    version: str
    format: int = FORMAT


def make_key(models: Sequence[str], prompts: Sequence[str], questions: Sequence[str], made_from: str, salt: str) -> Key:
    """Make a study of every pair of models for every prompt.

    Order and sides are random, drawn from `salt`.
    """
    rng = random.Random(salt)
    pairs = [Pair(i, *rng.sample(two, 2)) for i in range(len(prompts)) for two in combinations(range(len(models)), 2)]
    rng.shuffle(pairs)
    study = hashlib.sha256(f"{salt} {made_from}".encode()).hexdigest()[:16]
    return Key(study, salt, made_from, tuple(models), tuple(prompts), tuple(questions), tuple(pairs), __version__)


def image_order(key: Key) -> list[tuple[int, int]]:
    """Return every (item, model) once, in the order of the page.

    The order is random, too.
    """
    order = [(i, m) for i in range(len(key.prompts)) for m in range(len(key.models))]
    random.Random(f"{key.salt} images").shuffle(order)
    return order


def write_key(folder: Path, key: Key) -> None:
    """Write the key of a study to its folder."""
    write_json(folder / KEY, asdict(key))


def read_key(folder: Path) -> Key:
    """Read the key of a study from its folder.

    Raises ReadError for a file that is missing or damaged.
    """
    path = folder / KEY
    with reading(f"--out: {path}", CURE, "is missing or damaged"):
        value = object_in(path)
        if value.get("format") != FORMAT:
            raise ValueError(f"it has format {json.dumps(value.get('format'))[:20]}, this version reads {FORMAT}")
        key: Key = typed(Key, value)
        if len(key.models) < 2 or not key.prompts or not key.questions or not set(key.questions) <= set(QUESTIONS):
            raise ValueError("it names no two models, no prompt or no question")
        models, items = range(len(key.models)), range(len(key.prompts))
        for n, pair in enumerate(key.pairs):
            if pair.item not in items or not {pair.first, pair.second} <= set(models) or pair.first == pair.second:
                raise ValueError(f"its pairs.{n} names what there is not")
        return key
