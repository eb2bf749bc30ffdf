"""Videos as files, and as strips of frames.

A strip stands where only an image fits.
"""

from pathlib import Path

import torch
from torch import Tensor

from ..atomic import replacing
from ..core.indices import evenly_spaced

FPS = 8  # where the model has no rate of its own


def strip(images: Tensor, frames: int = 5) -> Tensor:
    """Return videos as strips of frames, and images as they are.

    Videos `[..., F, 3, H, W]` of five or more dimensions become images `[..., 3, H, n W]` of up to `frames`
    frames, evenly spaced. Images are `[B, 3, H, W]`.
    """
    if images.ndim < 5:
        return images
    chosen = evenly_spaced(images.shape[-4], frames)
    return torch.cat([images.select(-4, i) for i in chosen], -1)


def write_mp4(path: Path, video: Tensor, fps: int = FPS) -> Path:
    """Write one video `[F, 3, H, W]` in [0, 1] as H.264.

    Raises ValueError where the package for H.264 is missing or a side is odd.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError("video: writing mp4 needs the package av; run: pip install 'fewstep[video]'") from error
    height, width = video.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"video: got frames of {height}x{width}, H.264 takes even sides; choose another size")
    pixels = (video.detach().float().clamp(0, 1) * 255).round().byte().movedim(1, -1).cpu().numpy()
    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4") as file:
        stream = file.add_stream("libx264", rate=fps, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for frame in pixels:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return path
