"""Loading networks with every weight accounted for.

Every weight comes from the network's files, nothing of the files is left over, and all numbers are finite.
Every network that fewstep reads goes through `load_network` or `require_all`: libraries fill what is missing
at random, with a line in a log.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from safetensors import safe_open
from torch import Tensor, nn

from ..core.indices import evenly_spaced
from ..reading import json_in, reading, reason
from ..tensors import finite

PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
FIRST_CHOICE = ("", "fp32", "fp16", "bf16")  # order of preference among files of several precisions
SAMPLED = 16  # numbers of a tensor that are compared with its file's
POSITIONS = "position_ids"  # counts from 0 upwards, which text encoders used to keep among their weights
EIGHT_BITS = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|scale_input|weight_scale\w*|input_scale|comfy_quant|SCB|absmax|quant_map|"
    r"quant_state\..*)$"
)


Mark = tuple[torch.dtype, int, tuple[float, ...]]


class UnfitError(ValueError):
    """What is wrong with a file, named in one line.

    `cure` is set where something else helps than getting the file again.
    """

    def __init__(self, what: str, cure: str = "") -> None:
        super().__init__(what)
        self.cure = cure


class Weights(NamedTuple):
    """The files of a network.

    `variant` is the precision in the files' names, as libraries call it; empty for none.
    """

    files: tuple[Path, ...]
    variant: str

    def __str__(self) -> str:
        first = self.files[0]
        return f"{first.parent.name}/{first.name}" + (f" and {len(self.files) - 1} more" if len(self.files) > 1 else "")


def load_network(kind: Any, folder: Path, dtype: torch.dtype | None = None, root: Path | None = None) -> Any:
    """Load a network that `save_pretrained` wrote, in eval mode.

    `kind` is the network's class. Links may lead to where `root` reaches, by default the folder itself.
    Raises UnfitError for files that are missing, damaged, pickled or elsewhere, and for tensors that are
    missing, left over, of another shape, or not finite.
    """
    weights = weights_in(kind, folder, root)
    options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    try:
        network, info = kind.from_pretrained(
            folder,
            variant=weights.variant or None,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            **options,
        )
    except Exception as error:  # each kind of damage raises another type
        raise UnfitError(f"{weights} cannot be loaded ({reason(error)})") from error
    require_all(
        network, weights, info["missing_keys"], info["unexpected_keys"], [entry[0] for entry in info["mismatched_keys"]]
    )
    return network.eval()


def weights_in(kind: type[nn.Module], folder: Path, root: Path | None = None) -> Weights:
    """Find the safetensors files of a network's folder.

    Files without a precision in their names, or else fp32, fp16, bf16, or else the only ones there. Only
    headers are read. Raises UnfitError where there are none, and for a file that is damaged or leads
    elsewhere.
    """
    if not folder.is_dir():
        raise UnfitError(f"{folder.name}/ is missing")
    stem = "diffusion_pytorch_model" if issubclass(kind, ModelMixin) else "model"
    found: dict[str, Path] = {}
    # diffusers takes the index before the whole file, transformers the other way round: the last one found stays.
    forms = [rf"{stem}(?:\.(\w+))?\.safetensors", rf"{stem}\.safetensors\.index(?:\.(\w+))?\.json"]
    for form in forms if issubclass(kind, ModelMixin) else forms[::-1]:
        found |= {match[1] or "": file for file in sorted(folder.iterdir()) if (match := re.fullmatch(form, file.name))}
    if not found:
        pickles = sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES)
        if pickles:
            raise UnfitError(
                f"{folder.name}/{pickles[0]} is a pickle, which may run any code when it is read, "
                f"and no {stem}.safetensors is next to it",
                "pass a model in safetensors, or convert it as docs/checkpoints.md says",
            )
        raise UnfitError(f"{folder.name}/ has no weights (no {stem}.safetensors)")
    variant = next((v for v in FIRST_CHOICE if v in found), None)
    if variant is None:
        if len(found) > 1:
            raise UnfitError(
                f"{folder.name}/ has weights of several kinds ({', '.join(sorted(found))})", "leave one of them"
            )
        variant = next(iter(found))
    entry, root = found[variant], root or folder
    inside(entry, root)
    shards = _shards(entry, root) if entry.suffix == ".json" else (entry,)
    for file in shards:
        header(file)
    return Weights(shards, variant)


def _shards(index: Path, root: Path) -> tuple[Path, ...]:
    """Return the files that an index names, next to the index.

    Raises UnfitError where the index is damaged or names other files.
    """
    said = f"{index.parent.name}/{index.name}"
    try:
        named = json_in(index)["weight_map"].values()
        names = sorted({n for n in named if isinstance(n, str)}) if all(isinstance(n, str) for n in named) else []
    except Exception as error:  # each kind of damage raises another type
        raise UnfitError(f"{said} is damaged ({reason(error)})") from error
    if not names:
        raise UnfitError(f"{said} names no files")
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UnfitError(f"{said} names {name!r}, allowed are .safetensors files next to it")
        inside(index.parent / name, root)
    return tuple(index.parent / name for name in names)


def inside(file: Path, root: Path) -> Path:
    """Return `file` if it is a regular file in `root`.

    Links are followed. A folder of the hub's cache holds links into the store next to the folder; the store
    counts as inside. Raises UnfitError otherwise.
    """
    place, said = root.resolve(), f"{file.parent.name}/{file.name}"
    if not file.exists():
        raise UnfitError(f"{said} is missing")
    if not file.is_file():
        raise UnfitError(f"{said} is no regular file")
    store = [p.parent for p in place.parents if p.name == "snapshots"]
    if not any(file.resolve().is_relative_to(p) for p in (place, *store)):
        raise UnfitError(
            f"{said} is a link that leads out of {root}, to {str(file.resolve())!r}", "put the file itself there"
        )
    return file


def header(file: Path) -> list[str]:
    """Return the tensor names of a safetensors file.

    Raises UnfitError.
    """
    if not file.is_file():
        raise UnfitError(f"{file.parent.name}/{file.name} is missing or no regular file")
    try:
        with safe_open(file, "pt") as opened:
            return list(opened.keys())
    except Exception as error:  # each kind of damage raises another type
        raise UnfitError(f"{file.parent.name}/{file.name} is damaged ({reason(error)})") from error


def require_all(
    network: nn.Module,
    weights: Weights,
    missing: Collection[str],
    left: Collection[str],
    mismatched: Collection[str] = (),
) -> None:
    """Check that a network's weights are exactly those of its files.

    All numbers must be finite. `missing`, `left` and `mismatched` are what the library says. The values show,
    too, that no weight is made up. Raises UnfitError otherwise.
    """
    state = network.state_dict()
    missing = sorted({*missing, *(n for n, t in state.items() if t.is_meta)})
    left = sorted(n for n in left if n.rpartition(".")[2] != POSITIONS)
    if scaled := [n for n in left if EIGHT_BITS.search(n)]:
        raise UnfitError(
            f"{_file_of(weights, scaled[0])} keeps its weights in 8 bits or fewer, "
            f"with scales next to them ({scaled[0]}), which fewstep does not read",
            "pass the model in float16, bfloat16 or float32",
        )
    other = f"; it has {left[0]!r} instead, as another version of the library names it" if missing and left else ""
    refuse(
        weights,
        missing,
        "lacks",
        f"missing{other}",
        "run: pip install -U transformers diffusers, or download it again" if other else "",
    )
    refuse(weights, sorted(mismatched), "has another shape of", "of another shape")
    refuse(weights, left, "has", "left over, which this network does not have")
    require_finite(state, weights)
    made_up = sorted(strangers(state, weights.files))
    refuse(
        weights,
        made_up,
        "does not hold what was loaded as",
        "made up by a library that does not know this file",
        "run: pip install -U transformers diffusers",
    )


def refuse(weights: Weights, names: Sequence[str], verb: str, said: str, cure: str = "") -> None:
    """Raise UnfitError with the first of these names, if any."""
    if names:
        count = f"{len(names)} tensor is" if len(names) == 1 else f"{len(names)} tensors are"
        raise UnfitError(f"{_file_of(weights, names[0])} {verb} {names[0]!r} ({count} {said})", cure)


def _file_of(weights: Weights, name: str) -> str:
    """Return the file that has a tensor, or all files."""
    holder = next((f for f in weights.files if len(weights.files) > 1 and name in header(f)), None)
    return str(weights if holder is None else Weights((holder,), weights.variant))


def require_finite(state: Mapping[str, Tensor], weights: Weights) -> None:
    """Check that no tensor holds NaN or infinity.

    Raises UnfitError otherwise.
    """
    odd = [n for n, t in state.items() if not finite(t)]
    if odd:
        kind = str(state[odd[0]].dtype).removeprefix("torch.")
        raise UnfitError(
            f"{_file_of(weights, odd[0])} has numbers in {odd[0]!r} that are not finite in {kind} "
            f"({len(odd)} of {len(state)} tensors)",
            "" if kind == "float32" else "set dtype=float32, or download it again",
        )


def strangers(state: Mapping[str, Tensor], files: Sequence[Path]) -> list[str]:
    """Return names of tensors whose values are in none of the files.

    A tensor may be in a file under any name: libraries rename what they read, and make up what they do not
    find.
    """
    types = {t.dtype for t in state.values()}
    known: set[Mark] = set()
    for file in files:
        for tensor in read_in(file):
            known |= {mark(tensor, dtype) for dtype in types}
    return [n for n, t in state.items() if mark(t, t.dtype) not in known]


def read_in(file: Path) -> Iterator[Tensor]:
    """Yield all tensors of a file, one after the other."""
    with reading(file, "download it again"), safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - it is no mapping
            yield opened.get_tensor(name)


def mark(tensor: Tensor, dtype: torch.dtype) -> Mark:
    """Return a tensor's size and some of its numbers in `dtype`.

    Two tensors that were made independently have different marks.
    """
    flat = tensor.detach().reshape(-1)
    places = torch.tensor(evenly_spaced(len(flat), SAMPLED), device=flat.device, dtype=torch.long)
    return dtype, len(flat), tuple(flat[places].to(dtype).to(torch.float64).tolist())
