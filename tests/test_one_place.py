"""What one module alone may do, and how the package speaks of itself."""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.project import ROOT

PACKAGE = ROOT / "src" / "fewstep"
SOURCES = sorted(PACKAGE.rglob("*.py"))
GUIDANCE = "core/guidance.py"
FOLDER = "student/folder.py"
HASHES = "hashes.py"  # names the card, whose hashes a LoRA that is fused is compared with as well
# diffusers' own name of a LoRA's file, in any folder.
DIFFUSERS_OWN = {"backbones/lora.py": {"pytorch_lora_weights.safetensors"}}
CONDITIONAL, UNCONDITIONAL = re.compile("cond"), re.compile("null|uncond|empty")
MOST_WORDS = 12
# Functions whose docstring is their command's help page, which may say more.
HELP = "cli/main.py"
# First words of a docstring that are no verb: articles, pronouns and prepositions.
NO_VERB = frozenset(
    [
        "a",
        "an",
        "the",
        "all",
        "any",
        "each",
        "every",
        "what",
        "which",
        "who",
        "where",
        "when",
        "how",
        "whether",
        "that",
        "this",
        "these",
        "those",
        "it",
        "its",
        "of",
        "in",
        "on",
        "at",
        "to",
        "for",
        "from",
        "with",
        "without",
        "one",
        "two",
    ]
)


def place(file: Path) -> str:
    return file.relative_to(PACKAGE).as_posix()


def names(node: ast.AST) -> str:
    """The identifiers of an expression, without those of what it is indexed or called with."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{names(node.value)}.{node.attr}"
    if isinstance(node, ast.Call | ast.Subscript):
        return names(node.func if isinstance(node, ast.Call) else node.value)
    return ""


def combinations(source: str) -> list[int]:
    """Lines that subtract, or interpolate between, a conditional and an unconditional output, or call `guide`."""

    def pair(a: ast.AST, b: ast.AST) -> bool:
        first, second = names(a), names(b)
        return any(
            UNCONDITIONAL.search(x) and CONDITIONAL.search(y) and not UNCONDITIONAL.search(y)
            for x, y in ((first, second), (second, first))
        )

    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Sub) and pair(node.left, node.right))
        or (
            isinstance(node, ast.Call)
            and names(node.func).rpartition(".")[2] in ("lerp", "lerp_")
            and any(pair(a, b) for a, b in itertools.combinations([node.func, *node.args], 2))
        )
    ]


def test_guidance_is_applied_in_one_place() -> None:
    """`guide` combines a conditional and an unconditional output, and `backbones.base.guided` alone calls it."""
    found = {place(f) for f in SOURCES if combinations(f.read_text(encoding="utf-8"))}
    assert found == {GUIDANCE}
    callers = {
        place(f)
        for f in SOURCES
        for node in ast.walk(ast.parse(f.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and any(alias.name == "guide" for alias in node.names)
    }
    assert callers == {"backbones/base.py"}


@pytest.mark.parametrize(
    "source",
    [
        "y = m_null + w * (m_cond - m_null)",
        "y = w * (cond_out - uncond_out)",
        "y = torch.lerp(eps_uncond, eps_cond, w)",
        "y = m_null.lerp(m_cond, w)",
    ],
)
def test_another_combination_would_be_found(source: str) -> None:
    assert combinations(source)


def mentions(source: str, words: frozenset[str]) -> list[str]:
    """File names of a student's folder in code, docstrings and longer texts aside."""
    return [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in words
    ]


def test_a_students_folder_is_read_and_written_in_one_place() -> None:
    """No other module names the files of a student's folder, or imports their names."""
    tree = ast.parse((PACKAGE / FOLDER).read_text(encoding="utf-8"))
    constants = {
        target.id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.endswith("FILE")
    }
    assert {"LORA_FILE", "CONDITION_FILE", "HEAD_FILE"} <= set(constants)
    files = frozenset({"fewstep.json", *constants.values()})
    own = {FOLDER, HASHES}
    found = {place(f): set(mentions(f.read_text(encoding="utf-8"), files)) for f in SOURCES}
    assert {where: m for where, m in found.items() if m and where not in own} == DIFFUSERS_OWN
    importers = {
        place(f): alias.name
        for f in SOURCES
        for node in ast.walk(ast.parse(f.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").endswith("folder")
        for alias in node.names
        if alias.name in {*constants, "FILE"}
    }
    assert importers == {}


def documented() -> Iterator[tuple[str, ast.AST, str]]:
    """(place, node, docstring) of everything that has one."""
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                if place(file) == HELP and isinstance(node, ast.FunctionDef) and node.decorator_list:
                    continue
                yield f"{place(file)}:{getattr(node, 'lineno', 1)}", node, text


def test_docstrings_begin_with_one_short_sentence() -> None:
    odd = [
        f"{where}: {first}"
        for where, _, text in documented()
        if len((first := text.partition("\n")[0]).split()) > MOST_WORDS or not first.endswith(".")
    ]
    assert not odd, "\n" + "\n".join(odd)


def test_docstrings_of_functions_begin_with_a_verb() -> None:
    odd = [
        f"{where}: {text.partition(chr(10))[0]}"
        for where, node, text in documented()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and not any(names(d).endswith(("property", "overload")) for d in node.decorator_list)
        and (
            text.split()[0].lower() in NO_VERB
            or (text.split()[0].endswith(("ing", "s")) and text.split()[0][0].isupper())
        )
    ]
    assert not odd, "\n" + "\n".join(odd)


def test_public_functions_and_classes_say_what_they_are() -> None:
    bare = [
        f"{place(file)}:{node.lineno}: {node.name}"
        for file in SOURCES
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef | ast.FunctionDef)
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not bare, "\n" + "\n".join(bare)
