"""Features of the real emoji, the reference for generated emoji.

The features are shipped, so measuring needs no download. `zoo/emoji_reference/` is written by
`build_reference`, and the folder's README.md says how. The reference has one space, the embedding: the
leading principal components of the square roots of EfficientNet-lite0 features (which are >= 0; the root
keeps a few strong channels from dominating), in a unit in which the real emoji have a total variance of 100.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..atomic import write_json, write_tensors
from ..hashes import sha256_of
from ..reading import object_in, reading
from .alignment import colour_histogram
from .distances import principal_components
from .features import SIZE, WEIGHTS, feature_network, features

FOLDER = Path(__file__).parents[1] / "zoo" / "emoji_reference"
TENSORS, TEXTS = "reference.safetensors", "reference.json"
FORMAT = 1
VARIANCE = 100.0


class Captioned(Protocol):
    """A row of the data set, for example `zoo.emoji_data.Emoji`.

    `tone` is empty for plain images and for mixed tones.
    """

    @property
    def name(self) -> str: ...
    @property
    def caption(self) -> str: ...
    @property
    def tone(self) -> str: ...
    @property
    def held_out(self) -> bool: ...


@dataclass(frozen=True)
class Reference:
    """The real emoji.

    `gallery` [N, K] are the embeddings of the plain emoji, with `names` and `labels` [N]. Images of one name,
    and names of one image (the flags of France and of Clipperton), share a label. `colours` [M, T, 125] are
    the histograms of the `toned` names in every one of `tones`, the first of which is none. `held_out` are
    captions of toned emoji that no model was trained on.
    """

    mean: Tensor
    basis: Tensor
    gallery: Tensor
    names: tuple[str, ...]
    labels: Tensor
    toned: tuple[str, ...]
    tones: tuple[str, ...]
    colours: Tensor
    held_out: tuple[str, ...]
    sha256: str

    @property
    def width(self) -> int:
        """The number K of embedding dimensions."""
        return self.gallery.shape[1]

    def embed(self, features: Tensor) -> Tensor:
        """Return embeddings [B, K] of EfficientNet-lite0 features [B, 1280]."""
        return (features.sqrt() - self.mean) @ self.basis

    def halfway_white(self, embeddings: Tensor) -> Tensor:
        """Divide embeddings by the roots of their standard deviations.

        Cosines of these embeddings find names best (README.md of the reference).
        """
        return embeddings / self.gallery.std(0).sqrt()

    def label_of(self, names: Iterable[str]) -> Tensor:
        """Return the labels [B] of these names."""
        first = dict(zip(reversed(self.names), reversed(self.labels.tolist()), strict=True))
        return torch.tensor([first[name] for name in names])


def caption(name: str, tone: str) -> str:
    """Return the prompt for a name in a skin tone."""
    return f"{name}, {tone}"


def without_tone(caption: str) -> tuple[str, str]:
    """Return (name, tone) of a prompt, the inverse of `caption`."""
    name, _, tone = caption.rpartition(", ")
    return name, tone


def build_reference(emoji: Sequence[Captioned], images: Tensor, folder: Path = FOLDER, components: int = 256) -> Path:
    """Write the reference of `emoji` into `folder`.

    The images are uint8 [N, 3, H, W]; the files are `reference.safetensors` and `reference.json`. Several
    images of one caption are allowed. The shipped reference is
    `build_reference(*emoji_data.with_places(*emoji_data.load(archive, 0.05)))` with `fewstep.zoo.emoji_data`.
    """
    plain = [i for i, e in enumerate(emoji) if not e.tone and e.caption == e.name]
    variants: dict[str, dict[str, int]] = defaultdict(dict)
    for i, e in enumerate(emoji):
        if e.tone or e.caption == e.name:
            variants[e.name].setdefault(e.tone, i)
    tones = sorted({e.tone for e in emoji})
    rows = {name: [of[tone] for tone in tones] for name, of in variants.items() if set(of) == set(tones)}
    # Leave out names without visible skin (a snowboarder), whose images are the same in all tones.
    toned = [name for name, r in rows.items() if len({images[i].numpy().tobytes() for i in r}) == len(tones)]
    names = [emoji[i].name for i in plain]
    roots = features(feature_network(), images[plain].float() / 255).sqrt()
    pca = principal_components(roots, components)
    mean = pca.mean.float()
    basis = (pca.basis * (VARIANCE / pca.variance.sum()).sqrt()).half()
    histograms = [colour_histogram(images[rows[name]].float() / 255) for name in toned]
    tensors = {
        "mean": mean,
        "basis": basis,
        "gallery": ((roots - mean) @ basis.float()).half(),
        "labels": torch.tensor(_labels(names, [images[i].numpy().tobytes() for i in plain]), dtype=torch.int32),
        "colours": torch.stack(histograms).half() if toned else torch.empty(0, len(tones), 125).half(),
    }
    texts = {
        "format": FORMAT,
        "network_sha256": sha256_of(WEIGHTS),
        "network_input": SIZE,
        "names": names,
        "tones": tones,
        "toned": toned,
        "held_out": list(dict.fromkeys(e.caption for e in emoji if e.held_out and e.name in toned)),
    }
    write_tensors(folder / TENSORS, tensors)
    write_json(folder / TEXTS, texts)
    return folder


def load_reference(folder: Path = FOLDER) -> Reference:
    """Read a reference.

    Raises ValueError with one line if the reference is missing, damaged, or made with another feature
    network.
    """
    with reading(f"reference {folder}:", "install fewstep again, or call build_reference", "cannot be used"):
        texts = object_in(folder / TEXTS)
        t = load_file(folder / TENSORS)
        if (texts["format"], texts["network_sha256"], texts["network_input"]) != (FORMAT, sha256_of(WEIGHTS), SIZE):
            raise ValueError("it was made with another format or feature network")
        return Reference(
            mean=t["mean"].float(),
            basis=t["basis"].float(),
            gallery=t["gallery"].float(),
            names=tuple(texts["names"]),
            labels=t["labels"].long(),
            toned=tuple(texts["toned"]),
            tones=tuple(texts["tones"]),
            colours=t["colours"].float(),
            held_out=tuple(texts["held_out"]),
            sha256=sha256_of(folder / TENSORS, folder / TEXTS),
        )


def _labels(names: Sequence[str], images: Sequence[bytes]) -> list[int]:
    """Return labels 0, 1, 2, ... in order of appearance.

    Rows that share a name or an image share a label, also through a third row.
    """
    groups: dict[str | bytes, list[int]] = defaultdict(list)
    for i, keys in enumerate(zip(names, images, strict=True)):
        for key in keys:
            groups[key].append(i)
    label = list(range(len(names)))
    for group in (g for g in groups.values() if len(g) > 1):
        old = {label[i] for i in group}
        label = [min(old) if n in old else n for n in label]
    dense = {n: i for i, n in enumerate(dict.fromkeys(label))}
    return [dense[n] for n in label]
