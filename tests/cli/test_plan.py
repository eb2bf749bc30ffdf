"""`fewstep plan`: a table, and settings that fit a card and give the same training."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.backbones.base import Backbone
from fewstep.backbones.encoders import at_once
from fewstep.backbones.meta import meta_teacher
from fewstep.cli import plan
from fewstep.cli.beside import beside
from fewstep.cli.plan import (
    LEAST_BATCH,
    Hollow,
    Phase,
    Plan,
    Surroundings,
    around_training,
    fit,
    parse_bytes,
    plan_of,
    roundings,
    savings,
)
from fewstep.data.prompts import Embeddings
from fewstep.runs.recipe import DistillRecipe, first_stage, read_recipe
from fewstep.training.ledger import module_bytes
from fewstep.training.memory import Training, calls_alone, peak_bytes

from .. import pipelines, tiny
from .common import error_of, fewstep
from .families import recipe

pytestmark = pytest.mark.usefixtures("elsewhere")


@pytest.fixture(scope="session")
def planned(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    train = {"iterations": 2, "batch": 32, "lr": 1e-3, "fake_lr": 1e-3}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("planned"))
        settings = read_recipe(str(recipe(teacher, train=train)), [], DistillRecipe)
    hollow = plan.hollow_of(settings, meta_teacher(teacher))
    return plan_of(settings, hollow, around_training(settings, hollow))


def test_the_table_adds_up_and_no_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pipelines.save("sd", tmp_path / "sd")
    pipelines.spoil(folder)
    stage = {
        "method": {"steps": 2, "warmup": 0},
        "train": {"iterations": 1, "batch": 2, "lr": 1e-3, "fake_lr": 1e-3},
        "size": 16,
    }
    assert fewstep(monkeypatch, "plan", recipe(folder, warm_start=stage, size=32), "--memory", "2GiB") == 0
    said = capsys.readouterr().out
    assert said.count("needed") == 2 and said.count("as it is") == 2
    assert "fewstep distill" not in said


@pytest.mark.slow
def test_what_fits_is_found_and_is_the_same_training(planned: Plan) -> None:
    made, seen = planned, []
    for usable in (int(made.total * 0.6), made.total):
        sets, needed = fit(made, usable, "")
        assert needed <= usable
        values = dict(s.split("=") for s in sets)
        assert int(values.get("train.batch", 32)) * int(values.get("train.accumulate", 1)) == 32
        assert int(values.get("train.batch", 32)) >= LEAST_BATCH or "roles.checkpointing" in values
        seen.append(values)
    assert seen[0] and not seen[1]


def test_ways_to_save_come_fastest_first(planned: Plan) -> None:
    parts, both = savings(planned.recipe, "warm_start.")
    assert [s for s, _ in parts] == [
        [f"warm_start.train.batch={32 // k}", f"warm_start.train.accumulate={k}"] for k in (2, 4, 8)
    ]
    assert both[0][0] == ["roles.checkpointing=true"] and "warm_start.train.batch=1" in both[-1][0]
    assert all(r.train.batch * r.train.accumulate == 32 for _, r in [*parts, *both])
    own = planned.recipe
    shared = own.model_copy(update={"train": replace(own.train, global_batch=64)})
    assert [s for s, _ in savings(shared, "")[0]] == [[f"train.batch={32 // k}"] for k in (2, 4, 8)]


def counted(recipe: DistillRecipe, hollow: Hollow, around: Surroundings, cards: int = 1) -> Plan:
    """Return a plan of round numbers.

    A base takes 100, moments 40, adapters and gradients 20 each, a sample 4, with checkpointing 1.
    """
    base, moments = (
        {None: 100, "int8": 50, "nf4": 25}[recipe.roles.quantize],
        {"adamw": 40, "adamw8bit": 10}[recipe.train.optimizer],
    )
    return Plan(
        recipe,
        around,
        Training(base, 20, 20, moments, 0, recipe.train.batch * (1 if recipe.roles.checkpointing else 4)),
        hollow,
    )


@pytest.mark.parametrize(
    ("usable", "expected"),
    [
        (212, []),
        (200, ["train.batch=4", "train.accumulate=2"]),
        (181, ["train.batch=1", "train.accumulate=8", "roles.checkpointing=true"]),
        (180, ["train.optimizer=adamw8bit", "train.batch=4", "train.accumulate=2"]),
        (150, ["roles.quantize=int8", "train.batch=4", "train.accumulate=2"]),
        (
            105,
            [
                "train.optimizer=adamw8bit",
                "roles.quantize=int8",
                "train.batch=4",
                "train.accumulate=2",
                "roles.checkpointing=true",
            ],
        ),
        (
            80,
            [
                "train.optimizer=adamw8bit",
                "roles.quantize=nf4",
                "train.batch=4",
                "train.accumulate=2",
                "roles.checkpointing=true",
            ],
        ),
    ],
)
def test_what_changes_the_result_comes_last_the_least_first(
    usable: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"iterations": 2, "batch": 8, "lr": 1e-3, "fake_lr": 1e-3}
    settings = read_recipe(str(recipe(Path("none"), train=train)), [], DistillRecipe)
    none = tiny.stable_diffusion(channels=(96, 96))
    monkeypatch.setattr(plan, "plan_of", counted)
    monkeypatch.setattr(plan, "meta_of", lambda _: none)
    made = counted(settings, plan.hollow_of(settings, none), Surroundings((), 0, 0))
    assert fit(made, usable, "")[0] == expected
    if usable == 80:
        with pytest.raises(ValueError, match=r"with the smallest batch, checkpointing and all that rounds"):
            fit(made, 75, "")


def test_what_a_recipe_rounds_stays_so() -> None:
    wide, narrow = tiny.stable_diffusion(channels=(96, 96)), tiny.stable_diffusion()

    def ways(teacher: Backbone, **roles: object) -> list[list[str]]:
        settings = read_recipe(str(recipe(Path("none"), roles={"rank": 2, **roles})), [], DistillRecipe)
        return [sets for sets, _ in roundings(settings, teacher, "warm_start.")]

    eight = "warm_start.train.optimizer=adamw8bit"
    assert ways(wide) == [
        [eight],
        ["roles.quantize=int8"],
        [eight, "roles.quantize=int8"],
        [eight, "roles.quantize=nf4"],
    ]
    assert ways(wide, quantize="int8") == [[eight], [eight, "roles.quantize=nf4"]]
    assert ways(wide, lora=False) == ways(narrow) == [[eight]]


def test_a_card_that_is_too_small_is_said_so(planned: Plan) -> None:
    with pytest.raises(
        ValueError, match=r"^--memory: tiny needs .* are usable; --set dtype=bfloat16 halves the base's weights$"
    ):
        fit(planned, 2**20, "")


@pytest.mark.parametrize(
    ("memory", "said"),
    [
        ("many", "--memory: got 'many', allowed are sizes"),
        ("100MiB", "of which CUDA alone takes"),
        ("3 bananas", "allowed"),
    ],
)
def test_a_size_that_is_none(
    memory: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pipelines.save("sd", tmp_path / "sd")
    assert fewstep(monkeypatch, "plan", recipe(folder), "--memory", memory) == 2
    assert said in error_of(capsys)


def test_sizes() -> None:
    assert [parse_bytes(t) for t in ("24GiB", "16 GB", "1.5gib", "512M", "7")] == [
        24 * 2**30,
        16 * 10**9,
        3 * 2**29,
        2**29,
        7,
    ]


def test_phases_are_counted_apart_and_the_peak_is_named() -> None:
    train = {"iterations": 2, "batch": 8, "lr": 1e-3, "fake_lr": 1e-3}
    settings = read_recipe(str(recipe(Path("none"), train=train)), [], DistillRecipe)
    around = Surroundings((Phase("encoding prompts: text_encoder alone", 300),), 7, 90)
    t = Training(100, 20, 20, 40, 5, 60, sampling=32)
    hollow = Hollow(tiny.stable_diffusion(), Embeddings({}, {}, [], 0, ""))
    made = Plan(settings, around, t, hollow)
    held, shown = 100 + 20 + 40 + 5, len(settings.preview.prompts or [None] * 8)
    assert [p.bytes for p in made.phases] == [
        300,
        held + 20 + 60 + 7,
        held + 7 + 32 * min(shown, 8) // 8,
        held + 90,
        held + 7,
        held + 7,
    ]
    assert made.peak.name == "encoding prompts: text_encoder alone" and made.total == 300
    assert replace(made, around=Surroundings((), 7, 90)).peak.name == "previews: the autoencoder decodes"
    assert replace(made, around=Surroundings((), 7, 0)).peak.name == "training"
    two = replace(made, training=replace(t, exchange=200), cards=2)
    assert two.peak.name == "cards exchange gradients" and two.total == held + 20 + 200 + 7


def test_every_encoder_is_counted_alone(tmp_path: Path) -> None:
    folder = pipelines.save("sdxl", tmp_path / "sdxl")
    settings = read_recipe(str(recipe(folder)), [], DistillRecipe)
    teacher = meta_teacher(folder)
    around = around_training(settings, plan.hollow_of(settings, teacher))
    assert [p.name for p in around.encoders] == [
        f"encoding prompts: {n} alone" for n in ("text_encoder", "text_encoder_2")
    ]
    for phase, encoder in zip(around.encoders, teacher.encoders, strict=True):
        assert module_bytes(encoder) < phase.bytes < module_bytes(encoder) + peak_of(teacher)
        assert "forward" not in vars(encoder)


@pytest.mark.parametrize(
    "family", [*pipelines.cases(("sd", "sdxl", "sd3", "flux", "cogvideox", *pipelines.LONG_TRAINED))]
)
def test_one_long_text_among_others_needs_what_as_many_long_ones_need(family: str, tmp_path: Path) -> None:
    folder = pipelines.save(family, tmp_path / family)
    settings, teacher = read_recipe(str(recipe(folder)), [], DistillRecipe), meta_teacher(folder)
    hollow = plan.hollow_of(settings, teacher)
    count = at_once(teacher.encoders)
    alone = calls_alone(lambda: teacher.encode([plan.LONGEST] * count), list(teacher.encoders))
    assert [p.bytes for p in around_training(settings, hollow).encoders] == alone
    for n in (1, 2):
        every, index = teacher.encode([plan.LONGEST] * n), torch.arange(n)
        own = hollow.texts.at(index, torch.device("cpu")) if n > 1 else hollow.texts.unconditional(torch.device("cpu"))
        assert {k: (t.shape, t.dtype) for k, t in own.items()} == {k: (t.shape, t.dtype) for k, t in every.items()}


@pytest.mark.parametrize("room", [True, False])
def test_a_plan_counts_beside_itself_what_it_counts_in_turn(
    room: bool, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = {"iterations": 2, "batch": 2, "lr": 1e-3, "fake_lr": 1e-3}
    stage = {"method": {"steps": 2, "warmup": 0}, "train": train, "size": 16}
    settings = read_recipe(str(recipe(teacher, train=train, warm_start=stage, size=32)), [], DistillRecipe)
    monkeypatch.setattr(plan, "beside", partial(beside, room=lambda: room))
    made = plan.plans_of(settings)
    for found, own in zip(made, (first_stage(settings), settings), strict=True):
        hollow = plan.hollow_of(settings, plan.meta_of(settings))
        assert found == plan_of(own, hollow, around_training(own, hollow))


def peak_of(teacher: Backbone) -> int:
    """What all encoders take at work."""
    return peak_bytes(lambda: teacher.encode([""] * 64), *teacher.encoders)


@pytest.mark.slow
def test_cards_share_weights_or_exchange_gradients(planned: Plan) -> None:
    def on(cards: int, **train: object) -> Training:
        own = planned.recipe.model_copy(update={"train": replace(planned.recipe.train, **train)})  # type: ignore[arg-type]
        return plan_of(own, planned.hollow, planned.around, cards).training

    one, eight, shared = on(1), on(8), on(8, shard=True)
    assert replace(eight, exchange=0) == one and eight.exchange == 3 * one.trained // 2
    assert shared.held < one.held and shared.gathered > 0 and shared.exchange == 0


@pytest.mark.parametrize("family", ["zimage", "sd"])
def test_texts_count_at_their_longest(family: str) -> None:
    hollow = pipelines.backbone(family)
    masks = [v for k, v in plan.longest_texts(hollow).cond.items() if k == "mask"]
    assert all(isinstance(mask, Tensor) and bool(mask.all()) for mask in masks) and len(masks) == (family == "zimage")
