"""Loading and hashing models, with the time left on the screen."""

from pathlib import Path

import torch
from torch import nn

from ..backbones.base import Backbone
from ..backbones.load import called, download, fingerprint, load_teacher
from ..backbones.parts import Defer
from ..backbones.single_file import SUFFIX
from ..backbones.sizes import Size
from ..training.ledger import storage_bytes
from .progress import working


def loaded(
    source: str,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    size: Size | None = None,
    defer: Defer = lambda *_: None,
) -> Backbone:
    """Load a teacher as `load_teacher` does, and show how far it is.

    Progress is that of the bytes of a folder's networks, one after the other.
    """
    download(source)  # with bars of its own
    sizes = dict[str, int]()
    with working(f"loading {called(source)}") as tell:

        def begun(kind: type[nn.Module], folder: Path, name: str, kept: torch.dtype) -> nn.Module | None:
            if not sizes:
                sizes.update(weights_below(folder))
                tell.total = sum(sizes.values())
            tell(sum(size for part, size in sizes.items() if part in seen))
            seen.add(name)
            return defer(kind, folder, name, kept)

        seen = set[str]()
        return load_teacher(source, dtype, device, size, begun)


def weights_below(folder: Path) -> dict[str, int]:
    """Return the bytes of the weight files in each subfolder."""
    found = dict[str, int]()
    for file in folder.glob(f"*/*{SUFFIX}"):
        found[file.parent.name] = found.get(file.parent.name, 0) + file.stat().st_size
    return found


def hashed(module: nn.Module, through: torch.dtype = torch.float32) -> str:
    """Return a network's fingerprint, and show how far it is."""
    with working("hashing its weights", storage_bytes(*module.state_dict().values())) as tell:
        return fingerprint(module, through=through, tell=tell)
