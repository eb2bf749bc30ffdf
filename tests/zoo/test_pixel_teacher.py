"""Pixel-space teachers: images from the files that people have, and a model of them that samples."""

import gzip
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

import fewstep
from fewstep.backbones.unconditional import PixelModel
from fewstep.core.schedule import EDM, VP
from fewstep.training.fit import FitConfig
from fewstep.zoo.pixel_data import FASHION, FASHION_BEGINS, IDX, IDX_LABELS, load_idx, read_pixel_data
from fewstep.zoo.pixel_teacher import PixelTeacherConfig, draw_times, train_pixel_teacher

from .common import IMAGES


def write_idx(path: Path, data: torch.Tensor) -> None:
    head = bytes([0, 0, 8, data.ndim]) + b"".join(n.to_bytes(4, "big") for n in data.shape)
    path.write_bytes(gzip.compress(head + data.to(torch.uint8).numpy().tobytes()))


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """Forty made-up pieces of clothing, whose labels begin as those of the real ones."""
    write_idx(tmp_path / IDX, torch.randint(0, 256, (40, 28, 28), generator=torch.Generator().manual_seed(0)))
    write_idx(tmp_path / IDX_LABELS, torch.tensor([*FASHION_BEGINS, *(i % 10 for i in range(30))]))
    return tmp_path


def bytes_of(image: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


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
    assert data.labels.tolist() == [*FASHION_BEGINS, *(i % 10 for i in range(30))]
    assert data.classes == FASHION
    with pytest.raises(ValueError, match="install Debian's dataset-fashion-mnist"):
        read_pixel_data(str(fashion / "absent"))


def test_npz_of_pixels_and_of_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "pixels.npz", images=IMAGES, labels=[0, 0, 1, 1, 2, 2], classes=["cat", "dog", "ship"])
    data = read_pixel_data(str(tmp_path / "pixels.npz"))
    assert np.array_equal(data.images.permute(0, 2, 3, 1).numpy(), IMAGES)
    assert data.classes == ("cat", "dog", "ship")
    files = [bytes_of(p) for p in IMAGES]
    np.savez(
        tmp_path / "files.npz",
        jpeg=np.frombuffer(b"".join(files), np.uint8),
        offset=np.cumsum([0, *map(len, files)]),
        y=[0, 1, 0, 1, 0, 1],
    )
    again = read_pixel_data(str(tmp_path / "files.npz"))
    assert torch.equal(again.images, data.images)
    assert again.classes == ("0", "1")
    np.savez(tmp_path / "other.npz", x=IMAGES)
    with pytest.raises(ValueError, match=r"other.npz holds x; it needs images"):
        read_pixel_data(str(tmp_path / "other.npz"))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "files.npz").read_bytes()[:50])
    with pytest.raises(ValueError, match="cannot be read as npz"):
        read_pixel_data(str(tmp_path / "cut.npz"))


def test_a_folder_with_one_folder_per_class(tmp_path: Path) -> None:
    for i, image in enumerate(IMAGES):
        folder = tmp_path / "set" / ("dog" if i % 2 else "cat")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i}.png").write_bytes(bytes_of(image))
    data = read_pixel_data(str(tmp_path / "set"))
    assert data.classes == ("cat", "dog")
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert np.array_equal(data.images[3].permute(1, 2, 0).numpy(), IMAGES[1])
    (tmp_path / "set" / "cat" / "large.png").write_bytes(bytes_of(np.zeros((9, 9, 3), np.uint8)))
    with pytest.raises(ValueError, match="are of several sizes"):
        read_pixel_data(str(tmp_path / "set"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no images"):
        read_pixel_data(str(tmp_path / "empty"))


def test_it_trains_by_class(fashion: Path, tmp_path: Path) -> None:
    assert len(list(train_pixel_teacher(settings(fashion), tmp_path / "run"))) == 2
    teacher = fewstep.load_teacher(tmp_path / "run" / "teacher")
    assert fewstep.sample(teacher, ["bag", "coat"], steps=2, guidance=3.0).shape == (2, 3, 28, 28)
    with pytest.raises(ValueError, match=r"knows no 'hat'; its classes are t-shirt"):
        teacher.encode(["hat"])
    assert teacher.encode(["", FASHION[0]])["label"].tolist() == [10, 0]


def test_it_trains_in_colour_without_classes(tmp_path: Path) -> None:
    np.savez(tmp_path / "pixels.npz", images=IMAGES)
    options = {"layers": 2, "dropout": 0.1, "flip": True}
    assert len(list(train_pixel_teacher(settings(tmp_path / "pixels.npz", **options), tmp_path / "run"))) == 2
    teacher = fewstep.load_teacher(tmp_path / "run" / "teacher")
    assert teacher.encode(["", ""]) == {}
    assert fewstep.sample(teacher, ["", ""], steps=2).shape == (2, 3, 8, 8)


@pytest.mark.parametrize("process", ["vp", "edm"])
def test_batches_draw_times_by_their_law_in_equal_slices(process: str) -> None:
    """Half of a batch lies below the median, whatever the seed, and no time beyond the ends."""
    schedule, n = VP(torch.linspace(0.999, 0, 1000, dtype=torch.float64)) if process == "vp" else EDM(), 512
    t = draw_times(schedule, n, torch.Generator().manual_seed(0))
    middle = 500 if process == "vp" else np.exp(-1.2)
    assert abs(int((t < middle).sum()) - n // 2) <= 1
    assert schedule.t_clean < t.min() and t.max() <= schedule.t_max
    if process == "edm":
        assert t.log().std().item() == pytest.approx(1.2, rel=0.02)
    else:
        assert torch.equal(t, t.round())


def test_a_draw_at_the_end_of_its_slice_stays_on_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """127 + the largest number below 1 is 128 in single precision: a thousandth time of a thousand, of 0 .. 999."""
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.full((n,), 1 - 2**-24))
    assert draw_times(VP(torch.linspace(0.999, 0, 1000, dtype=torch.float64)), 128, torch.Generator()).max() == 999
    assert draw_times(EDM(), 128, torch.Generator()).max() == 80


def test_it_trains_with_edm_s_preconditioning(fashion: Path, tmp_path: Path) -> None:
    config = settings(fashion, process="edm", sigma_data=0.7)
    assert len(list(train_pixel_teacher(config, tmp_path / "run"))) == 2
    teacher = fewstep.load_teacher(tmp_path / "run" / "teacher")
    assert isinstance(teacher, PixelModel)
    assert isinstance(teacher.schedule, EDM)
    assert teacher.scheduler_config["sigma_data"] == 0.7
    assert fewstep.sample(teacher, ["bag", "coat"], steps=2, guidance=3.0).shape == (2, 3, 28, 28)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run" / "teacher")  # without fewstep
    assert pipe(batch_size=2, class_labels=[8, 4], num_inference_steps=2, output_type="pt").images.shape == (
        2,
        1,
        28,
        28,
    )
    with pytest.raises(ValueError, match=r"^process: got vp, the run in .* was begun with edm; pass --out"):
        next(train_pixel_teacher(settings(fashion), tmp_path / "run"))


@pytest.mark.parametrize(("process", "left"), [("vp", 0.15), ("edm", 0.03)])
def test_training_learns_the_clean_image(process: str, left: float, tmp_path: Path) -> None:
    """A network that has learnt one image gives it at any noise.

    With another sign, or told other times, more error is left.
    """
    np.savez(tmp_path / "one.npz", images=IMAGES[:1])
    fit = FitConfig(steps=60, batch=32, lr=1e-2, warmup=1, decay=30, ema=0.9, weight_decay=0.0)
    config = settings(tmp_path / "one.npz", process=process, channels=[16, 16], fit=fit)
    assert len(list(train_pixel_teacher(config, tmp_path / "run"))) == 60
    teacher = fewstep.load_teacher(tmp_path / "run" / "teacher")
    wanted = torch.from_numpy(IMAGES[0]).permute(2, 0, 1) / 255

    def off(images: Tensor) -> float:
        return float((images - wanted).square().mean())

    assert off(fewstep.sample(teacher, [""] * 4, steps=4)) < left * off(torch.full_like(wanted, float(wanted.mean())))


def test_sigma_data_is_edm_s_alone(fashion: Path) -> None:
    with pytest.raises(
        ValueError, match=r"sigma_data: got 0\.7 with process vp, which has none; leave it out, or set process=edm"
    ):
        settings(fashion, sigma_data=0.7)
