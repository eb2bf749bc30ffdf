"""The workflow calls a student in ComfyUI as it was trained.

Its noise levels are those that ComfyUI 0.7 itself computed.
"""

import itertools
import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from fewstep.backbones.families import FAMILIES
from fewstep.backbones.family import ComfyParts
from fewstep.backbones.sizes import Size
from fewstep.core.guidance import Guidance
from fewstep.core.schedule import Flow, Schedule
from fewstep.core.timegrid import uniform
from fewstep.student.card import StudentCard
from fewstep.student.comfyui import checkpoint_name, gap, levels, obstacle, simple, table, workflow

from .card import CARD
from .programs import BETAS, EPS, ZERO, V, on, process

# ComfyUI's `simple` on its own tables: at 4 steps the student's times 999, 749, 499, 249, at 3 one of them is another.
COMFYS = {
    (False, 4): [14.614641, 4.081729, 1.612886, 0.693205],
    (True, 4): [4518.763672, 5.398738, 1.76808, 0.727056],
    (False, 3): [14.614641, 2.918307, 0.932358],
    (False, 7): [14.614641, 6.70163, 3.528203, 2.061671, 1.276235, 0.790061, 0.438062],
}
INPUTS = {  # of ComfyUI's nodes, all of which it requires
    "CheckpointLoaderSimple": {"ckpt_name"},
    "LoraLoader": {"model", "clip", "lora_name", "strength_model", "strength_clip"},
    "ModelSamplingDiscrete": {"model", "sampling", "zsnr"},
    "ModelSamplingSD3": {"model", "shift"},
    "CLIPTextEncode": {"text", "clip"},
    "EmptyLatentImage": {"width", "height", "batch_size"},
    "EmptySD3LatentImage": {"width", "height", "batch_size"},
    "KSampler": {
        "model",
        "seed",
        "steps",
        "cfg",
        "sampler_name",
        "scheduler",
        "positive",
        "negative",
        "latent_image",
        "denoise",
    },
    "KSamplerSelect": {"sampler_name"},
    "ManualSigmas": {"sigmas"},
    "FluxGuidance": {"conditioning", "guidance"},
    "DualCLIPLoader": {"clip_name1", "clip_name2", "type"},
    "SamplerCustom": {
        "model",
        "add_noise",
        "noise_seed",
        "cfg",
        "positive",
        "negative",
        "sampler",
        "sigmas",
        "latent_image",
    },
    "VAEDecode": {"samples", "vae"},
    "SaveImage": {"filename_prefix", "images"},
    "UNETLoader": {"unet_name", "weight_dtype"},
    "CLIPLoader": {"clip_name", "type"},
    "VAELoader": {"vae_name"},
    "LoraLoaderModelOnly": {"model", "lora_name", "strength_model"},
    "EmptyHunyuanLatentVideo": {"width", "height", "length", "batch_size"},
    "Wan22ImageToVideoLatent": {"vae", "width", "height", "length", "batch_size"},
    "CreateVideo": {"images", "fps"},
    "SaveVideo": {"video", "filename_prefix", "format", "codec"},
}


def nodes(
    card: StudentCard,
    pipeline: str,
    schedule: Schedule,
    config: dict[str, Any],
    size: Size = 512,
    parts: ComfyParts | None = None,
) -> dict[str, dict[str, Any]]:
    """What each kind of node is told; checks that all it needs is there, and that links lead somewhere."""
    graph = workflow(card, FAMILIES[pipeline], "x-kohya.safetensors", size, schedule, config, parts)
    assert graph is not None
    graph = json.loads(json.dumps(graph))
    links = [v for node in graph.values() for v in node["inputs"].values() if isinstance(v, list)]
    assert links and all(source in graph for source, _ in links)
    assert all(set(node["inputs"]) == INPUTS[node["class_type"]] for node in graph.values())
    return {node["class_type"]: node["inputs"] for node in graph.values()}


def read(sigmas: str) -> list[float]:
    """As ComfyUI's node reads them."""
    return [float(i) for i in re.findall(r"[-+]?(?:\d*\.*\d+)", sigmas)]


def test_a_workflow_takes_the_students_steps_without_guidance_at_strength_one() -> None:
    told = nodes(CARD, "StableDiffusionPipeline", process(EPS), EPS)
    assert (told["LoraLoader"]["lora_name"], told["LoraLoader"]["strength_model"]) == ("x-kohya.safetensors", 1.0)
    sampler = told["KSampler"]
    assert (sampler["steps"], sampler["cfg"], sampler["sampler_name"], sampler["scheduler"]) == (
        4,
        1.0,
        "euler",
        "simple",
    )
    assert told["CheckpointLoaderSimple"]["ckpt_name"] == "model.safetensors"
    assert (told["EmptyLatentImage"]["width"], told["EmptyLatentImage"]["height"]) == (512, 512)


@pytest.mark.parametrize("own", [False, True])
def test_a_video_model_of_parts(own: bool) -> None:
    """Wan 2.1 and 2.2-5B: network, text encoder and autoencoder have files of their own."""
    base = f"Wan-AI/Wan2.{'2-TI2V-5B' if own else '1-T2V-1.3B'}-Diffusers"
    schedule, config = Flow(shift=5.0), {"num_train_timesteps": 1000, "shift": 5.0}
    times = {"4": uniform(schedule, 4).tolist()}
    card = replace(CARD, base=base, prediction="", timesteps=times)
    parts = ComfyParts("Wan22ImageToVideoLatent" if own else "EmptyHunyuanLatentVideo", "t5", "wan", "vae", own, fps=24)
    told = nodes(card, "WanPipeline", schedule, config, "832x480x81", parts)
    latent = told[parts.latent]
    assert (latent["width"], latent["height"], latent["length"]) == (832, 480, 81)
    assert latent.get("vae") == (["31", 0] if own else None) and told["VAEDecode"]["vae"] == ["31", 0]
    assert told["UNETLoader"]["unet_name"] == f"wan2.{'2_ti2v_5B' if own else '1_t2v_1.3B'}_fp16.safetensors"
    assert told["CLIPLoader"] == {"clip_name": "t5", "type": "wan"} and told["CreateVideo"]["fps"] == 24
    assert told["LoraLoaderModelOnly"]["model"] == ["1", 0] and told["ModelSamplingSD3"]["shift"] == 5.0
    assert (told["KSampler"]["steps"], told["KSampler"]["cfg"], told["KSampler"]["scheduler"]) == (4, 1.0, "simple")


@pytest.mark.parametrize("told", [True, False])
def test_a_model_whose_own_shift_will_do(told: bool) -> None:
    """Its noise levels are always given, and a network that is told its guidance is told the student's."""
    schedule, config = Flow(shift=2.0), {"num_train_timesteps": 1000, "shift": 2.0}
    times = uniform(schedule, 4).tolist()
    base = "black-forest-labs/FLUX.1-dev" if told else "Tongyi-MAI/Z-Image"
    card = replace(CARD, base=base, prediction="", timesteps={"4": times}, guidance=Guidance(scale=3.5))
    parts = ComfyParts("EmptySD3LatentImage", "a", "flux", "vae", second_encoder="b" * told, shift="", told=told)
    graph = nodes(card, "FluxPipeline" if told else "ZImagePipeline", schedule, config, 1024, parts)
    assert read(graph["ManualSigmas"]["sigmas"]) == pytest.approx([*times[:-1], 0.0])
    assert graph["SamplerCustom"]["model"] == ["2", 0] and "ModelSamplingSD3" not in graph
    assert graph["SamplerCustom"]["positive"] == (["33", 0] if told else ["3", 0])
    if told:
        assert graph["FluxGuidance"] == {"conditioning": ["3", 0], "guidance": 3.5}
        assert graph["DualCLIPLoader"] == {"clip_name1": "a", "clip_name2": "b", "type": "flux"}


@pytest.mark.parametrize(
    ("pipeline", "encoder", "kind", "vae"),
    [
        ("QwenImagePipeline", "qwen_2.5_vl_7b_fp8_scaled", "qwen_image", "qwen_image_vae"),
        ("ZImagePipeline", "qwen_3_4b", "lumina2", "ae"),
        ("Krea2Pipeline", "qwen3vl_4b_fp8_scaled", "krea2", "qwen_image_vae"),
        ("QwenImage21Pipeline", "qwen3vl_8b_int8_convrot", "qwen_image", "qwen_image_2.1_vae_bf16"),
    ],
)
def test_parts_are_those_of_comfyuis_templates(pipeline: str, encoder: str, kind: str, vae: str) -> None:
    parts = FAMILIES[pipeline].comfyui_parts(None)
    assert parts is not None and (parts.encoder, parts.kind, parts.vae) == (
        f"{encoder}.safetensors",
        kind,
        f"{vae}.safetensors",
    )
    assert parts.latent in ("EmptySD3LatentImage", "EmptyLatentImage") and not parts.shift


def chain(graph: dict[str, Any], node: str) -> list[str]:
    """The files from a sampler's model down to the network."""
    told = graph[node]["inputs"]
    name = next((told[k] for k in ("lora_name", "unet_name") if k in told), "")
    return [name] * bool(name) + (chain(graph, told["model"][0]) if "model" in told else [])


def test_a_pair_of_networks() -> None:
    """Wan 2.2-A14B: each network takes the steps on its side of the boundary."""
    schedule, config = Flow(shift=3.0), {"num_train_timesteps": 1000, "shift": 3.0}
    times = uniform(schedule, 4).tolist()  # 1, 0.9, 0.75, 0.5
    base = "Wan-AI/Wan2.2-T2V-A14B-Diffusers + low_style.safetensors@0.5 + style-high.safetensors"
    card = replace(CARD, base=base, prediction="", timesteps={"4": times})
    parts = ComfyParts("EmptyHunyuanLatentVideo", "t5", "wan", "vae", fps=16)
    family, of = FAMILIES["WanPipeline"], ("832x480x81", schedule, config, parts)
    for boundary, counts in ((0.875, [2, 2]), (0.4, [4]), (1.1, [4])):
        graph = workflow(card, family, "high.safetensors", *of, boundary, "low.safetensors")
        assert graph is not None
        graph = json.loads(json.dumps(graph))
        links = [v for node in graph.values() for v in node["inputs"].values() if isinstance(v, list)]
        assert all(source in graph for source, _ in links)
        assert all(set(node["inputs"]) == INPUTS[node["class_type"]] for node in graph.values())
        stages = [n["inputs"] for n in graph.values() if n["class_type"] == "SamplerCustom"]
        stages.sort(key=lambda s: not s["add_noise"])
        walked = [read(graph[s["sigmas"][0]]["inputs"]["sigmas"]) for s in stages]
        assert [len(w) - 1 for w in walked] == counts and [s["add_noise"] for s in stages] == [True, False][
            : len(counts)
        ]
        assert [v for w in walked for v in w[:-1]] == pytest.approx(times[:-1]) and walked[-1][-1] == 0
        assert all(a[-1] == b[0] for a, b in itertools.pairwise(walked))

        high, low = (
            ["high.safetensors", "style-high.safetensors", "wan2.2_t2v_high_noise_14B_fp16.safetensors"],
            ["low.safetensors", "low_style.safetensors", "wan2.2_t2v_low_noise_14B_fp16.safetensors"],
        )
        wanted = [high, low] if len(counts) == 2 else [low if boundary > 1 else high]
        assert [chain(graph, s["model"][0]) for s in stages] == wanted
        assert graph["7"]["inputs"]["samples"] == ["6", 0] and stages[-1] == graph["6"]["inputs"]


def test_fresh_noise_is_comfyuis_sampler_lcm() -> None:
    """Of a pair, the second sampler has another seed: with the same it would draw the first one's noise again."""
    schedule, config = Flow(shift=3.0), {"num_train_timesteps": 1000, "shift": 3.0}
    card = on(schedule, solver="renoise", base="Wan-AI/Wan2.2-T2V-A14B-Diffusers")
    parts = ComfyParts("EmptyHunyuanLatentVideo", "t5", "wan", "vae", fps=16)
    graph = workflow(
        card,
        FAMILIES["WanPipeline"],
        "high.safetensors",
        "832x480x81",
        schedule,
        config,
        parts,
        0.875,
        "low.safetensors",
    )
    assert graph is not None
    seeds = {n["inputs"]["noise_seed"] for n in graph.values() if n["class_type"] == "SamplerCustom"}
    assert graph["21"]["inputs"] == {"sampler_name": "lcm"} and seeds == {0, 1}
    told = nodes(on(schedule, solver="renoise"), "StableDiffusion3Pipeline", schedule, config)
    assert told["KSampler"]["sampler_name"] == "lcm"


def test_styles_that_were_fused_into_the_base_come_before_the_student() -> None:
    card = replace(CARD, base="a.safetensors + some/style.safetensors@0.5")
    graph = workflow(card, FAMILIES["StableDiffusionPipeline"], "x-kohya.safetensors", 512, process(EPS), EPS)
    assert graph is not None
    assert [
        (n["inputs"]["lora_name"], n["inputs"]["strength_model"])
        for n in graph.values()
        if n["class_type"] == "LoraLoader"
    ] == [
        ("style.safetensors", 0.5),
        ("x-kohya.safetensors", 1.0),
    ]
    assert graph["2"]["inputs"]["model"] == ["9", 0] and graph["9"]["inputs"]["model"] == ["1", 0]


@pytest.mark.parametrize(
    ("config", "said"), [(EPS, ("eps", False)), (V, ("v_prediction", False)), (ZERO, ("v_prediction", True))]
)
@pytest.mark.parametrize("pipeline", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_what_the_network_predicts_is_said_and_goes_before_the_sampler(
    config: dict[str, Any], said: tuple[str, bool], pipeline: str
) -> None:
    """Also where the checkpoint carries no mark of it."""
    told = nodes(CARD, pipeline, process(config), config)
    assert (told["ModelSamplingDiscrete"]["sampling"], told["ModelSamplingDiscrete"]["zsnr"]) == said
    assert told["KSampler"]["model"] == ["20", 0] and told["ModelSamplingDiscrete"]["model"] == ["2", 0]


@pytest.mark.parametrize("shift", [3.0, 1.0, 2.5])
def test_stable_diffusion_3_is_told_its_shift(shift: float) -> None:
    told = nodes(on(Flow(shift=shift)), "StableDiffusion3Pipeline", Flow(shift=shift), {"shift": shift})
    assert told["ModelSamplingSD3"]["shift"] == shift
    assert told["KSampler"]["model"] == ["20", 0]
    assert levels(Flow(shift=3.0), uniform(Flow(shift=3.0), 4)[:-1].tolist()) == pytest.approx([1.0, 0.9, 0.75, 0.5])


@pytest.mark.parametrize(("zero", "steps"), COMFYS)
def test_noise_levels_are_comfyuis(zero: bool, steps: int) -> None:
    schedule = process(ZERO if zero else EPS)
    assert [float(table(zero)[int(t)]) for t in simple(schedule, steps)] == pytest.approx(COMFYS[zero, steps], rel=1e-6)
    own = levels(schedule, simple(schedule, steps).tolist())
    assert own[1:] == pytest.approx(
        COMFYS[zero, steps][1:], rel=1e-5
    )  # noise without signal is infinite, and clamped in both


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("shift", [1.0, 2.0])
@pytest.mark.parametrize(("config", "solver"), [(EPS, "ddim"), (EPS, "dpmpp"), (ZERO, "ddim"), (ZERO, "dpmpp")])
def test_comfyui_asks_the_network_at_the_students_times(
    config: dict[str, Any], solver: str, shift: float, steps: int
) -> None:
    """It rounds a noise level to the nearest of its table in the logarithm."""
    schedule = process(config)
    card = on(schedule, steps, shift, solver=solver)
    told = nodes(card, "StableDiffusionPipeline", schedule, config)
    times = card.timesteps[str(steps)][:-1]
    if "KSampler" in told:
        assert 1000 % steps == 0
        assert [999 - int(i * 1000 / steps) for i in range(steps)] == times
        return
    assert told["KSamplerSelect"]["sampler_name"] == {"ddim": "euler", "dpmpp": "dpmpp_2m"}[solver]
    *sigmas, last = read(told["ManualSigmas"]["sigmas"])
    assert last == 0
    known = table(bool(config.get("rescale_betas_zero_snr"))).float().log()
    assert [(known - torch.tensor(s).log()).abs().argmin().item() for s in sigmas] == times


@pytest.mark.parametrize(("steps", "shift"), [(3, 1.0), (6, 1.0), (7, 1.0), (4, 1.7)])
def test_flow_is_told_the_levels_that_no_scheduler_visits(steps: int, shift: float) -> None:
    schedule = Flow(shift=3.0)
    told = nodes(on(schedule, steps, shift), "StableDiffusion3Pipeline", schedule, {"shift": 3.0})
    assert read(told["ManualSigmas"]["sigmas"]) == pytest.approx(uniform(schedule, steps, shift).tolist(), abs=1e-7)


def test_the_gap_to_simple_is_in_times_of_the_table() -> None:
    schedule = process(EPS)
    assert [gap(schedule, uniform(schedule, k)[:-1].tolist()) for k in (1, 2, 4, 5, 8)] == [0.0] * 5
    assert all(0 < gap(schedule, uniform(schedule, k)[:-1].tolist()) <= 1 + 1e-9 for k in (3, 6, 7))
    assert gap(schedule, uniform(schedule, 4, 2.0)[:-1].tolist()) > 50


@pytest.mark.parametrize(
    ("card", "pipeline", "config", "why"),
    [
        (CARD, "PixArtAlphaPipeline", EPS, "it loads no checkpoint of this family by itself"),
        (replace(CARD, head="span"), "StableDiffusionPipeline", EPS, "no sampler like this student's .a head."),
        (
            replace(CARD, analytic_first_step=True),
            "StableDiffusionPipeline",
            EPS,
            "no sampler like this student's .an analytic first step.",
        ),
        (
            replace(CARD, solver={"4": "ipndm"}),
            "StableDiffusionPipeline",
            EPS,
            "no sampler like this student's .ipndm.",
        ),
        (replace(CARD, base="emoji"), "StableDiffusionPipeline", EPS, "no file of the base is known"),
        (replace(CARD, base="somebody/their-model"), "StableDiffusionPipeline", EPS, "no file of the base is known"),
        (
            replace(CARD, base="a.safetensors + some/style@0.5"),
            "StableDiffusionPipeline",
            EPS,
            "a LoRA that is fused into the base is no file",
        ),
        (replace(CARD, weights="full"), "StableDiffusionPipeline", EPS, "the student is no LoRA"),
        (
            CARD,
            "StableDiffusionPipeline",
            BETAS,
            "their noise levels are Stable Diffusion's, and the base was trained on others",
        ),
    ],
)
def test_there_is_no_workflow_that_could_not_run(
    card: StudentCard, pipeline: str, config: dict[str, Any], why: str
) -> None:
    assert workflow(card, FAMILIES[pipeline], "x.safetensors", 512, process(config), config) is None
    assert re.search(why, obstacle(card, FAMILIES[pipeline], process(config), config))


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("folder/My mix #2.safetensors", "My mix #2.safetensors"),
        ("folder/a.safetensors@configs", "a.safetensors"),
        ("a.safetensors + style.safetensors@0.8", "a.safetensors"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "sd_xl_base_1.0.safetensors"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "v1-5-pruned-emaonly.safetensors"),
        ("krea/Krea-2-Raw", "krea2_raw_bf16.safetensors"),
        ("Qwen/Qwen-Image-2512", "qwen_image_2512_bf16.safetensors"),
        ("Qwen/Qwen-Image-2.1", "qwen_image_2.1_bf16.safetensors"),
        ("stabilityai/stable-diffusion-3.5-large", "sd3.5_large_fp8_scaled.safetensors"),
        ("some/folder", ""),
        ("emoji", ""),
    ],
)
def test_the_checkpoint_is_one_that_the_user_has(base: str, name: str) -> None:
    assert checkpoint_name(base) == name
