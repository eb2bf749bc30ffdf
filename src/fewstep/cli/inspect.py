"""`fewstep inspect`: what a file or folder is, read from its own metadata."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..api import load_teacher
from ..atomic import read_json
from ..backbones.load import bundled, fingerprint, quiet, source_of
from ..backbones.single_file import FIRST, read_checkpoint
from ..export.card import counted, read_card
from ..runs.students import student_folder
from ..training.state import checkpoints
from .progress import console


def run_inspect(source: str) -> None:
    """Print it, one `key  value` a line. Raises ValueError when it is nothing that fewstep knows."""
    quiet()
    path = Path(source)
    if path.suffix == ".safetensors":
        values = safetensors_summary(path)
    elif (path / "run.json").is_file():
        values = run_summary(path)
    elif (folder := student_folder(source)) is not None:
        card = read_card(folder)
        values = {"student": str(folder), "network calls": counted(card), **asdict(card)}
    elif source in bundled() or (path / "model_index.json").is_file() or source_of(source).reading:
        teacher = load_teacher(source)
        count = sum(p.numel() for p in teacher.module.parameters())
        values = {
            "teacher": teacher.name,
            "network": type(teacher.module).__name__,
            "parameters": f"{count / 1e6:.2f}M",
            "state": list(teacher.shape),
        }
        values |= {"hash": fingerprint(teacher.module), **{k: v for k, v in teacher.scheduler_config.items() if not k.startswith("_")}}
    elif not path.exists():
        raise ValueError(
            f"inspect: there is no {source}; pass a student, run or teacher folder, a .safetensors file, or one of {', '.join(bundled())}"
        )
    else:
        raise ValueError(f"inspect: {source} is no student, run, teacher or .safetensors file; pass the final/ folder of a run")
    width = max(len(k) for k in values)
    for key, value in values.items():
        console.print(f"{key:<{width}}  {value}", markup=False)


def safetensors_summary(path: Path) -> dict[str, Any]:
    """Header facts of a weights file: tensors, LoRA rank and alpha, whatever metadata it carries."""
    try:
        with safe_open(path, "pt") as file:
            names, metadata = list(file.keys()), file.metadata() or {}
            shapes = {n: file.get_slice(n).get_shape() for n in names}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"inspect: {path} is missing or damaged ({str(error).splitlines()[0]})") from error
    ranks = sorted({s[0] for n, s in shapes.items() if n.endswith("lora_A.weight")})
    values: dict[str, Any] = {
        "file": str(path),
        "tensors": len(names),
        "bytes": path.stat().st_size,
        "first key": names[0] if names else "",
    }
    if ranks:
        values |= {
            "kind": "LoRA, diffusers format",
            "layers": sum(n.endswith("lora_A.weight") for n in names),
            "rank": ", ".join(map(str, ranks)),
        }
    if FIRST in names:
        checkpoint = read_checkpoint(path)
        values |= {"kind": f"checkpoint of a {checkpoint.pipeline.__name__}", "configuration": checkpoint.config, **checkpoint.scheduler}
    settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    values |= {k.removeprefix("unet."): v for k, v in settings.items() if k.endswith((".r", ".lora_alpha"))}
    return values


def run_summary(path: Path) -> dict[str, Any]:
    """Where a run stands."""
    record = read_json(path / "run.json", "run its command again to write it anew")
    saved, final = checkpoints(path), path / "final"
    return {
        "run": str(path),
        "command": record.get("command"),
        "started": record.get("started"),
        "newest checkpoint": saved[-1].name if saved else "none yet",
        "student": str(final) if final.is_dir() else "not finished",
        **({"network calls": counted(read_card(final))} if final.is_dir() else {}),
    }
