"""The students of `benchmarks/tdm.py`: what each changes in one recipe, how it is called, and what the paper says about it."""

from dataclasses import dataclass, field
from typing import Any, Literal

from fewstep.runs.recipe import DistillRecipe, validate

Settings = dict[str, Any]
Relation = Literal["worse", "better", "level"]

BASE: Settings = {
    "kind": "distill",
    "name": "bench",
    "teacher": "emoji",
    "method": {"name": "tdm", "steps": 4, "guidance": 4.5, "loss": "huber", "fake": {"weight": "v"}, "warmup": 40},
    "roles": {"rank": 32},
    "train": {"iterations": 260, "batch": 16, "lr": 1.0e-4, "fake_lr": 1.0e-3, "ema": 0.97, "checkpoint_every": 100},
}
# An adversarial weight of 5 is a fifth of the Huber loss's gradient, one of 500 half of the normalised square's (at 0.05 neither is 0.4 %).
POOL: Settings = {"data": {"source": "teacher", "count": 1024, "steps": 25}}
IMITATION: Settings = {"steps": 4, "guidance": 4.5}


@dataclass(frozen=True)
class Draw:
    """One way of calling a student: steps, solver (None: its own), and the step count that it is told (None: the one it takes)."""

    steps: int = 4
    solver: str | None = None
    told: int | None = None

    @property
    def title(self) -> str:
        parts = [f"{self.steps} step{'s' if self.steps > 1 else ''}"]
        return ", ".join(
            parts
            + [f"tested with {self.solver}"] * (self.solver is not None)
            + [f"told {self.told}"] * (self.told is not None)
        )


@dataclass(frozen=True)
class Variant:
    """One student: what is changed in the base recipe, how it is called, and the paper's claim about it.

    `expect` is that claim as an ordering of FD, for each of its draws or one for all, beside the variant `against`, called the same way.
    """

    key: str
    label: str
    table: str
    claim: str
    method: Settings = field(default_factory=dict)  # replaces the base's where it names another method
    other: Settings = field(default_factory=dict)
    draws: tuple[Draw, ...] = (Draw(),)
    start: str = ""  # the key of the variant whose student it begins as
    expect: tuple[Relation, ...] = ()
    against: str = ""
    rate: float = 1.0  # its learning rates times this: the best of those tried, where it beats the default by more than noise (docs/log.md)

    def called(self, draw: Draw) -> tuple[int, str, int | None]:
        """What tells this way of calling it from others: (steps, solver, count it is told)."""
        return (
            draw.steps,
            draw.solver or str(validate(recipe_value(self, 0, 1), DistillRecipe, self.key).method.solver),
            draw.told,
        )


FEW = (Draw(1), Draw(2), Draw(4))
MANY = (Draw(1), Draw(2), Draw(3), Draw(4), Draw(6), Draw(8))
SOLVERS = (Draw(4, "ddim"), Draw(4, "dpmpp"), Draw(4, "renoise"))
UNIFY: Settings = {"name": "tdm-unify", "steps": [4, 2, 1]}
# Rivals keep their own loss and number of fake updates; a warm-up is as many updates of the fake score as TDM's.
DMD2: Settings = {"name": "dmd2", "loss": "l2", "warmup": 4}
VARIANTS = (
    Variant("tdm-4", "TDM, 4 steps", "1, 5, 6", "TDM-4step: 31.35 HPS; sampled in 1, 2 steps: 20.81, 29.08", draws=(*FEW, *SOLVERS[1:])),
    Variant("tdm-1", "TDM, 1 step", "1", "-", {"steps": 1}, draws=(Draw(1),), rate=2.0),
    Variant("unify", "TDM-unify", "5", "28.90 / 30.52 / 31.31 HPS in 1 / 2 / 4 steps", UNIFY, draws=(*FEW, Draw(4, None, 1), Draw(4, None, 2), Draw(2, None, 1), Draw(2, None, 4), Draw(1, None, 2), Draw(1, None, 4)), expect=("better", "better", "level"), against="tdm-4"),
    Variant("unify-6", "TDM-unify for 1, 2, 3, 4, 6 and 8 steps", "fig. 10", "one student serves all", {**UNIFY, "steps": [4, 8, 6, 3, 2, 1]}, draws=MANY, expect=("level",), against="unify"),
    Variant("no-condition", "TDM-unify, step count not told", "5", "worse: 26.11 / 29.15 / 29.39", {**UNIFY, "condition": False}, draws=FEW, expect=("worse",), against="unify"),
    Variant("no-surrogate", "TDM-unify, l2 with DMD's normaliser", "5", "worse: 28.23 / 30.20 / 30.85", {**UNIFY, "loss": "l2"}, draws=FEW, expect=("worse",), against="unify"),
    Variant("no-importance", "TDM, fake score drawn around the clean estimate", "5, fig. 11", "worse: 29.27 against 31.35; modes are lost", {"fake": {"input": "clean"}}, expect=("worse",), against="tdm-4"),
    Variant("no-segments", "TDM, tau beyond its segment", "eq. 5, 9", "biased: one fake score for several distributions", {"match": {"tau_range": "to_noise"}}, expect=("worse",), against="tdm-4"),
    Variant("clean", "TDM, matching clean samples, tau over all times", "7", "much worse: 24.63 against 31.35", {"match": {"state": "clean", "tau_range": "full"}}, draws=(SOLVERS[0], SOLVERS[2]), expect=("worse", "better"), against="tdm-4"),
    Variant("clean-segment", "TDM, matching clean samples, tau in its segment", "-", "not in the paper", {"match": {"state": "clean"}}, expect=("worse",), against="tdm-4"),
    Variant("fisher", "TDM, Fisher divergence", "8", "better: 31.70 against 31.35", {"match": {"divergence": "fisher"}}, expect=("better",), against="tdm-4", rate=2.0),
    Variant("train-dpmpp", "TDM, DPM-Solver++ in training", "6", "level: 30.86 (tested with DDIM), 31.30 (DPM-Solver++)", {"solver": "dpmpp"}, draws=SOLVERS[:2], expect=("level",), against="tdm-4"),
    Variant("train-renoise", "TDM, re-noising in training", "-", "not in the paper", {"solver": "renoise"}, draws=(SOLVERS[0], SOLVERS[2])),
    Variant("transition", "TDM, fake score on the transition noise", "-", "not in the paper", {"fake": {"target": "transition"}}),
    Variant("full", "TDM, all weights of three copies", "-", "not in the paper", {}, {"roles": {"lora": False}, "train": {"lr": 1.0e-5, "fake_lr": 1.0e-4}}, rate=5.0),
    Variant("gan", "TDM with adversarial term", "1", "SFT is better and cheaper (`finetunes.md`)", {"gan": {"weight": 5.0, "r1": 0.01}}, POOL),
    Variant("dmd2", "DMD2, 10 fake updates", "1, fig. 9", "TDM reaches its best in 4 % of the time and ends 20 % lower", DMD2, expect=("worse",), against="tdm-4"),
    Variant("dmd2-5", "DMD2, 5 fake updates", "fig. 9", "the original paper's setting", {**DMD2, "fake": {"updates": 5}, "warmup": 8}, expect=("worse",), against="tdm-4"),
    Variant("dmd2-gan", "DMD2, 5 fake updates, adversarial term", "1", "-", {**DMD2, "fake": {"updates": 5}, "warmup": 8, "gan": {"weight": 500.0, "r1": 0.01}}, POOL, expect=("worse",), against="tdm-4"),
    Variant("sid", "SiD in 4 steps", "1", "-", {"name": "sid"}, expect=("worse",), against="tdm-4"),
    Variant("sid-1", "SiD, 1 step", "1", "-", {"name": "sid", "steps": 1}, draws=(Draw(1),), expect=("worse",), against="tdm-1", rate=2.0),
    Variant("diff-instruct", "Diff-Instruct, 1 step", "1", "-", {"name": "diff-instruct", "steps": 1, "loss": "l2"}, draws=(Draw(1),), expect=("worse",), against="tdm-1", rate=2.0),
    Variant("lcm", "LCM", "1, 3, fig. 8", "stochastic only: poor under DDIM", {"name": "lcm", **IMITATION}, POOL, (Draw(4), Draw(4, "ddim")), expect=("worse",), against="tdm-4"),
    Variant("lcm-full", "LCM, all weights", "1", "-", {"name": "lcm", **IMITATION}, {**POOL, "roles": {"lora": False}, "train": {"lr": 1.0e-5}}, (Draw(4), Draw(4, "ddim")), expect=("worse",), against="tdm-4", rate=2.0),
    Variant("progressive", "progressive distillation", "1", "-", {"name": "progressive", **IMITATION}, {**POOL, "train": {"decay": 40}}, expect=("worse",), against="tdm-4"),
    Variant("rescued", "LCM, then 100 iterations of TDM", "fig. 8", "deterministic sampling restored", {}, {"train": {"iterations": 140, "decay": 0}}, (Draw(4, "ddim"),), "lcm", expect=("better",), against="lcm"),
)  # fmt: skip


def merged(value: Settings, changed: Settings) -> Settings:
    """Nested settings on top of others."""
    return value | {k: merged(value.get(k, {}), v) if isinstance(v, dict) else v for k, v in changed.items()}


def recipe_value(variant: Variant, seed: int, iterations: int, rate: float = 1.0) -> Settings:
    """The variant's recipe, its learning rates times its own rate and `rate`. Settings of the base that its method does not have are left out."""
    own = merged(BASE["method"], variant.method)
    if own["name"] in ("lcm", "progressive"):
        own = variant.method
    value = BASE | variant.other | {"method": own}
    value["train"] = (
        BASE["train"]
        | {"iterations": iterations, "decay": iterations // 2}
        | variant.other.get("train", {})
        | {"seed": seed}
    )
    value["train"]["decay"] = min(value["train"]["decay"], value["train"]["iterations"])
    if "warmup" in own:
        value["method"] = own | {
            "warmup": min(own["warmup"], value["train"]["iterations"] - 1)
        }  # a rehearsal of a few has updates, too
    value["train"] |= {k: rate * variant.rate * value["train"][k] for k in ("lr", "fake_lr")}
    return value
