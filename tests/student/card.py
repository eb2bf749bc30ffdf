"""The card of a student that several tests write or read."""

from fewstep.core.guidance import Guidance
from fewstep.student.card import StudentCard

CARD = StudentCard(
    name="x-tdm-4step",
    method="tdm",
    base="some/where/model.safetensors",
    base_hash="",
    steps=(4,),
    timesteps={"4": [999, 749, 499, 249, -1]},
    solver={"4": "ddim"},
    prediction="epsilon",
    weights="lora",
    rank=8,
    alpha=8.0,
    guidance=Guidance(scale=3.5),
    licence="other",
    iterations=7,
    train_seconds=1.0,
    hardware="",
    version="0",
)
