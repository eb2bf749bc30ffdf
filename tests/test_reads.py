"""Every read of a file says in one line what is wrong.

The reads are found in the source, so that no new one escapes.
"""

import ast
from collections.abc import Iterator

import pytest

from .project import PACKAGE

# Calls that read a file or parse what was in one, by the last part of their name:
# functions, and methods or functions of a module.
FUNCTIONS = frozenset({"open", "load_file", "safe_open", "text_in", "json_in", "object_in", "load_dataset", "_Loader"})
METHODS = frozenset({
    "open", "read_text", "read_bytes", "iterdir", "listdir", "scandir", "load_file", "safe_open", "from_pretrained",
    "from_single_file", "load_config", "fromfile", "ZipFile", "TarFile", "GzipFile", "loadtxt", "genfromtxt", "memmap",
    "read_csv",
})  # fmt: skip
OF_MODULES = frozenset({
    "json.load", "json.loads", "yaml.load", "yaml.safe_load", "yaml.compose", "csv.reader", "csv.DictReader", "np.load",
    "numpy.load", "torch.load", "pickle.load", "pickle.loads", "tomllib.load", "tomllib.loads",
})  # fmt: skip
GUARD = "reading"

# Reads outside a guard, each with the reason why no more is needed there.
PARSERS = "parses alone; its callers are the guards of this list's own file"
BY_CALLERS = (
    "the functions that call it are guards: load_teacher and meta_teacher, render_run, _yaml and override, files_in"
)
BYTES = "raises OSError alone, which names the file; it ends a command in one line, or is turned into one right there"
OURS = "reads what ships with fewstep, what it wrote a moment ago, or what came by a hash that has been compared"
SKIPS = (
    "passes over what is no JSON, as is said, and so does what it is for: "
    "a lock, a log that a kill cut off, a header of others"
)
SYSTEM = "reads what Linux writes about this machine and process"
ALLOWED = {
    "reading.text_in": PARSERS,
    "reading.json_in": PARSERS,
    "reading.json_of": PARSERS,
    "reading.object_in": PARSERS,
    "backbones.denoiser_file.read": BY_CALLERS,
    "backbones.encoders.deferred": BY_CALLERS,
    "backbones.load.load_beside": BY_CALLERS,
    "backbones.meta.components": BY_CALLERS,
    "backbones.parts.load_pipeline": BY_CALLERS,
    "backbones.qwenimage21.Qwen3VLProcessor.from_pretrained": BY_CALLERS,
    "backbones.parts.load_part": BY_CALLERS,
    "backbones.single_file.load_checkpoint": BY_CALLERS,
    "backbones.single_file.require_read": BY_CALLERS,
    "report.grids.read_grid": BY_CALLERS,
    "report.grids.require_png": BY_CALLERS,
    "runs.recipe._value_of": BY_CALLERS,
    "report.live._record": SKIPS,
    "runs.metrics_log._records": SKIPS,
    "cli.inspect._json": SKIPS,
    "studio.folders._newest": SKIPS,
    "studio.folders._walk": BYTES,
    "studio.folders.tail": BYTES,
    "studio.look.css": OURS,
    "cli.export.in_other_programs": OURS,
    "cli.recipes.run_recipes": OURS,
    "runs.encoder_record.EncoderRecord.read": SKIPS,
    "training.lock._began": SKIPS,
    "training.lock.holder_in": SKIPS,
    "training.lock._taken": SKIPS,
    "training.lock._read": SKIPS,
    "atomic.sync": BYTES,
    "hashes.sha256_of": BYTES,
    "evaluation.speed._peak": SYSTEM,
    "training.saving.free_memory": SYSTEM,
    "training.saving._numbers": SYSTEM,
    "notebook.png_of": BYTES,
    "cli.beside._work": SYSTEM,
    "cli.beside._result": OURS,
    "notebook._narrow": OURS,
    "student.folder.write_parts": BYTES,
    "student.student.Student.save": BYTES,
    "runs.place._somebodys": BYTES,
    "cli.progress.Plain.on_broken_pipe": BYTES,
    "backbones.weights.weights_in": BYTES,
    "data.captioned.Captioned.read": BYTES,
    "data.captioned.require_image": BYTES,
    "data.captioned._shard": BYTES,
    "data.captioned._require_end": BYTES,
    "data.folders._below": BYTES,
    "data.texts.read_text": BYTES,
    "data.texts.table": "raises csv.Error alone, which is turned into a line right there",
    "zoo.pixel_data._folder": BYTES,
    "backbones.files.save_pipeline": OURS,
    "backbones.miniature.load_tokenizer": OURS,
    "backbones.miniature_video.load_tokenizer": OURS,
    "report.page._source": OURS,
    "data.trajectories._require_own": OURS,
    "processes.require_same": OURS,
    "zoo.clip_data.load_clips": OURS,
    "zoo.emoji_data.fetch": OURS,
    "zoo.emoji_data.load": OURS,
    "zoo.emoji_data.load_style": OURS,
    "zoo.teacher.save_teacher": OURS,
}


def calls_in(tree: ast.AST) -> Iterator[tuple[ast.Call, str, bool]]:
    """(a call that reads, the function around it, whether a guard is around it)."""

    def walk(node: ast.AST, function: str, guarded: bool) -> Iterator[tuple[ast.Call, str, bool]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            function, guarded = (
                f"{function}.{node.name}".lstrip("."),
                False,
            )  # a function inside a guard may be called outside it
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
    """Whether a call is one that reads; `open` for writing is none, nor is JSON made into a value and back."""
    name, own = ast.unparse(call.func), _called(call)
    if name in OF_MODULES:
        return not (call.args and _called(call.args[0]) == "dumps")
    if own not in (METHODS if isinstance(call.func, ast.Attribute) else FUNCTIONS):
        return False
    modes = [*call.args[:2], *(k.value for k in call.keywords if k.arg == "mode")]
    return own != "open" or not any(
        isinstance(m, ast.Constant) and m.value in ("w", "wb", "x", "xb", "a", "ab") for m in modes
    )


def _called(node: ast.AST) -> str:
    """The last part of the name of what a call calls."""
    if not isinstance(node, ast.Call):
        return ""
    return (
        node.func.attr
        if isinstance(node.func, ast.Attribute)
        else node.func.id
        if isinstance(node.func, ast.Name)
        else ""
    )


def _catches_all(handler: ast.ExceptHandler) -> bool:
    """`except Exception` that ends in a `raise`: nothing is passed over."""
    return (
        isinstance(handler.type, ast.Name)
        and handler.type.id == "Exception"
        and isinstance(handler.body[-1], ast.Raise)
    )


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


def test_what_is_allowed_is_still_there() -> None:
    """A line whose read has gone would speak for the next one of that name."""
    assert not ALLOWED.keys() - found().keys()


@pytest.mark.parametrize(
    "read",
    [
        "open(path)",
        "path.read_text()",
        "path.read_bytes()",
        "path.open('rb')",
        "Image.open(path)",
        "tarfile.open(path)",
        "gzip.open(path)",
        "zipfile.ZipFile(path)",
        "json.load(file)",
        "json.loads(text)",
        "yaml.safe_load(text)",
        "csv.reader(file)",
        "np.load(path)",
        "torch.load(path)",
        "load_file(path)",
        "safe_open(path, 'pt')",
        "safetensors.torch.load_file(path)",
        "kind.from_pretrained(path)",
        "kind.from_single_file(path)",
        "kind.load_config(path)",
        "list(path.iterdir())",
        "json_in(path)",
    ],
)
def test_a_read_without_a_guard_is_found(read: str) -> None:
    assert unguarded(f"def f(path):\n    return {read}", "new.module")[0][0] == "new.module.f"
    assert unguarded(
        f"def f(path):\n    try:\n        return {read}\n"
        "    except (OSError, ValueError) as error:\n        raise E from error",
        "m",
    )
    assert unguarded(f"def f(path):\n    try:\n        return {read}\n    except Exception:\n        return None", "m")
    assert unguarded(f"def f(path):\n    with reading(path, 'x'):\n        def g():\n            return {read}\n", "m")
    assert unguarded(
        "def f(path):\n    try:\n        pass\n"
        f"    except Exception as error:\n        x = {read}\n        raise E from error",
        "m",
    )


@pytest.mark.parametrize(
    "source",
    [
        "with reading(path, 'delete it'):\n    x = json.loads(path.read_text())",
        "with reading(path, 'delete it'), safe_open(path, 'pt') as file:\n    pass",
        "try:\n    x = load_file(path)\nexcept Exception as error:\n    raise ValueError('one line') from error",
        "path.open('w')",
        "path.open('a', encoding='utf-8')",
        "x = json.loads(json.dumps(value))",
    ],
)
def test_what_is_guarded_or_no_read_is_let_through(source: str) -> None:
    assert not unguarded(source, "m")
