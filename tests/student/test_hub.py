"""Students on the hub: pushed to a hub on this machine, read from it by their id, and interrupted on the way."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image, ImageChops

import fewstep
from fewstep.atomic import write_json
from fewstep.backbones.meta import meta_teacher
from fewstep.core.guidance import Guidance
from fewstep.report.images import Images, save_images
from fewstep.roles.adapters import plain_state
from fewstep.roles.roles import RolesConfig, make_roles
from fewstep.runs.foreign import require_initial
from fewstep.student.card import StudentCard
from fewstep.student.folder import Parts, page_of, read_card, write_parts

from .. import tiny
from ..cli.common import error_of
from ..cli.common import fewstep as command
from ..hub import TOKEN, Hub, Repository, served, use

BASE, NAME = "maker/base", "me/mine"
PROMPTS = ("red cat", "<script>alert('x')</script> & *cat*", "key: [a, b] # no\n---\n- 'q\" {}", "猫 %s | `x`")
CARD = StudentCard(
    name="x-tdm-2step",
    method="tdm",
    base=BASE,
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
ROW = {"model": "student", "steps": 2, "guidance": 1.0, "nfe": 2, "n": 8, "fd_real": 12.5, "retrieval_top1": 0.5}
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as a folder."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    tiny.pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Iterator[Hub]:
    """A hub with the base on it, and a cache of what was downloaded."""
    with served() as found, pytest.MonkeyPatch.context() as patch:
        use(found, tmp_path_factory.mktemp("cache"), patch)
        found.add(BASE, files_in(teacher))
        yield found


@pytest.fixture
def hub(server: Hub) -> Hub:
    """The hub with nothing but the base."""
    server.reset(BASE)
    server.repositories[BASE].files["README.md"] = b"---\nlicense: openrail++\n---\n# A base\n"
    return server


@pytest.fixture(scope="module")
def pushed(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Repository]:
    """A run, and the repository that `fewstep push` made of it."""
    server.repositories[BASE].files["README.md"] = b"---\nlicense: openrail++\n---\n# A base\n"
    run = run_of(tmp_path_factory.mktemp("pushed") / "run")
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, "push", run, NAME) == 0
    return run, server.repositories[NAME]


def files_in(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def run_of(folder: Path, card: StudentCard = CARD, seed: int = 0) -> Path:
    """A finished run with a student of random weights, its images and its measurements."""
    backbone = tiny.stable_diffusion()
    make_roles(backbone, RolesConfig(rank=2))
    plain, settings = plain_state(backbone.module, "student")
    state = {k: torch.rand(v.shape, generator=torch.Generator().manual_seed(seed)) for k, v in plain.items()}
    write_parts(folder / "final", backbone, Parts(card, state, settings))
    rows = {label: torch.rand(len(PROMPTS), 3, 8, 8) for label in ("teacher, 50 steps (100 evaluations)", MINE)}
    save_images(folder / "images.safetensors", Images(PROMPTS, rows))
    write_json(folder / "final" / "eval.json", {"rows": [ROW], "protocol": "own-quick", "versions": {"fewstep": "0"}})
    (folder / "final" / "notes.txt").write_text("mine alone")
    return folder


def header_in(card: str) -> Any:
    """A card's header, as the hub's client reads it."""
    return ModelCard(card).data


MINE = "student, 2 steps (2 evaluations)"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return run_of(tmp_path / "run")


def test_a_dry_run_lists_the_files_and_sends_nothing(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(run / "none"))
    monkeypatch.delenv("HF_TOKEN")  # and needs no token
    assert command(monkeypatch, "push", run, NAME, "--dry-run") == 0
    said = capsys.readouterr().out
    assert f"{NAME} (private): 9 files, " in said and "left out  notes.txt" in said
    assert f"  {LORA}\n" in said and "  images/0.png\n" in said and "\n# x-tdm-2step\n" in said
    assert not [call for call in hub.asked if not call.startswith(("GET", "HEAD"))] and NAME not in hub.repositories


def test_a_student_that_was_pushed_is_read_by_its_id(
    hub: Hub, pushed: tuple[Path, Repository], teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (run, repository), base = pushed, fewstep.load_teacher(teacher)
    final, hub.repositories[NAME] = run / "final", repository
    assert repository.private and len(repository.commits) == 1
    assert "eval.json" not in repository.files and "notes.txt" not in repository.files
    for place in (LORA, "x-tdm-2step-kohya.safetensors", "scheduler/scheduler_config.json"):
        assert repository.files[place] == (final / place).read_bytes()
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "np"}
    wanted = fewstep.load(base, final)("red cat", generator=torch.Generator().manual_seed(0), **call).images
    for _ in ("asked", "from the cache"):
        found = fewstep.load(base, NAME)("red cat", generator=torch.Generator().manual_seed(0), **call).images
        assert (found == wanted).all()
        assert fewstep.load_student(NAME, base).card == replace(read_card(final), licence="openrail++")
        assert read_card(require_initial(NAME)).name == CARD.name
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_the_card_is_valid_and_shows_every_letter(pushed: tuple[Path, Repository]) -> None:
    files = pushed[1].files
    content = files["README.md"].decode()
    data = header_in(content)
    assert (data.license, data.base_model, data.base_model_relation) == ("openrail++", BASE, "adapter")
    assert [w["text"] for w in data.widget] == list(PROMPTS)
    assert all(files[w["output"]["url"]].startswith(b"\x89PNG") for w in data.widget)
    found = {(r.metric_type, r.metric_value, r.metric_name) for r in data.eval_results}
    assert found == {
        ("fd_real", 12.5, "FD to real images (2 steps)"),
        ("retrieval_top1", 50.0, "Prompt match, top 1, % (2 steps)"),
    }
    assert "<script>" not in content.split("\n---\n", 1)[1] and "<Gallery />" in content
    assert f'pipe.load_lora_weights("{NAME}")' in content and "| student | 2 | 1.0 | 2 | 8 | 12.5 |" in content
    assert json.loads(files["fewstep.json"])["licence"] == "openrail++"


def test_inspect_downloads_the_card_alone(
    hub: Hub, pushed: tuple[Path, Repository], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories[NAME] = pushed[1]
    assert command(monkeypatch, "inspect", NAME) == 0
    said = capsys.readouterr().out
    assert said.startswith("student ") and NAME in said and "x-tdm-2step" in said
    assert not [call for call in hub.asked if call.startswith("GET") and call.endswith(".safetensors")]


def test_an_interrupted_push_shows_nothing_and_the_second_finishes(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.drop_after = 1
    assert command(monkeypatch, "push", run, NAME, "--public") == 2
    assert f"the upload to {NAME} broke off" in error_of(capsys)
    left = hub.repositories[NAME]
    assert left.private and set(left.files) == {".gitattributes"} and len(hub.uploads) == 1
    hub.drop_after = -1
    assert command(monkeypatch, "push", run, NAME, "--public") == 0
    assert not left.private and len(left.commits) == 1 and LORA in left.files
    assert len(hub.uploads) == len(set(hub.uploads)), "what was sent is not sent again"


def test_a_newer_student_replaces_the_files_of_the_older_one(
    hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command(monkeypatch, "push", run, NAME) == 0
    hub.repositories[NAME].files["USE_POLICY.txt"] = b"theirs"
    newer = run_of(tmp_path / "newer", replace(CARD, name="y-tdm-2step"), seed=1)
    assert command(monkeypatch, "push", newer, NAME) == 0
    files = hub.repositories[NAME].files
    assert "y-tdm-2step-kohya.safetensors" in files and "x-tdm-2step-kohya.safetensors" not in files
    assert files["USE_POLICY.txt"] == b"theirs" and files[LORA] == (newer / "final" / LORA).read_bytes()


def test_nothing_of_this_machine_is_uploaded(
    hub: Hub, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_of(tmp_path / "run", replace(CARD, base=str(teacher)))
    assert command(monkeypatch, "push", run, NAME) == 2
    assert "--licence: got none, and its base is tiny, of this machine" in error_of(capsys)
    assert command(monkeypatch, "push", run, NAME, "--licence", "mit") == 0
    files = hub.repositories[NAME].files
    assert not [place for place, data in files.items() if str(teacher.parent).encode() in data]
    assert header_in(files["README.md"].decode()).get("base_model") is None
    terms = b"---\nlicense: other\nlicense_name: x-non-commercial\nlicense_link: LICENSE.md\n---\n"
    hub.repositories[BASE].files["README.md"] = terms
    capsys.readouterr()
    assert command(monkeypatch, "push", run, NAME, "--base", BASE) == 0
    assert "note: the base's licence other (x-non-commercial) is non-commercial" in capsys.readouterr().out
    data = header_in(hub.repositories[NAME].files["README.md"].decode())
    assert (data.base_model, data.license_name) == (BASE, "x-non-commercial")
    assert data.license_link == f"{hub.url}/{BASE}/blob/main/LICENSE.md"


@pytest.mark.parametrize(
    ("header", "options", "said"),
    [
        (
            "license: openrail++",
            ["--licence", "mit"],
            "the base maker/base has openrail++, which its students have too",
        ),
        ("license: cc-by-nc-nd-4.0", ["--public"], "forbids to share what is made from it"),
        ("tags: [x]", [], "--licence: got none, and maker/base on the hub names none"),
        ("license: mit", ["--licence", "a b"], "allowed are the hub's names"),
        ("license: other\nlicense_name: x-nc", ["--licence", "mit"], "maker/base has other (x-nc)"),
        ("license: mit", ["--base", "/home/x"], "--base: got '/home/x', allowed are hub ids"),
        ("license: mit", ["--base", "no/body"], "the hub has no no/body, or it is private"),
    ],
)
def test_the_licence_is_the_bases(
    header: str,
    options: list[str],
    said: str,
    hub: Hub,
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.repositories[BASE].files["README.md"] = f"---\n{header}\n---\n".encode()
    assert command(monkeypatch, "push", run, NAME, *options) == 2
    assert said in error_of(capsys)
    assert NAME not in hub.repositories


def test_a_push_that_cannot_be_is_refused_in_one_line(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add(NAME, {".gitattributes": b"", "model.safetensors": b"somebody's"})
    assert command(monkeypatch, "push", run, NAME) == 2
    assert "is there already and holds no student (model.safetensors and 0 more)" in error_of(capsys)
    assert command(monkeypatch, "push", run, "no-user") == 2
    assert "USER/NAME: got 'no-user', allowed are names" in error_of(capsys)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_reader")
    assert command(monkeypatch, "push", run, "me/new") == 2
    assert "the hub does not let this token write to me/new; run: hf auth login" in error_of(capsys)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(run / "none"))
    assert command(monkeypatch, "push", run, NAME) == 2
    assert error_of(capsys).startswith("error: push: there is no token for the hub; run: hf auth login")
    lora = run / "final" / LORA
    lora.write_bytes(lora.read_bytes()[:-1] + b"\0")
    assert command(monkeypatch, "push", run, NAME, "--dry-run") == 2
    assert "is damaged or was changed" in error_of(capsys)


def test_what_is_no_student_on_the_hub_is_named(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, said in (
        (("evaluate", BASE), "on the hub it has no fewstep.json"),
        (("inspect", BASE), f"inspect: {BASE} on the hub is no student"),
        (
            ("export", "no/body", "out"),
            "no/body is no student folder here, and the hub has no no/body, or it is private",
        ),
    ):
        assert command(monkeypatch, *arguments) == 2
        assert said in error_of(capsys)
    hub.drop_after = 0
    assert command(monkeypatch, "inspect", "no/body") == 2
    assert "no/body is not to be had from the hub" in error_of(capsys)


def test_a_card_is_the_same_without_the_bases_weights(run: Path, teacher: Path) -> None:
    """What is pushed is rendered from configurations alone."""
    final = run / "final"
    assert page_of(final, read_card(final), "final", meta_teacher(teacher)) == (final / "README.md").read_text()


@pytest.mark.slow
def test_another_program_uses_it_by_its_id(
    hub: Hub, pushed: tuple[Path, Repository], teacher: Path, tmp_path: Path
) -> None:
    """The card's snippet, without fewstep, and the command line: base and student both come from the hub."""
    run, repository = pushed
    hub.repositories[NAME] = repository
    snippet = repository.files["README.md"].decode().split("```python\n")[1].split("```")[0]
    code = f"{snippet.replace('a prompt', 'red cat')}\nimage.save('snippet.png')\n"
    assert "fewstep" not in code and NAME in code and BASE in code
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    environment = {**os.environ, **own, "HF_HUB_DISABLE_XET": "1"}
    for arguments in (["-c", code], ["-m", "fewstep", "sample", NAME, "-p", "red cat", "--json"]):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["files"] == [str(tmp_path / "sample.png")]
    pipe = fewstep.load(fewstep.load_teacher(teacher), run / "final")
    (wanted,) = pipe("red cat", generator=torch.Generator().manual_seed(0)).images
    with Image.open(tmp_path / "snippet.png") as found:
        assert ImageChops.difference(found, wanted).getextrema() == ((0, 0),) * 3
