"""Generated bad files and settings each end in one line.

The exit code is 2. None ends in a traceback, and none is taken in silence.
"""

import contextlib
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_origin, get_type_hints

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from safetensors.torch import load_file, save_file

from fewstep.cli import main
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.runs.recipe import DistillRecipe, _kinds

from .storm import RECIPE, place

pytestmark = pytest.mark.slow
SHORT: dict[str, Any] = {
    **{k: v for k, v in RECIPE.items() if k not in ("first", "evaluate")},
    "method": {"name": "trajp-l", "steps": 2, "head": "none", "guidance": 2.0},
    "train": {"batch": 2, "lr": 1.0e-3, "fake_lr": 1.0e-2, "checkpoint_every": 1, "iterations": 2},
}


def examples(count: int) -> settings:
    """So many of a kind, the same every time."""
    quiet = [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
        HealthCheck.function_scoped_fixture,
    ]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=quiet)


@dataclass(frozen=True)
class Said:
    """How a command ended: its exit code, and everything that it printed."""

    code: int
    text: str


def fewstep(folder: Path, *arguments: str) -> Said:
    """A command in this process, in a folder."""
    there, given_before, text = os.getcwd(), sys.argv, io.StringIO()
    os.chdir(folder)
    sys.argv = ["fewstep", *arguments]
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), pytest.raises(SystemExit) as left:
            main.run()
        return Said(int(left.value.code or 0), text.getvalue())
    finally:
        os.chdir(there)
        sys.argv = given_before


def assert_refused(said: Said, what: object) -> None:
    """One line, exit code 2, and no fault of fewstep's own."""
    lines = [line for line in said.text.splitlines() if line.startswith(("error: ", "Error: "))]
    assert said.code == 2, (what, said)
    assert len(lines) == 1 and "Traceback" not in said.text and "a fault of fewstep" not in said.text, (what, said)
    assert "traceback is in" not in said.text, (what, said)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, a recipe, and the finished run that it gave."""
    folder = place(tmp_path_factory.mktemp("bad") / "made")
    (folder / "storm.yaml").write_text(yaml.safe_dump(SHORT), encoding="utf-8")
    said = fewstep(folder, "distill", "storm.yaml")
    assert said.code == 0, said
    return folder


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where copies of it are spoilt, one after the other."""
    return tmp_path_factory.mktemp("room")


def copied(made: Path, room: Path) -> Path:
    """A copy of what was made."""
    shutil.rmtree(room / "copy", ignore_errors=True)
    return Path(shutil.copytree(made, room / "copy"))


# Settings


def leaves(kind: Any, where: str = "") -> Iterator[tuple[str, list[Any]]]:
    """Every setting of a model or dataclass, with the types that it takes."""
    for name, annotation in _fields(kind).items():
        kinds = _kinds(annotation)
        inner = [k for k in kinds if isinstance(k, type) and (issubclass(k, BaseModel) or is_dataclass(k))]
        if name == "method":
            inner = [DistributionMatching]
        if name in ("first", "data", "kind"):
            continue
        if inner:
            yield from leaves(inner[0], f"{where}{name}.")
        else:
            yield f"{where}{name}", kinds


def _fields(kind: Any) -> dict[str, Any]:
    return (
        {n: f.annotation for n, f in kind.model_fields.items()}
        if issubclass(kind, BaseModel)
        else get_type_hints(kind, include_extras=True)
    )


WORD = st.text("abcdefghijklmnopqrstuvwxyz_ ", min_size=1, max_size=12).filter(
    lambda w: w.strip() not in ("", "true", "false", "null", "nan", "inf")
)
ODD = [
    st.just([[]]),
    st.just({"a": 1}),
    st.lists(WORD, min_size=1, max_size=2),
    st.dictionaries(WORD, st.integers(), min_size=1, max_size=2),
]


def wrong(kinds: Sequence[Any]) -> st.SearchStrategy[Any]:
    """Values that no setting of these types takes."""
    found: list[st.SearchStrategy[Any]] = [st.dictionaries(WORD, st.integers(), min_size=1, max_size=2)]
    origins = [get_origin(k) or k for k in kinds]
    if NoneType not in origins:
        found.append(st.none())
    if not {str, Literal} & set(origins):
        found.append(WORD.filter(lambda w: w not in ("no", "bf16")))
    if not {list, tuple} & {*origins, *(get_origin(k) for k in kinds)} and not any(
        "Sequence" in str(o) or "tuple" in str(o) for o in kinds
    ):
        found.append(st.lists(st.integers(), max_size=2))
    if float in origins:
        found.append(st.sampled_from([math.nan, math.inf, -math.inf]))
    if int in origins and float not in origins:
        found.append(st.floats(0.01, 0.99))
    if bool not in origins:
        found.append(st.booleans())
    if Literal in origins:
        found.append(WORD.map(lambda w: f"{w}-"))
    return st.one_of(found)


SETTINGS = dict(leaves(DistillRecipe))


def put(recipe: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """The recipe with one setting changed."""
    copy = json.loads(json.dumps(recipe))
    *parents, last = key.split(".")
    place = copy
    for parent in parents:
        place = place.setdefault(parent, {})
    place[last] = value
    return copy


@examples(70)
@given(data=st.data())
def test_a_setting_of_another_type(made: Path, data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(SETTINGS)))
    value = data.draw(wrong(SETTINGS[key]))
    recipe = {**SHORT, "method": {"steps": 2, "guidance": 2.0, "warmup": 1}, "data": None}
    (made / "bad.yaml").write_text(yaml.safe_dump(put(recipe, key, value)), encoding="utf-8")
    assert_refused(fewstep(made, "distill", "bad.yaml", "--dry-run"), (key, value))


@examples(25)
@given(data=st.data())
def test_a_setting_that_is_not_there_and_a_recipe_that_is_none(made: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["key", "text", "bytes", "set"]))
    arguments: list[str] = []
    if kind == "key":
        parent = data.draw(st.sampled_from(["", "method.", "train.", "roles.", "prompts.", "preview."]))
        (made / "bad.yaml").write_text(
            yaml.safe_dump(put(SHORT, f"{parent}{data.draw(WORD.filter(lambda w: '.' not in w))} x", 1)),
            encoding="utf-8",
        )
    elif kind == "text":
        (made / "bad.yaml").write_text(data.draw(st.text(max_size=30)), encoding="utf-8")
    elif kind == "bytes":
        (made / "bad.yaml").write_bytes(data.draw(st.binary(max_size=30)))
    else:
        shutil.copy(made / "storm.yaml", made / "bad.yaml")
        parent = data.draw(st.sampled_from(["", "method.", "train.lr.", "name.", "data.", "first.x."]))
        arguments = [
            "--set",
            data.draw(st.one_of(WORD, st.builds("{}{}-={}".format, st.just(parent), WORD, st.text(max_size=8)))),
        ]
    assert_refused(fewstep(made, "distill", "bad.yaml", "--dry-run", *arguments), (kind, arguments))


# Files

BROKEN_PROMPTS = {
    "txt": [b"", b"\n \n\t\n", b"red cat\n\xc3\x28\n", b"\xff\xfe\x00", b"red\x00cat\n", b"\x80" * 9],
    "jsonl": [
        b"",
        b"{",
        b'{"prompt": 3}\n',
        b'{"caption_": "a"}\n',
        b'{"prompt": "a"}\n{"prompt"\n',
        b"[[1]]\n",
        b'{"prompt": null}\n',
        b"\xff\n",
    ],
    "csv": [
        b"",
        b"prompt\n",
        b"a,b\nc,d\n",
        b"prompt,prompt\na,b\n",
        b'prompt\n"a\n',
        b"\xff\xff\n",
        b"prompt\n\x00\n",
    ],
    "tsv": [b"prompts\nred cat\n", b"prompt\n\n"],
    "parquet": [b"PAR1"],
    "": [b"red cat\n"],
}


@examples(20)
@given(data=st.data())
def test_prompts_that_are_none(made: Path, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(sorted(BROKEN_PROMPTS)))
    content = data.draw(st.sampled_from(BROKEN_PROMPTS[kind]))
    path = made / f"broken.{kind}".rstrip(".")
    path.write_bytes(content)
    assert_refused(fewstep(made, "distill", "storm.yaml", "--prompts", path.name), (kind, content))


def places_of(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value inside a JSON value."""
    if where:
        yield where
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places_of(inner, (*where, key))


def other_type(value: Any) -> st.SearchStrategy[Any]:
    """JSON values of another type than this one."""
    kinds: list[tuple[Any, st.SearchStrategy[Any]]] = [
        (str, WORD), ((int, float), st.integers(2, 9)), (list, st.just([[]])), (dict, st.just({"a": {}})),
        (NoneType, st.none()),
    ]  # fmt: skip
    return st.one_of([strategy for kind, strategy in kinds if not isinstance(value, kind)])


def spoil_json(path: Path, data: st.DataObject, only: Sequence[str] = ()) -> object:
    """Give one value of a JSON file, of `only` these keys, another type, or cut the file off; returns what was done."""
    text = path.read_text(encoding="utf-8")
    if data.draw(st.booleans()):
        end = data.draw(st.integers(0, len(text.rstrip()) - 1))
        path.write_text(text[:end], encoding="utf-8")
        return path.name, end
    value = json.loads(text)
    where = data.draw(st.sampled_from([p for p in places_of(value) if not only or p in [(o,) for o in only]]))
    inner: Any = value
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = data.draw(other_type(inner[where[-1]]))
    path.write_text(json.dumps(value), encoding="utf-8")
    return path.name, where, inner[where[-1]]


@examples(25)
@given(data=st.data())
def test_a_student_whose_card_is_spoilt(made: Path, room: Path, data: st.DataObject) -> None:
    folder = copied(made, room)
    what = spoil_json(folder / "runs" / "storm" / "final" / "fewstep.json", data)
    for command in (("inspect", "runs/storm/final"), ("sample", "runs/storm", "-p", "red cat")):
        assert_refused(fewstep(folder, *command), (command[0], what))


def spoil_tensors(path: Path, data: st.DataObject, kinds: Sequence[str] = ("cut", "bit", "bytes", "gone")) -> object:
    """Spoil a file of tensors, and return what was done.

    The file is cut off, a byte of its tensors changed, its content replaced, or the file removed.
    """
    content, kind = path.read_bytes(), data.draw(st.sampled_from(kinds))
    if kind == "cut":
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    elif kind == "bit":
        at = data.draw(st.integers(8 + int.from_bytes(content[:8], "little"), len(content) - 1))
        path.write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
    elif kind == "bytes":
        path.write_bytes(data.draw(st.binary(max_size=64)))
    else:
        path.unlink()
    return path.name, kind


@examples(15)
@given(data=st.data())
def test_a_checkpoint_that_is_spoilt(made: Path, room: Path, data: st.DataObject) -> None:
    folder = copied(made, room)
    path = data.draw(st.sampled_from(sorted((folder / "runs" / "storm" / "checkpoint-000002").iterdir())))
    what = spoil_json(path, data) if path.suffix == ".json" else spoil_tensors(path, data)
    assert_refused(fewstep(folder, "distill", "storm.yaml"), what)


@examples(8)
@given(data=st.data())
def test_a_record_of_trajectories_that_is_spoilt(made: Path, room: Path, data: st.DataObject) -> None:
    folder = copied(made, room)
    what = spoil_json(folder / "runs" / "storm" / "trajectories" / "trajectories.json", data)
    assert_refused(fewstep(folder, "distill", "storm.yaml"), what)


@examples(6)
@given(data=st.data())
def test_embeddings_and_trajectories_that_are_spoilt_are_made_again(
    made: Path, room: Path, data: st.DataObject
) -> None:
    """They hold nothing that cannot be made again, and are what they were."""
    folder = copied(made, room)
    kind = data.draw(st.sampled_from(["embeddings", "trajectories"]))
    path = data.draw(st.sampled_from(sorted((folder / "runs" / "storm" / kind).glob("*.safetensors"))))
    before = {k: v.clone() for k, v in load_file(path).items()}  # no view of the file that is spoilt
    what = spoil_tensors(path, data)
    said = fewstep(folder, "distill", "storm.yaml")
    assert said.code == 0, (what, said)
    after = load_file(path)
    assert after.keys() == before.keys() and all(
        torch.equal(after[k], v) for k, v in before.items() if k != "seconds"
    ), what


SETTINGS_OF_PARTS = {
    "unet/config.json": [
        "in_channels",
        "out_channels",
        "block_out_channels",
        "cross_attention_dim",
        "down_block_types",
        "norm_num_groups",
        "sample_size",
    ],
    "vae/config.json": ["latent_channels", "block_out_channels", "norm_num_groups", "scaling_factor", "up_block_types"],
    "text_encoder/config.json": ["hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"],
    "scheduler/scheduler_config.json": ["num_train_timesteps", "beta_schedule", "prediction_type"],
    "model_index.json": ["_class_name", "unet", "vae", "scheduler"],
}


@examples(30)
@given(data=st.data())
def test_a_teacher_whose_settings_are_spoilt(made: Path, room: Path, data: st.DataObject) -> None:
    folder = copied(made, room)
    file = data.draw(st.sampled_from(sorted(SETTINGS_OF_PARTS)))
    what = spoil_json(folder / "teacher" / file, data, SETTINGS_OF_PARTS[file])
    shutil.rmtree(folder / "runs")
    assert_refused(fewstep(folder, "distill", "storm.yaml"), (file, what))


@examples(20)
@given(data=st.data())
def test_a_style_that_is_none(made: Path, room: Path, data: st.DataObject) -> None:
    folder = copied(made, room)
    path = folder / "runs" / "storm" / "final" / "pytorch_lora_weights.safetensors"
    kind, strength = data.draw(st.sampled_from(["file", "shape", "name", "nan", "strength"])), ""
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    key = data.draw(st.sampled_from(sorted(tensors)))
    what: object = (kind, key)
    if kind == "file":  # whose bytes nobody has said the hash of
        what = spoil_tensors(path, data, ("cut", "bytes", "gone"))
    elif kind == "shape":
        save_file({**tensors, key: torch.zeros(7, 5)}, path)
    elif kind == "name":
        save_file(
            {**{k: v for k, v in tensors.items() if k != key}, f"unet.{data.draw(WORD)}.lora_A.weight": tensors[key]},
            path,
        )
    elif kind == "nan":
        save_file({**tensors, key: tensors[key] * math.nan}, path)
    else:
        strength = "@" + data.draw(st.sampled_from(["nan", "inf", "-inf", "x", "", "1e999", "1@2", "0x1"]))
    lora = folder / "style.safetensors"
    if path.exists():
        path.rename(lora)
    shutil.rmtree(folder / "runs")
    assert_refused(
        fewstep(folder, "distill", "storm.yaml", "--fuse-lora", f"style.safetensors{strength}"), (what, strength)
    )
