"""The README.md of a student of a network of one's own.

The page says which network to bring, and how to call the student.
"""

from .card import StudentCard, counted, guidance_text
from .metadata import PLAIN, Shown, gallery, header


def own_card(card: StudentCard, folder: str, shown: Shown = PLAIN) -> str:
    """Return the model card in Markdown, with a header for the hub.

    `folder` is the reader's name for the folder of the card; `shown` is what a card on the hub has more.
    """
    steps = card.steps[0]
    times = ", ".join(f"{t:g}" for t in card.timesteps[str(steps)][:-1])
    kind = {
        "lora": f"LoRA of rank {card.rank}, in PEFT's format in `peft/`",
        "full": "all weights of the network, in `network.safetensors` (its `state_dict`)",
    }.get(card.weights, "those of the base, as they are, with a head in `trajp.safetensors`")
    if card.per_step:
        kind = f"for each step {'a' if card.weights == 'lora' else ''} {kind}, in `step_1` to `step_{steps}`".replace(
            "  ", " "
        )
    process = f"prediction={card.prediction!r}"
    if card.sigma_data:
        process += f", sigma_data={card.sigma_data:g}"
    heard = f", conditions=...)  # tensors: {', '.join(card.conditions)}" if card.conditions else ")"
    prompt = "a prompt" if card.conditions else ""
    return f"""{header(card, "fewstep", "", ["few-step", card.method], shown)}# {card.name}
{gallery(shown)}
A {steps}-step generator distilled from `{card.base}`, a network of one's own (`{card.own_network}`), \
with {card.method.upper()}, from {card.data}.

| | |
|---|---|
| steps | {" or ".join(map(str, card.steps))} |
| NFE of a sample | {counted(card)} |
| times | {times} |
| solver | {card.solver[str(steps)]} |
| guidance | baked in; the teacher's guidance: {guidance_text(card)} |
| state | {list(card.shape)} |
| process | {card.schedule.get("kind")}, {process}; `fewstep.json` has all of it |
| weights | {kind} |
| base weights | SHA-256 {card.base_hash}... |
| cost | {card.iterations} iterations, {card.train_seconds / 60:.1f} minutes on {card.hardware} |

The network, its schedule and its conditions come from your own code; what does not fit is refused:

```python
import fewstep

teacher = fewstep.Denoiser({card.own_network}(...), schedule, shape={card.shape}, {process}{heard}
student = fewstep.load_student("{folder}", base=teacher)
states = fewstep.sample(student, ["{prompt}"] * 4)
```
{shown.evaluation}"""
