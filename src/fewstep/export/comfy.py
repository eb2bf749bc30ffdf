"""A ComfyUI workflow that calls a student as it was trained: its steps, its times, strength 1.0, no guidance."""

from typing import Any

from ..backbones.load import source_of
from .card import StudentCard

SAMPLERS = {"ddim": "euler", "dpmpp": "dpmpp_2m", "renoise": "lcm"}  # Euler's steps on noise levels are DDIM's
LATENTS = {  # of the pipelines whose checkpoints ComfyUI loads by itself
    "StableDiffusionPipeline": "EmptyLatentImage",
    "StableDiffusionXLPipeline": "EmptyLatentImage",
    "StableDiffusion3Pipeline": "EmptySD3LatentImage",
}


def workflow(card: StudentCard, pipeline: str, lora: str, size: int, even: bool = True) -> dict[str, Any] | None:
    """In ComfyUI's API format, ready to be dropped on its window; None where it has no nodes for it.

    Its `simple` scheduler visits the K-th parts of the table of times, which are the student's where these are `even`.
    """
    solver = card.solver[str(card.steps[0])]
    if not even or pipeline not in LATENTS or solver not in SAMPLERS or card.head or card.free_first:
        return None

    def node(kind: str, inputs: dict[str, Any]) -> dict[str, Any]:
        return {"class_type": kind, "inputs": inputs}

    base = source_of(card.base)
    graph = {"1": node("CheckpointLoaderSimple", {"ckpt_name": f"{base.names[0]}.safetensors"})}
    last = "1"
    for key, (name, strength) in zip(
        [*(str(9 + i) for i in range(len(base.loras))), "2"],
        [*((path.rsplit("/", 1)[-1], s) for path, s in base.loras), (lora, 1.0)],
        strict=True,
    ):
        loaded = {"lora_name": name, "strength_model": strength, "strength_clip": strength, "model": [last, 0], "clip": [last, 1]}
        graph[key], last = node("LoraLoader", loaded), key
    return graph | {
        "3": node("CLIPTextEncode", {"text": "a prompt", "clip": ["2", 1]}),
        "4": node("CLIPTextEncode", {"text": "", "clip": ["2", 1]}),
        "5": node(LATENTS[pipeline], {"width": size, "height": size, "batch_size": 1}),
        "6": node("KSampler", {
            "seed": 0, "steps": card.steps[0], "cfg": 1.0, "sampler_name": SAMPLERS[solver], "scheduler": "simple", "denoise": 1.0,
            "model": ["2", 0], "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0],
        }),
        "7": node("VAEDecode", {"samples": ["6", 0], "vae": ["1", 2]}),
        "8": node("SaveImage", {"filename_prefix": card.name, "images": ["7", 0]}),
    }  # fmt: skip
