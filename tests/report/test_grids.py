"""Grids: exact pixels at the right places, text that fits, files that are whole."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from fewstep.report.grids import FONT_SIZE, GAP, draw_grid, enlargement, read_grid, wrap, write_grid
from fewstep.report.images import png, to_uint8


@pytest.mark.parametrize(("size", "factor"), [(16, 6), (32, 3), (64, 2), (95, 2), (96, 1), (97, 1), (512, 1)])
def test_small_images_are_enlarged_to_at_least_96_pixels(size: int, factor: int) -> None:
    assert enlargement(size, 2 * size) == factor


def test_every_image_stands_in_the_grid_pixel_for_pixel(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    path = write_grid(
        tmp_path / "samples" / "step_000100.png", images, ["teacher, 50 guided steps", "student"], ["a", "b", "c"]
    )
    sheet = np.asarray(Image.open(path))
    height, width = 96, 120
    # The grid ends at the lower right corner, a margin inside; count back from there.
    right, bottom = sheet.shape[1] - 14, sheet.shape[0] - 14
    for row in range(2):
        for column in range(3):
            x, y = right - (3 - column) * (width + GAP) + GAP, bottom - (2 - row) * (height + GAP) + GAP
            shown = sheet[y : y + height, x : x + width]
            expected = to_uint8(images[row, column]).permute(1, 2, 0).numpy().repeat(3, 0).repeat(3, 1)
            assert (shown == expected).all(), (row, column)


def test_nothing_is_left_beside_the_grid(tmp_path: Path) -> None:
    write_grid(tmp_path / "a.png", torch.zeros(1, 1, 3, 8, 8), ["x"], ["y"])
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_labels_and_prompts_are_drawn() -> None:
    images = torch.ones(1, 1, 3, 96, 96)
    blank, labelled = draw_grid(images, [""], [""]), draw_grid(images, ["teacher"], [""])
    both = draw_grid(images, ["teacher"], ["red apple"])
    assert np.asarray(blank).min() == 255
    assert labelled.width > blank.width
    assert np.asarray(labelled).min() < 128
    assert both.height > labelled.height


def test_a_long_prompt_is_wrapped_within_its_column_and_shortened() -> None:
    font = ImageFont.load_default(FONT_SIZE)
    lines = wrap("an oil painting of " + "very " * 60 + "old lighthouses", 128, 4, font)
    assert len(lines) == 4
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 128 + font.getlength("…") for line in lines)
    assert " ".join(wrap("red apple", 128, 4, font)) == "red apple"
    assert wrap("", 128, 4, font) == []


def test_a_tensor_that_does_not_fit_the_words_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"grid: images are \[2, 1, 3, 8, 8\], allowed is \[1, 1, 3, H, W\]"):
        write_grid(tmp_path / "a.png", torch.zeros(2, 1, 3, 8, 8), ["x"], ["y"])
    assert not list(tmp_path.iterdir())


def test_a_grid_can_be_taken_apart_again(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 3, 16, 20, generator=torch.Generator().manual_seed(0))
    grid = read_grid(
        write_grid(tmp_path / "a.png", images, ["teacher", "student, 4 steps"], ["a", "日本 🍎", "<b>"]).read_bytes()
    )
    assert grid is not None
    assert (grid.labels, grid.prompts, grid.width, grid.height) == (
        ("teacher", "student, 4 steps"),
        ("a", "日本 🍎", "<b>"),
        20,
        16,
    )
    for row in range(2):
        for column in range(3):
            tile = np.asarray(Image.open(io.BytesIO(grid.tiles[row][column])))
            assert (tile == to_uint8(images[row, column]).permute(1, 2, 0).numpy()).all()


GIANT = {
    "labels": ["a"],
    "prompts": ["b"],
    "left": 0,
    "top": 0,
    "width": 10**9,
    "height": 10**9,
    "down": 1,
    "factor": 1,
}


@pytest.mark.parametrize(
    "words",
    [
        None,
        "{",
        "[]",
        "{}",
        *[json.dumps(GIANT | {"width": w, "height": 4, "factor": f}) for w, f in ((10**9, 1), (4, 0), (-4, 1), (4, 9))],
    ],
)
def test_other_images_are_no_grids(words: str | None) -> None:
    image = Image.new("RGB", (8, 8))
    if words is not None:
        image.info["fewstep"] = words
    assert read_grid(png(image)) is None
    assert read_grid(b"no image") is None
