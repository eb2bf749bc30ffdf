"""Prompts: read, encoded once, cached on disk, drawn evenly.

Prompts come from a text file, JSONL, CSV or a hub data set.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..atomic import SHA256, growing_header, read_hashed, require_room, write_growing
from ..backbones.base import Backbone, Cond
from ..backbones.encoders import at_once
from ..backbones.modules import dtype_of
from ..backbones.parts import SizeConditioned
from ..core.indices import evenly_spaced
from ..processes import any_rank, barrier, this_process
from ..transfer import all_sent
from .packed import Packed, pack, packed, packed_bytes
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


LEAST_HELD_OUT, MOST_HELD_OUT = 16, 128  # prompts; with fewer nothing could be told


@dataclass(frozen=True)
class Split:
    """Prompts to train on, and prompts kept out of the training."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]


def split_prompts_of(prompts: Sequence[str], share: float) -> Split:
    """Keep a share of prompts out of the training, chosen by hash.

    At most `MOST_HELD_OUT`, and none where the share is of fewer than `LEAST_HELD_OUT`. The others keep their order.
    """
    count = min(MOST_HELD_OUT, int(share * len(prompts)))
    if count < LEAST_HELD_OUT:
        return Split(tuple(prompts), ())
    kept = set(sorted(set(prompts), key=lambda p: hashlib.sha256(p.encode()).hexdigest())[:count])
    return Split(tuple(p for p in prompts if p not in kept), tuple(p for p in prompts if p in kept))


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


FEW = 8  # prompts by which a cache is judged
LAYOUT = "packed"  # of a cache; another layout has other keys
Kept = Callable[[Path, int], None]  # called with the file that is going to be written, and the size in bytes


def ignore(*_: object) -> None:
    """Ignore all arguments."""


class Embeddings:
    """Conditions of a list of prompts and of the empty prompt.

    Prompts are encoded once. The conditions are on the CPU, or in a file from which only the drawn conditions
    are read; an index gives those of some prompts as tensors.
    """

    def __init__(
        self,
        cond: Mapping[str, Tensor | Packed],
        null: Cond,
        prompts: Sequence[str],
        encoded: int,
        key: str,
        identity: str = "",
    ) -> None:
        self.cond, self.null, self.prompts, self.count = cond, null, list(prompts), len(prompts)
        self.identity = identity  # of the network and the encoder
        self.key = key  # a hash of the encoder's identity and the prompts
        self.encoded = encoded  # prompts that were encoded this time; 0 if the cache was used

    def choose(self, batch: int, rng: torch.Generator, group: int = 1) -> Tensor:
        """Draw the indices [batch] of random prompts, on the CPU.

        `group` neighbours have one prompt.
        """
        drawn = torch.randint(self.count, (batch // group,), generator=rng, device=rng.device).cpu()
        return drawn if group == 1 else drawn.repeat_interleave(group)

    def draw(self, batch: int, rng: torch.Generator, device: torch.device) -> Cond:
        """Draw the conditions of `batch` random prompts."""
        return self.at(self.choose(batch, rng), device)

    def at(self, index: slice | Tensor, device: torch.device) -> Cond:
        """Return the conditions of some prompts."""
        return all_sent({k: v[index] for k, v in self.cond.items()}, device)

    def take(self, of: Tensor, key: str) -> "Embeddings":
        """Return the conditions of the prompts with indices `of [N]`.

        The order is that of `of`; an index may repeat.
        """
        cond = {k: v.take(of) if isinstance(v, Packed) else v[of] for k, v in self.cond.items()}
        return Embeddings(cond, self.null, [self.prompts[i] for i in of.tolist()], 0, key, self.identity)

    def all(self, device: torch.device) -> Cond:
        """Return the conditions of all prompts, in order."""
        return self.at(slice(None), device)

    def unconditional(self, device: torch.device) -> Cond:
        """Return the condition of the empty prompt, [1, ...]."""
        return {k: v.to(device) for k, v in self.null.items()}


@dataclass(frozen=True)
class Encoding:
    """Prompts and what they are encoded with.

    It knows the key of a cache, and its files.

    Conditions that say the size of the images belong to no prompt and are not kept: a text is stored once
    however many sizes.
    """

    backbone: Backbone
    prompts: Sequence[str]
    identity: str
    chunk: int

    @property
    def key(self) -> str:
        """A hash of the encoder's identity, the type and the prompts."""
        about = [LAYOUT, self.identity, str(dtype_of(self.backbone.module)), list(self.prompts)]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()[:24]

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encode prompts on the CPU, without what says the size."""
        return {k: v.cpu() for k, v in self.backbone.encode(list(prompts)).items() if k not in self.sizes(1)}

    def sizes(self, count: int) -> dict[str, Tensor]:
        """Return the conditions that say the size, of `count` prompts."""
        if not isinstance(self.backbone, SizeConditioned):
            return {}
        return {k: v.cpu() for k, v in self.backbone.size_conditions(count).items()}

    def starts(self, rank: int, processes: int) -> range:
        """Return where the parts begin that a process encodes."""
        return range(rank * self.chunk, len(self.prompts), processes * self.chunk)

    def parts(self, rank: int, processes: int) -> Iterator[dict[str, Tensor]]:
        """Yield the encoded parts of a process: rows and lengths."""
        for start in self.starts(rank, processes):
            encoded = self.encode(self.prompts[start : start + self.chunk])
            yield {
                f"{what}.{k}.{start:09d}": tensor
                for k, v in encoded.items()
                for what, tensor in zip(("cond", "lengths"), pack(v), strict=True)
            }

    def embeddings(self, tensors: Mapping[str, Tensor], null: Cond, encoded: int) -> Embeddings:
        """Return the conditions that parts hold.

        Raises KeyError where a part is missing.
        """
        starts = sorted({name.rpartition(".")[2] for name in tensors if name.startswith("cond.")})
        cond: dict[str, Tensor | Packed] = {}
        for k, v in null.items():
            found = [(tensors[f"cond.{k}.{start}"], tensors[f"lengths.{k}.{start}"]) for start in starts]
            cond[k] = packed(found, tuple(v.shape[1:]))
        sizes = self.sizes(len(self.prompts))
        null = {**null, **{k: v[:1] for k, v in sizes.items()}}
        return Embeddings(cond | sizes, null, self.prompts, encoded, self.key, self.identity)

    def files(self, cache: Path, processes: int) -> list[Path]:
        """Return the files of a cache, one of each process."""
        if processes == 1:
            return [cache / f"{self.key}.safetensors"]
        return [cache / f"{self.key}-{i:03d}-of-{processes:03d}.safetensors" for i in range(processes)]

    def found(self, cache: Path) -> list[Path]:
        """Return the files of a complete cache, of any number of processes."""
        ends = {p.stem.rpartition("-of-")[2] for p in cache.glob(f"{self.key}-*-of-*.safetensors")}
        sets = [self.files(cache, n) for n in (1, *sorted(int(end) for end in ends if end.isdecimal()))]
        return next((files for files in sets if all(f.exists() for f in files)), [])

    def read(self, files: Sequence[Path]) -> Embeddings | None:
        """Read a cache.

        None where it is damaged, cannot be verified, or is of other prompts.
        """
        tensors = dict[str, Tensor]()
        try:
            for file in files:
                own, about = read_hashed(file)
                if SHA256 not in about:
                    return None
                tensors |= own
            null = {k.removeprefix("null."): v for k, v in tensors.items() if k.startswith("null.")}
            shapes = {k: tensors[f"shape.{k}"].tolist() for k in null}
            kept = self.embeddings(tensors, null, 0) if null and any(n.startswith("cond.") for n in tensors) else None
        except (SafetensorError, KeyError):
            return None
        sound = kept is not None and all(
            len(v) == len(self.prompts)
            and list(null[k].shape) == [1, *shapes[k]]
            and {p.shape[1:] for p in v.parts} == {null[k].shape[2:]}
            and {p.dtype for p in v.parts} == {null[k].dtype}
            and int((v.begins + v.lengths).amax()) <= max(len(p) for p in v.parts)
            for k, v in kept.cond.items()
            if isinstance(v, Packed)
        )
        return kept if sound else None

    def write(self, file: Path, null: Cond, rank: int, processes: int, keep: Kept) -> None:
        """Encode the parts of a process into a file.

        One part is in memory at a time.
        """
        parts = self.parts(rank, processes)
        first = next(parts, {})
        kept = {f"null.{k}": v.contiguous() for k, v in null.items()}
        kept |= {f"shape.{k}": torch.tensor(v.shape[1:], dtype=torch.int64) for k, v in null.items()}
        count = len(kept) + 2 * len(null) * len(self.starts(rank, processes))
        if rank == 0:
            each = sum(t.nbytes for t in first.values()) / max(1, min(self.chunk, len(self.prompts)))
            around = growing_header(count) + sum(t.nbytes for t in kept.values())
            expected = int(each * len(self.prompts)) + processes * around
            keep(file, expected)
            require_room(file, expected)
        rest = (item for part in chain([first], parts) for item in part.items())
        write_growing(file, chain(kept.items(), rest), count)


def embed(
    backbone: Backbone,
    prompts: Sequence[str],
    cache: Path | None,
    identity: str,
    chunk: int | None = None,
    keep: Kept = ignore,
    together: bool = False,
) -> Embeddings:
    """Encode prompts once, or read the conditions from the cache.

    `cache` is a folder; with a cache, only one chunk is in memory, by default of as many prompts as the encoders
    take at once. Padding is not stored. `identity` names the
    encoder: a change of the identity invalidates the cache, as a change of dtype does. `keep` is called with
    the file before the file is written, and with about the size of the cache. With `together`, all processes
    call, and each encodes a share into a file of its own. Raises OSError if there is no room for the file.
    """
    encoding = Encoding(backbone, prompts, identity, at_once(backbone.encoders) if chunk is None else chunk)
    state = this_process() if together and cache is not None else None
    rank, processes = (0, 1) if state is None else (state.process_index, state.num_processes)
    if cache is not None and (files := encoding.found(cache)):
        kept = encoding.read(files)
    else:
        files, kept = [], None
    if processes > 1:
        kept = None if any_rank(kept is None) else kept
    if kept is not None:
        return kept
    for file in files if rank == 0 else ():
        file.unlink(missing_ok=True)  # a damaged cache is rebuilt: everything in a cache can be made again
    null = encoding.encode([""])
    if cache is None or not null:
        tensors = {n: t for part in encoding.parts(0, 1) for n, t in part.items()}
        return encoding.embeddings(tensors, null, len(prompts))
    if processes > 1:
        barrier()  # nothing is written before the damaged files are gone
    own = encoding.files(cache, processes)
    encoding.write(own[rank], null, rank, processes, keep)
    if processes > 1:
        barrier()
    made = encoding.read(own)
    if made is None:
        raise OSError(
            f"cannot read {own[0].parent}, where all processes have written; choose a folder that all of them share"
        )
    made.encoded = len(prompts)
    return made


def embedding_bytes(backbone: Backbone, prompts: Sequence[str]) -> int:
    """Return about the bytes of the prompts' conditions in a cache.

    They are judged by some prompts.

    With fake (meta) tensors, which have no padding to be told, the bytes at most.
    """
    few = [prompts[i] for i in evenly_spaced(len(prompts), FEW)]
    encoded = Encoding(backbone, few, "", len(few)).encode(few)
    hollow = any(isinstance(v, FakeTensor) for v in encoded.values())
    taken = sum(v.nbytes for v in encoded.values()) if hollow else packed_bytes(encoded)
    return taken * len(prompts) // len(few)
