"""Weights of metrics, found here or fetched from the hub."""

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ..hashes import sha256_of

PLACE = "FEWSTEP_WEIGHTS"  # environment variable: a folder of weights


@dataclass(frozen=True)
class Weights:
    """Files of a repository `owner/name` on the hub."""

    repo: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """A folder with all files of `weights`."""

    weights: Weights
    folder: Path

    def record(self) -> dict[str, str]:
        """Return the SHA-256 of each file, under `owner/name/file`."""
        return {f"{self.weights.repo}/{name}": sha256_of(self.folder / name) for name in self.weights.files}


def place() -> Path:
    """Return the folder in which weights are looked for first."""
    return Path(os.environ.get(PLACE) or Path.home() / ".cache" / "fewstep" / "weights")


def find_weights(weights: Weights, option: str) -> Found:
    """Find the files of a network.

    `option`, such as `--metrics clip_score`, needs it. Without `files` all of the repository are needed. They are
    looked for in `place()/owner--name`, then in the hub's cache, then on the hub. Raises ValueError in one line
    that names the files and where to put them.
    """
    own = place() / weights.repo.replace("/", "--")
    if own.is_dir() and all((own / name).is_file() for name in weights.files):
        return Found(weights, own)
    try:
        folder = Path(snapshot_download(weights.repo, allow_patterns=list(weights.files) or None))
    except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(_missing(weights, option, own)) from error
    if not all((folder / name).is_file() for name in weights.files):
        raise ValueError(_missing(weights, option, own))
    return Found(weights, folder)


def _missing(weights: Weights, option: str, own: Path) -> str:
    named, listed = ", ".join(weights.files) or "all files", " ".join((weights.repo, *weights.files))
    return (
        f"{option}: its weights cannot be had here; put {named} of {weights.repo} into {own}, "
        f"or run where the hub is: hf download {listed}"
    )
