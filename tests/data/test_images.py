"""Real images from folders and shards: which caption, which pixels, encoded once, and one line for every mistake."""

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.atomic import write_tensors
from fewstep.backbones.base import Backbone, Denoiser
from fewstep.backbones.sd import StableDiffusion
from fewstep.data.captioned import Captioned, read_images
from fewstep.data.images import encode_images_of, to_tensor

from .. import tiny
from .common import png


def captioned(file: Path, data: bytes) -> Captioned:
    """An image without a caption, in this file."""
    file.write_bytes(data)
    return Captioned(file.name, "", "", file, 0, len(data))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "set"
    (path / "more").mkdir(parents=True)
    (path / "a_red_cat.png").write_bytes(png())
    (path / "b.png").write_bytes(png((0, 255, 0)))
    (path / "b.txt").write_text("blue dog\n")
    (path / "more" / "c.PNG").write_bytes(png((0, 0, 255)))
    (path / "metadata.jsonl").write_text(
        json.dumps({"file_name": "more/c.PNG", "text": "a photo of a green house"}) + "\n"
    )
    (path / "notes.md").write_text("not an image")
    return path


def test_the_middle_is_cut_out_and_transparency_is_white(tmp_path: Path) -> None:
    wide = Image.new("RGB", (40, 20), (0, 0, 0))
    wide.paste((255, 255, 255), (10, 0, 30, 20))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    assert bool((to_tensor(captioned(tmp_path / "wide", buffer.getvalue()), 20) == 1).all())
    clear = to_tensor(captioned(tmp_path / "clear", png((255, 0, 0, 0))), 8)
    assert clear.shape == (3, 8, 8)
    assert bool((clear == 1).all())


def test_they_are_encoded_once_and_stay_with_their_captions(folder: Path, tmp_path: Path) -> None:
    backbone = tiny.stable_diffusion()
    first = encode_images_of(backbone, str(folder), tmp_path / "cache", "tiny")
    assert first.x0.shape == (3, 4, 8, 8)
    images = torch.stack([to_tensor(p, 16) for p in read_images(str(folder))[0]])
    torch.testing.assert_close(first.x0, backbone.encode_images(images))
    again = encode_images_of(backbone, str(folder), tmp_path / "cache", "tiny")
    assert again.embeddings.encoded == 0
    assert torch.equal(again.x0, first.x0)
    assert again.key == first.key
    real = first.draw(20, torch.Generator().manual_seed(0), torch.device("cpu"))
    told = backbone.encode([p.caption for p in read_images(str(folder))[0]])["text"]
    for x0, text in zip(real.x0, real.cond["text"], strict=True):
        (row,) = {i for i in range(3) if torch.equal(first.x0[i], x0)}
        torch.testing.assert_close(text, told[row])
    assert len({x.sum().item() for x in real.x0}) == 3
    (folder / "b.txt").write_text("another")
    assert encode_images_of(backbone, str(folder), tmp_path / "cache", "tiny").key != first.key


def test_they_are_checked_before_any_and_go_through_in_parts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers of all before the first is decoded; then no more than a part is in memory."""
    backbone, sizes, told = tiny.stable_diffusion(), [], []
    states = StableDiffusion.encode_images

    def counted(self: StableDiffusion, images: Tensor) -> Tensor:
        sizes.append(len(images))
        return states(self, images)

    monkeypatch.setattr(StableDiffusion, "encode_images", counted)
    (folder / "z.png").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"^data\.source: z\.png is no image"):
        encode_images_of(backbone, str(folder), tmp_path / "cache", "tiny")
    assert not sizes and not (tmp_path / "cache").exists()
    (folder / "z.png").write_bytes(png()[:-30])  # its header is whole
    with pytest.raises(ValueError, match=r"^data\.source: z\.png cannot be read"):
        encode_images_of(backbone, str(folder), tmp_path / "cache", "tiny", chunk=2)
    assert not list((tmp_path / "cache").glob("images-*"))
    (folder / "z.png").unlink()
    sizes.clear()
    again = tmp_path / "again"
    data = encode_images_of(
        backbone,
        str(folder),
        again,
        "tiny",
        2,
        lambda found: told.append(found.count),
        lambda path, size: told.append(size),
    )
    assert sizes == [2, 1] and len(data) == 3
    assert told == [
        3,
        *(p.stat().st_size for p in sorted(again.iterdir(), key=lambda p: p.name.startswith("images"))),
    ]


def test_a_cache_of_other_states_is_made_again(folder: Path, tmp_path: Path) -> None:
    backbone = tiny.stable_diffusion()
    first = encode_images_of(backbone, str(folder), tmp_path, "tiny").x0.clone()
    (path,) = tmp_path.glob("images-*")
    for tensors in ({"x": first}, {"x0": first[:2]}, {"x0": first[..., :4]}, {"x0": first.long()}):
        write_tensors(path, tensors)
        assert torch.equal(encode_images_of(backbone, str(folder), tmp_path, "tiny").x0, first)


def test_captions_that_are_all_empty_teach_nothing(folder: Path) -> None:
    for name in ("a_red_cat", "b", "more/c"):
        (folder / f"{name}.txt").write_text(" \n")
    (folder / "metadata.jsonl").unlink()
    with pytest.raises(
        ValueError,
        match=r"^data\.source: none of the 3 images in .*: 0 by name, 3 empty has a caption; write metadata",
    ):
        encode_images_of(tiny.stable_diffusion(), str(folder), None, "tiny")
    assert len(encode_images_of(tiny.pixels(()), str(folder), None, "x")) == 3  # which is told nothing


def test_latents_are_those_that_decode_back() -> None:
    """`encode_images` inverts `decode`'s scaling: on the bundled teacher an image comes back as itself."""
    from fewstep.backbones.load import load_teacher

    backbone = load_teacher("emoji")
    disc = (
        (torch.linspace(-1, 1, 64)[:, None].square() + torch.linspace(-1, 1, 64).square() > 0.5)
        .float()
        .expand(3, 64, 64)
    )
    back = backbone.decode(backbone.encode_images(disc[None]))
    assert (back[0] - disc).abs().mean() < 0.08


@pytest.mark.parametrize("case", ["missing", "empty", "not a tar", "bad listing", "no image"])
def test_mistakes_are_one_line(tmp_path: Path, case: str) -> None:
    source, expected = tmp_path / "set", "data.source: "
    if case != "missing":
        source.mkdir()
    if case == "not a tar":
        (source / "a.tar").write_bytes(b"hello")
    if case == "bad listing":
        (source / "metadata.jsonl").write_text("{}\n")
    if case == "no image":
        (source / "a.png").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        read_images(str(source))
    assert str(error.value).startswith(expected)
    with pytest.raises(ValueError, match="are no images; leave it out"):
        encode_images_of(tiny_points(), str(source), None, "x")


def tiny_points() -> Backbone:
    return Denoiser(torch.nn.Linear(2, 2), tiny.TABLE, (2,))
