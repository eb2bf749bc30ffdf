"""Captioned images from a folder or from webdataset shards.

The module decides which files belong together, and counts what a source holds.
"""

import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from ..reading import ReadError, reading
from .folders import files_in, hidden
from .image_files import KINDS, OTHERS, opened
from .texts import Found, decoded, json_lines, json_of, printable, read_text, require_regular, table, text_of

OPTION = "data.source"
# Files that hold the caption of an image of the same name; the first one counts.
BESIDE = (
    ".txt",
    ".caption",
    ".json",
)
LISTS = ("metadata.jsonl", "captions.jsonl", "metadata.csv")
UNREAD_LIST = "metadata.parquet"
TEXTS = ("text", "caption", "prompt")  # caption keys in a row of a list, or in an image's JSON
BY_NAME, EMPTY = "by name", "empty"
LARGEST_CAPTION = 2**24  # bytes
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True, slots=True)
class Captioned:
    """One image with a caption.

    The image is `size` bytes of `file`, starting at `start`.
    """

    name: str
    caption: str
    origin: str  # source of the caption
    file: Path
    start: int
    size: int

    def read(self) -> bytes:
        """Return the bytes of the image file.

        Raises ValueError if the bytes are no longer there.
        """
        try:
            with self.file.open("rb") as file:
                file.seek(self.start)
                data = file.read(self.size)
        except OSError as error:
            raise ValueError(
                f"{OPTION}: cannot read {printable(self.name)} ({error.strerror}); check the file"
            ) from error
        if len(data) != self.size:
            raise ValueError(
                f"{OPTION}: {printable(self.name)} has ended before its {self.size} bytes; "
                "leave the files alone while they are read"
            )
        return data


class Caption(NamedTuple):
    """A caption, and the kind of file that it is from."""

    text: str
    origin: str


def require_there(source: str) -> None:
    """Check that there is a source of images. Raises ValueError."""
    if not Path(source).exists():
        raise ValueError(
            f"{OPTION}: there is no {printable(source)}; pass a folder of images or of webdataset .tar files"
        )


def read_images(source: str) -> tuple[list[Captioned], Found]:
    """Read all captioned images of a source, in a fixed order.

    The source is a folder of images, or webdataset `.tar` shards (one file, or a folder of shards). Returns
    the images and what was found. Headers are read, pixels are not.

    Captions of a folder come from `metadata.jsonl`, `captions.jsonl` or `metadata.csv` with `file_name`
    (relative to the list) and `text`; otherwise from a `.txt`, `.caption` or `.json` next to the image;
    otherwise from the image's name. Captions in a shard are the files of the same key, which may lie anywhere
    in the shard.

    Raises ValueError with one line if there is no image, or if an image cannot be used.
    """
    require_there(source)
    path = Path(source)
    if not path.is_dir():
        require_regular(path, OPTION, "pass a folder of images or of webdataset .tar files")
    every = (
        {"": path}
        if path.is_file()
        else dict(files_in(path, (*KINDS, *OTHERS, *BESIDE, ".tar", ".jsonl", ".csv", ".parquet"), OPTION))
    )
    shards = [p for name, p in every.items() if not name or p.suffix.lower() == ".tar"]
    cases: Counter[str] = Counter()
    found = (
        [image for shard in shards for image in _shard(shard, cases)] if shards else list(_folder(path, every, cases))
    )
    if shards and (stray := [name for name in every if Path(name).suffix.lower() in KINDS]):
        raise ValueError(
            f"{OPTION}: {printable(source)} has .tar files and images, e.g. {printable(stray[0])}; "
            "pass a folder of one of the two"
        )
    if not found:
        other = f" (it has {', '.join(f'{n} {kind}' for kind, n in cases.items())})" if cases else ""
        raise ValueError(
            f"{OPTION}: {printable(source)} has no images{other}; "
            f"allowed are {', '.join(KINDS)}, or .tar files that hold them"
        )
    for image in found:
        require_image(image)
    return found, _found(source, found, cases)


def _found(source: str, images: Sequence[Captioned], cases: Mapping[str, int]) -> Found:
    """Count captions by source, empty captions, and files left out."""
    kept = Counter(p.origin for p in images if p.caption)
    captions = {f"captions of {kind}": n for kind, n in sorted(kept.items()) if kind and kind != BY_NAME}
    return Found(
        source,
        len(images),
        "images",
        {**captions, BY_NAME: kept[BY_NAME], EMPTY: sum(not p.caption for p in images), **cases},
    )


def require_image(image: Captioned) -> None:
    """Check the header of an image file.

    Raises ValueError for a header of no readable image.
    """
    whole = image.start == 0 and image.size == image.file.stat().st_size
    with image.file.open("rb") as file, opened(file if whole else image.read(), image.name, OPTION):
        return


def _folder(root: Path, every: Mapping[str, Path], cases: Counter[str]) -> Iterator[Captioned]:
    listed = _listed(
        {name: path for name, path in every.items() if name.rpartition("/")[2].lower() in (*LISTS, UNREAD_LIST)}
    )
    beside = {
        _same(name[: -len(path.suffix)]) + path.suffix.lower(): path
        for name, path in every.items()
        if path.suffix.lower() in BESIDE
    }
    images = [(name, path) for name, path in every.items() if path.suffix.lower() in KINDS]
    cases.update(_left_out(every))
    if nowhere := len(listed.keys() - {_same(name) for name, _ in images}):
        if nowhere == len(listed) and images:
            raise ValueError(
                f"{OPTION}: no file_name of the lists in {printable(root)} is that of an image, e.g. "
                f"{printable(next(iter(listed)))}; write them as seen from where the list lies"
            )
        cases["rows of lists without an image"] = nowhere
    for name, path in images:
        stem = name[: -len(path.suffix)]
        files = [(s, beside[key]) for s in BESIDE for key in (_same(stem) + s, _same(name) + s) if key in beside]
        caption = listed.get(_same(name)) or _first(
            (kind, _small(file), f"{OPTION}: {printable(file)}") for kind, file in files
        )
        if caption is None:
            bare = stem.rpartition("/")[2].replace("_", " ")
            caption = Caption(text_of(bare, f"{OPTION}: the name of {printable(path)}"), BY_NAME)
        yield Captioned(name, caption.text, caption.origin, path, 0, path.stat().st_size)


def _left_out(names: Sequence[str] | Mapping[str, object]) -> Counter[str]:
    """Count image files of kinds that are not read."""
    suffixes = (Path(name).suffix.lower() for name in names)
    return Counter(f"{s} left out" for s in suffixes if s in OTHERS)


def _same(name: str) -> str:
    """Normalise a file name to one spelling.

    macOS decomposes accents, and Windows uses backslashes.
    """
    return normalize("NFC", name.replace("\\", "/").removeprefix("./"))


def _small(path: Path) -> str:
    require_small(path.stat().st_size, f"{OPTION}: {printable(path)}")
    return read_text(path, OPTION, "check the file")


def require_small(size: int, where: str) -> None:
    """Check the size of a caption file.

    Raises ReadError for a file that is too large to be a caption.
    """
    if size > LARGEST_CAPTION:
        raise ReadError(f"{where} is no caption, it has {size:,} bytes; remove it, or name it otherwise than the image")


def _first(texts: Iterable[tuple[str, str, str]]) -> Caption | None:
    """Return the first caption of (suffix, text, where).

    A `.txt` is a caption as a whole; a `.json` has a caption only if a caption field exists.
    """
    for kind, text, where in texts:
        if kind != ".json":
            return Caption(text_of(text, where), kind)
        value = json_of(text, where)
        if isinstance(value, dict) and any(k in value for k in TEXTS):
            return Caption(text_of(next((value[k] for k in TEXTS if value.get(k) is not None), None), where), kind)
    return None


def _listed(lists: Mapping[str, Path]) -> dict[str, Caption]:
    """Return the captions of all lists by file name.

    Raises ValueError for a row without `file_name`, and for a list without texts.
    """
    captions: dict[str, Caption] = {}
    for name, path in lists.items():
        folder, _, own = name.rpartition("/")
        if own.lower() == UNREAD_LIST:
            raise ValueError(
                f"{OPTION}: {printable(path)} is not read; write its file_name and text as metadata.jsonl or "
                "metadata.csv, and remove it"
            )
        where, told = f"{OPTION}: {printable(path)}", False
        text = read_text(path, OPTION, "check the file")
        rows: list[tuple[str, object]] = (
            list(table(text, ",", where)[1]) if own.lower().endswith(".csv") else list(json_lines(text, where))
        )
        for here, row in rows:
            if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
                raise ValueError(f'{here} is not {{"file_name": ..., "text": ...}}; correct it')
            told = told or any(k in row for k in TEXTS)
            caption = text_of(next((row[k] for k in TEXTS if row.get(k) is not None), None), here)
            key = _same(f"{folder}/{row['file_name']}" if folder else row["file_name"])
            if captions.setdefault(key, Caption(caption, own)).text != caption:
                raise ValueError(f"{here} gives {printable(key)} a second caption; keep one for each image")
        if rows and not told:
            has = ", ".join(printable(k) for k in rows[0][1]) if isinstance(rows[0][1], dict) else "none"
            raise ValueError(f"{where} has no column {', '.join(TEXTS)}; it has {has}; name the captions' column text")
    return captions


def _shard(path: Path, cases: Counter[str]) -> Iterator[Captioned]:
    """Yield the images of a webdataset shard in the shard's order.

    Files of one key may lie anywhere in the shard.
    """
    with require_regular(path, OPTION, "pass a .tar file").open("rb") as file:
        start = file.read(6)
    if packed := next((kind for magic, kind in PACKED.items() if start.startswith(magic)), None):
        raise ValueError(
            f"{OPTION}: {printable(path)} is packed with {packed}; unpack it to a folder or a plain .tar first"
        )
    with (
        reading(f"{OPTION}: {printable(path)}", "pack it again", "is no tar file, or damaged"),
        tarfile.open(path, "r:") as tar,
    ):
        members = _members(tar, path)
        images = {name: m for name, m in members.items() if Path(name).suffix.lower() in KINDS}
        cases.update(_left_out(members))
        texts = {
            name: _text(tar, m, _where(path, name))
            for name, m in members.items()
            if Path(name).suffix.lower() in BESIDE
        }
        _require_end(tar, path)
    for name, caption in _by_key(images, texts, path).items():
        member = images[name]
        yield Captioned(f"{path.name}:{name}", caption.text, caption.origin, path, member.offset_data, member.size)


def _members(tar: tarfile.TarFile, path: Path) -> dict[str, tarfile.TarInfo]:
    """Return the files of a shard by name, with links resolved.

    Raises ReadError for an image or caption that is no file of the archive.
    """
    known: dict[str, tarfile.TarInfo] = {}
    files: dict[str, tarfile.TarInfo] = {}
    every = [m for m in tar if not any(hidden(part) and part not in (".", "..") for part in m.name.split("/"))]
    known.update((m.name, m) for m in every if m.isreg())
    for m in every:
        suffix = Path(m.name).suffix.lower()
        if suffix not in (*KINDS, *OTHERS, *BESIDE) or m.isdir():
            continue
        target = m
        if m.islnk() or m.issym():
            beside = m.name.rpartition("/")[0]
            target = (
                known.get(m.linkname, m)
                if m.islnk()
                else known.get(f"{beside}/{m.linkname}" if beside else m.linkname, m)
            )
        if not target.isreg() or target.issparse():
            raise ReadError(
                f"{OPTION}: {printable(path)}: {printable(m.name)} is no file of this archive (a link that leads "
                "out, a device, or with holes); pack it again"
            )
        files[m.name] = target
    return files


def _require_end(tar: tarfile.TarFile, path: Path) -> None:
    """Check that an archive ends as tar archives do.

    Raises TarError otherwise: Python's reader takes a damaged header for the end, and drops the rest.
    """
    with path.open("rb") as file:
        file.seek(tar.offset)
        count = 0
        while part := file.read(1 << 20):
            count += len(part)
            if part.count(0) != len(part):
                raise tarfile.ReadError(
                    f"what stands at byte {tar.offset} is no header and no end; are two archives one after the other?"
                )
    if count < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("it has been cut off")


def _where(path: Path, name: str) -> str:
    return f"{OPTION}: {printable(path.name)}:{printable(name)}"


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> str:
    require_small(member.size, where)
    file = tar.extractfile(member)
    assert file is not None  # a regular file
    return decoded(file.read(), where)


def _by_key(images: Mapping[str, object], texts: Mapping[str, str], path: Path) -> dict[str, Caption]:
    """Return the caption of every image.

    A caption has the image's own name, or the image's key, which ends at the first dot. Raises ValueError if
    a key has several images of other names, because the caption could belong to any of these images.
    """
    own = {_stem(name) + Path(name).suffix.lower(): name for name in texts}
    keyed = {(_key(name), Path(name).suffix.lower()): name for name in [*texts][::-1]}
    stems = defaultdict(set)
    for name in images:
        stems[_key(name)].add(_stem(name))
    result = {}
    for name in images:
        files = [(s, own[_stem(name) + s]) for s in BESIDE if _stem(name) + s in own]
        if not files:
            if len(several := stems[_key(name)]) > 1:
                raise ValueError(
                    f"{OPTION}: {printable(path)} has several images of one key, "
                    f"{' and '.join(map(printable, sorted(several)[:2]))}; keep one of each"
                )
            files = [(s, keyed[_key(name), s]) for s in BESIDE if (_key(name), s) in keyed]
        result[name] = _first((kind, texts[of], _where(path, of)) for kind, of in files) or Caption("", "")
    return result


def _stem(name: str) -> str:
    return name[: -len(Path(name).suffix)]


def _key(name: str) -> str:
    folder, _, own = name.rpartition("/")
    return f"{folder}/{own.partition('.')[0]}"
