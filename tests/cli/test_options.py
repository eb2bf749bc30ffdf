"""Options are refused by the name that was typed, before anything is drawn."""

import re
from pathlib import Path

import pytest

from fewstep.runs.recipe import DistillRecipe, read_recipe

from .common import error_of
from .common import fewstep as command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-o", "x.jpg"), r"-o: got x.jpg, allowed are names that end in .png; pass x.png"),
        (("-o", "x"), r"-o: got x, allowed are names that end in .png"),
        (("-n", "1000000000"), r"--count: got 1000000000, allowed are whole numbers from 1 to 1024"),
        (("--guidance", "nan"), r"--guidance: got nan, allowed are numbers from -1000 to 1000"),
        (("--guidance-rescale", "2"), r"--guidance-rescale: got 2\.0, allowed are numbers from 0 to 1"),
        (("--steps", "1001"), r"--steps: got 1001, allowed are 1 to 1000"),
        (("--solver", "DDIM"), r"--solver: got 'DDIM', allowed are ddim, dpmpp, ipndm, renoise"),
        (("-p", "a \udcff b"), r"--prompt: .* has bytes that are no letters here"),
    ],
)
def test_a_wrong_option_of_sample(
    arguments: tuple[str, ...],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "sample", "emoji", "-p", "rocket", *arguments) == 2
    assert re.search(said, error_of(capsys))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["train.batch=1:30", "train.lr=017", "train.iterations=1_0", "train.lr='1e-4'"])
def test_numbers_are_as_they_are_written(text: str) -> None:
    """YAML 1.1 reads these as 90, 15 and 10."""
    with pytest.raises(ValueError, match=rf"^{text.partition('=')[0]}: input should be a number, got '"):
        read_recipe("demo", [text], DistillRecipe)


@pytest.mark.parametrize(("text", "value"), [("1e-5", 1e-5), ("5.0e-4", 5e-4), (".5", 0.5), ("1", 1.0)])
def test_numbers_of_every_usual_form(text: str, value: float) -> None:
    assert read_recipe("demo", [f"train.lr={text}"], DistillRecipe).train.lr == value
