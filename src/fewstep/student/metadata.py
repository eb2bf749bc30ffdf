"""The header of a model card, as the hub's client writes it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..backbones.load import hub_id
from .card import StudentCard
from .hub import Licence

RELATIONS = {"lora": "adapter", "full": "finetune", "none": "adapter"}  # to the base, by a card's weights


@dataclass(frozen=True)
class Result:
    """One number that was measured under a protocol, for the hub's tables."""

    protocol: str
    metric: str
    name: str
    value: float


@dataclass(frozen=True)
class Shown:
    """What a card on the hub shows beyond a student's own facts.

    `gallery` has prompts and files in the student's folder, `results` are measurements for the hub's tables, and
    `evaluation` is a section in Markdown. The licence is the base's, by default the one that the card names.
    """

    licence: Licence | None = None
    gallery: tuple[tuple[str, str], ...] = ()
    results: tuple[Result, ...] = ()
    evaluation: str = ""


PLAIN = Shown()


def header(card: StudentCard, library: str, tag: str, tags: Sequence[str], shown: Shown = PLAIN) -> str:
    """Return a card's header in YAML, between its two lines.

    `library` loads the files, and `tag` is what the hub calls their task, empty for none.
    """
    licence = shown.licence or Licence(card.licence)
    base = hub_id(card.base) if not card.own_network else ""
    more: dict[str, Any] = {
        "base_model_relation": RELATIONS[card.weights] if base else None,
        "widget": [{"text": text, "output": {"url": file}} for text, file in shown.gallery] or None,
    }
    data = ModelCardData(
        license=licence.id,
        license_name=licence.name or None,
        license_link=licence.link or None,
        base_model=base or None,
        library_name=library,
        pipeline_tag=tag or None,
        tags=list(tags),
        model_name=card.name if shown.results else None,
        eval_results=[_entry(result, tag) for result in shown.results] or None,
        **more,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def _entry(result: Result, tag: str) -> EvalResult:
    return EvalResult(
        task_type=tag,
        dataset_type=f"fewstep-{result.protocol}",
        dataset_name=f"fewstep evaluate --protocol {result.protocol}",
        metric_type=result.metric,
        metric_name=result.name,
        metric_value=result.value,
    )


def gallery(shown: Shown) -> str:
    """Return where a card on the hub shows its images."""
    return "\n<Gallery />\n" * bool(shown.gallery)
