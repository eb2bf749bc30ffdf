"""Captions of folders and shards are read as other programs pack them.

None is lost without a word, and nothing outside is read.
"""

import io
import os
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.data.captioned import read_images

from .common import captions, png

PNG = png()
Entry = tuple[str, bytes | str] | tarfile.TarInfo


def shard(path: Path, *entries: Entry) -> Path:
    """An uncompressed archive of these, in this order."""
    with tarfile.open(path, "w") as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
                continue
            name, data = entry[0], entry[1].encode() if isinstance(entry[1], str) else entry[1]
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def special(name: str, kind: bytes, to: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def folder(root: Path, files: Mapping[str, bytes | str]) -> Path:
    """Files by name; returns `root`."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return root


def line_of(source: Path) -> str:
    return read_images(str(source))[1].line


def test_members_of_a_shard_need_not_lie_beside_each_other(tmp_path: Path) -> None:
    """A shard's images find their captions wherever these lie in it.

    The shard is sorted by kind. It has macOS's shadows, captions of every kind, names with dots, suffixes in
    capitals, and links within.
    """
    path = shard(
        tmp_path / "a.tar",
        ("._1.png", "shadow"), ("1.png", PNG), ("x/2.JPG", PNG), ("3 v1.5.png", PNG), ("4.webp.png", PNG),
        ("5.png", PNG), ("6.png", PNG), special("7.png", tarfile.LNKTYPE, "1.png"), ("8.png", PNG), ("9.png", PNG),
        ("._1.txt", b"\0\5\x16"), ("__MACOSX/1.png", "shadow"), ("1.txt", "\ufeffone\n"), ("x/2.TXT", "two"),
        ("3 v1.5.txt", "three"), ("4.txt", "four"), ("5.caption", "five"),
        ("6.json", '{"caption": null, "key": "6"}'), ("7.txt", "seven"), ("8.json", '["a list"]'),
        ("9.json", '{"text": "nine"}'),
    )  # fmt: skip
    found = {name.removeprefix("a.tar:"): text for name, text in captions(path).items()}
    assert found == {
        "1.png": "one", "x/2.JPG": "two", "3 v1.5.png": "three", "4.webp.png": "four", "5.png": "five", "6.png": "",
        "7.png": "seven", "8.png": "", "9.png": "nine"
    }  # fmt: skip
    assert all(p.read() == PNG for p in read_images(str(path))[0])
    assert (
        line_of(path)
        == f"9 images in {path}: 1 captions of .caption, 1 captions of .json, 5 captions of .txt, 0 by name, 2 empty"
    )


def test_captions_of_a_folder_by_where_they_are_from(tmp_path: Path) -> None:
    """A folder's captions come from lists, from files beside, or from names.

    The lists have byte order marks, other slashes and accents that are taken apart. Shadows are left out.
    """
    root = folder(
        tmp_path / "set",
        {
            "metadata.csv": '\ufefffile_name,text\r\na.png,"red, wet"\r\n./b.png,\r\nx\\c.png,three\r\ngone.png,x\r\n',
            "a.png": PNG, "a.txt": "not this", "b.png": PNG, "x/c.png": PNG,
            "y/metadata.jsonl": '\ufeff{"file_name": "\u00e9.png", "text": "four"}\n', "y/e\u0301.png": PNG,
            "d.PNG": PNG, "d.TXT": "five", "e.png": PNG, "e.png.txt": "six", "f.png": PNG, "f.caption": "seven",
            "g_h.png": PNG, "g_h.json": '{"shapes": []}', "i.heic": "x", ".cache/a.png": PNG, "._a.png": "shadow",
            "__MACOSX/a.png": "shadow",
        },
    )  # fmt: skip
    assert {Path(n).name: text for n, text in captions(root).items()} == {
        "a.png": "red, wet", "b.png": "", "c.png": "three", "e\u0301.png": "four", "d.PNG": "five", "e.png": "six",
        "f.png": "seven", "g_h.png": "g h"
    }  # fmt: skip
    kept = "1 captions of .caption, 2 captions of .txt, 2 captions of metadata.csv, 1 captions of metadata.jsonl"
    assert (
        line_of(root)
        == f"8 images in {root}: {kept}, 1 by name, 1 empty, 1 .heic left out, 1 rows of lists without an image"
    )


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"metadata.jsonl": '{"file_name": "a.png", "text": ["b", "c"]}\n'},
            r"metadata\.jsonl, line 1 has a list where a text belongs",
        ),
        ({"metadata.jsonl": '{"file_name": "a.png", "text": 7}\n'}, r"line 1 has 7 where a text belongs"),
        ({"metadata.jsonl": '[{"file_name": "a.png"}]\n'}, r'line 1 is not {"file_name"'),
        (
            {"metadata.jsonl": '{"file_name": "a.png", "alt": "b"}\n'},
            "has no column text, caption, prompt; it has file_name, alt",
        ),
        (
            {"metadata.jsonl": '{"file_name": "x/a.png", "text": "b"}\n'},
            r"no file_name of the lists .* e\.g\. x/a\.png",
        ),
        (
            {"metadata.jsonl": '{"file_name": "a.png", "text": "b"}\n{"file_name": "a.png", "text": "c"}\n'},
            "line 2 gives a.png a second",
        ),
        ({"metadata.csv": 'file_name,text\na.png,"b\nc\n'}, r"metadata\.csv, line 2: unexpected end of data"),
        ({"metadata.parquet": "x"}, r"metadata\.parquet is not read"),
        ({"a.txt": b"\xff\xfea"}, r"a\.txt is not UTF-16 text"),
        ({"a.txt": "x" * 30_000}, r"a\.txt has a text of 30,000 characters"),
        ({"a.json": '{"caption": ["b"]}'}, r"a\.json has a list where"),
        ({"a.json": "{"}, r"a\.json is not JSON"),
        ({"b.tar": ""}, r"b\.tar is no tar file"),
        ({"b\x1b[31m\n.png": "x"}, r"b\\x1b\[31m\\n\.png is no image"),
    ],
)
def test_a_folder_that_cannot_be_read_as_it_was_meant(tmp_path: Path, files: dict[str, str | bytes], said: str) -> None:
    with pytest.raises(ValueError, match=rf"^data\.source: [^\n\x1b]*{said}[^\n\x1b]*$"):
        read_images(str(folder(tmp_path / "set", {"a.png": PNG, **files})))


def test_images_of_kinds_that_are_not_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no images \(it has 1 \.heic left out\); allowed are \.png"):
        read_images(str(folder(tmp_path / "set", {"a.heic": "x"})))


@pytest.mark.parametrize("kind", ["image", "caption", "folder"])
def test_links_that_lead_out_are_not_followed(tmp_path: Path, kind: str) -> None:
    """Those within the folder are, and those of the hub's cache, whose files are all links to its blobs."""
    outside, root = (
        folder(tmp_path / "outside", {"a.png": PNG, "a.txt": "secret"}),
        folder(tmp_path / "set", {"b.png": PNG}),
    )
    (root / "c.png").symlink_to("b.png")
    (root / "round").symlink_to(".")
    assert set(captions(root)) == {"b.png", "c.png"}
    name, to = {"image": ("a.png", "a.png"), "caption": ("b.txt", "a.txt"), "folder": ("more", "")}[kind]
    (root / name).symlink_to(outside / to)
    with pytest.raises(ValueError, match=rf"^data\.source: [^\n]*{name} is a link that leads out of the folder, to "):
        read_images(str(root))
    hub = (
        folder(tmp_path / "hub", {"blobs/1": PNG, "blobs/2": "a caption", "snapshots/rev/readme": ""})
        / "snapshots"
        / "rev"
    )
    (hub / "a.png").symlink_to("../../blobs/1")
    (hub / "a.txt").symlink_to("../../blobs/2")
    assert captions(hub) == {"a.png": "a caption"}


@pytest.mark.parametrize("name", ["b.png", "a.txt", "metadata.jsonl"])
def test_pipes_do_not_hang_it(tmp_path: Path, name: str) -> None:
    root = folder(tmp_path / "set", {"a.png": PNG})
    os.mkfifo(root / name)
    with pytest.raises(ValueError, match=rf"{name} is a pipe or a device, not a file; remove it"):
        read_images(str(root))


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([special("2.png", tarfile.SYMTYPE, "/etc/passwd")], r"2\.png is no file of this archive"),
        ([special("2.png", tarfile.LNKTYPE, "3.png")], r"2\.png is no file of this archive"),
        ([special("2.png", tarfile.CHRTYPE)], r"2\.png is no file of this archive"),
        ([special("1.txt", tarfile.FIFOTYPE)], r"1\.txt is no file of this archive"),
        ([("1.img.png", PNG), ("1.seg.png", PNG)], r"several images of one key, .* and .*; keep one"),
        ([("1.json", '{"text": 3}')], r"a\.tar:1\.json has 3 where a text belongs"),
        ([("2.png", "x")], r"a\.tar:2\.png is no image of PNG"),
    ],
)
def test_members_that_are_not_what_they_should_be(tmp_path: Path, entries: list[Entry], said: str) -> None:
    with pytest.raises(ValueError, match=rf"^data\.source: [^\n]*{said}[^\n]*$"):
        read_images(str(shard(tmp_path / "a.tar", ("1.png", PNG), *entries)))


def test_a_damaged_shard_is_not_its_beginning(tmp_path: Path) -> None:
    """Python's reader takes a header that is none for the end of the archive."""
    path = shard(tmp_path / "a.tar", ("1.png", PNG), ("1.txt", "one"), ("2.png", PNG))
    whole = path.read_bytes()
    second = 512 + 512 * -(-len(PNG) // 512)
    header = whole[:second] + b"x" * 512 + whole[second + 512 :]
    for data in (header, whole + whole, whole[: second + 100], whole[: second + 1024]):
        path.write_bytes(data)
        with pytest.raises(
            ValueError, match=r"^data\.source: .*a\.tar is no tar file, or damaged \([^\n]+\); pack it again$"
        ):
            read_images(str(path))


ORDERED = [(f"{i}.{kind}", f"caption {i}" if kind == "txt" else PNG) for i in range(4) for kind in ("png", "txt")]


@given(st.permutations(ORDERED))
def test_any_order_gives_the_same_captions(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[str, bytes | str]]
) -> None:
    path = shard(tmp_path_factory.mktemp("any") / "a.tar", *entries)
    assert captions(path) == {f"a.tar:{i}.png": f"caption {i}" for i in range(4)}
