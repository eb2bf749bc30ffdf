"""Prompts: read, encoded once, cached on disk, drawn evenly.

Prompts come from a text file, JSONL, CSV or a hub data set.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..atomic import SHA256, read_hashed, write_rows
from ..backbones.base import Backbone, Cond, rows
from ..backbones.modules import dtype_of
from ..transfer import all_sent
from .texts import COLUMNS, Found, json_lines, lines, printable, read_text, table, text_of

DELIMITERS = {".csv": ",", ".tsv": "\t"}
KINDS = (".txt", ".jsonl", *DELIMITERS)
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
ALLOWED = "pass a .txt, .jsonl, .csv or .tsv file, or a hub data set id"


def read_prompts(source: str, column: str | None = None) -> list[str]:
    """Return the prompts that `find_prompts` finds."""
    return find_prompts(source, column)[0]


def find_prompts(source: str, column: str | None = None) -> tuple[list[str], Found]:
    """Read the prompts of `source`, and count what was found.

    Prompts are stripped and in order, without empty prompts and repetitions. `.txt`: one prompt per line;
    `.jsonl`: objects, texts or lists of texts; `.csv`/`.tsv`: a header row; otherwise a hub data set id
    (needs the package `datasets`).

    Raises ValueError if the file is missing, the column is missing, a prompt is no text, or no prompt is
    left.
    """
    path = Path(source)
    kind, where = path.suffix.lower(), f"prompts: {printable(path)}"
    if not path.exists() and kind not in KINDS and HUB_ID.fullmatch(source):
        values: Iterable[tuple[str, object]] = _hub(source, column)
    elif kind not in KINDS:
        raise ValueError(
            f"prompts: got {printable(source)!r}, allowed are a .txt, .jsonl, .csv or .tsv file, or a hub data set "
            "id such as owner/name"
        )
    elif kind == ".txt":
        values = ((f"{where}, line {n}", line) for n, line in lines(read_text(path, "prompts", ALLOWED), where))
    elif kind == ".jsonl":
        values = _objects(json_lines(read_text(path, "prompts", ALLOWED), where), column)
    else:
        values = _rows(*table(read_text(path, "prompts", ALLOWED), DELIMITERS[kind], where), column, where)
    found = [text_of(one, here) for here, value in values for one in (value if isinstance(value, list) else [value])]
    prompts = list(dict.fromkeys(p for p in found if p))
    if not prompts:
        raise ValueError(f"prompts: {printable(source)} has no prompt in it; write one a line")
    empty = 0 if kind == ".txt" else found.count("")  # blank lines of a text file do not count as lost prompts
    return prompts, Found(
        source, len(prompts), "prompts", {"empty": empty, "repeated": len(found) - found.count("") - len(prompts)}
    )


def _objects(records: Iterable[tuple[str, object]], column: str | None) -> Iterable[tuple[str, object]]:
    for here, value in records:
        yield here, value[_column(value, column, here)] if isinstance(value, dict) else value


def _rows(
    names: Sequence[str], records: Sequence[tuple[str, Mapping[str, str]]], column: str | None, where: str
) -> Iterable[tuple[str, object]]:
    if records:
        name = _column(names, column, where)
        yield from ((here, row.get(name)) for here, row in records)


def _column(names: Iterable[str], column: str | None, where: str) -> str:
    """Return the name of the column with the prompts.

    Without a given `column`, capitals do not matter. Raises ValueError that lists the existing columns.
    """
    known = {n.lower(): n for n in names} if column is None else {n: n for n in names}
    name = next((c for c in (COLUMNS if column is None else (column,)) if c in known), None)
    if name is None:
        wanted, there = column or " or ".join(COLUMNS), ", ".join(printable(n) for n in known.values())
        raise ValueError(f"{where} has no column {printable(wanted)}; it has {there}; pass --set prompts.column=NAME")
    return known[name]


def _hub(source: str, column: str | None) -> Iterable[tuple[str, object]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError("prompts: a hub data set needs the package `datasets`; run: pip install datasets") from error
    where = f"prompts: data set {source}"
    try:
        data = load_dataset(source, split="train")
    except Exception as error:  # the package raises many types of errors
        reason = printable(str(error).strip().partition("\n")[0] or type(error).__name__)
        raise ValueError(
            f"{where} cannot be loaded ({reason}); check its name, that it has a split `train`, and the network"
        ) from error
    name = _column(data.column_names, column, where)
    # Select the column first: other columns may be images.
    yield from ((f"{where}, row {i}", value) for i, value in enumerate(data.select_columns([name])[name]))


CHUNK = 64  # prompts that are encoded at once
Kept = Callable[[Path, int], None]  # called with the file that is going to be written, and the size in bytes


def ignore(*_: object) -> None:
    """Ignore all arguments."""


class Embeddings:
    """Conditions of a list of prompts and of the empty prompt.

    Prompts are encoded once. The conditions are on the CPU, or in a file from which only the drawn conditions
    are read.
    """

    def __init__(
        self, cond: Cond, null: Cond, prompts: Sequence[str], encoded: int, key: str, identity: str = ""
    ) -> None:
        self.cond, self.null, self.prompts, self.count = cond, null, list(prompts), len(prompts)
        self.identity = identity  # of the network and the encoder
        self.key = key  # a hash of the encoder's identity and the prompts
        self.encoded = encoded  # prompts that were encoded this time; 0 if the cache was used

    def draw(self, batch: int, rng: torch.Generator, device: torch.device) -> Cond:
        """Draw the conditions of `batch` random prompts."""
        drawn = torch.randint(self.count, (batch,), generator=rng, device=rng.device).cpu()
        return all_sent(rows(self.cond, drawn), device)

    def take(self, of: Tensor, key: str) -> "Embeddings":
        """Return the conditions of the prompts with indices `of [N]`.

        The order is that of `of`; an index may repeat.
        """
        return Embeddings(rows(self.cond, of), self.null, [self.prompts[i] for i in of.tolist()], 0, key, self.identity)

    def all(self, device: torch.device) -> Cond:
        """Return the conditions of all prompts, in order."""
        return {k: v.to(device) for k, v in self.cond.items()}

    def unconditional(self, device: torch.device) -> Cond:
        """Return the condition of the empty prompt, [1, ...]."""
        return {k: v.to(device) for k, v in self.null.items()}


def embed(
    backbone: Backbone,
    prompts: Sequence[str],
    cache: Path | None,
    identity: str,
    chunk: int = CHUNK,
    keep: Kept = ignore,
) -> Embeddings:
    """Encode prompts once, or read the conditions from the cache.

    `cache` is a folder; with a cache, only one chunk is in memory. `identity` names the encoder: a change of
    the identity invalidates the cache, as a change of size or dtype does. `keep` is called with the file
    before the file is written. Raises OSError if there is no room for the file.
    """
    dtype = str(dtype_of(backbone.module))
    about = [identity, backbone.shape, dtype, list(prompts)]  # SDXL is conditioned on the image size
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
    path = None if cache is None else cache / f"{key}.safetensors"
    if path is not None and path.exists():
        if (kept := _kept(path, prompts, key, identity)) is not None:
            return kept
        # A damaged or different cache is rebuilt: everything in a cache can be made again.
        path.unlink()
    parts = (
        {f"cond.{k}": v.cpu() for k, v in backbone.encode(list(prompts[i : i + chunk])).items()}
        for i in range(0, len(prompts), chunk)
    )
    null = {f"null.{k}": v.cpu().contiguous() for k, v in backbone.encode([""]).items()}
    if path is not None and null:
        write_rows(path, len(prompts), parts, null, keep)  # every process of a run may write the file
        return _embeddings(read_hashed(path)[0], prompts, len(prompts), key, identity)
    encoded = list(parts)
    tensors = null | {k: torch.cat([p[k] for p in encoded]).contiguous() for k in encoded[0]}
    return _embeddings(tensors, prompts, len(prompts), key, identity)


def _kept(path: Path, prompts: Sequence[str], key: str, identity: str) -> Embeddings | None:
    """Return a cache file's content if the content fits these prompts."""
    try:
        tensors, about = read_hashed(path)
    except SafetensorError:
        return None
    if SHA256 not in about:  # the file cannot be verified
        return None
    found = _embeddings(tensors, prompts, 0, key, identity)
    of_cond, of_null = ({k: (v.dtype, v.shape[1:]) for k, v in part.items()} for part in (found.cond, found.null))
    counts = all(len(v) == len(prompts) for v in found.cond.values()) and all(len(v) == 1 for v in found.null.values())
    return found if of_cond and of_cond == of_null and counts else None


def embedding_bytes(backbone: Backbone, count: int) -> int:
    """Return the bytes of `count` conditions in a cache."""
    return count * sum(v[0].numel() * v.dtype.itemsize for v in backbone.encode([""]).values())


def _embeddings(
    tensors: Mapping[str, Tensor], prompts: Sequence[str], encoded: int, key: str, identity: str
) -> Embeddings:
    cond = {k.removeprefix("cond."): v for k, v in tensors.items() if k.startswith("cond.")}
    null = {k.removeprefix("null."): v for k, v in tensors.items() if k.startswith("null.")}
    return Embeddings(cond, null, prompts, encoded, key, identity)
