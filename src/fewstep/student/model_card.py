"""The README.md of a student.

The page says how to call the student, what the student was made from, and the cost. A test runs the snippet.
"""

import inspect
import json
import re
from collections.abc import Sequence
from pathlib import Path

from ..backbones.denoiser_file import denoiser_file
from ..backbones.few_step import PipelineInfo, told_times
from ..backbones.files import PEFT_FOLDER
from ..backbones.load import bundled, called, hub_id, source_of
from ..backbones.single_file import PREDICTIONS, is_file, read_checkpoint
from ..backbones.sizes import call_options
from ..core.solvers import SOLVERS
from .card import StudentCard, counted, guidance_text
from .metadata import PLAIN, Shown, gallery, header


def model_card(
    card: StudentCard,
    folder: str,
    scheduler: str,
    info: PipelineInfo,
    even: bool,
    elsewhere: str = "",
    whole: bool = False,
    shift: float = 1.0,
    second: str = "",
    shown: Shown = PLAIN,
) -> str:
    """Return the model card: Markdown with a hub header.

    `folder` is the reader's name for the folder of the card, `scheduler` the class of the student's scheduler
    and `shift` its shift of times. `info` is that of the base's pipeline; times that are not `even` are passed
    where the family's schedulers take times. `elsewhere` is a section on other programs. `whole` says that the
    folder is a pipeline, which needs no base. `second` is the file with the LoRA of a pair's second network.
    `shown` is what a card on the hub has more.
    """
    steps, home, at = card.steps[0], _text(called(card.base)), _text(folder)
    times = ", ".join(f"{t:g}" for t in card.timesteps[str(steps)][:-1])
    told = card.guidance.scale if info.embeds_guidance else 1.0
    asked = {k: v for k, v in info.family.guidance(told, 1).items() if v is not None}
    guided = ", ".join(f"{k}={v!r}" for k, v in asked.items())
    first = list(inspect.signature(info.family.pipeline.__call__).parameters)[1]
    named = "" if first == "prompt" else "prompt="
    counts = " or ".join(map(str, card.steps))
    part, peft = f"pipe.{info.part}", card.weights == "lora" and not info.loads_lora
    lora = (
        f"{part} = PeftModel.from_pretrained({part}, {at}, subfolder={_text(PEFT_FOLDER)})"
        if peft
        else f"pipe.load_lora_weights({at})"
    )
    full = "\n".join(
        f'{own} = type({own}).from_pretrained({at}, subfolder="{own.removeprefix("pipe.")}")'
        for own in ([part, f"{part}_2"] if info.boundary else [part])
    )
    if second:
        lora += f'\npipe.load_lora_weights({at}, weight_name="{second}", load_into_transformer_2=True)'
    load = {"lora": lora, "full": full}.get(card.weights, "")
    kind = {
        "lora": f"LoRA of rank {card.rank}, alpha {card.alpha or 0:g}; load it at strength 1.0",
        "full": "all weights of the network",
    }.get(card.weights, "those of the base, as they are")
    if card.per_step:
        one = f"a LoRA of rank {card.rank}, for strength 1.0" if card.weights == "lora" else "a whole network"
        kind = f"for each step {one}, in `step_1` to `step_{steps}`"
    base, ours = (
        (f"{info.family.name}.from_pretrained({at})", False) if whole else base_loading(card.base, info.family.name)
    )
    names = [info.family.name] if whole else sorted([scheduler] if ours else [scheduler, info.family.name])
    imports = "\n".join(
        ["import torch", f"from diffusers import {', '.join(names)}"]
        + ["from peft import PeftModel"] * peft
        + ["\nimport fewstep"] * ours
    )
    others = (
        ""
        if len(card.steps) == 1
        else f"""
The files alone are the student of {steps} step{"s" if steps > 1 else ""}. fewstep conditions it on the others: \
`fewstep.load({home}, {at})("a prompt", num_inference_steps={card.steps[-1]})`;
`fewstep export {folder} OUT --steps {card.steps[-1]}` writes files that are right for another count by themselves."""
    )
    sized = "".join(f", {k}={v}" for k, v in call_options(card.size).items())
    result = "frame" if info.family.video else "image"
    # A head corrects every step. No stock scheduler has an analytic first step, or the steps of some solvers.
    # Such students need fewstep at hand.
    stock = (even or bool(info.told_by)) and not (
        card.per_step or card.head or card.analytic_first_step or not SOLVERS[card.solver[str(steps)]].stock
    )
    own = told_times(info.family, shift, card.timesteps[str(steps)][:-1])
    how = f"num_inference_steps={steps}" if even else "".join(f"{k}={list_of(v)}" for k, v in own.items())
    student = "" if whole else f'{load}\npipe.scheduler = {scheduler}.from_pretrained({at}, subfolder="scheduler")\n'
    snippet = f"""{imports}

pipe = {base}
{student}{result} = pipe({named}"a prompt", {how}, {guided}{sized}, \
generator=torch.Generator().manual_seed(0)).{result}s[0]"""
    with_fewstep = f"""import torch

import fewstep

pipe = fewstep.load({home}, {at})
{result} = pipe("a prompt", generator=torch.Generator().manual_seed(0)).{result}s[0]"""
    if not info.family.takes_prompts or (card.per_step and card.weights == "full"):
        asked_for, end = ("a prompt", "") if info.family.takes_prompts else ("", "  # or names of classes")
        stock, with_fewstep = (
            False,
            f"""import fewstep

images = fewstep.sample(fewstep.load_student({at}), ["{asked_for}"]){end}""",
        )
    head = (
        f"\n| head | {card.head}, in trajp.safetensors: corrects the direction of every step, "
        "without a network evaluation |"
        if card.head
        else ""
    )
    beyond = "fewstep alone has its solver: in another program its files are another model."
    if card.per_step:
        beyond = "fewstep alone changes the weights from step to step: in another program one step's are another model."
    if stock:
        beyond = (
            "With fewstep the settings come from the folder: "
            f'`fewstep.load({at if whole else home}, {at})("a prompt")`.'
        )
    if stock and whole:
        beyond = (
            "Steps and guidance have to be said: "
            f"by itself diffusers takes 50 guided steps, which it was not made for. {beyond}"
        )
    if stock and info.family.alone:
        beyond = f"Call it with one prompt at a time: in a batch diffusers draws the shorter ones otherwise. {beyond}"
    if stock and info.family.needs:
        beyond = f"diffusers needs {info.family.needs} for it: `pip install {info.family.needs}`. {beyond}"
    if stock and scheduler == "FlowMatchEulerDiscreteScheduler" and SOLVERS[card.solver[str(steps)]].stochastic:
        beyond = (
            "Every step draws fresh noise from torch's own generator, whatever `generator` is: "
            f"`torch.manual_seed(0)` before the call repeats an image. {beyond}"
        )
    free = "; the first step is analytic, without a network evaluation" if card.analytic_first_step else ""
    baked = "told to the network" if info.embeds_guidance else "baked in"
    guidance = f"{baked}: call it with `{guided}` (the teacher's guidance: {guidance_text(card)})"
    if card.guidance_scales:
        served = ", ".join(f"{w:g}" for w in card.guidance_scales)
        guidance = (
            f"conditioned on: with fewstep {served} by `guidance_scale`; the files alone are the student of the first"
        )
    tag = tag_of(info)
    tags = [tag, *(["lora"] if card.weights == "lora" else []), "few-step", card.method]
    own_base = (
        ""
        if hub_id(card.base) or card.base in bundled()
        else f" Put your own path in place of {home}, the base that it was made on."
    )
    return f"""{header(card, "diffusers", tag, tags, shown)}# {plain(card.name)}
{gallery(shown)}
A {steps}-step generator distilled from {_code(called(card.base))} \
with {plain(card.method.upper())}, from {plain(card.data)}.

| | |
|---|---|
| steps | {counts} |
| NFE of an image | {counted(card)} |
| timesteps | {times} |
| solver | {card.solver[str(steps)]}{free} |
| guidance | {guidance}; a negative prompt has no effect |
| weights | {kind} |{head}
| base weights | SHA-256 {card.base_hash}... |
| cost | {card.iterations} iterations, {card.train_seconds / 60:.1f} minutes on {card.hardware} |

```python
{snippet if stock else with_fewstep}
```

{beyond}{own_base}{others}
{elsewhere}{shown.evaluation}
{licence_text(card, shown)}
"""


def tag_of(info: PipelineInfo) -> str:
    """Return what the hub calls a pipeline's task."""
    if not info.family.takes_prompts:
        return "unconditional-image-generation"
    return "text-to-video" if info.family.video else "text-to-image"


def licence_text(card: StudentCard, shown: Shown) -> str:
    """Say which licence a student has."""
    if shown.licence is None or card.own_network:
        return "The licence of the base model applies to this student."
    where = f", {shown.licence.link}" if "://" in shown.licence.link else ""
    return f"The licence of the base model applies to this student: {plain(str(shown.licence))}{plain(where)}."


def base_loading(base: str, pipeline: str) -> tuple[str, bool]:
    """Return Python that loads the base's pipeline, LoRAs included.

    Returns (code, whether the code needs fewstep). A path on this machine is cut to its last part.
    """
    source, whole = source_of(base), _text(called(base))
    place = _text(called(source.place))
    if source.place in bundled():
        return f"fewstep.load_teacher({whole}).pipe  # this base ships with fewstep", True
    loaded, config = f"{pipeline}.from_pretrained({place})", source.reading
    if is_file(source.place):
        if Path(source.place).is_file():  # the base may be elsewhere
            if denoiser_file(Path(source.place), source.reading) is not None:
                return f"fewstep.load_teacher({whole}).pipe  # its network is in a file of its own", True
            checkpoint = read_checkpoint(Path(source.place), source.reading)
            if checkpoint.absent:
                return (
                    f"fewstep.load_teacher({whole}).pipe  # its file has no {' and no '.join(checkpoint.absent)}",
                    True,
                )
            config = checkpoint.config
        configured = "" if config in ("", *PREDICTIONS) else f", config={_text(called(config))}"
        loaded = f"{pipeline}.from_single_file({place}{configured})"
    styles = (
        f"\npipe.load_lora_weights({_text(called(s))})\npipe.fuse_lora(lora_scale={w:g})\npipe.unload_lora_weights()"
        for s, w in source.loras
    )
    return loaded + "".join(styles), False


def list_of(values: Sequence[float]) -> str:
    """Write numbers as a Python list."""
    return f"[{', '.join(f'{v:.8g}' for v in values)}]"


def _text(value: str) -> str:
    """Quote a string as Python writes strings."""
    return json.dumps(value, ensure_ascii=False)


def plain(value: str) -> str:
    """Escape a text in which Markdown would find markup."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", " ".join(value.split()))


def _code(value: str) -> str:
    """Format a text as Markdown code, whatever the text holds."""
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", value)), default=0))
    return f"{fence}{' ' * (len(fence) > 1)}{value}{' ' * (len(fence) > 1)}{fence}"
