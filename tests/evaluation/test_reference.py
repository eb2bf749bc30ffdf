"""The shipped reference is whole, and one built here is read back."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fewstep.evaluation.alignment import colour_histogram, name_ranks, nearest_colours
from fewstep.evaluation.features import feature_network, features
from fewstep.evaluation.protocols import REFERENCE
from fewstep.evaluation.reference import FOLDER, TEXTS, _labels, build_reference, caption, load_reference, without_tone

from .conftest import World


def test_the_shipped_reference() -> None:
    shipped = load_reference()
    assert shipped.sha256 == REFERENCE
    assert shipped.gallery.shape == (4 * 1911, 256)  # as they are, and three times placed
    assert len(shipped.names) == len(shipped.labels) == 4 * 1911
    assert len(set(shipped.names)) == 1910
    assert shipped.colours.shape == (321, 6, 125)
    assert len(shipped.held_out) == 95
    assert shipped.tones[0] == ""
    assert torch.cov(shipped.gallery.T).trace().item() == pytest.approx(100, rel=1e-3)
    torch.testing.assert_close(shipped.colours.sum(2), torch.ones(321, 6), rtol=0, atol=0.02)


def test_the_shipped_reference_tells_its_emoji_apart() -> None:
    shipped = load_reference()
    white = shipped.halfway_white(shipped.gallery)
    assert name_ranks(white, white, shipped.labels, shipped.label_of(shipped.names)).max() == 0
    tones = torch.arange(6).expand(321, 6)
    candidates = shipped.colours[:, None].expand(-1, 6, -1, -1)
    assert (nearest_colours(shipped.colours.flatten(0, 1), candidates.flatten(0, 1)) == tones.flatten()).all()


def test_same_images_share_a_label() -> None:
    shipped = load_reference()
    france, clipperton, norway, tuxedo = shipped.label_of(
        ["france flag", "clipperton island flag", "norway flag", "man in tuxedo"]
    ).tolist()
    assert france == clipperton != norway
    assert [n for n, label in zip(shipped.names, shipped.labels.tolist(), strict=True) if label == tuxedo] == [
        "man in tuxedo"
    ] * 8
    assert _labels(["a", "b", "a", "c", "d"], [b"1", b"2", b"3", b"3", b"4"]) == [0, 1, 0, 0, 2]
    assert _labels(["a", "b", "c", "b"], [b"1", b"2", b"1", b"1"]) == [0, 0, 0, 0]


def test_held_out_captions_are_of_known_names_and_tones() -> None:
    shipped = load_reference()
    for held in shipped.held_out:
        name, tone = without_tone(held)
        assert name in shipped.toned
        assert tone in shipped.tones[1:]
        assert caption(name, tone) == held


def test_round_trip(world: World) -> None:
    reference = load_reference(world.folder)
    plain = [i for i, b in enumerate(world.blobs) if not b.tone]
    images = world.images.float() / 255
    assert reference.names == tuple(world.blobs[i].name for i in plain)
    embedded = reference.embed(features(feature_network(), images[plain]))
    torch.testing.assert_close(embedded, reference.gallery, rtol=0, atol=0.02)  # kept as float16
    assert reference.gallery.mean(0).abs().max() < 0.02
    torch.testing.assert_close(reference.halfway_white(reference.gallery).std(0), reference.gallery.std(0).sqrt())
    assert reference.tones == ("", "dark skin tone", "light skin tone", "medium skin tone")
    dark = next(i for i, b in enumerate(world.blobs) if b.tone == "dark skin tone" and b.name == reference.toned[2])
    torch.testing.assert_close(reference.colours[2, 1], colour_histogram(images[dark : dark + 1])[0], rtol=0, atol=1e-3)
    assert reference.held_out == tuple(b.caption for b in world.blobs if b.held_out)


def test_building_again_gives_the_same_hash(world: World, tmp_path: Path) -> None:
    again = build_reference(world.blobs, world.images, tmp_path, components=16)
    assert load_reference(again).sha256 == world.protocol.reference
    assert sorted(f.name for f in tmp_path.iterdir()) == ["reference.json", "reference.safetensors"]


@pytest.mark.parametrize("damage", ["missing", "cut", "network", "key"])
def test_damage_is_one_line(world: World, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "reference"
    if damage != "missing":
        shutil.copytree(world.folder, folder)
    if damage == "cut":
        file = folder / "reference.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    if damage in ("network", "key"):
        texts = json.loads((folder / TEXTS).read_text())
        (folder / TEXTS).write_text(
            json.dumps({**texts, "network_sha256": "0"} if damage == "network" else {"format": 1})
        )
    with pytest.raises(ValueError, match="install fewstep again, or call build_reference") as error:
        load_reference(folder)
    assert "\n" not in str(error.value)


def test_licences_and_sources_are_beside_the_files() -> None:
    for folder in (FOLDER, FOLDER.parent / "features"):
        assert "Apache-2.0" in (folder / "README.md").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in (FOLDER.parent / "features" / "LICENSE").read_text(encoding="utf-8")
