"""`fewstep distill` as its user runs it: to the end, stopped and resumed, and with every mistake that comes to mind."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fewstep.atomic import stream_tensors, write_json
from fewstep.backbones import encoders
from fewstep.backbones import parts as backbone_parts
from fewstep.cli import main
from fewstep.training import loop, state

from .common import error_of, fewstep, read_report


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "pytorch_lora_weights.safetensors")


def test_a_run_leaves_everything_it_promises(
    recipe: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fewstep(monkeypatch, "distill", recipe) == 0
    run, said = Path("runs/tiny"), capsys.readouterr().out
    whole = sum(t.numel() for t in load_file(teacher / "unet" / "diffusion_pytorch_model.safetensors").values())
    own = sum(t.numel() for t in weights(run).values())
    share = f"trains {own / 1e6:.2f} M of {whole / 1e6:.1f} M weights, {100 * own / whole:.1f} %, in "
    assert f"student: {share}" in said and f"fake: {share}" in said
    assert "calls    4 in 4 steps; the teacher takes 6 in 3" in said
    assert "try      fewstep sample runs/tiny -p 'red cat' --compare" in said
    assert "| NFE of an image | 4 in 4 steps |" in (run / "final" / "README.md").read_text()
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert {
        "run.json",
        "metrics.jsonl",
        "report.html",
        "samples/step_000000.png",
        "samples/step_000005.png",
        "images.safetensors",
        "best/fewstep.json",
        "best/preview.json",
    } <= names
    assert {
        f"final/{n}"
        for n in (
            "pytorch_lora_weights.safetensors",
            "tiny-tdm-4step-kohya.safetensors",
            "scheduler/scheduler_config.json",
            "fewstep.json",
            "README.md",
        )
    } <= names
    assert {"checkpoint-000004", "checkpoint-000005"} == {p.name for p in run.glob("checkpoint-*")}
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pth", ".pkl", ".tmp"))]
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [r for r in records if "fake_loss" in r]
    assert [r["iteration"] for r in trained] == [1, 2, 3, 4, 5]
    assert all({"student_loss", "student_grad", "fake_grad", "seconds"} <= r.keys() for r in trained[1:])
    assert [r["iteration"] for r in records if "preview" in r] == [0, 5]
    card = json.loads((run / "final" / "fewstep.json").read_text())
    assert card["timesteps"] == {"4": [999.0, 749.0, 499.0, 249.0, -1.0]}
    assert card["guidance"] == {"scale": 2.0, "tilt": 0.0, "apg_eta": 1.0, "stop": 0.0, "rescale": 0.0}


@pytest.mark.slow
def test_stopped_and_resumed_is_the_straight_run_bit_for_bit(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fewstep(monkeypatch, "distill", recipe, "--out", "straight") == 0
    update = loop._update
    asked: list[bool] = []

    def interrupt(*arguments: Any) -> torch.Tensor:
        if arguments[-1].iteration == 2 and not asked:  # in the third iteration, as a Ctrl-C would come
            asked.append(True)
            os.kill(os.getpid(), signal.SIGINT)
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_update", interrupt)
        assert fewstep(monkeypatch, "distill", recipe, "--out", "stopped") == 130
    assert "stopped after iteration 3" in capsys.readouterr().out
    assert fewstep(monkeypatch, "report", "stopped") == 0
    assert capsys.readouterr().out.strip() == str(Path("stopped/report.html").resolve())
    page = read_report("stopped")
    assert "Losses" in page and f"fewstep distill {recipe} --out stopped" in page
    assert fewstep(monkeypatch, "distill", recipe, "--out", "stopped") == 0
    said = capsys.readouterr().out
    assert "resuming stopped at iteration 3 of 5" in said
    assert "try      fewstep sample stopped -p 'red cat' --compare" in said
    assert "fewstep evaluate stopped<" in read_report("stopped")
    straight, resumed = weights(Path("straight")), weights(Path("stopped"))
    assert all(torch.equal(v, resumed[k]) for k, v in straight.items())
    losses = [
        [
            (r["iteration"], r["fake_loss"])
            for r in map(json.loads, Path(d, "metrics.jsonl").read_text().splitlines())
            if "fake_loss" in r
        ]
        for d in ("straight", "stopped")
    ]
    assert losses[0] == losses[1]


class Killed(BaseException):
    """What nothing catches, as nothing catches a kill."""


def test_a_second_run_loads_no_encoder(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that the encoders say is in the cache, and their files are still the same."""
    loaded: list[str] = []
    for owner in (encoders, backbone_parts):
        original = owner.load_part

        def load_part(kind: Any, folder: Path, name: str, dtype: Any, own: Any = original) -> Any:
            loaded.append(name)
            return own(kind, folder, name, dtype)

        monkeypatch.setattr(owner, "load_part", load_part)
    assert fewstep(monkeypatch, "distill", recipe, "--set", "train.iterations=3") == 0
    assert sorted(loaded) == ["text_encoder", "unet", "vae"]
    del loaded[:]
    assert fewstep(monkeypatch, "distill", recipe) == 0
    assert sorted(loaded) == ["unet", "vae"]
    del loaded[:]
    (recipe.parent / "prompts.txt").write_text("green bird\n")
    assert fewstep(monkeypatch, "distill", recipe, "--out", "runs/other") == 0
    assert sorted(loaded) == ["text_encoder", "unet", "vae"]


def test_a_killed_run_goes_on_from_its_checkpoint_bit_for_bit(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fewstep(monkeypatch, "distill", recipe, "--out", "straight") == 0
    update = loop._update

    def die(*arguments: Any) -> torch.Tensor:
        if arguments[-1].iteration == 3:
            raise Killed
        return update(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_update", die)
        patch.setattr("sys.argv", ["fewstep", "distill", str(recipe), "--out", "killed"])
        with pytest.raises(Killed):
            main.run()
    assert [p.name for p in Path("killed").glob("checkpoint-*")] == ["checkpoint-000002"]
    assert fewstep(monkeypatch, "distill", recipe, "--out", "killed") == 0
    assert all(torch.equal(v, weights(Path("killed"))[k]) for k, v in weights(Path("straight")).items())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--set", "method.steps=0"], "method.steps: got 0"),
        (["--set", "method.steps=2000"], "method.steps: got 2000, allowed are whole numbers from 1 to 1000"),
        (["--set", "method.stepz=4"], "method.stepz: unknown option"),
        (["--set", "method.loss=l3"], "method.loss: got 'l3', allowed are l2, huber, huber-elementwise"),
        (["--set", "train.lr=fast"], "train.lr: input should be a number, got 'fast'"),
        (["--set", "train.lr=-1"], "train.lr: got -1.0"),
        (["--set", "train.batch=0"], "train.batch: got 0"),
        (["--set", "roles.rank=0"], "roles.rank: got 0"),
        (["--set", "roles.targets=everything"], "roles.targets: got 'everything'"),
        (["--set", "novalue"], "--set: got 'novalue'"),
        (["--set", "extra=1"], "extra: unknown option"),
        (["--prompts", "missing.txt"], "prompts: cannot read missing.txt"),
        (["--prompts", "empty.txt"], "prompts: empty.txt has no prompt in it"),
        (["--prompts", "table.csv"], "has no column prompt or caption or text; it has a, b"),
        (["--teacher", "nowhere"], "teacher: got 'nowhere'"),
        (["--teacher", "."], "teacher: . is no diffusers pipeline"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    Path("empty.txt").write_text("\n  \n")
    Path("table.csv").write_text("a,b\n1,2\n")
    assert fewstep(monkeypatch, "distill", recipe, *arguments) == 2
    assert expected in error_of(capsys)
    assert not Path("runs").exists() or not list(Path("runs").rglob("checkpoint-*"))


def test_a_truncated_teacher_is_one_line(
    recipe: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(teacher, broken)
    file = next((broken / "unet").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    assert fewstep(monkeypatch, "distill", recipe, "--teacher", broken) == 2
    assert "is damaged" in error_of(capsys)


@pytest.mark.slow
def test_a_truncated_checkpoint_is_named_and_nothing_is_lost(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fewstep(monkeypatch, "distill", recipe) == 0
    run = Path("runs/tiny")
    file = run / "checkpoint-000005" / "student.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    assert fewstep(monkeypatch, "distill", recipe) == 2
    message = error_of(capsys)
    assert "checkpoint-000005 is damaged" in message
    assert "to go on from checkpoint-000004" in message
    import shutil

    shutil.rmtree(run / "checkpoint-000005")
    before = weights(run)
    assert fewstep(monkeypatch, "distill", recipe) == 0
    assert all(torch.equal(v, weights(run)[k]) for k, v in before.items())


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = 0

    def fill_up(*arguments: Any) -> str:
        nonlocal calls
        calls += 1
        if calls > 6:  # the second checkpoint
            raise OSError(28, "No space left on device")
        return stream_tensors(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(state, "stream_tensors", fill_up)
        assert fewstep(monkeypatch, "distill", recipe) == 2
    assert "No space left on device" in error_of(capsys)
    assert [p.name for p in Path("runs/tiny").glob("*checkpoint*")] == ["checkpoint-000002"]
    assert fewstep(monkeypatch, "distill", recipe) == 0


def test_other_settings_do_not_resume(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fewstep(monkeypatch, "distill", recipe) == 0
    assert fewstep(monkeypatch, "distill", recipe, "--set", "train.lr=5e-3") == 2
    assert "other settings" in error_of(capsys)


def test_dry_run_trains_nothing(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fewstep(monkeypatch, "distill", recipe, "--dry-run", "--set", "train.batch=3") == 0
    text = capsys.readouterr().out
    assert "batch: 3" in text
    assert "denoiser (one for all roles)" in text and "optimiser (adamw)" in text
    assert "[999.0, 749.0, 499.0, 249.0, -1.0]" in text
    assert not Path("runs").exists()


def test_a_recipe_of_another_kind_names_its_verb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fewstep(monkeypatch, "distill", "emoji-teacher") == 2
    assert "run: fewstep train-teacher" in error_of(capsys)
    write_json(Path("x.yaml"), [])
    assert fewstep(monkeypatch, "distill", "x.yaml") == 2
    assert "holds no settings" in error_of(capsys)
