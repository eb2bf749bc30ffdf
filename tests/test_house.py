"""What a clone, a wheel and a CI run rest on: versions, package contents, commands, the ban on the network."""

import os
import re
import socket
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from hatchling.builders.wheel import WheelBuilder
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import fewstep
from tests.project import ROOT, pyproject


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of this tree, built without the network."""
    built = WheelBuilder(str(ROOT)).build(directory=str(tmp_path_factory.mktemp("dist")), versions=["standard"])
    return Path(next(built))


def test_constraints_are_inside_the_ranges() -> None:
    pins = [Requirement(line) for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    tested = {canonicalize_name(p.name): str(p.specifier).removeprefix("==") for p in pins}
    assert len(tested) == len(pins), "a package is constrained twice"
    project = pyproject()["project"]
    declared = [*project["dependencies"], *(r for rows in project["optional-dependencies"].values() for r in rows)]
    needed = [r for r in map(Requirement, declared) if r.marker is None]
    assert needed
    for requirement in needed:
        version = tested.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is missing from constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} does not allow the tested {version}"


def test_constraints_name_no_build_of_one_machine() -> None:
    """No constraint names a build, an index or a file.

    `torch==X+cpu` exists only where its wheel lies; `torch==X` is the CPU build there and the ordinary one elsewhere.
    """
    assert not re.search(r"^[^#\n]*(\+|@|file:|https?:)", read("constraints.txt"), re.MULTILINE)


def test_the_wheel_holds_every_recipe_and_every_file_of_the_package(wheel: Path) -> None:
    packed = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    source = {
        f.relative_to(ROOT / "src").as_posix() for f in (ROOT / "src").rglob("*") if f.is_file() and f.suffix != ".pyc"
    }
    recipes = {
        f"fewstep/recipes/{f.relative_to(ROOT / 'recipes').as_posix()}"
        for f in (ROOT / "recipes").rglob("*")
        if f.is_file()
    }
    assert "fewstep/py.typed" in source
    assert any(r.endswith(".yaml") for r in recipes)
    assert packed == source | recipes


def test_the_wheel_says_its_licence_and_its_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        meta = {n.split(".dist-info/")[1]: archive.read(n).decode() for n in archive.namelist() if ".dist-info/" in n}
    assert "License-Expression: Apache-2.0" in meta["METADATA"]
    assert "Apache License" in meta["licenses/LICENSE"]
    assert "fewstep = fewstep.cli.main:run" in meta["entry_points.txt"]


def test_recipes_are_found_in_an_unpacked_wheel(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "from fewstep import recipes_path as r; print(r.recipes_folder(), *r.recipe_names())"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    folder, *names = done.stdout.split()
    assert Path(folder) == tmp_path / "fewstep" / "recipes"
    assert sorted(names) == sorted(f.stem for f in (ROOT / "recipes").glob("*.yaml"))


def test_recipes_lie_flat() -> None:
    """A recipe is called by its file's name, so all of them lie in one folder and end in .yaml."""
    assert {f.parent for f in (ROOT / "recipes").rglob("*.y*ml")} == {ROOT / "recipes"}
    assert not list((ROOT / "recipes").rglob("*.yml"))


def test_the_changelogs_newest_version_is_this_one() -> None:
    first = re.search(r"^## \[?(\d[^\s\]]*)", read("CHANGELOG.md"), re.MULTILINE)
    assert first
    assert first[1] == fewstep.__version__


def test_ci_runs_the_command_that_the_readers_are_told() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    command = "make test"
    assert re.search(rf"^{command}\b", read(".ci/run"), re.MULTILINE)
    assert command in read("CONTRIBUTING.md")
    if (ROOT / "README.md").exists():
        assert command in read("README.md")
        assert pyproject()["project"].get("readme") == "README.md", 'add `readme = "README.md"` to [project]'


def test_make_help_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", read("Makefile"), re.MULTILINE)
    assert phony
    shown = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^ *make ([\w-]+)", shown, re.MULTILINE) == phony[1].split()


def test_hooks_need_no_network() -> None:
    repos = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert {r["repo"] for r in repos} == {"local"}
    assert {h["language"] for r in repos for h in r["hooks"]} == {"system"}


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(f"docs/{f.name}" for f in (ROOT / "docs").glob("*.md"))]
)
def test_links_inside_the_project_lead_somewhere(page: str) -> None:
    if not (ROOT / page).exists():
        assert page == "README.md"
        return
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", read(page))
    missing = [link for link in links if ":" not in link and not ((ROOT / page).parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("example.org", 443)])
def test_the_network_is_out_of_reach(address: tuple[str, int]) -> None:
    with pytest.raises(pytest.fail.Exception, match="wants the network"):
        socket.create_connection(address, timeout=1)
    with pytest.raises(pytest.fail.Exception, match="wants the network"), socket.socket() as s:
        s.connect_ex(address)


def test_this_machine_is_in_reach() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname(), timeout=5) as client,
    ):
        assert client.getpeername() == server.getsockname()


def test_every_listed_slow_test_is_there() -> None:
    listed = read("tests/slow.txt").splitlines()[1:]
    assert listed == sorted(set(listed))
    gone = []
    for node in listed:
        file, _, name = node.partition("::")
        if f"def {name.partition('[')[0]}(" not in read(file):
            gone.append(node)
    assert not gone
