"""What all tabs of the studio share."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from .queue import Line

NETWORK, PLOTS = "network", "plots"  # what one handler at a time may use


@dataclass(frozen=True)
class Place:
    """The studio's folder, its queue, and where files to download lie.

    `told` returns the line for an error, and logs one that nobody foresaw.
    """

    folder: Path
    line: Line
    told: Callable[[Exception], str]
    downloads: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="fewstep-studio-")))
