"""Measure what distilling each model family costs at its true size.

    python benchmarks/backbones.py                          # what fits here; writes benchmarks/backbones.md and .json
    python benchmarks/backbones.py --only sd15 --batch 8    # measures that family again and keeps the others

The networks have random weights. Three arrangements of the same TDM iteration, 4 steps with a guided teacher:
`one base` keeps teacher, student and fake score as LoRA adapters of one frozen network. `three copies` trains all
weights of two copies. `reference` is the bare network calls of the public demo script: eleven forward and two
backward passes on three networks, without its text encoder, optimizer and bookkeeping. Conditions are random tensors
of the true shapes. On a CPU the networks have few of their blocks, at true width, and small states (a U-Net has its
first two blocks). There only ratios mean anything: next to narrow networks an adapter of rank 32 would look expensive.
Seconds on a CPU are those of its threads. `flux2` is FLUX.2-klein-4B, `wan` Wan 2.1-1.3B; on a CPU their texts have few
tokens, too. Three copies of `flux2` take more memory than that machine has.
"""

import argparse
import gc
import json
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLFlux2,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from fewstep.backbones.base import Backbone
from fewstep.backbones.load import around, at_size
from fewstep.backbones.sizes import Size
from fewstep.core import timegrid
from fewstep.core.guidance import Guidance
from fewstep.data.prompts import Embeddings
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.roles.roles import Roles, RolesConfig, make_roles
from fewstep.training.loop import TrainConfig, distill
from records import CLOCK, Facts, Record, about, machine, markdown, new_record, origin, stored_rows, write_record

TABLE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
}


@dataclass(frozen=True)
class Family:
    """A model family: its pipeline, the shapes of a prompt's conditions, and a batch that fits."""

    build: Callable[[bool], Any]  # True: with few blocks
    cond: Callable[[Any], Mapping[str, tuple[int, ...]]]
    batch: int
    small_size: Size | None = None  # with few blocks; None: as the networks' settings have it


def vae() -> AutoencoderKL:
    """Return an autoencoder that never runs; only its scale factor of 8 counts."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
    )


def clip(width: int, projected: bool = False) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Return a text encoder that never runs; only its width counts."""
    few = {"intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    config = CLIPTextConfig(hidden_size=width, projection_dim=width, **few)
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def t5(width: int = 4096) -> T5EncoderModel:
    """Return a text encoder that never runs; only its width counts."""
    return T5EncoderModel(T5Config(d_model=width, d_kv=8, d_ff=8, num_layers=1, num_heads=1, vocab_size=8))


def sd15(small: bool) -> StableDiffusionPipeline:
    """Return Stable Diffusion 1.5 with random weights."""
    few: dict[str, Any] = {
        "block_out_channels": (320, 640),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    unet = UNet2DConditionModel(sample_size=16 if small else 64, cross_attention_dim=768, **(few if small else {}))
    return StableDiffusionPipeline(
        vae(), clip(768), None, unet, DDIMScheduler(**TABLE), None, None, requires_safety_checker=False
    )


def sdxl(small: bool) -> StableDiffusionXLPipeline:
    """Return Stable Diffusion XL with random weights."""
    both: dict[str, Any] = {
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    true: dict[str, Any] = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }
    few: dict[str, Any] = {
        "sample_size": 16,
        "block_out_channels": (320, 640),
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (5, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    unet = UNet2DConditionModel(**both, **(few if small else true))
    texts = clip(768), clip(1280, projected=True), None, None
    return StableDiffusionXLPipeline(vae(), *texts, unet, DDIMScheduler(**TABLE), add_watermarker=False)


def pixart(small: bool) -> PixArtAlphaPipeline:
    """Return PixArt-alpha with random weights."""
    both: dict[str, Any] = {
        "norm_num_groups": 32,
        "out_channels": 8,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "cross_attention_dim": 1152,
        "caption_channels": 4096,
    }
    few: dict[str, Any] = {"sample_size": 16, "num_layers": 4}
    true: dict[str, Any] = {"sample_size": 128, "num_layers": 28, "use_additional_conditions": True}
    transformer = PixArtTransformer2DModel(**both, **(few if small else true))
    return PixArtAlphaPipeline(None, t5(), vae(), transformer, DDIMScheduler(**TABLE))


def cogvideox(small: bool) -> CogVideoXPipeline:
    """Return CogVideoX-2B with random weights."""
    few: dict[str, Any] = {"num_layers": 2, "sample_width": 16, "sample_height": 16, "sample_frames": 9}
    transformer = CogVideoXTransformer3DModel(**(few if small else {}), use_rotary_positional_embeddings=False)
    codec = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        norm_num_groups=2,
        layers_per_block=1,
    )
    scheduler = CogVideoXDDIMScheduler(
        **TABLE, prediction_type="v_prediction", snr_shift_scale=3.0, rescale_betas_zero_snr=True, clip_sample=False
    )
    return CogVideoXPipeline(None, t5(), codec, transformer, scheduler)


def flux2(small: bool) -> Flux2KleinPipeline:
    """Return FLUX.2-klein-4B with random weights."""
    codec = AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), norm_num_groups=8, layers_per_block=1)
    transformer = Flux2Transformer2DModel(
        num_layers=1 if small else 5,
        num_single_layers=1 if small else 20,
        num_attention_heads=24,
        joint_attention_dim=7680,
        guidance_embeds=False,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return Flux2KleinPipeline(scheduler, codec, None, None, transformer)


def wan(small: bool) -> WanPipeline:
    """Return Wan 2.1-1.3B with random weights."""
    transformer = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=2 if small else 30)
    codec = AutoencoderKLWan(base_dim=8, num_res_blocks=1)
    with torch.device("cpu"):  # it copies its table there
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(None, t5(), codec, scheduler, transformer)


def sdxl_cond(pipe: Any) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of SDXL's conditions."""
    config = pipe.unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {"text": (77, config.cross_attention_dim), "pooled": (pooled,), "sizes": (6,)}


def cogvideox_cond(pipe: Any) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of CogVideoX's condition."""
    return {"text": (pipe.transformer.config.max_text_seq_length, pipe.transformer.config.text_embed_dim)}


def flux2_cond(pipe: Any) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of FLUX.2's condition."""
    config = pipe.transformer.config
    return {"text": (512 if config.num_layers > 2 else 16, config.joint_attention_dim)}


def wan_cond(pipe: Any) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of Wan's condition."""
    config = pipe.transformer.config
    return {"text": (512 if config.num_layers > 2 else 16, config.text_dim)}


FAMILIES = {
    "sd15": Family(sd15, lambda p: {"text": (77, p.unet.config.cross_attention_dim)}, 4),
    "sdxl": Family(sdxl, sdxl_cond, 1),
    "pixart": Family(pixart, lambda p: {"text": (120, p.transformer.config.caption_channels), "mask": (120,)}, 1),
    "cogvideox": Family(cogvideox, cogvideox_cond, 1),
    "flux2": Family(flux2, flux2_cond, 1, small_size=64),
    "wan": Family(wan, wan_cond, 1, small_size="64x64x5"),
}
ARRANGEMENTS = ("one base", "three copies", "reference")


def clock(device: torch.device) -> float:
    """Return the time in seconds, after all work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return CLOCK()


def least(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the seconds of the fastest run, after one that is not counted."""
    run()
    best = float("inf")
    for _ in range(repeats):
        began = clock(device)
        run()
        best = min(best, clock(device) - began)
    return best


def peak(device: torch.device) -> float | None:
    """Return GiB since the last call to `reset_peak_memory_stats`; None where no device counts them."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def embeddings(name: str, backbone: Backbone, dtype: torch.dtype, count: int) -> Embeddings:
    """Return random conditions of `count` prompts and of the empty prompt."""
    pipe, rng = backbone.pipe, torch.Generator().manual_seed(0)  # type: ignore[attr-defined]
    cond = {
        k: (torch.ones(count + 1, *s) if k == "mask" else torch.randn((count + 1, *s), generator=rng)).to(dtype)
        for k, s in FAMILIES[name].cond(pipe).items()
    }
    own, null = {k: v[:count] for k, v in cond.items()}, {k: v[count:] for k, v in cond.items()}
    return Embeddings(own, null, ["random"] * count, 0, name)


def by_role(roles: Roles, data: Embeddings, batch: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Return the seconds of one bare call of each role.

    The roles: a rollout step, the student with gradient, the guided teacher, the fake score with gradient.
    """
    backbone = roles.backbone
    cond, null = data.draw(batch, torch.Generator().manual_seed(0), device), data.unconditional(device)
    x = torch.randn(batch, *backbone.shape, device=device)
    t = timegrid.uniform(backbone.schedule, 2)[1].to(device).expand(batch)

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
    """Return the seconds of an iteration of the training loop.

    The first two do not count. Returns the fastest, or the mean where a batch is too small for all steps.
    """
    loop, found = distill(roles, DistributionMatching(steps=4, warmup=0), data, config), []
    for _ in range(config.iterations):
        began = clock(device)
        next(loop)
        found.append(clock(device) - began)
    return min(found[2:]) if config.batch >= 4 else sum(found[2:]) / len(found[2:])


def reference(roles: Roles, data: Embeddings, batch: int, device: torch.device, repeats: int) -> float:
    """Return the seconds of eleven forward and two backward passes of whole networks."""
    one = by_role(roles, data, batch, device, repeats)
    return 9 * one["rollout step"] + one["student"] + one["fake"]


def measure(name: str, arrangement: str, a: argparse.Namespace, device: torch.device) -> Facts:
    """Return one row. Raises torch.OutOfMemoryError where the arrangement does not fit."""
    small, family = device.type == "cpu", FAMILIES[name]
    batch = a.batch or (4 if small else family.batch)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    share = arrangement == "one base"
    torch.manual_seed(0)
    pipe = family.build(small)
    denoiser = pipe.unet if "unet" in pipe.components else pipe.transformer
    denoiser.to(device, dtype if share else torch.float32)
    backbone = at_size(around(pipe, name), family.small_size if small else None)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    roles = make_roles(backbone, RolesConfig(lora=share, rank=a.rank, checkpointing=a.checkpointing))
    data = embeddings(name, backbone, dtype if share else torch.float32, 8)
    precision: Literal["no", "bf16"] = "bf16" if device.type == "cuda" else "no"
    config = TrainConfig(iterations=a.repeats + 2, batch=batch, lr=1e-6, fake_lr=1e-6, precision=precision)
    row: Facts = {
        "family": name,
        "arrangement": arrangement,
        "blocks": "few" if small else "all",
        "batch": batch,
        "dtype": str(dtype),
        "command": shlex.join(["python", "benchmarks/backbones.py", *sys.argv[1:]]),
        **origin(),
    }
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        if arrangement == "reference":
            seconds, parameters = reference(roles, data, batch, device, a.repeats), sum_of(denoiser)
            return row | {"seconds": seconds, "roles": {}, "peak_gib": None, "parameters": parameters}
        split = by_role(roles, data, batch, device, a.repeats)
    seconds = iterations(roles, data, config, device)
    return row | {"seconds": seconds, "roles": split, "peak_gib": peak(device), "parameters": sum_of(denoiser)}


def sum_of(network: torch.nn.Module) -> int:
    """Return the number of a network's own parameters, without LoRA."""
    return sum(p.numel() for n, p in network.named_parameters() if "lora_" not in n)


def calls(roles: dict[str, float]) -> float:
    """Return the seconds of the bare calls in an iteration.

    The rollout of a sample takes one and a half of the four steps on average.
    """
    return 1.5 * roles["rollout step"] + roles["student"] + roles["teacher"] + roles["fake"]


def page(record: Record) -> str:
    """Return the page of a record."""
    lines = []
    for r in record.rows:
        beside = {o["arrangement"]: o["seconds"] for o in record.rows if o["family"] == r["family"] and o is not r}
        ratios = [""] * 3
        if r["roles"]:
            slower = (beside.get(name) for name in ("three copies", "reference"))
            ratios = [
                f"{r['seconds'] / calls(r['roles']):.2f}",
                *(f"{s / r['seconds']:.2f}" if s else "" for s in slower),
            ]
        size, memory = f"{r['parameters'] / 1e6:.0f}M", "-" if r["peak_gib"] is None else f"{r['peak_gib']:.1f} GiB"
        split = ", ".join(f"{k} {v:.3f}" for k, v in r["roles"].items())
        lines.append([r["family"], size, r["batch"], r["arrangement"], f"{r['seconds']:.3f}", *ratios, memory, split])
    head = ["family", "parameters", "batch", "arrangement", "seconds", "of its calls alone", "copies take"]
    head += ["reference takes", "peak", "a call of each role, s"]
    return f"""# What an iteration costs, family by family

{about(__doc__)}

{chr(10).join(runs(record.rows))}

{markdown(head, lines)}
"""


def runs(rows: list[Facts]) -> list[str]:
    """Return a line for each run: the families it measured, its command, and where."""
    found: dict[str, list[str]] = {}
    for r in rows:
        at = [f"`{r['command']}`", machine(r["hardware"]), f"commit {r['versions']['commit']}"]
        at += [f"torch {r['versions']['torch']}", f"{r['blocks']} blocks"]
        families = found.setdefault(", ".join(at), [])
        families += [r["family"]] * (r["family"] not in families)
    return [f"- {', '.join(families)}: {at}" for at, families in found.items()]


def main() -> None:
    """Measure families and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--arrangements", nargs="*", choices=ARRANGEMENTS, default=list(ARRANGEMENTS))
    parser.add_argument("--batch", type=int, default=0, help="samples of an iteration; 0: each family's own")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--checkpointing", action="store_true", help="keep only the inputs of the networks' blocks")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [r for r in stored_rows(a.to / "backbones.json") if r["family"] not in a.only]
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
            rows.sort(key=lambda r: list(FAMILIES).index(r["family"]))
            record = new_record("backbones", "python benchmarks/backbones.py", rows, [0], {})
            write_record(record, page(record), a.to)


if __name__ == "__main__":
    main()
