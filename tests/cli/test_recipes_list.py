"""`fewstep recipes`."""

import pytest

from fewstep.cli.recipes import run_recipes
from fewstep.recipes_path import recipe_names


def test_every_recipe_is_listed_with_what_it_trains(capsys: pytest.CaptureFixture[str]) -> None:
    run_recipes()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(len(line.split()) > 3 for line in lines)


def test_a_word_selects_some(capsys: pytest.CaptureFixture[str]) -> None:
    run_recipes("wan")
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [n for n in recipe_names() if n.startswith("wan")]
    with pytest.raises(ValueError, match="recipes: none has the word nosuch; leave it out"):
        run_recipes("nosuch")
