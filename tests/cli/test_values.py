"""Names that people give come through command line and recipes unchanged. A name that no file may have is one line."""

import json
import math
import string
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fewstep.atomic import write_json
from fewstep.backbones.load import absolute, called, fused, hub_id, seen_from, source_of
from fewstep.cli import distill as module
from fewstep.cli.preflight import note_guidance, note_shadowed
from fewstep.runs.recipe import DistillRecipe, FinetuneRecipe, override, read_recipe

from .. import tiny
from .common import RECIPE, error_of, fewstep

NAMES = [
    "mymix #2", "[SD] mix", "a: b", "{x}", "null", "~", "true", "no", "3", "1e5", "2026-01-01", "0x10", "!!int 3", "&a",
    "*a", "- x", "'", '"', '"q"', "a, b", "[a, b]", "%x", "@x", "`x", "x: ", " x", "x ", "Müller", "東京", "...", "---",
    "?", "|", ">", "=", "x=y", "\\x", "a\tb", "a\nb", *(f"a{c}b" for c in string.printable),
    *(f"{c}b" for c in string.printable), *string.printable,
]  # fmt: skip


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_json(Path("tiny.yaml"), {**RECIPE, "teacher": "x"})
    return Path("tiny.yaml")


def test_options_of_their_own_are_values(path: Path) -> None:
    for name in NAMES:
        if name.startswith("~"):
            continue
        read = read_recipe(str(path), [], DistillRecipe, {"teacher": name, "prompts.source": name})
        assert (read.teacher, read.prompts.source) == (name, name)
        sets = [
            f"teacher={name}",
            f"prompts.source={name}",
            f"roles.targets={name}",
            f"init_from={name}",
            f"warm_start.data.folder={name}",
        ]
        value = override({}, sets, DistillRecipe)
        left = None if name == "null" else name
        assert value == {
            "teacher": name,
            "prompts": {"source": name},
            "roles": {"targets": name},
            "init_from": left,
            "warm_start": {"data": {"folder": left}},
        }


@pytest.mark.parametrize("option", ["evaluate", "init_from", "prompts.column", "preview.protocol"])
def test_what_may_be_left_out_is_left_out_by_null(option: str, path: Path) -> None:
    for text in ("null", ""):
        value = read_recipe(str(path), [f"{option}=x", f"{option}={text}"], DistillRecipe)
        for part in option.split("."):
            value = getattr(value, part)
        assert value is None


def test_all_else_is_yaml() -> None:
    def put(*sets: str) -> dict[str, Any]:
        return override({"method": {}}, sets, DistillRecipe)

    assert put(
        "train.lr=1e-5", "train.iterations=7", "roles.exclude=[a, b]", "method.condition=false", "data={source: x}"
    ) == {
        "method": {"condition": False},
        "train": {"lr": 1e-5, "iterations": 7},
        "roles": {"exclude": ["a", "b"]},
        "data": {"source": "x"},
    }
    assert put("warm_start.method.loss=3", "data.folder=007", "method.steps=2", "preview.prompts=[a]", "nowhere=3") == {
        "warm_start": {"method": {"loss": "3"}},
        "data": {"folder": "007"},
        "method": {"steps": 2},
        "preview": {"prompts": ["a"]},
        "nowhere": 3,
    }
    assert override({}, ["teacher=007", "data.source=1"], FinetuneRecipe) == {"teacher": "007", "data": {"source": "1"}}


@pytest.mark.parametrize(
    "name", ["../../x", "/tmp/x", "a/b", "..", "", "a\\b", "con", "x" * 300, "a\nb", " x", "x.", "\x1b[31m", "a:b"]
)
def test_a_runs_name_is_a_name(
    name: str, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(path, {**RECIPE, "teacher": "x", "name": name})
    assert fewstep(monkeypatch, "distill", path) == 2
    said = error_of(capsys)
    assert said.startswith("error: name: got ") and said.endswith(
        "it becomes the run's folder: choose another, or pass --out"
    )
    assert said.isprintable() and not Path("runs").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: distill\ntrain: {lr: 1}\nname: x\ntrain: {lr: 2}\n", "has train twice, in line 2 and in line 4"),
        ("kind: distill\ntrain:\n  lr: 1\n  batch: 3\n  lr: 1\n", "has lr twice, in line 3 and in line 5"),
        ("kind: distill\n'name': x\nname: x\n", "has name twice, in line 2 and in line 3"),
        ("kind: distill\npreview: {prompts: [{a: 1, a: 1}]}\n", "has a twice, in line 2 and in line 2"),
    ],
)
def test_a_key_that_is_there_twice_is_named_with_its_lines(
    text: str, said: str, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path.write_text(text, encoding="utf-8")
    assert fewstep(monkeypatch, "distill", path) == 2
    assert error_of(capsys) == f"error: recipe: tiny.yaml {said}; the last one alone would count: keep one of them"


def test_what_is_merged_may_be_said_anew(path: Path) -> None:
    text = yaml.safe_dump({**RECIPE, "teacher": "x"}).replace("train:", "train: &base", 1)
    path.write_text(
        text + "data: {source: trajectories}\nwarm_start:\n  method: {name: trajp-l}\n"
        "  train:\n    <<: *base\n    batch: 9\n",
        encoding="utf-8",
    )
    assert read_recipe(str(path), ["init_from=null", "method.init_head=drop"], DistillRecipe).warm_start is not None


@pytest.mark.parametrize("option", ["--teacher", "--prompts"])
def test_an_empty_option_is_said(
    option: str, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fewstep(monkeypatch, "distill", path, option, "") == 2
    assert error_of(capsys).startswith(f"error: {option}: got an empty text")


@pytest.mark.parametrize("out", ["/", "~", "tiny.yaml", "tiny.yaml/run", "/dev/null", "model", "full"])
def test_a_run_needs_a_folder_of_its_own(
    out: str, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_json(Path("model/model_index.json"), {})
    write_json(Path("full/final/thesis.json"), {"years": 4})
    monkeypatch.setenv("HOME", str(Path("home").absolute()))
    for more in ((), ("--dry-run",)):
        assert fewstep(monkeypatch, "distill", path, "--out", out, *more) == 2
        assert error_of(capsys).startswith("error: --out: ")
    assert json.loads(Path("full/final/thesis.json").read_text(encoding="utf-8")) == {"years": 4}


@pytest.mark.parametrize("command", [("sample", "emoji", "-p", "rocket"), ("evaluate", "nothing")])
@pytest.mark.parametrize("out", ["-", "/dev/null", "folder", "link", "tiny.yaml/x.png", "x" * 300])
def test_an_output_that_cannot_be_is_said_before_anything_is_drawn(
    command: tuple[str, ...], out: str, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("folder").mkdir()
    Path("link").symlink_to("tiny.yaml")
    assert fewstep(monkeypatch, *command, "-o", out) == 2
    assert error_of(capsys).startswith("error: -o: got ")
    assert Path("/dev/null").is_char_device() and path.is_file()


def test_what_was_typed_is_what_trains(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`--teacher "mymix #2"` is that folder and no other; the printed command says it again."""
    seen: list[DistillRecipe] = []

    def stop(recipe: DistillRecipe, *rest: object) -> None:
        seen.append(recipe)
        sys.exit(2)

    monkeypatch.setattr(module, "run_stages", stop)
    assert (
        fewstep(
            monkeypatch,
            "distill",
            path,
            "--teacher",
            "mymix #2",
            "--prompts",
            "[a]: b.txt",
            "--fuse-lora",
            "x + y@1.safetensors",
        )
        == 2
    )
    assert not Path("runs").exists()
    assert seen[0].prompts.source == "[a]: b.txt"
    assert source_of(seen[0].teacher) == ("mymix #2", (("x + y@1.safetensors", 1.0),), "")


def test_a_folder_that_is_called_as_a_bundled_teacher_is_said(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    note_shadowed("emoji")
    assert capsys.readouterr().out == ""
    write_json(Path("emoji/model_index.json"), {})
    note_shadowed("emoji + style.safetensors")
    note_shadowed("./emoji")
    assert (
        capsys.readouterr().out
        == "note: teacher emoji is the one that ships with fewstep; pass ./emoji for the folder here\n"
    )
    assert source_of("./emoji").names == ["emoji"] and absolute("./emoji") == str(path.absolute().parent / "emoji")


def test_sources_are_what_is_there(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("my + mix", "lo@ra", "style@2.safetensors", "a.safetensors@b", "deep/x + y@0.5.safetensors"):
        Path(name).mkdir(parents=True)
    assert source_of("my + mix") == ("my + mix", (), "") and source_of("a.safetensors@b") == ("a.safetensors@b", (), "")
    styles = [
        "lo@ra",
        "style@2.safetensors@0.5",
        "style@2.safetensors",
        "deep/x + y@0.5.safetensors",
        "owner/name@0.25",
        "gone@v2.safetensors",
    ]
    wanted = (
        ("lo@ra", 1.0), ("style@2.safetensors", 0.5), ("style@2.safetensors", 1.0), ("deep/x + y@0.5.safetensors", 1.0),
        ("owner/name", 0.25), ("gone@v2.safetensors", 1.0),
    )  # fmt: skip
    text = fused("me/base", styles)
    assert source_of(text) == ("me/base", wanted, "") and source_of(fused("my + mix", styles)) == (
        "my + mix",
        wanted,
        "",
    )
    assert source_of(absolute(text)).loras == tuple(
        (str(tmp_path / p) if Path(p).exists() else p, w) for p, w in wanted
    )
    assert (
        absolute("emoji") == "emoji"
        and absolute("me/base") == "me/base"
        and hub_id(text) == "me/base"
        and not hub_id("emoji")
    )
    assert (
        called(absolute("my + mix")) == "my \\+ mix"
        and called(absolute(".")) == tmp_path.name
        and source_of(".").names == [tmp_path.name]
    )
    for odd in ("x@", "x@nan", "x@inf", "x@y"):
        with pytest.raises(ValueError, match="--fuse-lora: got"):
            fused("me/base", [odd])
    student = tmp_path / "runs" / "x" / "final"
    student.mkdir(parents=True)
    monkeypatch.chdir("/")
    assert source_of(seen_from("me/base + gone", student)) == source_of("me/base + gone")
    assert seen_from("lo@ra", student) == str(tmp_path / "lo@ra") and seen_from("me/other", student) == "me/other"


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("train.iterations", True, r"^train\.iterations: input should be a number, got true"),
        ("train.lr", True, r"^train\.lr: input should be a number, got true"),
        ("method.guidance.rescale", False, r"^method\.guidance\.rescale: input should be a number, got false"),
        ("method.steps", [4, True], r"^method\.steps: input should be a number, got true"),
        ("train.betas", [False, 0.9], r"^train\.betas: input should be a number, got false"),
        ("size", False, r"^size: input should be a number, got false"),
        ("name", True, r"^name: input should be a text, got true"),
        ("roles.alpha", math.nan, r"^roles\.alpha: got nan, allowed are numbers above 0"),
        ("roles.alpha", math.inf, r"^roles\.alpha: got inf, allowed are numbers above 0"),
        (
            "method.match.fisher_correction",
            math.nan,
            r"^method\.match\.fisher_correction: got nan, allowed are finite numbers",
        ),
        *(
            (f"{part}.seed", 10**30, rf"^{part}\.seed: got 10+, allowed are whole numbers from -2\^62")
            for part in ("train", "preview", "data")
        ),
    ],
)
def test_numbers_that_are_none(option: str, value: object, said: str, path: Path) -> None:
    """A truth value is no number, though Python takes it for one."""
    recipe: dict[str, Any] = {**RECIPE, "teacher": "x", "data": {"source": "teacher"}}
    *parents, last = option.split(".")
    inside = recipe
    for parent in parents:
        block = inside.get(parent)
        inside[parent] = inside = {**block} if isinstance(block, dict) else {}
    inside[last] = value
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(ValueError, match=said) as error:
        read_recipe(str(path), [], DistillRecipe)
    assert "\n" not in str(error.value)


def test_truth_values_stay_where_they_are_meant(path: Path) -> None:
    sets = [
        "roles.lora=true",
        "train.shard=false",
        "method.analytic_first_step=false",
        "preview.keep_best=true",
        "init_from=true",
        "name=no",
    ]
    recipe = read_recipe(str(path), sets, DistillRecipe)
    assert recipe.roles.lora and recipe.preview.keep_best and (recipe.init_from, recipe.name) == ("true", "no")


def test_more_steps_of_the_teacher_than_it_has_are_said_before_anything_is_walked() -> None:
    recipe = DistillRecipe.model_validate({**RECIPE, "teacher": "x", "preview": {"teacher_steps": 1001}})
    with pytest.raises(ValueError, match=r"^preview\.teacher_steps: got 1001, allowed are 1 to 1000"):
        module.check_initial(recipe, tiny.denoiser())


def test_a_guidance_that_turns_from_prompts_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for scale, said in ((1.0, ""), (3.5, ""), (0.0, "is 0; below 1"), (-2.0, "is -2; below 1")):
        note_guidance(scale)
        out = capsys.readouterr().out
        assert said in out and bool(out) == bool(said)
