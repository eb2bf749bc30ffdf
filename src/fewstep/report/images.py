"""The images of a run, as exact 8-bit pixels.

Each model samples the same prompts from the same noise.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ..atomic import write_bytes
from ..reading import reading, require_regular
from ..typed import typed
from .kinds import ImagesHeader


@dataclass(frozen=True)
class Trajectory:
    """Clean estimates along a trajectory.

    `estimates` `[P, K, 3, H, W]` in [0, 1] are those of the first P prompts at K `times`, from noise to
    clean.
    """

    times: Sequence[float]
    estimates: Tensor


@dataclass(frozen=True)
class StepGrid:
    """Images of a student of several step counts.

    `images` `[P, T, S, 3, H, W]` in [0, 1] are those of the first P prompts, conditioned on each of T step
    counts (`conditions`) and sampled in each of S step counts (`steps`), as in TDM fig. 10.
    """

    conditions: Sequence[int]
    steps: Sequence[int]
    images: Tensor


@dataclass(frozen=True)
class Images:
    """The images and trajectories of a run, by label.

    `rows`: label -> `[P, 3, H, W]` in [0, 1], column p sampled for `prompts[p]`. `trajectories`: label ->
    clean estimates. Labels are shown as they are and say what was counted: "teacher, 50 guided steps (100
    evaluations)".

    Raises ValueError where a shape does not fit the prompts.
    """

    prompts: Sequence[str] = ()
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    trajectories: Mapping[str, Trajectory] = field(default_factory=dict)
    grid: StepGrid | None = None

    def __post_init__(self) -> None:
        for label, images in self.rows.items():
            if images.ndim != 4 or images.shape[:2] != (len(self.prompts), 3):
                allowed = f"[{len(self.prompts)}, 3, H, W]: one image for each prompt"
                raise ValueError(f"images: row {label!r} is {list(images.shape)}, allowed is {allowed}")
        for label, t in self.trajectories.items():
            shape = t.estimates.shape
            if t.estimates.ndim != 5 or shape[1:3] != (len(t.times), 3) or shape[0] > len(self.prompts):
                allowed = f"[P, {len(t.times)}, 3, H, W] with at most {len(self.prompts)} prompts"
                raise ValueError(
                    f"images: trajectory {label!r} is {list(shape)}, allowed is {allowed}: one estimate for each time"
                )
        if (g := self.grid) is not None and (
            g.images.ndim != 6 or g.images.shape[1:4] != (len(g.conditions), len(g.steps), 3)
        ):
            allowed = f"[P, {len(g.conditions)}, {len(g.steps)}, 3, H, W]: one image for each condition and step count"
            raise ValueError(f"images: the grid is {list(g.images.shape)}, allowed is {allowed}")


def to_uint8(images: Tensor) -> Tensor:
    """Convert values in [0, 1] to {0, ..., 255}.

    Values are rounded to the nearest and clamped; NaN becomes black.
    """
    return (images.detach().float().nan_to_num(0.0, 1.0, 0.0).clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def to_pil(image: Tensor) -> Image.Image:
    """Convert `[3, H, W]` in [0, 1] to an 8-bit RGB image."""
    return Image.fromarray(to_uint8(image).permute(1, 2, 0).contiguous().numpy(), "RGB")


def png(image: Image.Image) -> bytes:
    """Encode an image as PNG, lossless.

    The texts that the image's `info` holds are written, too.
    """
    buffer, words = io.BytesIO(), PngInfo()
    for key, text in image.info.items():
        if isinstance(key, str) and isinstance(text, str):
            words.add_text(key, text)
    image.save(buffer, "PNG", pnginfo=words)
    return buffer.getvalue()


def save_images(path: Path, images: Images) -> Path:
    """Write images as uint8 tensors to a safetensors file.

    The tensors are `row/LABEL`, `trajectory/LABEL` and `grid`. Prompts, order of labels and times stand in
    the metadata.
    """
    tensors = {f"row/{label}": to_uint8(row).contiguous() for label, row in images.rows.items()}
    tensors |= {f"trajectory/{label}": to_uint8(t.estimates).contiguous() for label, t in images.trajectories.items()}
    grid = images.grid
    if grid is not None:
        tensors["grid"] = to_uint8(grid.images).contiguous()
    about = {
        "grid": None if grid is None else [list(grid.conditions), list(grid.steps)],
        "prompts": list(images.prompts),
        "rows": list(images.rows),
        "trajectories": {label: list(t.times) for label, t in images.trajectories.items()},
    }
    return write_bytes(path, save(tensors, metadata={"images": json.dumps(about, ensure_ascii=False)}))


def load_images(path: Path) -> Images:
    """Read the images that `save_images` wrote.

    The 8-bit values come back exactly. Raises ValueError where the file was not written by `save_images`.
    """
    with reading(
        f"images {path}:", "delete it and run `fewstep evaluate` again", "damaged, or not written by save_images"
    ):
        with safe_open(require_regular(path), framework="pt") as file:
            about = typed(ImagesHeader, json.loads((file.metadata() or {})["images"]))
            rows = {label: _pixels(file.get_tensor(f"row/{label}")) for label in about["rows"]}
            trajectories = {
                label: Trajectory(tuple(times), _pixels(file.get_tensor(f"trajectory/{label}")))
                for label, times in about["trajectories"].items()
            }
            counts = about.get("grid")
            grid = (
                None
                if counts is None
                else StepGrid(tuple(counts[0]), tuple(counts[1]), _pixels(file.get_tensor("grid")))
            )
        return Images(tuple(about["prompts"]), rows, trajectories, grid)


def _pixels(values: Tensor) -> Tensor:
    """Convert 8-bit values to numbers in [0, 1].

    Raises ValueError for anything else.
    """
    if values.dtype != torch.uint8:
        raise ValueError(f"its images are {str(values.dtype).removeprefix('torch.')}, not uint8")
    return values.float() / 255
