"""`fewstep plan`: a table, and settings that fit a card and give the same training."""

from pathlib import Path

import pytest

from fewstep.backbones.base import Backbone
from fewstep.backbones.hollow import hollow_teacher
from fewstep.cli.plan import LEAST_BATCH, Plan, fastest, fit, hollow_of, parse_bytes, phases_of, plan_of, roundings, savings
from fewstep.cli.recipe import DistillRecipe, read_recipe

from .. import pipelines, tiny
from .test_distill import error_of, fewstep
from .test_distill import teacher as tiny_teacher  # noqa: F401 - a fixture
from .test_families import elsewhere, recipe  # noqa: F401 - a fixture


@pytest.fixture
def planned(tiny_teacher: Path) -> tuple[Plan, Backbone]:  # noqa: F811
    train = {"iterations": 2, "batch": 32, "lr": 1e-3, "fake_lr": 1e-3}
    settings = read_recipe(str(recipe(tiny_teacher, train=train)), [], DistillRecipe)
    hollow = hollow_teacher(tiny_teacher)
    return plan_of(settings, hollow, phases_of(settings, hollow)), hollow


def test_the_table_adds_up_and_no_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pipelines.save("sd", tmp_path / "sd")
    for weights in folder.rglob("*.safetensors"):
        weights.unlink()
    stage = {"method": {"steps": 2, "warmup": 0}, "train": {"iterations": 1, "batch": 2, "lr": 1e-3, "fake_lr": 1e-3}, "size": 16}
    assert fewstep(monkeypatch, "plan", recipe(folder, first=stage, size=32), "--memory", "2GiB") == 0
    said = capsys.readouterr().out
    assert said.count("needed") == 2 and said.count("as it is") == 2
    assert "fewstep distill" not in said


def test_what_fits_is_found_and_is_the_same_training(planned: tuple[Plan, Backbone]) -> None:
    made, teacher = planned
    seen = []
    for usable in (int(made.total * 0.6), made.total):
        sets, needed = fit(made, teacher, usable, "")
        assert needed <= usable
        values = dict(s.split("=") for s in sets)
        assert int(values.get("train.batch", 32)) * int(values.get("train.accumulate", 1)) == 32
        assert int(values.get("train.batch", 32)) >= LEAST_BATCH or "roles.checkpointing" in values
        seen.append(values)
    assert seen[0] and not seen[1]


def test_ways_to_save_come_fastest_first(planned: tuple[Plan, Backbone]) -> None:
    parts, both = savings(planned[0].recipe, "first.")
    assert [s for s, _ in parts] == [[f"first.train.batch={32 // k}", f"first.train.accumulate={k}"] for k in (2, 4, 8)]
    assert both[0][0] == ["roles.checkpointing=true"] and "first.train.batch=1" in both[-1][0]
    assert all(r.train.batch * r.train.accumulate == 32 for _, r in [*parts, *both])


def test_what_changes_the_result_comes_last_the_least_first(tmp_path: Path) -> None:
    """Only where nothing with the same result fits; and what a recipe rounds already stays so."""
    folder = tmp_path / "wide"
    tiny.pipeline(channels=(96, 128)).save_pretrained(folder)
    train = {"iterations": 2, "batch": 2, "lr": 1e-3, "fake_lr": 1e-3}
    settings = read_recipe(str(recipe(folder, train=train, roles={"rank": 16})), [], DistillRecipe)
    hollow = hollow_of(settings)
    ways = [sets for sets, _ in roundings(settings, hollow, "first.")]
    eight, base = "first.train.optimizer=adamw8bit", "roles.base="
    assert ways == [[eight], [f"{base}int8"], [eight, f"{base}int8"], [eight, f"{base}nf4"]]
    made = plan_of(settings, hollow, phases_of(settings, hollow))
    least, smallest = fastest(made, hollow, 1, "")[0], made.total
    assert least is None
    for _, way in [w for ways in savings(settings, "") for w in ways]:
        smallest = min(smallest, plan_of(way, hollow, made.phases).total)
    assert not any("optimizer" in s or "base" in s for s in fit(made, hollow, smallest, "")[0])
    sets, needed = fit(made, hollow, smallest - 1, "")
    assert "train.optimizer=adamw8bit" in sets and needed < smallest
    inside = read_recipe(str(recipe(folder, train=train, roles={"rank": 16, "base": "int8"})), [], DistillRecipe)
    assert [s for s, _ in roundings(inside, hollow_of(inside), "")] == [
        ["train.optimizer=adamw8bit"],
        ["train.optimizer=adamw8bit", "roles.base=nf4"],
    ]
    copies = read_recipe(str(recipe(folder, train=train, roles={"share": False})), [], DistillRecipe)
    assert [s for s, _ in roundings(copies, hollow, "")] == [["train.optimizer=adamw8bit"]]


def test_a_card_that_is_too_small_is_said_so(planned: tuple[Plan, Backbone]) -> None:
    made, teacher = planned
    with pytest.raises(ValueError, match=r"^--memory: tiny needs .* are usable; --set dtype=bfloat16 halves the base's weights$"):
        fit(made, teacher, 2**20, "")


@pytest.mark.parametrize(
    ("memory", "said"),
    [("many", "--memory: got 'many', allowed are sizes"), ("100MiB", "of which CUDA alone takes"), ("3 bananas", "allowed")],
)
def test_a_size_that_is_none(
    memory: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pipelines.save("sd", tmp_path / "sd")
    assert fewstep(monkeypatch, "plan", recipe(folder), "--memory", memory) == 2
    assert said in error_of(capsys)


def test_sizes() -> None:
    assert [parse_bytes(t) for t in ("24GiB", "16 GB", "1.5gib", "512M", "7")] == [24 * 2**30, 16 * 10**9, 3 * 2**29, 2**29, 7]
