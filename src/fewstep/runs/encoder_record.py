"""What a cache of embeddings knows of the encoders that made it.

Encoders whose files are still the same need not be loaded to be named: a second run finds all it needs in the
cache and loads none.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from ..atomic import write_json
from ..backbones.encoders import PREFIX, deferred
from ..backbones.parts import Defer
from ..reading import object_in

FILE = "encoders.json"


@dataclass(frozen=True)
class EncoderRecord:
    """The encoders of a cache.

    Their files, and the hashes of the denoiser and of all together.
    """

    files: dict[str, list[int]]
    denoiser: str
    identity: str

    @staticmethod
    def read(cache: Path) -> "EncoderRecord | None":
        """Return a cache's record, None where there is none."""
        try:
            return EncoderRecord(**object_in(cache / FILE))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, cache: Path) -> None:
        """Write the record, where there are encoders."""
        if self.files:
            write_json(cache / FILE, asdict(self))


def encoder_files(folder: Path) -> dict[str, list[int]]:
    """Return size and time of change of encoders' files, by path."""
    files = sorted(f for f in folder.glob(f"{PREFIX}*/*") if f.is_file())
    return {str(f.resolve()): [(told := f.stat()).st_size, told.st_mtime_ns] for f in files}


def known_encoders(cache: Path) -> Defer:
    """Return what defers the loading of encoders whose files a cache knows."""
    record = EncoderRecord.read(cache)

    def defer(kind: type[nn.Module], folder: Path, name: str, dtype: torch.dtype) -> nn.Module | None:
        known = record is not None and name.startswith(PREFIX) and record.files == encoder_files(folder)
        return deferred(kind, folder, name, dtype) if known else None

    return defer
