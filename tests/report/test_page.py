"""Images in a page are exact where they are small, and clips move."""

import base64
import io

import numpy as np
import torch
from PIL import Image

from fewstep.report.images import to_uint8
from fewstep.report.page import small_url


def opened(address: str) -> tuple[str, Image.Image]:
    head, _, data = address.partition(";base64,")
    return head, Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0))


def test_a_small_image_is_exact() -> None:
    x = noise(3, 256, 64)
    head, image = opened(small_url(x))
    assert head == "data:image/png" and not image.info
    assert (np.asarray(image) == to_uint8(x).permute(1, 2, 0).numpy()).all()


def test_a_large_image_is_short() -> None:
    smooth = torch.nn.functional.interpolate(noise(1, 3, 8, 8), (512, 512), mode="bicubic")[0].clamp(0, 1)
    head, image = opened(small_url(smooth))
    assert head == "data:image/webp" and image.size == (512, 512) and not image.getexif()
    off = np.asarray(image.convert("RGB")).astype(float) - to_uint8(smooth).permute(1, 2, 0).numpy()
    assert abs(off).mean() < 2


def test_a_clip_is_an_animation_of_its_frames_without_end() -> None:
    x = noise(5, 3, 16, 24)
    head, image = opened(small_url(x))
    assert head == "data:image/webp"
    assert (image.n_frames, image.info["loop"]) == (5, 0)  # type: ignore[attr-defined]
    for i, frame in enumerate(x):
        image.seek(i)
        image.load()
        assert image.info["duration"] == 125
        assert (np.asarray(image.convert("RGB")) == to_uint8(frame).permute(1, 2, 0).numpy()).all()
