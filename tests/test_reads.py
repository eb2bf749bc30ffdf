"""Every place where a file is read says in one line what is wrong with it: the reads are found in the source, so that no new one escapes."""

import ast
from collections.abc import Iterator

from .test_architecture import PACKAGE

# Calls that read a file or parse what was in one, by the last part of their name; those of one module alone by both.
READERS = frozenset({
    "open", "read_text", "read_bytes", "iterdir", "listdir", "scandir", "load_file", "safe_open", "from_pretrained", "from_single_file", "load_config",
    "load_dataset", "fromfile", "text_in", "json_in", "object_in", "ZipFile", "TarFile", "GzipFile", "loadtxt", "genfromtxt", "memmap", "open_memmap",
})  # fmt: skip
OF_MODULES = frozenset({
    "json.load", "json.loads", "yaml.load", "yaml.safe_load", "yaml.compose", "csv.reader", "csv.DictReader", "np.load", "numpy.load", "torch.load",
    "pickle.load", "pickle.loads", "tomllib.load", "_Loader",
})  # fmt: skip
GUARD = "reading"

# Reads outside a guard, each with the reason why no more is needed there.
CALLED_IN_A_GUARD = "its callers have the guard: load_teacher, hollow_teacher and around"
NAMES_ITSELF = "raises OSError alone, which names the file and ends a command in one line"
OURS = "reads what ships with fewstep, or what it wrote a moment ago"
ALLOWED = {
    "reading.text_in": "is what is called within guards",
    "reading.json_in": "is what is called within guards",
    "reading.object_in": "is what is called within guards",
    "atomic.sync": NAMES_ITSELF,
    "hashes.sha256_of": NAMES_ITSELF,
    "export.final.write_final": NAMES_ITSELF,
    "runs.students.save_student": NAMES_ITSELF,
    "cli.preflight._somebodys": NAMES_ITSELF,
}


def calls_in(tree: ast.AST) -> Iterator[tuple[ast.Call, str, bool]]:
    """(a call that reads, the function around it, whether a guard is around it)."""

    def walk(node: ast.AST, function: str, guarded: bool) -> Iterator[tuple[ast.Call, str, bool]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            function, guarded = f"{function}.{node.name}".lstrip("."), False  # a function inside a guard may be called outside it
        if isinstance(node, ast.Call) and reads(node):
            yield node, function, guarded
        if isinstance(node, ast.With) and any(_called(item.context_expr) == GUARD for item in node.items):
            for item in node.items:
                yield from walk(item, function, True)
            for part in node.body:
                yield from walk(part, function, True)
            return
        if isinstance(node, ast.Try):
            caught = any(_catches_all(h) for h in node.handlers)
            for part in node.body:
                yield from walk(part, function, guarded or caught)
            for other in (*node.handlers, *node.orelse, *node.finalbody):
                yield from walk(other, function, guarded)
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, function, guarded)

    yield from walk(tree, "", False)


def reads(call: ast.Call) -> bool:
    """Whether a call is one that reads; `open` for writing is none."""
    name = ast.unparse(call.func)
    if name in OF_MODULES:
        return True
    if _called(call) not in READERS:
        return False
    modes = [*call.args[:2], *(k.value for k in call.keywords if k.arg == "mode")]
    return not any(isinstance(m, ast.Constant) and isinstance(m.value, str) and m.value in ("w", "wb", "xb", "x", "a") for m in modes)


def _called(node: ast.AST) -> str:
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""


def _catches_all(handler: ast.ExceptHandler) -> bool:
    """`except Exception` that ends in a `raise`: nothing is passed over."""
    return isinstance(handler.type, ast.Name) and handler.type.id == "Exception" and isinstance(handler.body[-1], ast.Raise)


def unguarded(source: str, module: str) -> list[tuple[str, str]]:
    """(place, call) of every read without a guard."""
    return [
        (f"{module}.{function}".rstrip("."), f"line {call.lineno}: {ast.unparse(call)[:90]}")
        for call, function, guarded in calls_in(ast.parse(source))
        if not guarded
    ]


def found() -> dict[str, list[str]]:
    """All of them in the package, by place."""
    places: dict[str, list[str]] = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(file.relative_to(PACKAGE).with_suffix("").parts)
        for place, call in unguarded(file.read_text(encoding="utf-8"), module):
            places.setdefault(place, []).append(call)
    return places


def test_every_read_is_guarded() -> None:
    new = [f"{place}: {call}" for place, calls in found().items() if place not in ALLOWED for call in calls]
    assert not new, "read these within fewstep.reading.reading, or say in ALLOWED why not:\n" + "\n".join(new)
