"""Checkpoints in parts, one of each process of a sharded run.

Each process writes what it has and reads what it needs. torch.distributed.checkpoint plans it, in its safetensors
format: no process holds a tensor whole, and any number of processes reads what any number wrote. A file holds about
`FILE` bytes of one process, which is also what a process copies while it writes.
"""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from ..hashes import sha256_of
from ..processes import between_iterations, gathered, this_process

FOLDER = "parts"  # of a checkpoint
FILE = 2**30
Groups = Mapping[str, Mapping[str, Tensor]]


def save_parts(folder: Path, groups: Groups) -> dict[str, str]:
    """Write the parts of all processes into `folder/parts`.

    All processes have to call. Returns the SHA-256 of each file, by its name. Raises OSError in every process if one of
    them cannot write.
    """
    place, tensors = folder / FOLDER, _flat(groups)
    try:
        save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(str(place), _files(tensors), save_distributed=True),
            process_group=between_iterations(),
        )
    except CheckpointException as error:
        rank, (first, _) = next(iter(error.failures.items()))
        reason = OSError(f"process {rank} cannot write its part: {first}")
        reason.errno = getattr(first, "errno", None)
        raise reason from error
    own = place.glob(f"shard-{this_process().process_index + 1:05d}-*.safetensors")
    return {name: sha for found in gathered({p.name: sha256_of(p) for p in own}) for name, sha in found.items()}


def load_parts(folder: Path, groups: Groups) -> None:
    """Fill the tensors of `groups`, sharded or whole, from `folder/parts`.

    A process reads only what it holds. Raises ValueError if names or shapes differ.
    """
    tensors = _flat(groups)
    reader = HuggingFaceStorageReader(str(folder / FOLDER))
    there = reader.read_metadata().state_dict_metadata
    shapes = {n: tuple(t.size) for n, t in there.items() if isinstance(t, TensorStorageMetadata)}
    wanted = {n: tuple(t.shape) for n, t in tensors.items()}
    if odd := sorted(n for n in {**shapes, **wanted} if shapes.get(n) != wanted.get(n)):
        raise ValueError(
            f"{folder} does not fit what is trained, at {odd[0]}; delete that folder to go on from an older one"
        )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each process reads for itself, on purpose
        load(tensors, storage_reader=reader, no_dist=True)


def read_parts(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the whole tensors of `folder/parts`, by group and name."""
    reader = HuggingFaceStorageReader(str(folder / FOLDER))
    there = reader.read_metadata().state_dict_metadata
    groups = dict[str, dict[str, Tensor]]()
    for key, about in there.items():
        assert isinstance(about, TensorStorageMetadata)
        group, _, name = key.partition("/")
        shape = () if key.endswith(NUMBER) else about.size
        groups.setdefault(group, {})[name.removesuffix(NUMBER)] = torch.empty(shape, dtype=about.properties.dtype)
    load_parts(folder, groups)
    return groups


def require_intact(folder: Path, hashes: Mapping[str, str], names: Iterable[str]) -> None:
    """Check that the files `names` in `folder/parts` have their SHA-256.

    Raises ValueError that names the first one that has not.
    """
    for name in names:
        if not (folder / FOLDER / name).is_file() or sha256_of(folder / FOLDER / name) != hashes[name]:
            raise ValueError(f"{FOLDER}/{name} does not have the SHA-256 that state.json says")


NUMBER = "#"  # marks a tensor without dimensions, which is written with one


def _flat(groups: Groups) -> dict[str, Tensor]:
    """Return the tensors by `group/name`, as views of the same memory."""
    return {
        f"{group}/{name}{'' if t.ndim else NUMBER}": t.detach() if t.ndim else t.detach().reshape(1)
        for group, tensors in groups.items()
        for name, t in tensors.items()
    }


def _files(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of the file of each tensor, from 1."""
    place, room = dict[str, int](), FILE
    number = 1
    for name, tensor in tensors.items():
        own = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).nbytes
        if own > room and room < FILE:
            number, room = number + 1, FILE
        place[name], room = number, room - own
    return place
