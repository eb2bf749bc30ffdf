"""The LoRA file for other programs, and its model card section."""

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..atomic import write_tensors
from ..backbones.experts import Experts, experts_of, split_state
from ..backbones.few_step import PipelineInfo
from ..backbones.layouts import shift_first
from ..core.schedule import Schedule
from ..core.solvers import SOLVERS
from .card import StudentCard, step_card
from .comfyui import TABLE, checkpoint_name, foreign, gap, obstacle
from .headers import kohya_header, own_header
from .kohya import kohya, native, renamed

# Of a U-Net; sd-scripts and stable-diffusion.cpp read no LoRA outside of these blocks.
BLOCKS = ("down_blocks", "mid_block", "up_blocks")


def write_client_file(
    folder: Path,
    lora: Path,
    network: nn.Module,
    card: StudentCard,
    info: PipelineInfo,
    state: Mapping[str, Tensor],
    size: int,
) -> str:
    """Write a LoRA for programs that only know files.

    `state` is the LoRA, with alpha equal to its rank. The file of a U-Net has kohya's names, which all these
    programs read. The file of a transformer has the original program's names, which ComfyUI and diffusers read,
    or else diffusers' own. Returns the file's name, or an empty one where no program reads LoRA of the family.
    """
    name = client_file(card, info)
    if not name:
        return ""
    if not info.family.kohya:
        if isinstance(network, Experts):
            for own, tensors, part in zip(pair_files(card), split_state(state), experts_of(network), strict=True):
                names = dict(info.family.original_names(part))
                write_tensors(folder / own, native(tensors, names), own_header(card))
            return name
        names = dict(info.family.original_names(network)) if info.family.writes_original else {}
        if renamed(state, names):
            write_tensors(folder / name, native(state, names, shift_first(network)), own_header(card))
        else:
            shutil.copyfile(lora, folder / name)
        return name
    assert card.alpha is not None
    kohya_names = dict(info.family.original_names(network)) if info.family.kohya == "original" else None
    named = kohya(state, card.alpha, kohya_names)
    config: Mapping[str, Any] = network.config  # type: ignore[assignment]
    write_tensors(folder / name, named, kohya_header(card, info, config, named, size))
    return name


def client_file(card: StudentCard, info: PipelineInfo) -> str:
    """Return the name of the LoRA for programs that only know files.

    Of a pair, that of the first file. Empty where no program reads LoRA of the family, and for a student without one.
    """
    if card.weights != "lora" or not info.loads_lora:
        return ""
    if info.boundary:
        return pair_files(card)[0]
    return f"{card.name}{'-kohya' if info.family.kohya else '-lora'}.safetensors"


def pair_files(card: StudentCard) -> tuple[str, str]:
    """Return the files of a pair: for high and for low noise."""
    high, low = (f"{card.name}-{noise}-noise-lora.safetensors" for noise in ("high", "low"))
    return high, low


def other_programs(
    card: StudentCard,
    info: PipelineInfo,
    schedule: Schedule,
    config: Mapping[str, Any],
    file: str,
    layers: Collection[str],
    folder: str,
) -> str:
    """Return a model card's section on programs other than diffusers.

    Empty where there is no file for such programs. `file` is that of `write_client_file`, `layers` are those
    that the LoRA changes, and `config` is that of the base's scheduler.
    """
    if not file:
        return ""
    unet = bool(info.family.kohya)
    readers = (
        "ComfyUI, A1111, Forge, SD.Next, InvokeAI, sd-scripts and stable-diffusion.cpp"
        if unet
        else "ComfyUI and diffusers"
        if info.family.comfyui_latent or info.comfyui is not None
        else "diffusers"
    )
    if card.per_step:
        last = client_file(step_card(card, card.steps[0] - 1), info)
        rows = [
            f"`{file}` to `{last}` are the LoRAs of its steps, under the names that {readers} read. Each is for its "
            f"own step: strength 1.0, {plural_of(card.steps[0])}, CFG 1, no negative prompt.",
            _comfyui(card, info, schedule, config, folder),
        ]
        return "\n## Other programs\n\n" + "\n".join(f"- {row}" for row in rows) + "\n"
    named = f"`{file}`, with `{pair_files(card)[1]}` for the second network," if info.boundary else f"`{file}`"
    rows = [
        f"{named} is this LoRA under the names that {readers} read. "
        f"Strength 1.0, {plural_of(card.steps[0])}, CFG 1, no negative prompt."
    ]
    if unet and (why := foreign(schedule, config)):
        rows.append(f"ComfyUI, A1111 and Forge cannot sample it: {why}.")
    else:
        rows.append(_comfyui(card, info, schedule, config, folder))
        rows += [_automatic(card, schedule, config)] * unet
    if unread := [n for n in layers if n.split(".")[0] not in BLOCKS] if unet else []:
        of = f"{len(unread)} of its {len(layers)} layers ({', '.join(unread)})"
        told = f"; {card.time_layer} says its step count" if card.time_layer in unread else ""
        rows.append(
            f"sd-scripts, stable-diffusion.cpp and older diffusers leave out {of}{told}; "
            "there use `fewstep export --format merged`."
        )
    return "\n## Other programs\n\n" + "\n".join(f"- {row}" for row in rows) + "\n"


def _comfyui(card: StudentCard, info: PipelineInfo, schedule: Schedule, config: Mapping[str, Any], folder: str) -> str:
    """Return what to do in ComfyUI, or why nothing can be done."""
    name = checkpoint_name(card.base)
    if why := obstacle(card, info.family, schedule, config, info.comfyui):
        cured = bool(info.family.kohya) and not name and not card.per_step
        cure = (
            f" `fewstep export {folder} OUT --base FILE.safetensors` writes one for the checkpoint that you have."
            if cured
            else ""
        )
        return f"There is no workflow for ComfyUI: {why}.{cure}"
    return f"ComfyUI: drop `comfyui-workflow.json` on its window. It loads `{name}` and names all settings."


def _automatic(card: StudentCard, schedule: Schedule, config: Mapping[str, Any]) -> str:
    """Return what to choose in A1111 and Forge.

    The schedule `Simple` of these programs is ComfyUI's.
    """
    steps = card.steps[0]
    times, sampler = card.timesteps[str(steps)][:-1], SOLVERS[card.solver[str(steps)]].clients.get("a1111")
    if card.head or card.analytic_first_step or sampler is None:
        return "A1111, Forge: they have no sampler that steps as this student does."
    if (off := gap(schedule, times)) > 1.001:
        return "A1111, Forge: none of their schedules has this student's times."
    there = "which has exactly its times" if off == 0 else f"which is off by one of {TABLE} times at most"
    own = ["v-prediction"] * (config.get("prediction_type") == "v_prediction")
    own += ["zero terminal SNR"] * bool(config.get("rescale_betas_zero_snr"))
    base = f", the base set to {' and '.join(own)}" if own else ""
    return (
        f"A1111 from 1.10, Forge: sampler {sampler}, schedule type Simple, "
        f"{plural_of(steps)}, CFG scale 1{base}; {there}."
    )


def plural_of(steps: int) -> str:
    """Return `1 step`, `4 steps`."""
    return f"{steps} step{'s' if steps > 1 else ''}"
