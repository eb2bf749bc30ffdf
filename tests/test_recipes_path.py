from pathlib import Path

import pytest

from fewstep import recipes_path
from fewstep.recipes_path import recipe_names, recipe_path, recipes_folder


def test_a_shipped_name_is_found() -> None:
    assert recipe_names()
    for name in recipe_names():
        assert recipe_path(name) == recipes_folder() / f"{name}.yaml"
        assert recipe_path(name).is_file()


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_a_file_of_ones_own_is_taken_as_it_is(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"mine{suffix}"
    file.touch()
    assert recipe_path(str(file)) == file


def test_a_missing_file_is_an_error_that_names_the_choices(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^recipe: there is no file .*; pass .*{recipe_names()[0]}"):
        recipe_path(str(tmp_path / "mine.yaml"))


def test_a_wrong_name_is_an_error_that_names_the_nearest() -> None:
    name = recipe_names()[0]
    with pytest.raises(ValueError, match=rf"^recipe: no shipped recipe is called {name}x; did you mean {name}\?"):
        recipe_path(name + "x")


def test_recipes_inside_the_package_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "only.yaml").touch()
    monkeypatch.setattr(recipes_path, "__file__", str(tmp_path / "recipes_path.py"))
    assert recipe_names() == ["only"]
