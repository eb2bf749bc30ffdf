"""images.safetensors keeps every pixel, label, prompt and time."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fewstep.report.images import Images, StepGrid, Trajectory, load_images, save_images, to_uint8


def test_a_grid_of_step_counts_comes_back(tmp_path: Path) -> None:
    images = (torch.rand(2, 3, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 255).round() / 255
    before = Images(("a", "b"), grid=StepGrid((1, 2, 4), (1, 4), images))
    after = load_images(save_images(tmp_path / "p.safetensors", before)).grid
    assert after is not None
    assert (after.conditions, after.steps) == ((1, 2, 4), (1, 4))
    assert torch.equal(after.images, images)
    with pytest.raises(ValueError, match=r"the grid is \[2, 3, 2, 3, 4, 4\], allowed is \[P, 2, 2, 3, H, W\]"):
        Images(("a", "b"), grid=StepGrid((1, 2), (1, 4), images))


def some_images() -> Images:
    rng = torch.Generator().manual_seed(1)
    rows = {
        label: torch.rand(3, 3, 8, 8, generator=rng)
        for label in ("teacher, 50 guided steps (100 evaluations)", "student/é", "a")
    }
    paths = {"student": Trajectory((999.0, 499.0), torch.rand(2, 2, 3, 8, 8, generator=rng))}
    return Images(("red apple", "“quoted” 🍎", "<b>bold</b>"), rows, paths)


def test_saving_and_loading_keeps_everything_in_order(tmp_path: Path) -> None:
    before = some_images()
    after = load_images(save_images(tmp_path / "images.safetensors", before))
    assert after.prompts == before.prompts
    assert list(after.rows) == list(before.rows)
    for label, images in before.rows.items():
        assert torch.equal(to_uint8(after.rows[label]), to_uint8(images))
        assert (after.rows[label] - images).abs().max() <= 0.5 / 255 + 1e-6
    assert after.trajectories["student"].times == (999.0, 499.0)
    assert torch.equal(
        to_uint8(after.trajectories["student"].estimates), to_uint8(before.trajectories["student"].estimates)
    )


def test_every_eight_bit_value_survives() -> None:
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(values.float() / 255), values)


def test_values_outside_and_not_a_number_are_clamped() -> None:
    assert to_uint8(torch.tensor([-1.0, 2.0, float("nan"), float("inf"), float("-inf")])).tolist() == [
        0,
        255,
        0,
        255,
        0,
    ]


def test_nothing_at_all_can_be_saved(tmp_path: Path) -> None:
    assert load_images(save_images(tmp_path / "p.safetensors", Images())) == Images()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"row 'a' is \[2, 3, 8, 8\], allowed is \[1, 3, H, W\]"):
        Images(["p"], {"a": torch.zeros(2, 3, 8, 8)})
    with pytest.raises(
        ValueError, match=r"trajectory 'a' is \[1, 3, 3, 8, 8\], allowed is \[P, 2, 3, H, W\] with at most 1 prompts"
    ):
        Images(["p"], {}, {"a": Trajectory((1.0, 0.5), torch.zeros(1, 3, 3, 8, 8))})


@pytest.mark.parametrize("kind", ["other", "cut", "text"])
def test_a_file_that_is_not_ours_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "images.safetensors"
    if kind == "other":
        save_file({"weight": torch.zeros(2)}, path)
    else:
        data = save_images(path, some_images()).read_bytes()
        path.write_bytes(data[:-10] if kind == "cut" else b"hello")
    with pytest.raises(ValueError, match=r"images\.safetensors: damaged") as error:
        load_images(path)
    assert "\n" not in str(error.value)
