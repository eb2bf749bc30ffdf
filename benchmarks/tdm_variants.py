"""List the students of `benchmarks/tdm.py`.

Each is one recipe with a few settings changed. A variant says how its student is sampled, and what the paper says.
"""

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
    "roles": {"lora": True, "rank": 32},
    "train": {"iterations": 260, "batch": 16, "lr": 1.0e-4, "fake_lr": 1.0e-3, "ema": 0.97, "checkpoint_every": 100},
}
TEACHER_IMAGES: Settings = {"data": {"source": "teacher", "count": 1024, "steps": 25}}


@dataclass(frozen=True)
class Draw:
    """A way to sample a student: steps, solver and the step count it is conditioned on; None for its own."""

    steps: int = 4
    solver: str | None = None
    condition: int | None = None

    @property
    def title(self) -> str:
        solver = [] if self.solver is None else [f"tested with {self.solver}"]
        condition = [] if self.condition is None else [f"conditioned on {self.condition}"]
        return ", ".join([f"{self.steps} step{'s' if self.steps > 1 else ''}", *solver, *condition])


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A student: changed settings, ways to sample it, and the paper's claim.

    `expect` is that claim as an ordering of FD, for each draw or one for all, next to the variant `against` sampled
    the same way.
    """

    key: str
    label: str
    table: str = "-"
    claim: str = "-"
    method: Settings = field(default_factory=dict)
    other: Settings = field(default_factory=dict)
    draws: tuple[Draw, ...] = (Draw(),)
    init_from: str = ""  # key of the variant whose student is continued
    expect: tuple[Relation, ...] = ()
    against: str = ""
    rate: float = 1.0  # times the base's learning rates: the best of those tried, where it gains more than noise

    def sampled(self, draw: Draw) -> tuple[int, str, int | None]:
        """Return what tells a draw from others: steps, solver and condition."""
        recipe = validate(recipe_value(self, 0, 1), DistillRecipe, self.key)
        return draw.steps, draw.solver or str(recipe.method.solver), draw.condition


FEW = (Draw(1), Draw(2), Draw(4))
MANY = (Draw(1), Draw(2), Draw(3), Draw(4), Draw(6), Draw(8))
DDIM, DPMPP, RENOISE = Draw(4, "ddim"), Draw(4, "dpmpp"), Draw(4, "renoise")
OTHER_CONDITIONS = tuple(Draw(k, None, c) for k, c in ((4, 1), (4, 2), (2, 1), (2, 4), (1, 2), (1, 4)))
UNIFY: Settings = {"name": "tdm-unify", "steps": [4, 2, 1]}
# Rivals keep their own loss and number of fake updates. A warm-up has as many updates of the fake score as TDM's.
DMD2: Settings = {"name": "dmd2", "loss": "l2", "warmup": 4}
DMD2_5: Settings = DMD2 | {"fake": {"updates": 5}, "warmup": 8}
IMITATION: Settings = {"steps": 4, "guidance": 4.5}
FULL: Settings = {"roles": {"lora": False}}
VARIANTS = (
    Variant(
        key="tdm-4",
        label="TDM, 4 steps",
        table="1, 5, 6",
        claim="TDM-4step: 31.35 HPS; sampled in 1, 2 steps: 20.81, 29.08",
        draws=(*FEW, DPMPP, RENOISE),
    ),
    Variant(key="tdm-1", label="TDM, 1 step", table="1", method={"steps": 1}, draws=(Draw(1),), rate=2.0),
    Variant(
        key="unify",
        label="TDM-unify",
        table="5",
        claim="28.90 / 30.52 / 31.31 HPS in 1 / 2 / 4 steps",
        method=UNIFY,
        draws=(*FEW, *OTHER_CONDITIONS),
        expect=("better", "better", "level"),
        against="tdm-4",
    ),
    Variant(
        key="unify-6",
        label="TDM-unify for 1, 2, 3, 4, 6 and 8 steps",
        table="fig. 10",
        claim="one student serves all",
        method=UNIFY | {"steps": [4, 8, 6, 3, 2, 1]},
        draws=MANY,
        expect=("level",),
        against="unify",
    ),
    Variant(
        key="no-condition",
        label="TDM-unify without the condition",
        table="5",
        claim="worse: 26.11 / 29.15 / 29.39",
        method=UNIFY | {"condition": False},
        draws=FEW,
        expect=("worse",),
        against="unify",
    ),
    Variant(
        key="no-surrogate",
        label="TDM-unify, l2 with DMD's normalizer",
        table="5",
        claim="worse: 28.23 / 30.20 / 30.85",
        method=UNIFY | {"loss": "l2"},
        draws=FEW,
        expect=("worse",),
        against="unify",
    ),
    Variant(
        key="no-importance",
        label="TDM without importance sampling for the fake score",
        table="5, fig. 11",
        claim="worse: 29.27 against 31.35; modes are lost",
        method={"fake": {"input": "clean"}},
        expect=("worse",),
        against="tdm-4",
    ),
    Variant(
        key="no-segments",
        label="TDM, tau beyond its segment",
        table="eq. 5, 9",
        claim="biased: one fake score for several distributions",
        method={"match": {"tau_range": "to_noise"}},
        expect=("worse",),
        against="tdm-4",
    ),
    Variant(
        key="clean",
        label="TDM, matching clean samples, tau over all times",
        table="7",
        claim="much worse: 24.63 against 31.35",
        method={"match": {"state": "clean", "tau_range": "full"}},
        draws=(DDIM, RENOISE),
        expect=("worse", "better"),
        against="tdm-4",
    ),
    Variant(
        key="clean-segment",
        label="TDM, matching clean samples, tau in its segment",
        claim="not in the paper",
        method={"match": {"state": "clean"}},
        expect=("worse",),
        against="tdm-4",
    ),
    Variant(
        key="fisher",
        label="TDM, Fisher divergence",
        table="8",
        claim="better: 31.70 against 31.35",
        method={"match": {"divergence": "fisher"}},
        expect=("better",),
        against="tdm-4",
        rate=2.0,
    ),
    Variant(
        key="train-dpmpp",
        label="TDM, DPM-Solver++ in training",
        table="6",
        claim="level: 30.86 (tested with DDIM), 31.30 (DPM-Solver++)",
        method={"solver": "dpmpp"},
        draws=(DDIM, DPMPP),
        expect=("level",),
        against="tdm-4",
    ),
    Variant(
        key="train-renoise",
        label="TDM, re-noising in training",
        claim="not in the paper",
        method={"solver": "renoise"},
        draws=(DDIM, RENOISE),
    ),
    Variant(
        key="transition",
        label="TDM, fake score on the transition noise",
        claim="not in the paper",
        method={"fake": {"target": "transition"}},
    ),
    # What is best in the arena (`arena.md`): as many updates of the student take three times as long.
    Variant(
        key="even",
        label="TDM, five fake updates at the student's rate",
        claim="not in the paper",
        method={"fake": {"updates": 5}, "warmup": 8},
        other={"train": {"fake_lr": 1.0e-4}},
    ),
    Variant(
        key="even-wide",
        label="TDM, tau up to pure noise, five fake updates at the student's rate",
        claim="not in the paper",
        method={"fake": {"updates": 5}, "warmup": 8, "match": {"tau_range": "to_noise"}},
        other={"train": {"fake_lr": 1.0e-4}},
    ),
    Variant(
        key="full",
        label="TDM, all weights of three copies",
        claim="not in the paper",
        other=FULL | {"train": {"lr": 1.0e-5, "fake_lr": 1.0e-4}},
        rate=5.0,
    ),
    # An adversarial weight of 5 is a fifth of the Huber loss's gradient (at 0.05 it is below 0.4 %).
    Variant(
        key="gan",
        label="TDM with adversarial term",
        table="1",
        claim="SFT is better and cheaper (`finetunes.md`)",
        method={"gan": {"weight": 5.0, "r1": 0.01}},
        other=TEACHER_IMAGES,
    ),
    Variant(
        key="dmd2",
        label="DMD2, 10 fake updates",
        table="1, fig. 9",
        claim="TDM reaches its best in 4 % of the time and ends 20 % lower",
        method=DMD2,
        expect=("worse",),
        against="tdm-4",
    ),
    Variant(
        key="dmd2-5",
        label="DMD2, 5 fake updates",
        table="fig. 9",
        claim="the original paper's setting",
        method=DMD2_5,
        expect=("worse",),
        against="tdm-4",
    ),
    # An adversarial weight of 500 is half of the normalized square's gradient.
    Variant(
        key="dmd2-gan",
        label="DMD2, 5 fake updates, adversarial term",
        table="1",
        method=DMD2_5 | {"gan": {"weight": 500.0, "r1": 0.01}},
        other=TEACHER_IMAGES,
        expect=("worse",),
        against="tdm-4",
    ),
    Variant(key="sid", label="SiD in 4 steps", table="1", method={"name": "sid"}, expect=("worse",), against="tdm-4"),
    Variant(
        key="sid-1",
        label="SiD, 1 step",
        table="1",
        method={"name": "sid", "steps": 1},
        draws=(Draw(1),),
        expect=("worse",),
        against="tdm-1",
        rate=2.0,
    ),
    Variant(
        key="diff-instruct",
        label="Diff-Instruct, 1 step",
        table="1",
        method={"name": "diff-instruct", "steps": 1, "loss": "l2"},
        draws=(Draw(1),),
        expect=("worse",),
        against="tdm-1",
        rate=2.0,
    ),
    Variant(
        key="lcm",
        label="LCM",
        table="1, 3, fig. 8",
        claim="stochastic only: poor under DDIM",
        method={"name": "lcm", **IMITATION},
        other=TEACHER_IMAGES,
        draws=(Draw(4), DDIM),
        expect=("worse",),
        against="tdm-4",
    ),
    Variant(
        key="lcm-full",
        label="LCM, all weights",
        table="1",
        method={"name": "lcm", **IMITATION},
        other=TEACHER_IMAGES | FULL | {"train": {"lr": 1.0e-5}},
        draws=(Draw(4), DDIM),
        expect=("worse",),
        against="tdm-4",
        rate=2.0,
    ),
    Variant(
        key="progressive",
        label="progressive distillation",
        table="1",
        method={"name": "progressive", **IMITATION},
        other=TEACHER_IMAGES | {"train": {"decay": 40}},
        expect=("worse",),
        against="tdm-4",
    ),
    Variant(
        key="rescued",
        label="LCM, then 100 iterations of TDM",
        table="fig. 8",
        claim="deterministic sampling restored",
        other={"train": {"iterations": 140, "decay": 0}},
        draws=(DDIM,),
        init_from="lcm",
        expect=("better",),
        against="lcm",
    ),
)


def merged(value: Settings, changed: Settings) -> Settings:
    """Return nested settings with changes; a block takes the place of a plain value."""
    blocks = {k: v for k, v in changed.items() if isinstance(v, dict)}
    return value | changed | {k: merged(_block(value.get(k)), v) for k, v in blocks.items()}


def _block(value: Any) -> Settings:
    return value if isinstance(value, dict) else {}


def recipe_value(variant: Variant, seed: int, iterations: int, rate: float = 1.0) -> Settings:
    """Return the variant's recipe, its learning rates times its own rate and `rate`.

    Consistency and progressive distillation have few of the base's settings, so they name their own.
    """
    own = merged(BASE["method"], variant.method)
    if own["name"] in ("lcm", "progressive"):
        own = variant.method
    value = BASE | variant.other | {"method": own}
    train = {"iterations": iterations, "decay": iterations // 2}
    value["train"] = BASE["train"] | train | variant.other.get("train", {}) | {"seed": seed}
    value["train"]["decay"] = min(value["train"]["decay"], value["train"]["iterations"])
    if "warmup" in own:  # a short training has updates of the student, too
        value["method"] = own | {"warmup": min(own["warmup"], value["train"]["iterations"] - 1)}
    value["train"] |= {k: rate * variant.rate * value["train"][k] for k in ("lr", "fake_lr")}
    return value
