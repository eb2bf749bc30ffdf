"""A student's folder on any file system, under any name, and nothing read from it but what was written."""

import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import fewstep
from fewstep.atomic import write_json
from fewstep.backbones.few_step import pipeline_info
from fewstep.backbones.load import absolute, fingerprint
from fewstep.backbones.sd import StableDiffusion
from fewstep.cli.sample import open_student
from fewstep.core.guidance import Guidance
from fewstep.names import made_name
from fewstep.roles.adapters import plain_state, remove_adapters
from fewstep.roles.roles import TRAINED, RolesConfig, make_roles
from fewstep.student.card import StudentCard
from fewstep.student.folder import Parts, read_card, write_parts
from fewstep.student.model_card import model_card

from .. import tiny

LORA = "pytorch_lora_weights.safetensors"
CARD = StudentCard(
    name="x-tdm-2step",
    method="tdm",
    base="x",
    base_hash="",
    steps=(2,),
    timesteps={"2": [999, 499, -1]},
    solver={"2": "ddim"},
    prediction="v_prediction",
    weights="lora",
    rank=2,
    alpha=2.0,
    guidance=Guidance(scale=2.0),
    licence="other",
    iterations=1,
    train_seconds=1.0,
    hardware="none",
    version="0",
)


@pytest.fixture(scope="module")
def backbone() -> StableDiffusion:
    return tiny.stable_diffusion()


def written(folder: Path, backbone: StableDiffusion, card: StudentCard = CARD) -> Path:
    """A student of random weights."""
    make_roles(backbone, RolesConfig(rank=2))
    plain, settings = plain_state(backbone.module, "student")
    state = {k: torch.rand(v.shape, generator=torch.Generator().manual_seed(0)) for k, v in plain.items()}
    write_parts(folder, backbone, Parts(card, state, settings))
    remove_adapters(backbone.module, TRAINED)
    return folder


@pytest.fixture
def final(tmp_path: Path, backbone: StableDiffusion) -> Path:
    return written(tmp_path / "final", backbone)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_links_gets_a_copy(
    number: int, tmp_path: Path, backbone: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    final = written(tmp_path / "final", backbone)
    assert (final / LORA).is_file()


def test_all_files_follow_the_umask_and_nothing_is_left_beside(tmp_path: Path, backbone: StableDiffusion) -> None:
    before = os.umask(0o022)
    try:
        final = written(tmp_path / "final", backbone)
        written(final, backbone)  # once more in its place
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in final.rglob("*") if p.is_file()} == {0o644}
    assert [p.name for p in tmp_path.iterdir()] == ["final"]


def test_what_is_no_student_is_not_replaced(tmp_path: Path, backbone: StableDiffusion) -> None:
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "thesis.txt").write_text("kept", encoding="utf-8")
    (tmp_path / "file").write_text("kept", encoding="utf-8")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("final", "file", "link"):
        with pytest.raises(OSError, match="what is there is no student; move it away"):
            written(tmp_path / name, backbone)
    assert (
        (tmp_path / "final" / "thesis.txt").read_text(encoding="utf-8")
        == (tmp_path / "file").read_text(encoding="utf-8")
        == "kept"
    )
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    ("number", "cure"),
    [(errno.ENAMETOOLONG, "too long"), (errno.EROFS, "may not be written to"), (errno.ENOSPC, "free some space")],
)
def test_a_failure_says_its_cause_and_keeps_what_was_there(
    number: int, cure: str, final: Path, backbone: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    before = {p: p.read_bytes() for p in final.rglob("*") if p.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr("fewstep.student.folder.sync_all", refuse)
        with pytest.raises(OSError, match=f"cannot write .*final: .*{cure}.* \\(training is not repeated\\)$"):
            written(final, backbone)
    assert before == {p: p.read_bytes() for p in final.parent.rglob("*") if p.is_file()}


def damages(file: Path) -> Iterator[str]:
    """Ways in which a LoRA is another one, the file put back after each."""
    data, state = file.read_bytes(), load_file(file)
    file.unlink()  # it shares its bytes with the file of the long name
    some = sorted(state)[::2]
    for what, tensors in {
        "half of its layers": {k: v for i, (k, v) in enumerate(sorted(state.items())) if i // 2 % 2},
        "all but one layer": dict(sorted(state.items())[2:]),
        "one number": state | {some[0]: state[some[0]] + 1e-6},
    }.items():
        save_file(tensors, file)
        yield what
    for at in (9, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        yield f"bit {at}"
    file.unlink()
    yield "no file"
    file.write_bytes(data)


def refusal(load: Callable[[], object]) -> str:
    """What is said of it."""
    with pytest.raises(ValueError) as said:  # noqa: PT011 - compared where it is asked for
        load()
    return str(said.value)


def test_another_lora_than_was_written_is_refused(final: Path, backbone: StableDiffusion) -> None:
    pipe = tiny.pipeline()
    for what in damages(final / LORA):
        for load in (lambda: fewstep.load_student(final, backbone), lambda: fewstep.load(pipe, final)):
            assert re.match(rf"^student: .*{LORA} is (missing|damaged or was changed)", refusal(load)), what
    assert fewstep.load_student(final, backbone).card.files.keys() == {LORA}
    fewstep.load(pipe, final)
    remove_adapters(backbone.module, ("student",))


def test_a_student_without_hashes_is_read(final: Path, backbone: StableDiffusion) -> None:
    card = json.loads((final / "fewstep.json").read_text(encoding="utf-8"))
    card.pop("files")
    (final / "fewstep.json").write_text(json.dumps(card), encoding="utf-8")
    assert fewstep.load_student(final, backbone).card.files == {}
    remove_adapters(backbone.module, ("student",))


def test_a_base_with_other_weights_is_said(
    tmp_path: Path,
    base: Path,
    backbone: StableDiffusion,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other, own, others = (
        tmp_path / "other",
        fingerprint(backbone.module),
        fingerprint((pipe := tiny.pipeline(seed=1)).unet),
    )
    pipe.save_pretrained(other)
    final = written(tmp_path / "final", backbone, replace(CARD, base=str(base), base_hash=own))
    fewstep.load_student(final)  # warnings of ours are errors here
    assert (
        open_student(final, str(other)).base_note().startswith("the base other has other weights (SHA-256 ")
    )  # chosen on purpose
    assert "note: the base other has other weights (SHA-256 " in capsys.readouterr().out
    card = json.loads((final / "fewstep.json").read_text(encoding="utf-8"))
    (final / "fewstep.json").write_text(json.dumps(card | {"base": str(other)}), encoding="utf-8")
    with pytest.warns(UserWarning, match="the base other has other weights"):
        fewstep.load_student(final)
    (final / "fewstep.json").write_text(json.dumps(card | {"base": "other", "base_hash": others}), encoding="utf-8")
    monkeypatch.chdir("/")
    fewstep.load_student(final)  # its base is beside the folder above


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "..", "a/b", "a\\b", "a\nb", "a\0b", 3, None, ["x"], ""])
def test_a_name_that_leads_elsewhere_is_refused(name: object, tmp_path: Path) -> None:
    (tmp_path / "fewstep.json").write_text(json.dumps(asdict(CARD) | {"name": name}), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"^student: .*fewstep\.json: name: got .*; do not use this file unless you trust who made it$"
    ):
        read_card(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "[SD] mix",
        "a: b",
        "#1",
        "- x",
        "`x`",
        "{a}",
        "null",
        "*x*",
        "é 東京",
        "x" * 300,
        "a'b",
        'a"b',
        "<b>x</b>",
        "a|b",
        "%",
        "@a",
    ],
)
def test_any_teachers_name_makes_a_card_that_is_read(name: str, tmp_path: Path, backbone: StableDiffusion) -> None:
    """No path of this machine is in it, and its header is YAML."""
    place = tmp_path / "secret" / made_name(name) if len(name) > 200 or "|" in name else tmp_path / "secret" / name
    place.mkdir(parents=True)
    card = replace(CARD, name=made_name(place.name, "-tdm-2step"), base=absolute(str(place)))
    readme = model_card(card, "final", "DDIMScheduler", pipeline_info(backbone.pipe), True)
    header = yaml.safe_load(readme.split("---\n")[1])
    assert header == {
        "license": "other",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["text-to-image", "lora", "few-step", "tdm"],
    }
    assert "secret" not in readme and str(tmp_path) not in readme
    title = next(line for line in readme.splitlines() if line.startswith("# "))
    assert re.sub(r"\\(.)", r"\1", title) == f"# {card.name}"
    code = re.search(r"```python\n(.*?)```", readme, re.DOTALL)
    assert code is not None and repr(compile(code[1], "card", "exec"))


@pytest.mark.parametrize(
    ("base", "said"),
    [("me/my-model", "me/my-model"), ("emoji", None), ("me/my-model + style.safetensors@0.5", "me/my-model")],
)
def test_a_card_names_the_hubs_base(base: str, said: str | None, backbone: StableDiffusion) -> None:
    readme = model_card(replace(CARD, base=base), "final", "DDIMScheduler", pipeline_info(backbone.pipe), True)
    assert yaml.safe_load(readme.split("---\n")[1]).get("base_model") == said


@pytest.mark.parametrize("name", [f.name for f in fields(StudentCard)])
def test_a_field_of_another_type_is_named(name: str, tmp_path: Path) -> None:
    """Every field of `fewstep.json`, whatever stands there instead, is refused by its name, or is right."""
    sound = {**json.loads(json.dumps(asdict(CARD))), "name": "x"}
    odd = [None, "", "x", -1, 0.5, True, [], {}, [None], [[1]], {"a": 1}, float("nan"), 10**30, "\0"]
    refused = list[str]()
    for value in odd:
        write_json(tmp_path / "fewstep.json", {**sound, name: value})
        try:
            card = read_card(tmp_path)
        except ValueError as error:
            refused.append(str(error))
        else:
            assert type(getattr(card, name)) in (type(value), tuple) or (
                name == "guidance" and (card.guidance, value) == (Guidance(), {})
            )
    assert all(name in said and str(tmp_path) in said and "\n" not in said for said in refused), refused
    assert len(refused) >= 8
    write_json(tmp_path / "fewstep.json", sound)
    assert read_card(tmp_path) == replace(CARD, name="x")


@pytest.mark.parametrize(
    "change",
    [
        {"steps": [4, 4]},
        {"steps": [4]},
        {"timesteps": {"2": [999, -1]}},
        {"timesteps": {"2": [499, 999, -1]}},
        {"timesteps": {"2": [999, float("nan"), -1]}},
        {"solver": {"2": "euler"}},
        {"weights": "some"},
        {"weights": "none"},
        {"rank": None},
        {"rank": 0},
        {"alpha": 0},
        {"head": "x"},
        {"guidance_scales": [1.0, 2.0]},
        {"guidance": {"rescale": 2}},
        {"base": ""},
        {"unknown": 1},
    ],
    ids=str,
)
def test_values_that_no_student_has_are_refused(change: dict[str, object], tmp_path: Path) -> None:
    write_json(tmp_path / "fewstep.json", {**asdict(CARD), "name": "x", **change})
    with pytest.raises(
        ValueError, match=r"student: .*fewstep\.json does not fit format 2 \(.+\); export the run again"
    ):
        read_card(tmp_path)
