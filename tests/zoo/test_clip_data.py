"""Animated emoji: which are taken, under which name, and what is drawn from them."""

import io
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewstep.zoo.clip_data import Clips, draw_clips, load_clips
from fewstep.zoo.emoji_data import Emoji

from ..archives import pack


def webp(frames: int) -> bytes:
    """A square that grows darker by ten a frame, see-through around it."""
    images = []
    for i in range(frames):
        images.append(Image.new("RGBA", (32, 32), (0, 0, 0, 0)))
        images[-1].paste((200 - 10 * i, 100, 0, 255), (8, 8, 24, 24))
    file = io.BytesIO()
    images[0].save(file, "WEBP", save_all=True, append_images=images[1:], lossless=True, duration=40)
    return file.getvalue()


def test_what_moves_and_has_a_name_is_taken(tmp_path: Path) -> None:
    about = {"has_img_google": True, "category": "People & Body", "subcategory": "person-sport"}
    tones = {"1F3FF": {"image": "1f3c3-1f3ff.png", "has_img_google": True}}
    entries = [
        {**about, "name": "RUNNER", "image": "1f3c3.png", "skin_variations": tones},
        {**about, "name": "STILL", "image": "1f3c4.png"},
        {**about, "name": "NOT THERE", "image": "1f3c5.png"},
    ]
    names = pack(tmp_path / "names.tgz", {"package/emoji.json": json.dumps(entries).encode()})
    assets = {"1f3c3": webp(12), "1f3c3-1f3ff": webp(9), "1f3c4": webp(1), "ffff": webp(5)}
    archive = pack(tmp_path / "clips.tgz", {f"package/assets/{k}.webp": v for k, v in assets.items()})
    clips = load_clips(names, archive, 16, tmp_path / "cache" / "clips.safetensors")
    assert [(e.caption, len(x)) for e, x in zip(clips.emoji, clips.frames, strict=True)] == [
        ("runner", 12),
        ("runner, dark skin tone", 9),
    ]
    assert clips.frames[0].shape == (12, 3, 16, 16)
    assert (clips.frames[0][:, :, 0, 0] == 255).all()  # see-through is white
    assert clips.frames[0][:, 0, 8, 8].tolist() == [200 - 10 * i for i in range(12)]
    archive.unlink()  # decoded once
    again = load_clips(names, archive, 16, tmp_path / "cache" / "clips.safetensors")
    assert again.emoji == clips.emoji
    assert all(torch.equal(a, b) for a, b in zip(again.frames, clips.frames, strict=True))


def counting(frames: int, mirrors: bool = True) -> Clips:
    """A clip whose left half says which frame it is."""
    x = torch.full((frames, 3, 8, 8), 255, dtype=torch.uint8)
    x[:, :, :, :4] = torch.arange(frames, dtype=torch.uint8)[:, None, None, None]
    return Clips([Emoji("count", "count", "", "0.png", False, mirrors)], [x])


def test_frames_are_evenly_spaced_in_order_from_many_beginnings() -> None:
    found = draw_clips(counting(72, mirrors=False), [0] * 50, 9, 1.0, torch.Generator().manual_seed(0))
    assert found.shape == (50, 9, 3, 8, 8)
    shown = found[:, :, 0, 0, 0].long()
    assert set(shown.diff(dim=1).unique().tolist()) == {3}
    assert shown.min() < 4
    assert 67 <= shown.max() <= 71
    assert len(shown[:, 0].unique()) > 8
    again = draw_clips(counting(72, mirrors=False), [0] * 50, 9, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(found, again)


@pytest.mark.parametrize("frames", [2, 9, 12])
def test_a_short_clip_stands_still_at_its_end(frames: int) -> None:
    shown = draw_clips(counting(frames, mirrors=False), [0] * 8, 9, 1.0, torch.Generator().manual_seed(0))[
        :, :, 0, 0, 0
    ].long()
    assert (shown.diff(dim=1) >= 0).all()
    assert shown.max() <= frames - 1


def test_the_place_is_the_same_in_all_frames() -> None:
    """A still stays one; its place and side differ from clip to clip."""
    still = counting(1)
    still = Clips(still.emoji, [still.frames[0].expand(20, 3, 8, 8)])
    found = draw_clips(still, [0] * 40, 9, 0.7, torch.Generator().manual_seed(0))
    assert torch.equal(found, found[:, :1].expand_as(found))
    sides = (found[:, 0, 0, :, :4].float().mean((1, 2)) < found[:, 0, 0, :, 4:].float().mean((1, 2))).sum()
    assert 8 < sides < 32
    assert len({bytes(x[0].numpy()) for x in found}) > 30
