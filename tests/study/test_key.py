"""The page says nothing of whose an image is, and the key says all of it."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest

from fewstep.reading import ReadError
from fewstep.study.key import KEY, image_order, make_key, read_key, write_key
from fewstep.study.page import study_page

from .studies import HOSTILE, MODELS, PROMPTS, image, key_of, shown, write_study


def test_every_pair_of_models_is_asked_of_every_prompt_once() -> None:
    key = key_of(("a", "b", "c"))
    asked = sorted((p.item, *sorted((p.first, p.second))) for p in key.pairs)
    assert asked == [(i, *two) for i in range(3) for two in combinations(range(3), 2)]


def test_order_and_sides_are_random_and_the_salt_s() -> None:
    keys = [make_key(MODELS[:2], [str(i) for i in range(10)], ("better",), "x", str(salt)) for salt in range(100)]
    first = sum(pair.first == 0 for key in keys for pair in key.pairs)
    assert abs(first - 500) < 4 * 250**0.5  # 4 standard deviations of 1000 coins
    begins = sum(key.pairs[0].item for key in keys) / 100
    assert abs(begins - 4.5) < 4 * (8.25 / 100) ** 0.5
    assert keys[3] == make_key(MODELS[:2], [str(i) for i in range(10)], ("better",), "x", "3")
    assert len({key.study for key in keys}) == 100


def test_the_page_gives_nothing_away() -> None:
    """No name, no role, no step count, no salt, and no order that follows the models'."""
    key = key_of()
    html = study_page(key, image)
    told = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    for word in ("secret", "student", "tdm", "teacher", "emoji", "steps", "guided", key.salt, key.made_from, "fewstep"):
        assert not re.search(rf"\b{re.escape(word)}\b", told, re.IGNORECASE), word
    data = json.loads(re.search(r'id="data">(.*?)</script>', html)[1])  # type: ignore[index]
    assert set(data) == {"study", "questions", "pairs"} and data["study"] == key.study
    urls = re.findall(r'<script type="text/plain">(data:[^<]*)</script>', html)
    of = shown(key)
    assert len(urls) == len(set(urls)) == len(of) == 6
    for (prompt, first, second), pair in zip(data["pairs"], key.pairs, strict=True):
        assert prompt == key.prompts[pair.item]
        assert (of[urls[first]], of[urls[second]]) == ((pair.item, pair.first), (pair.item, pair.second))
    salts = [make_key(MODELS, PROMPTS, ("better",), "x", str(salt)) for salt in range(60)]
    begins = [image_order(key)[0][1] for key in salts]
    assert min(begins.count(model) for model in range(3)) > 8  # 20 each, on average


def test_the_page_loads_nothing_and_is_no_markup_of_a_prompt(tmp_path: Path) -> None:
    html = write_study(tmp_path, key_of()).read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|url\(", html) and "default-src 'none'" in html
    assert "<b>bold" not in html and html.count("<img") == 3 and HOSTILE not in html
    assert not re.search(r'(?:src|href)="(?!data:)', html)


def test_a_key_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_key(tmp_path, key_of())
    assert read_key(tmp_path) == key_of()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": 2}, "it has format 2, this version reads 1"),
        ({"models": ["a"]}, "names no two models"),
        ({"questions": ["odd"]}, "no question"),
        ({"pairs": [{"item": 9, "first": 0, "second": 1}]}, "pairs.0 names what there is not"),
        ({"pairs": [{"item": 0, "first": 1, "second": 1}]}, "pairs.0 names what there is not"),
        ({"pairs": "none"}, "pairs is 'none', not a list"),
    ],
)
def test_a_damaged_key_is_one_line(tmp_path: Path, change: dict[str, object], said: str) -> None:
    write_key(tmp_path, key_of())
    (tmp_path / KEY).write_text(json.dumps(json.loads((tmp_path / KEY).read_text()) | change))
    with pytest.raises(ReadError, match=re.escape(said)):
        read_key(tmp_path)
    with pytest.raises(ReadError, match=r"--out: .*key\.json is missing or damaged .*without it the answers cannot"):
        read_key(tmp_path / "elsewhere")
