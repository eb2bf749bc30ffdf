"""Pixel-space teachers: pictures from the files that people have, and a model of them that samples."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import fewstep
from fewstep.training.fit import FitConfig
from fewstep.zoo.pixel_data import FASHION, IDX, load_idx, read_pixel_data
from fewstep.zoo.pixel_teacher import PixelTeacherConfig, train_pixel_teacher


def write_idx(path: Path, data: torch.Tensor) -> None:
    head = bytes([0, 0, 8, data.ndim]) + b"".join(n.to_bytes(4, "big") for n in data.shape)
    path.write_bytes(gzip.compress(head + data.to(torch.uint8).numpy().tobytes()))


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Forty made-up pieces of clothing."""
    write_idx(tmp_path / IDX, torch.randint(0, 256, (40, 28, 28), generator=torch.Generator().manual_seed(0)))
    write_idx(tmp_path / "train-labels-idx1-ubyte.gz", torch.arange(40) % 10)
    return tmp_path


def bytes_of(picture: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, kind)
    return buffer.getvalue()


PICTURES = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)


def settings(data: Path, **other: object) -> PixelTeacherConfig:
    value = {
        "kind": "pixel-teacher",
        "seed": 0,
        "data": str(data),
        "channels": [8, 8],
        "attention": [False, False],
        "fit": FitConfig(steps=2, batch=4, lr=1e-3, warmup=1, decay=1),
    }
    return PixelTeacherConfig.model_validate(value | other)


def test_idx_files(fashion: Path) -> None:
    data = read_pixel_data(str(fashion))
    assert data.images.shape == (40, 1, 28, 28)
    assert torch.equal(data.images[:, 0], load_idx(fashion / IDX))
    assert data.labels.tolist() == [i % 10 for i in range(40)]
    assert data.classes == FASHION
    with pytest.raises(ValueError, match="install Debian's dataset-fashion-mnist"):
        read_pixel_data(str(fashion / "absent"))


def test_npz_of_pixels_and_of_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "pixels.npz", images=PICTURES, labels=[0, 0, 1, 1, 2, 2], classes=["cat", "dog", "ship"])
    data = read_pixel_data(str(tmp_path / "pixels.npz"))
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), PICTURES)
    assert data.classes == ("cat", "dog", "ship")
    files = [bytes_of(p) for p in PICTURES]
    np.savez(
        tmp_path / "files.npz", jpeg=np.frombuffer(b"".join(files), np.uint8), offset=np.cumsum([0, *map(len, files)]), y=[0, 1, 0, 1, 0, 1]
    )
    again = read_pixel_data(str(tmp_path / "files.npz"))
    assert torch.equal(again.images, data.images)
    assert again.classes == ("0", "1")
    np.savez(tmp_path / "other.npz", x=PICTURES)
    with pytest.raises(ValueError, match=r"other.npz holds x; it needs images"):
        read_pixel_data(str(tmp_path / "other.npz"))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "files.npz").read_bytes()[:50])
    with pytest.raises(ValueError, match="cannot be read as npz"):
        read_pixel_data(str(tmp_path / "cut.npz"))


def test_a_folder_with_one_folder_per_class(tmp_path: Path) -> None:
    for i, picture in enumerate(PICTURES):
        folder = tmp_path / "set" / ("dog" if i % 2 else "cat")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(bytes_of(picture))
    data = read_pixel_data(str(tmp_path / "set"))
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(data.images[3].permute(1, 2, 0).numpy(), PICTURES[1])
    (tmp_path / "set" / "cat" / "large.png").write_bytes(bytes_of(np.zeros((9, 9, 3), np.uint8)))
    with pytest.raises(ValueError, match="are of several sizes"):
        read_pixel_data(str(tmp_path / "set"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no pictures"):
        read_pixel_data(str(tmp_path / "empty"))


def test_it_trains_by_class(fashion: Path, tmp_path: Path) -> None:
    assert len(list(train_pixel_teacher(settings(fashion), tmp_path / "run"))) == 2
    teacher = fewstep.load_teacher(tmp_path / "run" / "teacher")
    assert fewstep.sample(teacher, ["bag", "coat"], steps=2, guidance=3.0).shape == (2, 3, 28, 28)
    with pytest.raises(ValueError, match=r"knows no 'hat'; its classes are t-shirt"):
        teacher.encode(["hat"])
    assert teacher.encode(["", FASHION[0]])["label"].tolist() == [10, 0]


def test_it_trains_in_colour_without_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "pixels.npz", images=PICTURES)
    options = {"layers": 2, "dropout": 0.1, "flip": True}
    assert len(list(train_pixel_teacher(settings(tmp_path / "pixels.npz", **options), tmp_path / "run"))) == 2
    teacher = fewstep.load_teacher(tmp_path / "run" / "teacher")
    assert teacher.encode(["", ""]) == {}
    assert fewstep.sample(teacher, ["", ""], steps=2).shape == (2, 3, 8, 8)
