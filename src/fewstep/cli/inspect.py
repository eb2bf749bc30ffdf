"""`fewstep inspect`: what a file or folder is, by its metadata."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open

from ..backbones.load import bundled, quiet, source_of
from ..backbones.single_file import FIRST, read_checkpoint
from ..data.texts import printable
from ..reading import read_json, reading, require_regular
from ..student.card import counted
from ..student.folder import find_student, on_hub, read_card
from ..student.headers import KEY
from ..training.state import checkpoints
from .loading import hashed, loaded
from .progress import console, put_result

SHOWN = 16  # numbers of a list that are shown
KINDS: dict[str, dict[str, str]] = {  # by how a LoRA's keys end, then by how they begin
    ".lora_A.weight": {"unet": "diffusers'", "transformer": "diffusers'", "base_model": "PEFT's", "": "PEFT's"},
    ".lora_down.weight": {"": "kohya's"},
    ".lora.down.weight": {"": "old diffusers'"},
}


def run_inspect(source: str) -> None:
    """Print what a file or folder is, one `key  value` per line.

    Raises ValueError for anything that fewstep does not know.
    """
    quiet()
    path = Path(source)
    if path.suffix == ".safetensors":
        values = safetensors_summary(path)
    elif (path / "run.json").is_file():
        values = run_summary(path)
    elif (folder := find_student(source, "inspect", weights=False)) is not None:
        card = read_card(folder)
        values = {"student": source if on_hub(source) else str(folder), "NFE": counted(card), **asdict(card)}
    elif source in bundled() or (path / "model_index.json").is_file() or source_of(source).reading:
        teacher = loaded(source)
        count = sum(p.numel() for p in teacher.module.parameters())
        values = {
            "teacher": teacher.name,
            "network": type(teacher.module).__name__,
            "parameters": f"{count / 1e6:.2f}M",
            "state": list(teacher.shape),
        }
        values |= {
            "hash": hashed(teacher.module),
            **{k: v for k, v in teacher.scheduler_config.items() if not k.startswith("_")},
        }
    elif on_hub(source):
        raise ValueError(f"inspect: {source} on the hub is no student; pass the hub id of one")
    elif not path.exists():
        raise ValueError(
            f"inspect: there is no {source}; "
            f"pass a student, run or teacher folder, a .safetensors file, or one of {', '.join(bundled())}"
        )
    else:
        raise ValueError(
            f"inspect: {source} is no student, run, teacher or .safetensors file; pass the final/ folder of a run"
        )
    put_result(values)
    width = max(len(k) for k in values)
    for key, value in values.items():
        console.print(f"{printable(key):<{width}}  {printable(_short(value))}", markup=False)


def _short(value: Any) -> Any:
    """Shorten a long list of numbers to its ends."""
    if isinstance(value, dict):
        return {k: _short(v) for k, v in value.items()}
    if not isinstance(value, list | tuple) or len(value) <= SHOWN or not all(isinstance(v, int | float) for v in value):
        return value
    return f"{len(value)} numbers, {value[0]:.6g} to {value[-1]:.6g}"


def safetensors_summary(path: Path) -> dict[str, Any]:
    """Return what a weights file says of itself.

    Tensors; for a LoRA the convention of the names, rank and alpha; for a student how to call the student.
    """
    with (
        reading(f"inspect: {path}", "check the path, or copy it again", "is missing or damaged"),
        safe_open(require_regular(path), "pt") as file,
    ):
        names, header = list(file.keys()), file.metadata() or {}
        shapes = {n: file.get_slice(n).get_shape() for n in names}
        alphas = [file.get_tensor(n).item() for n in names if n.endswith(".alpha") and math.prod(shapes[n]) == 1]
    values: dict[str, Any] = {
        "file": str(path),
        "tensors": len(names),
        "bytes": path.stat().st_size,
        "first key": names[0] if names else "",
    }
    if FIRST in names:
        checkpoint = read_checkpoint(path)
        values |= {
            "kind": f"checkpoint of a {checkpoint.pipeline.__name__}",
            "configuration": checkpoint.config,
            **checkpoint.scheduler,
        }
    ending = next((e for e in KINDS if any(n.endswith(e) for n in names)), "")
    if ending:
        downs = [n for n in names if n.endswith(ending)]
        told = _json(header, "lora_adapter_metadata")
        alphas = alphas or [
            float(v) for k, v in told.items() if k.endswith(".lora_alpha") and isinstance(v, int | float)
        ]
        values |= {
            "kind": f"LoRA, {KINDS[ending].get(downs[0].split('.')[0], KINDS[ending][''])} names",
            "layers": len(downs),
            "rank": _several(shapes[n][0] for n in downs),
            "alpha": _several(alphas) or "not said: read as the rank",
        }
    student = _json(header, KEY)
    values |= {k: v for k, v in student.items() if k not in values}
    return values | {k: v for k, v in sorted(header.items()) if k.startswith(("ss_", "sshs_", "modelspec."))}


def _several(numbers: Iterable[float]) -> str:
    return ", ".join(f"{n:g}" for n in sorted(set(numbers)))


def _json(header: Mapping[str, str], key: str) -> dict[str, Any]:
    """Read a JSON object from an entry of a header.

    Empty where the entry is missing or holds anything else.
    """
    try:
        value = json.loads(header.get(key, "{}"))
    except (ValueError, RecursionError):
        return {}
    return _object(value)


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def run_summary(path: Path) -> dict[str, Any]:
    """Return how far a run has come."""
    record = read_json(path / "run.json", "run its command again to write it anew")
    saved, final = checkpoints(path), path / "final"
    recipe, settings = _object(record.get("recipe")), _object(_object(record.get("recipe")).get("method"))
    return {
        "run": str(path),
        "teacher": recipe.get("teacher"),
        "method": settings.get("name"),
        "steps": settings.get("steps"),
        "command": record.get("command"),
        "started": record.get("started"),
        "newest checkpoint": saved[-1].name if saved else "none yet",
        "student": str(final) if final.is_dir() else "not finished",
        **({"NFE": counted(read_card(final))} if final.is_dir() else {}),
    }
