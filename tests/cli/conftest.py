"""Teachers, recipes and students that the tests of the command line share."""

import shutil
from pathlib import Path

import pytest
import torch

from fewstep.backbones import miniature
from fewstep.training.memory import Training

from .common import fewstep, written


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion pipeline of random weights, saved to a folder."""
    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    torch.manual_seed(0)
    tokenizer = miniature.word_tokenizer(["red cat", "blue dog"], 600, 8)
    vae, text = miniature.autoencoder([8, 16], 4, 16), miniature.text_encoder(tokenizer, 32, 1, 4)
    miniature.pipeline(vae, text, tokenizer, miniature.unet([32, 32], [False, True], 4, 8, 32)).save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe file of a five-iteration run; the working folder is a new one."""
    return written(teacher, tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def trained(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a student that differs from its teacher."""
    folder = tmp_path_factory.mktemp("student")
    with pytest.MonkeyPatch.context() as patch:
        path = written(teacher, folder, patch)
        assert fewstep(patch, "distill", path, "--set", "train.lr=0.02") == 0
    return folder / "runs" / "tiny"


@pytest.fixture
def final(recipe: Path, trained: Path) -> Path:
    """That student on disk, in the working folder."""
    return Path(shutil.copytree(trained, recipe.parent / "runs" / "tiny")).relative_to(recipe.parent) / "final"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder is a new one."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Intervals from few draws, which are most of what tiny evaluations take; `tests/evaluation` has them in full."""
    monkeypatch.setattr("fewstep.evaluation.bootstrap.DRAWS", 20)


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dry runs without the seconds that counting memory takes; tests of `fewstep plan` and of the count have them."""
    monkeypatch.setattr("fewstep.cli.plan.training_bytes", lambda *_, **__: Training(6, 5, 4, 3, 2, 1))
