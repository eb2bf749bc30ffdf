"""Videos keep their frames, on the way to a strip and to a file."""

import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from fewstep.report.video import strip, write_mp4


def test_a_strip_shows_frames_evenly() -> None:
    video = torch.arange(9.0)[:, None, None, None].expand(9, 3, 2, 4)[None]
    shown = strip(video, 3)
    assert shown.shape == (1, 3, 2, 12)
    assert shown[0, 0, 0, ::4].tolist() == [0, 4, 8]
    assert strip(video[:, :2]).shape == (1, 3, 2, 8)  # no more than there are
    images = torch.rand(2, 3, 4, 4)
    assert strip(images) is images


def test_an_mp4_holds_the_frames(tmp_path: Path) -> None:
    grey = torch.linspace(0.1, 0.9, 9)
    video = grey[:, None, None, None].expand(9, 3, 16, 32)
    path = write_mp4(tmp_path / "sub" / "x.mp4", video, fps=4)
    with av.open(str(path)) as file:
        frames = [f.to_ndarray(format="rgb24") for f in file.decode(video=0)]
        assert float(file.streams.video[0].average_rate or 0) == 4
    assert len(frames) == 9
    assert frames[0].shape == (16, 32, 3)
    assert all(abs(float(np.mean(f)) / 255 - float(g)) < 0.02 for f, g in zip(frames, grey, strict=True))
    assert [p.name for p in path.parent.iterdir()] == ["x.mp4"]


def test_what_cannot_be_written_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"got frames of 15x32, H\.264 takes even sides"):
        write_mp4(tmp_path / "x.mp4", torch.rand(2, 3, 15, 32))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match="needs the package av; run: pip install"):
        write_mp4(tmp_path / "x.mp4", torch.rand(2, 3, 16, 32))
    assert not list(tmp_path.iterdir())
