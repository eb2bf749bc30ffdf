"""What distilling each family costs at its true size, with random weights: seconds of an iteration by role, and peak memory.

    python benchmarks/backbones.py                     # whatever fits this machine; writes benchmarks/backbones.md and .json
    python benchmarks/backbones.py --only sd15 --batch 8    # that family's rows again; the others stay as they are

Three arrangements of the same TDM iteration (4 steps, guided teacher): `one base` has teacher, student and fake score as LoRA adapters of one
frozen network; `three copies` trains all weights of two copies; `reference` is the bare network calls of the public demo script: eleven forward
and two backward passes on three networks, without its text encoder, optimiser and bookkeeping. Conditions are random tensors of the true
shapes. On a CPU the networks have few of their blocks, of true width (of U-Nets the first two), on small states, and only ratios mean anything:
against narrow ones an adapter of rank 32 would look dear.
"""

import argparse
import gc
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from fewstep.atomic import write_json
from fewstep.backbones.base import Backbone
from fewstep.backbones.load import around
from fewstep.core.guidance import Guidance
from fewstep.data.prompts import Embeddings
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.training.loop import TrainConfig, distill
from origin import commit

TABLE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
}


@dataclass(frozen=True)
class Family:
    """How a family is built, of a few blocks or at its true size, and the shapes of a prompt's conditions."""

    build: Callable[[bool], Any]
    cond: Callable[[Any], Mapping[str, tuple[int, ...]]]
    batch: int


def vae() -> AutoencoderKL:
    """Never run here; its scale factor of 8 is what counts."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8
    )  # fmt: skip


def sd15(small: bool) -> StableDiffusionPipeline:
    few = {
        "block_out_channels": (320, 640), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    unet = UNet2DConditionModel(sample_size=16 if small else 64, cross_attention_dim=768, **(few if small else {}))
    return StableDiffusionPipeline(
        vae(), None, None, unet, DDIMScheduler(**TABLE), None, None, requires_safety_checker=False
    )


def sdxl(small: bool) -> StableDiffusionXLPipeline:
    both = {
        "use_linear_projection": True, "addition_embed_type": "text_time", "cross_attention_dim": 2048, "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }  # fmt: skip
    true = {
        "sample_size": 128, "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    few = {
        "sample_size": 16, "block_out_channels": (320, 640), "transformer_layers_per_block": (1, 2), "attention_head_dim": (5, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }  # fmt: skip
    unet = UNet2DConditionModel(**both, **(few if small else true))
    return StableDiffusionXLPipeline(vae(), None, None, None, None, unet, DDIMScheduler(**TABLE), add_watermarker=False)


def pixart(small: bool) -> PixArtAlphaPipeline:
    both = {
        "norm_num_groups": 32, "out_channels": 8, "num_attention_heads": 16, "attention_head_dim": 72, "cross_attention_dim": 1152, "caption_channels": 4096,
    }  # fmt: skip
    sizes = (
        {"sample_size": 16, "num_layers": 4}
        if small
        else {"sample_size": 128, "num_layers": 28, "use_additional_conditions": True}
    )
    transformer = PixArtTransformer2DModel(**both, **sizes)
    return PixArtAlphaPipeline(None, None, vae(), transformer, DDIMScheduler(**TABLE))


def cogvideox(small: bool) -> CogVideoXPipeline:
    few = {"num_layers": 2, "sample_width": 16, "sample_height": 16, "sample_frames": 9}
    transformer = CogVideoXTransformer3DModel(**(few if small else {}), use_rotary_positional_embeddings=False)
    codec = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4, block_out_channels=(8,) * 4, norm_num_groups=2, layers_per_block=1
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler(
        **TABLE, prediction_type="v_prediction", snr_shift_scale=3.0, rescale_betas_zero_snr=True, clip_sample=False
    )
    return CogVideoXPipeline(None, None, codec, transformer, scheduler)


FAMILIES = {
    "sd15": Family(sd15, lambda p: {"text": (77, p.unet.config.cross_attention_dim)}, 4),
    "sdxl": Family(sdxl, lambda p: {"text": (77, p.unet.config.cross_attention_dim), "pooled": (p.unet.config.projection_class_embeddings_input_dim - 6 * p.unet.config.addition_time_embed_dim,), "sizes": (6,)}, 1),
    "pixart": Family(pixart, lambda p: {"text": (120, p.transformer.config.caption_channels), "mask": (120,)}, 1),
    "cogvideox": Family(cogvideox, lambda p: {"text": (p.transformer.config.max_text_seq_length, p.transformer.config.text_embed_dim)}, 1),
}  # fmt: skip


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def least(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds, the least of so many runs after one that is not counted."""
    run()
    best = float("inf")
    for _ in range(repeats):
        began = clock(device)
        run()
        best = min(best, clock(device) - began)
    return best


def peak(device: torch.device) -> float | None:
    """GiB since the last call to `reset_peak_memory_stats`; None where nobody counts."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def embeddings(name: str, backbone: Backbone, dtype: torch.dtype, count: int) -> Embeddings:
    """Random conditions of `count` prompts and of the empty one."""
    shapes, rng = FAMILIES[name].cond(around_pipe(backbone)), torch.Generator().manual_seed(0)
    cond = {
        k: torch.ones(count + 1, *s) if k == "mask" else torch.randn((count + 1, *s), generator=rng)
        for k, s in shapes.items()
    }
    cond = {k: v.to(dtype) for k, v in cond.items()}
    return Embeddings(
        {k: v[:count] for k, v in cond.items()}, {k: v[count:] for k, v in cond.items()}, ["random"] * count, 0, name
    )


def around_pipe(backbone: Backbone) -> Any:
    return backbone.pipe  # type: ignore[attr-defined]


def by_role(roles: Roles, data: Embeddings, batch: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Seconds of one bare call of each role: rollout step, student with gradient, guided teacher, fake score with gradient."""
    backbone, cond, null = (
        roles.backbone,
        data.draw(batch, torch.Generator().manual_seed(0), device),
        data.unconditional(device),
    )
    x, t = (
        torch.randn(batch, *backbone.shape, device=device),
        torch.full((batch,), 499.0, dtype=torch.float64, device=device),
    )

    def trained(role: Any) -> list[Tensor | None]:
        value = roles.denoise(role, cond)(x, t).x0.sum()
        return list(torch.autograd.grad(value, list(roles.trained[role].values()), allow_unused=True))

    def teacher() -> Tensor:
        with torch.no_grad():
            return roles.teacher(cond, null, Guidance(scale=3.5))(x, t).x0

    def rollout() -> Tensor:
        with torch.no_grad():
            return roles.denoise("student", cond)(x, t).x0

    calls: dict[str, Callable[[], object]] = {
        "rollout step": rollout,
        "student": lambda: trained("student"),
        "teacher": teacher,
        "fake": lambda: trained("fake"),
    }
    return {name: least(call, device, repeats) for name, call in calls.items()}


def iterations(roles: Roles, data: Embeddings, config: TrainConfig, device: torch.device) -> float:
    """Seconds of an iteration of the training loop after the first two: the least, or where a batch has too few samples for all steps the mean."""
    loop, found = distill(roles, DistributionMatching(steps=4, warmup=0), data, config), []
    for _ in range(config.iterations):
        began = clock(device)
        next(loop)
        found.append(clock(device) - began)
    return min(found[2:]) if config.batch >= 4 else sum(found[2:]) / len(found[2:])


def reference(roles: Roles, data: Embeddings, batch: int, device: torch.device, repeats: int) -> float:
    """Eleven forward and two backward passes, of whole networks."""
    one = by_role(roles, data, batch, device, repeats)
    return 9 * one["rollout step"] + one["student"] + one["fake"]


def measure(name: str, arrangement: str, a: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """One row. Raises torch.OutOfMemoryError where it does not fit."""
    small, family = device.type == "cpu", FAMILIES[name]
    batch = a.batch or (4 if small else family.batch)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    share = arrangement == "one base"
    torch.manual_seed(0)
    pipe = family.build(small)
    denoiser = pipe.unet if "unet" in pipe.components else pipe.transformer
    denoiser.to(device, dtype if share else torch.float32)
    backbone = around(pipe, name)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    roles = make_roles(backbone, RolesConfig(lora=share, rank=a.rank, checkpointing=a.checkpointing))
    data = embeddings(name, backbone, dtype if share else torch.float32, 8)
    precision: Literal["no", "bf16"] = "bf16" if device.type == "cuda" else "no"
    config = TrainConfig(iterations=a.repeats + 2, batch=batch, lr=1e-6, fake_lr=1e-6, precision=precision)
    command = shlex.join(["python", "benchmarks/backbones.py", *sys.argv[1:]])
    row: dict[str, Any] = {
        "family": name,
        "arrangement": arrangement,
        "batch": batch,
        "dtype": str(dtype),
        "commit": commit(),
        "command": command,
    }
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        if arrangement == "reference":
            return row | {
                "seconds": reference(roles, data, batch, device, a.repeats),
                "roles": {},
                "peak_gib": None,
                "parameters": sum(p.numel() for p in denoiser.parameters()),
            }
        split = by_role(roles, data, batch, device, a.repeats)
    seconds = iterations(roles, data, config, device)
    parameters = sum(p.numel() for n, p in denoiser.named_parameters() if "lora_" not in n)
    return row | {"seconds": seconds, "roles": split, "peak_gib": peak(device), "parameters": parameters}


def hardware() -> str:
    """What the numbers were measured on."""
    return (
        torch.cuda.get_device_name(0)
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads, networks of few blocks"
    )


def kept(file: Path) -> list[dict[str, Any]]:
    """Rows that were measured before on the same hardware."""
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"hardware": ""}
    return found["rows"] if found["hardware"] == hardware() else []


def calls(roles: dict[str, float]) -> float:
    """Seconds of the bare calls that an iteration contains: of the four steps a sample's rollout takes one and a half on average."""
    return 1.5 * roles["rollout step"] + roles["student"] + roles["teacher"] + roles["fake"]


def by_run(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """Families by the command and the commit that measured them."""
    found: dict[tuple[str, str], list[str]] = {}
    for r in rows:
        of = found.setdefault((r["command"], r["commit"]), [])
        of += [r["family"]] * (r["family"] not in of)
    return found


def write(rows: list[dict[str, Any]], a: argparse.Namespace) -> None:
    """The table and the rows."""
    write_json(a.to / "backbones.json", {"rows": rows, "hardware": hardware(), "seeds": [0]})
    lines = []
    for r in rows:
        split = ", ".join(f"{k} {v:.3f}" for k, v in r["roles"].items())
        memory = "-" if r["peak_gib"] is None else f"{r['peak_gib']:.1f} GiB"
        other = {
            o["arrangement"]: f"{o['seconds'] / r['seconds']:.2f}"
            for o in rows
            if o["family"] == r["family"] and o is not r
        }
        against = (
            [f"{r['seconds'] / calls(r['roles']):.2f}", other.get("three copies", ""), other.get("reference", "")]
            if r["roles"]
            else [""] * 3
        )
        size = f"{r['parameters'] / 1e6:.0f}M"
        cells = [r["family"], size, f"{r['batch']}", r["arrangement"], f"{r['seconds']:.3f}", *against, memory, split]
        lines.append(f"| {' | '.join(cells)} |")
    runs = [
        f"- {', '.join(of)}: `{command}`, commit {commit}, {hardware()}, torch {torch.__version__}"
        for (command, commit), of in by_run(rows).items()
    ]
    text = f"""# What an iteration costs, family by family

{(__doc__ or "").split(chr(10) * 2)[2].strip()}

{chr(10).join(runs)}

| family | parameters | batch | arrangement | seconds | of its calls alone | copies take | reference takes | peak | a call of each role, s |
|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(lines)}
"""
    (a.to / "backbones.md").write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--arrangements", nargs="*", default=["one base", "three copies", "reference"])
    parser.add_argument("--batch", type=int, default=0, help="samples an iteration; 0: each family's own")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true", help="keep only the inputs of the networks' blocks")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent)
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = [r for r in kept(a.to / "backbones.json") if r["family"] not in a.only]
    for name in a.only:
        for arrangement in a.arrangements:
            try:
                rows.append(measure(name, arrangement, a, device))
                print(json.dumps(rows[-1]), flush=True)
            except torch.OutOfMemoryError:
                print(f"{name}, {arrangement}: does not fit this card", flush=True)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            write(sorted(rows, key=lambda r: list(FAMILIES).index(r["family"])), a)


if __name__ == "__main__":
    main()
