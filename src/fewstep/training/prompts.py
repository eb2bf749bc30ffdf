"""Prompts: read from a text file, JSONL, CSV or a hub data set; encoded once, cached on disk, drawn evenly."""

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..atomic import write_rows
from ..backbones.base import Backbone, Cond, rows

COLUMNS = ("prompt", "caption", "text")


def read_prompts(source: str, column: str | None = None) -> list[str]:
    """Prompts of `source`, stripped, in order, without empty lines and repetitions.

    `.txt`: one a line; `.jsonl`: objects; `.csv`/`.tsv`: a header row; anything else: a hub data set id (needs the package
    `datasets`). Raises ValueError when the file is missing, the column is not there, or nothing is left.
    """
    path = Path(source)
    if path.suffix == ".txt":
        found = _text(path).splitlines()
    elif path.suffix == ".jsonl":
        found = _column([_object(line, i, path) for i, line in enumerate(_text(path).split("\n"), 1) if line.strip()], column, path)
    elif path.suffix in (".csv", ".tsv"):
        found = _column(list(csv.DictReader(io.StringIO(_text(path)), delimiter="\t" if path.suffix == ".tsv" else ",")), column, path)
    else:
        found = _hub(source, column)
    prompts = list(dict.fromkeys(p.strip() for p in found if p.strip()))
    if not prompts:
        raise ValueError(f"prompts: {source} has no prompt in it; write one a line")
    return prompts


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark before the first column's name
    except OSError as error:
        raise ValueError(
            f"prompts: cannot read {path} ({error.strerror}); pass a .txt, .jsonl, .csv or .tsv file, or a hub data set id"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts: {path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error


def _object(line: str, number: int, path: Path) -> Mapping[str, object]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"prompts: line {number} of {path} is not JSON ({error})") from error
    return value if isinstance(value, dict) else {"prompt": value}


def _column(records: Sequence[Mapping[str, object]], column: str | None, path: Path | str) -> list[str]:
    if not records:
        return []
    names = list(records[0])
    name = column or next((c for c in COLUMNS if c in names), None)
    if name is None or name not in names:
        raise ValueError(
            f"prompts: {path} has no column {column or ' or '.join(COLUMNS)}; it has {', '.join(map(str, names))}; pass --set prompts.column=NAME"
        )
    return [str(r.get(name) or "") for r in records]


def _hub(source: str, column: str | None) -> list[str]:
    if "/" not in source or Path(source).suffix or Path(source).exists():
        raise ValueError(f"prompts: got {source!r}, allowed are a .txt, .jsonl, .csv or .tsv file, or a hub data set id such as owner/name")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError("prompts: a hub data set needs the package `datasets`; run: pip install datasets") from error
    data = load_dataset(source, split="train")
    return _column([{n: r[n] for n in data.column_names} for r in data], column, source)


CHUNK = 64  # prompts that are encoded at once


class Embeddings:
    """Conditions of a list of prompts and of the empty prompt, encoded once; on the CPU, or in a file of which what is drawn is read."""

    def __init__(self, cond: Cond, null: Cond, prompts: Sequence[str], encoded: int, key: str, identity: str = "") -> None:
        self.cond, self.null, self.prompts, self.count = cond, null, list(prompts), len(prompts)
        self.identity = identity  # of the network and the encoder
        self.key = key  # a hash of the encoder's identity and the prompts
        self.encoded = encoded  # prompts that went through the encoder this time: 0 where the cache served

    def draw(self, batch: int, rng: torch.Generator, device: torch.device) -> Cond:
        """Conditions of `batch` prompts drawn at random."""
        rows = torch.randint(self.count, (batch,), generator=rng, device=rng.device).cpu()
        return {k: v[rows].to(device) for k, v in self.cond.items()}

    def take(self, of: Tensor, key: str) -> "Embeddings":
        """These prompts, `of [N]`, in this order, again where one comes twice."""
        return Embeddings(rows(self.cond, of), self.null, [self.prompts[i] for i in of.tolist()], 0, key, self.identity)

    def all(self, device: torch.device) -> Cond:
        """Conditions of all prompts, in their order."""
        return {k: v.to(device) for k, v in self.cond.items()}

    def unconditional(self, device: torch.device) -> Cond:
        """The condition of the empty prompt, [1, ...]."""
        return {k: v.to(device) for k, v in self.null.items()}


def embed(backbone: Backbone, prompts: Sequence[str], cache: Path | None, identity: str, chunk: int = CHUNK) -> Embeddings:
    """Encode prompts once, with a `cache` in the memory of one chunk. `cache` is a folder; `identity` names the encoder (a change of it invalidates the cache, as one of size or dtype does)."""
    dtype = str(next(backbone.module.parameters()).dtype)
    about = [identity, backbone.shape, dtype, list(prompts)]  # SDXL is told the size of its pictures
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]
    path = None if cache is None else cache / f"{key}.safetensors"
    if path is not None and path.exists():
        try:
            tensors = load_file(path)
            return _embeddings(tensors, prompts, 0, key, identity)
        except SafetensorError:
            path.unlink()  # a truncated cache is rebuilt, it holds nothing that cannot be made again
    parts = (
        {f"cond.{k}": v.cpu() for k, v in backbone.encode(list(prompts[i : i + chunk])).items()} for i in range(0, len(prompts), chunk)
    )
    null = {f"null.{k}": v.cpu().contiguous() for k, v in backbone.encode([""]).items()}
    if path is not None and null:
        write_rows(path, len(prompts), parts, null)  # every process of a run may do it
        return _embeddings(load_file(path), prompts, len(prompts), key, identity)
    encoded = list(parts)
    tensors = null | {k: torch.cat([p[k] for p in encoded]).contiguous() for k in encoded[0]}
    return _embeddings(tensors, prompts, len(prompts), key, identity)


def _embeddings(tensors: Mapping[str, Tensor], prompts: Sequence[str], encoded: int, key: str, identity: str) -> Embeddings:
    cond = {k.removeprefix("cond."): v for k, v in tensors.items() if k.startswith("cond.")}
    null = {k.removeprefix("null."): v for k, v in tensors.items() if k.startswith("null.")}
    return Embeddings(cond, null, prompts, encoded, key, identity)
