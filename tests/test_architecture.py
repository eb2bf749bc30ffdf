"""The house rules that imports can break: which folder may import which, and where each third-party package lives."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.project import PACKAGE, ROOT, pyproject

FILES = frozenset(
    {
        "atomic",
        "config_fields",
        "findings",
        "hashes",
        "names",
        "notebook",
        "reading",
        "recipes_path",
        "tensors",
        "typed",
        "words",
    }
)  # leaves, for everyone who may touch files
BELOW_METHODS = FILES | {"transfer", "core", "objectives", "backbones", "roles", "heads"}
BELOW_DATA = BELOW_METHODS | {"methods", "processes"}
BELOW_RUNS = BELOW_DATA | {"student", "data", "training", "evaluation", "report", "study", "zoo"}

# What each folder or module directly under src/fewstep may import, besides itself.
# `fewstep` is the package's own __init__.
MAY_IMPORT: dict[str, frozenset[str]] = {
    **dict.fromkeys(FILES, frozenset()),
    "atomic": frozenset({"hashes", "names", "reading"}),
    "hashes": frozenset({"reading"}),
    "reading": frozenset({"names"}),
    "tensors": frozenset({"reading"}),
    "typed": frozenset({"names"}),
    "transfer": frozenset(),
    "core": frozenset({"config_fields"}),
    "objectives": frozenset({"core"}),
    "backbones": FILES | {"core"},
    "roles": FILES | {"core", "backbones"},
    "heads": FILES | {"core"},
    "methods": BELOW_METHODS,
    "processes": FILES,
    "student": BELOW_METHODS | {"methods"},
    "data": BELOW_DATA,
    "training": BELOW_DATA | {"data"},
    "evaluation": FILES | {"core", "backbones"},
    "report": FILES | {"core", "backbones", "heads", "evaluation", "student"},
    "study": FILES | {"report"},
    "zoo": FILES | {"core", "backbones", "data", "training"},
    "checks": frozenset({"core", "backbones", "roles"}),
    "runs": BELOW_RUNS,
    "api": BELOW_RUNS | {"runs"},
    "fewstep": frozenset({"api", "notices"}),
    "notices": frozenset(),
    "studio": BELOW_RUNS | {"runs", "recipes_path"},
    "cli": BELOW_RUNS | {"runs", "api", "fewstep", "notices", "studio"},
    "__main__": frozenset({"cli"}),
}

ANYWHERE = frozenset({"torch", "numpy", "PIL", "safetensors", "pydantic", "yaml"})
HOME = {  # of third-party packages, the only folders that import them
    "diffusers": "backbones",
    "transformers": "backbones evaluation",
    "tokenizers": "backbones",
    "huggingface_hub": "backbones evaluation student",
    "peft": "roles",
    "accelerate": "training processes",
    "bitsandbytes": "training",
    "trackio": "training",
    "datasets": "data",
    "matplotlib": "report",
    "av": "report",
    "jinja2": "report",
    "IPython": "notebook",
    "typer": "cli",
    "rich": "cli",
    "gradio": "studio cli",  # the command says what to install where it is missing
}
FILE_MODULES = frozenset({"glob", "io", "os", "pathlib", "shutil", "subprocess", "tempfile"})
HEAVY = ("accelerate", "diffusers", "matplotlib", "numpy", "peft", "torch", "transformers")


def module_name(file: Path) -> str:
    """`fewstep.core.schedule` for src/fewstep/core/schedule.py; a package is named by its `__init__`."""
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts)


def imports(tree: ast.Module, module: str) -> Iterator[tuple[int, str]]:
    """(line, absolute name) of every import of `module`, also those inside functions; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def folder_of(name: str) -> str:
    """The folder or module directly under src/fewstep that `fewstep.…` names.

    A name that is neither is in the package's `__init__`.
    """
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and (parts[1] in MAY_IMPORT or (PACKAGE / parts[1]).is_dir()) else "fewstep"


def passed_on(function: ast.FunctionDef, name: str) -> bool:
    """Whether `**name` goes on to another call, which then refuses what it does not know."""
    calls = (node for node in ast.walk(function) if isinstance(node, ast.Call))
    return any(
        k.arg is None and isinstance(k.value, ast.Name) and k.value.id == name for call in calls for k in call.keywords
    )


def violations(source: str, module: str) -> list[str]:
    """One line for every rule that `source` breaks as `module`."""
    tree, folder = ast.parse(source), module.split(".")[1].replace("__init__", "fewstep")
    found = []
    for line, name in imports(tree, module):
        top = name.split(".")[0]
        if top == "fewstep":
            if (
                (target := folder_of(name)) != folder
                and name != "fewstep.__version__"
                and target not in MAY_IMPORT.get(folder, frozenset())
            ):
                found.append((line, f"{folder}/ may not import {target}/ ({name})"))
        elif top in sys.stdlib_module_names:
            if folder == "core" and top in FILE_MODULES:
                found.append((line, f"core/ touches no files and imports {name}"))
        elif folder not in HOME.get(top, folder).split():
            found.append((line, f"{top} lives in {HOME[top]}/ only"))
        elif top not in HOME and (top not in ANYWHERE or (folder == "core" and top != "torch")):
            found.append((line, f"{top} has no home in {folder}/"))
        if name == "importlib.import_module" and folder != "fewstep":
            found.append((line, "an import by string escapes these rules"))
        if folder == "core" and name.startswith("torch.nn") and not name.startswith("torch.nn.functional"):
            found.append((line, f"core/ has no modules and imports {name}"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "importlib.import_module" and folder != "fewstep":
            found.append((node.lineno, "an import by string escapes these rules"))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr":
            found.append((node.lineno, "hasattr: say in the type what is there"))
        if (
            isinstance(node, ast.FunctionDef)
            and (rest := node.args.kwarg) is not None
            and not passed_on(node, rest.arg)
        ):
            found.append((node.lineno, f"{node.name} swallows **{rest.arg}: name the arguments"))
        if folder == "core":
            if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.nn.Module", "nn.Module"):
                found.append((node.lineno, "core/ has no modules"))
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("open", "torch.from_file"):
                found.append((node.lineno, "core/ touches no files"))
    return [f"{module}:{line}: {text}" for line, text in sorted(found)]


def test_every_module_keeps_the_rules() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert files
    broken = [text for file in files for text in violations(file.read_text(encoding="utf-8"), module_name(file))]
    assert not broken, "\n" + "\n".join(broken)


def test_every_folder_has_a_row() -> None:
    folders = {f.parent.name for f in PACKAGE.glob("*/*.py")} | {f.stem for f in PACKAGE.glob("*.py")} - {"__init__"}
    assert folders <= set(MAY_IMPORT), "add a row to MAY_IMPORT"


def test_the_directions_have_no_cycle() -> None:
    assert list(TopologicalSorter(MAY_IMPORT).static_order())


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fewstep.core.x", "from ..objectives import denoising"),
        ("fewstep.core.x", "def f():\n    from fewstep.backbones.base import Denoiser"),
        ("fewstep.core.x", "import numpy as np"),
        ("fewstep.core.x", "from torch import Tensor, nn"),
        ("fewstep.core.x", "import torch\nclass A(torch.nn.Module): ..."),
        ("fewstep.core.x", "from pathlib import Path"),
        ("fewstep.core.x", "text = open('a').read()"),
        ("fewstep.core.__init__", "from .. import objectives"),
        ("fewstep.objectives.x", "from ..backbones import base"),
        ("fewstep.backbones.x", "from ..roles import adapters"),
        ("fewstep.methods.x", "from ..training.loop import train"),
        ("fewstep.methods.x", "from diffusers import UNet2DModel"),
        ("fewstep.backbones.x", "def f():\n    import peft"),
        ("fewstep.training.x", "import rich.progress"),
        ("fewstep.training.x", "from .. import load_teacher"),
        ("fewstep.training.x", "from importlib import import_module"),
        ("fewstep.training.x", "import importlib\nimportlib.import_module('peft')"),
        ("fewstep.evaluation.x", "import scipy"),
        ("fewstep.evaluation.x", "from ..training import loop"),
        ("fewstep.report.x", "from ..cli import main"),
        ("fewstep.studio.x", "from ..cli import main"),
        ("fewstep.__init__", "from .cli.main import run"),
        ("fewstep.unknown.x", "from ..core import schedule"),
        ("fewstep.roles.x", "if hasattr(a, 'b'): ..."),
        ("fewstep.roles.x", "def f(**options):\n    g(options.get('a'))"),
    ],
)
def test_a_broken_rule_is_found(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        (
            "fewstep.core.x",
            "import math\nimport torch\nimport torch.nn.functional as F\nfrom .schedule import Schedule",
        ),
        ("fewstep.roles.x", "import peft\nfrom torch import nn\nfrom ..backbones.base import Denoiser"),
        (
            "fewstep.zoo.x",
            "from ..backbones import miniature\nfrom ..training.fit import fit\nfrom . import emoji_data",
        ),
        ("fewstep.cli.x", "import typer\nfrom .. import load_teacher\nfrom ..zoo import teacher"),
        ("fewstep.roles.x", "from .. import __version__\ndef f(**options):\n    return g(1, **options)"),
        ("fewstep.__main__", "from fewstep.cli.main import run"),
    ],
)
def test_a_rule_that_is_kept_is_not_reported(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_what_is_imported_is_declared() -> None:
    """Every third-party package that src or tests import is a dependency by name: a clean install has it."""
    project = pyproject()["project"]
    core = [Requirement(r) for r in project["dependencies"]]
    extras = {name: [Requirement(r) for r in rows] for name, rows in project["optional-dependencies"].items()}
    declared = {canonicalize_name(r.name) for r in [*core, *(r for rows in extras.values() for r in rows)]}
    distributions = packages_distributions()
    benchmarks = {file.stem for file in (ROOT / "benchmarks").glob("*.py")}
    missing = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
        for _, name in imports(ast.parse(file.read_text(encoding="utf-8")), "x.x.x.x")
        if (top := name.split(".")[0]) not in {"fewstep", "tests", "x"} | sys.stdlib_module_names | benchmarks
        and not declared & {canonicalize_name(d) for d in distributions.get(top, [top])}
    }
    assert not missing, sorted(missing)


def test_help_imports_nothing_heavy() -> None:
    """`fewstep --help` answers at once: the heavy packages are imported inside the commands."""
    code = f"""
import sys
from fewstep.cli.main import run
sys.argv = ["fewstep", "--help"]
try:
    run()
except SystemExit as end:
    assert not end.code, end.code
print("HEAVY", sorted(set({HEAVY!r}) & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "HEAVY []"
    assert "distill" in done.stdout
