"""What the headers of a student's LoRA files say.

The headers have fewstep's own facts, and the facts that other programs look for.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

from ..backbones.few_step import PipelineInfo
from ..backbones.load import FUSED, source_of
from .card import StudentCard, counted

KEY = "fewstep"  # the entry with the student's facts, JSON
SHOWN = (
    "name",
    "method",
    "base",
    "base_hash",
    "steps",
    "timesteps",
    "solver",
    "prediction",
    "rank",
    "alpha",
    "guidance",
    "licence",
    "version",
)
# By the width of the text embedding.
VERSIONS = {768: ("sd_v1", "stable-diffusion-v1"), 1024: ("sd_v2", "stable-diffusion-v2-512")}
STABILITY = "https://github.com/Stability-AI/generative-models"
XL = ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base")


def public_base(base: str) -> str:
    """Return a teacher's name for everybody to see.

    A hub id stays as it is; of a path the last part remains.
    """
    source = source_of(base)
    there = [source.place, *(path for path, _ in source.loras)]
    names = [
        p if p.count("/") == 1 and not Path(p).exists() and p[0] not in "./~" else n
        for p, n in zip(there, source.names, strict=True)
    ]
    return FUSED.join(names)


def own_header(card: StudentCard) -> dict[str, str]:
    """Return the student's facts as one entry.

    The facts say how to call the student, and on which base.
    """
    facts = {k: v for k, v in asdict(replace(card, base=public_base(card.base))).items() if k in SHOWN}
    return {"format": "pt", KEY: json.dumps(facts)}


def kohya_header(
    card: StudentCard, info: PipelineInfo, config: Mapping[str, Any], state: Mapping[str, Tensor], size: int
) -> dict[str, str]:
    """Return a header as kohya's scripts write headers.

    The keys are `ss_*`, and Stability's `modelspec`; what is not known is left out. `config` is that of the
    U-Net, `state` is what the file holds, and `size` is that of the images. The hash is SHA-256 of the file
    behind its header, as these programs count it.
    """
    version, architecture = (
        XL if info.family.kohya == "original" else VERSIONS.get(config.get("cross_attention_dim", 0), ("", ""))
    )
    if architecture == VERSIONS[1024][1] and card.prediction == "v_prediction":
        architecture, version = "stable-diffusion-v2-768-v", "sd_v2_v"
    data = save({name: tensor.contiguous() for name, tensor in state.items()})
    digest = hashlib.sha256(memoryview(data)[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    rank, alpha, count = str(card.rank), f"{card.alpha:g}", card.steps[0]
    call = f"strength 1.0, {count} step{'s' if count > 1 else ''}, CFG 1"
    known = {
        "ss_base_model_version": version,
        "ss_v2": str(version.startswith("sd_v2")) if version else "",
        "ss_output_name": card.name,
        "ss_sd_model_name": public_base(card.base),
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps({"conv_dim": rank, "conv_alpha": alpha}),
        "ss_steps": str(card.iterations),
        "ss_training_comment": f"{card.method} by fewstep {card.version}; {call}",
        "sshs_model_hash": digest,
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{architecture}/lora" if architecture else "",
        "modelspec.implementation": STABILITY if architecture == XL[1] else "diffusers",  # the layers' names
        "modelspec.title": card.name,
        "modelspec.resolution": f"{size}x{size}" if size else "",
        "modelspec.prediction_type": {"epsilon": "epsilon", "v_prediction": "v"}.get(card.prediction, ""),
        "modelspec.license": card.licence if card.licence != "other" else "",
        "modelspec.description": f"{card.method} student of {public_base(card.base)}: {counted(card)}",
        "modelspec.usage_hint": call,
        "modelspec.hash_sha256": f"0x{digest}",
    }  # fmt: skip
    return own_header(card) | {k: v for k, v in known.items() if v}
