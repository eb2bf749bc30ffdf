"""What could fail at a training's end is tried before it.

The parts are shown as a list, and a failure is refused before hours have gone into the training.
"""

import copy
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep import atomic
from fewstep.backbones import files

from . import common
from .common import error_of

FEW = ("--set", "train.iterations=2", "--set", "preview.teacher_steps=1")


def fewstep(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    return common.fewstep(monkeypatch, *arguments, look=True)


def everything(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.slow
def test_a_dry_run_and_a_run_show_the_same_list(
    recipe: Path, uncounted: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything(Path.cwd())
    assert fewstep(monkeypatch, "distill", recipe, "--dry-run") == 0
    dry = capsys.readouterr().out
    assert everything(Path.cwd()) == before  # nothing is left of it
    assert fewstep(monkeypatch, "distill", recipe, *FEW) == 0
    run = capsys.readouterr().out
    for out in (dry, run):
        names = [
            line.split()[1] for line in out.partition("before the training:")[2].splitlines() if line.startswith("  ok")
        ]
        assert {"folder", "writing", "disk", "model", "diffusers", "images", "student"} <= set(names)
        assert "its files are written, read and sampled in 4 steps: largest difference 0" in out
        assert "\n  NO" not in out
    assert not list(Path("runs/tiny").rglob("*.tmp"))
    assert fewstep(monkeypatch, "distill", recipe, *FEW) == 0
    assert "before the training:" not in capsys.readouterr().out  # a run that has begun has been looked at


def spoiled(teacher: Path, folder: Path, part: str, begins: str, factor: float) -> Path:
    """The teacher with some weights multiplied."""
    shutil.copytree(teacher, folder)
    file = folder / part / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({n: t * factor if n.startswith(begins) else t for n, t in state.items()}, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("part", "begins", "factor", "said"),
    [
        ("vae", "decoder.conv_out", 0.0, "its images are one colour"),
        ("unet", "conv_in", 1e38, "what the network says at 999: not finite"),
    ],
)
def test_a_teacher_that_draws_nothing_is_refused(
    dry: bool,
    part: str,
    begins: str,
    factor: float,
    said: str,
    recipe: Path,
    teacher: Path,
    tmp_path: Path,
    uncounted: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    odd = spoiled(teacher, tmp_path / "odd", part, begins, factor)
    assert fewstep(monkeypatch, "distill", recipe, "--teacher", odd, *(["--dry-run"] if dry else FEW)) == 2
    error = error_of(capsys)
    assert f"error: teacher: {odd}: " in error and said in error
    assert not list(Path("runs").rglob("*.safetensors")) and not list(Path().rglob("*.tmp"))


def test_a_disk_that_is_too_small_is_refused(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = shutil.disk_usage(".")._replace(free=100)
    monkeypatch.setattr("fewstep.runs.rehearsal.shutil.disk_usage", lambda path: full)
    assert fewstep(monkeypatch, "distill", recipe, *FEW) == 2
    printed = capsys.readouterr()
    assert "for what a run keeps, 0.1 KiB are free; free some space, or choose another folder" in printed.err
    assert "  NO  disk" in printed.out and "  ok  folder" in printed.out
    assert fewstep(monkeypatch, "distill", recipe, *FEW, "--quiet") == 2
    said = capsys.readouterr().out
    assert "  NO  disk" in said and "  ok" not in said
    assert not list(Path("runs").rglob("*.safetensors"))


def test_a_folder_that_cannot_be_written_is_found_by_a_dry_run(
    recipe: Path, uncounted: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "mkdir", refuse)
    assert fewstep(monkeypatch, "distill", recipe, "--dry-run") == 2
    assert "error: --out: cannot write to runs/tiny (Read-only file system)" in error_of(capsys)


@pytest.mark.parametrize("share", ["true", "false"])
def test_files_that_lose_a_part_of_the_student_are_seen_before_it_is_trained(
    share: str, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A writer that drops one tensor, or rounds the network: as a new family's names might."""
    write = atomic.write_tensors

    def lossy(path: Path, tensors: dict[str, torch.Tensor], *rest: Any) -> None:
        write(path, {n: t * 0 if "up_blocks" in n and "lora_B" in n else t for n, t in tensors.items()}, *rest)

    def rounded(folder: Path, network: torch.nn.Module) -> None:
        smaller = copy.deepcopy(network)
        with torch.no_grad():
            for p in smaller.parameters():
                p.mul_(0.9)
        files.save_network(folder, smaller)

    monkeypatch.setattr(files, "write_tensors", lossy)
    monkeypatch.setattr("fewstep.student.folder.save_network", rounded)
    assert fewstep(monkeypatch, "distill", recipe, *FEW, "--set", f"roles.lora={share}") == 2
    assert "they do not hold all of it: please report it with the recipe" in error_of(capsys)
    assert not list(Path("runs").rglob("*.safetensors"))
