"""LPIPS equals the package that defines it, and tells seeds that are alike from those that are not."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from fewstep.cli.extra import extra_of
from fewstep.core.guidance import Guidance
from fewstep.evaluation.environments import CONVERSIONS, install
from fewstep.evaluation.environments import PLACE as ENVIRONMENTS
from fewstep.evaluation.images import ImageProtocol, evaluate_images
from fewstep.evaluation.lpips import FILE, LAYERS, SIDE, Lpips, load_lpips, perceptual_diversity, thumbnails
from fewstep.evaluation.protocols import Row, evaluate
from fewstep.evaluation.scorer import Extra
from fewstep.evaluation.weights import PLACE

from .conftest import World
from .test_faults import FEW, PROMPTS, drawn

CHANNELS, KERNELS = (3, 4, 6, 5, 4, 4), (11, 5, 3, 3, 3)


def tensors(channels: Sequence[int] = CHANNELS) -> dict[str, Tensor]:
    """Random weights of a narrow network, under the package's names."""
    rng, found = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for i, (name, kernel) in enumerate(zip(LAYERS, KERNELS, strict=True)):
        found[f"net.{name}.weight"] = (
            torch.randn((channels[i + 1], channels[i], kernel, kernel), generator=rng) / kernel
        )
        found[f"net.{name}.bias"] = torch.randn(channels[i + 1], generator=rng)
        found[f"lin{i}.model.1.weight"] = torch.rand((1, channels[i + 1], 1, 1), generator=rng)
    return found


def pair(side: int = SIDE) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(1)
    a, b = torch.rand((2, 3, 3, side, side), generator=rng)
    return a, b


def need(module: str) -> Any:
    return pytest.importorskip(module, exc_type=ImportError)


def test_it_is_that_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a random AlexNet with the package's own heads, converted by the command that users run."""
    package, models = need("lpips"), need("torchvision.models")
    whole = models.alexnet
    monkeypatch.setattr(models, "alexnet", lambda pretrained: whole(weights=None))
    monkeypatch.setenv(PLACE, str(tmp_path))
    (tmp_path / FILE).parent.mkdir()
    torch.manual_seed(0)
    monkeypatch.setattr(sys, "argv", ["-c", str(tmp_path / FILE)])
    exec(compile(CONVERSIONS["lpips"].code, "conversion", "exec"), {})
    torch.manual_seed(0)
    theirs = package.LPIPS(net="alex", verbose=False)
    for side in (64, 80):
        a, b = pair(side)
        with torch.no_grad():
            expected = theirs(a, b, normalize=True).flatten()
        assert expected.min() > 1e-3
        assert (load_lpips().distance(a, b) - expected).abs().max() <= 1e-5 * expected.max()


def test_it_is_its_formula() -> None:
    known = tensors()
    a, b = pair()
    expected = torch.zeros(3)
    x, y = ((2 * v - 1 - torch.tensor([-0.030, -0.088, -0.188])[:, None, None]) for v in (a, b))
    x, y = (v / torch.tensor([0.458, 0.448, 0.450])[:, None, None] for v in (x, y))
    for i, name in enumerate(LAYERS):
        if i in (1, 2):
            x, y = (F.max_pool2d(v, 3, 2) for v in (x, y))
        how = {"stride": 4, "padding": 2} if i == 0 else {"padding": 2 if i == 1 else 1}
        x, y = (F.relu(F.conv2d(v, known[f"net.{name}.weight"], known[f"net.{name}.bias"], **how)) for v in (x, y))
        apart = (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square()
        expected += torch.einsum("bchw,c->b", apart, known[f"lin{i}.model.1.weight"].flatten()) / apart[0, 0].numel()
    measure = Lpips(known)
    assert (measure.distance(a, b) - expected).abs().max() <= 1e-5
    assert measure.distance(a, a).abs().max() == 0
    assert torch.equal(measure.distance(a, b), measure.distance(b, a))


class Plain:
    """The mean difference of two images, in LPIPS's place."""

    key, weights = "lpips", {"plain": "0" * 64}

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean((1, 2, 3))


def test_it_is_the_mean_over_pairs_of_a_prompt() -> None:
    small = torch.tensor([0.0, 0.3, 0.9, 0.5, 0.5])[:, None].expand(-1, 3 * SIDE**2)
    groups = [torch.tensor([0, 1, 2]), torch.tensor([3, 4])]
    found = perceptual_diversity(Plain(), small, groups)
    assert found is not None and found.tolist() == pytest.approx([0.6, 0.0])
    assert perceptual_diversity(Plain(), small, [*groups, torch.tensor([1])]) is None
    clips = torch.zeros(2, 5, 3, 8, 8)
    clips[:, 2] = 1
    assert thumbnails(clips).shape == (2, 3 * SIDE**2) and thumbnails(clips).min() == pytest.approx(1)


def test_seeds_that_are_alike_have_none(tmp_path: Path) -> None:
    rows = [
        Row("teacher", 50, Guidance(scale=2.0), 100, drawn()),
        Row("student", 1, Guidance(), 1, drawn(seed_of=lambda s: 5)),
        Row("student", 2, Guidance(), 2, drawn(seed_of=lambda s: s + 1)),
    ]
    protocol: ImageProtocol = replace(FEW, count=16, components=4)
    result = evaluate_images(rows, protocol, PROMPTS[:4], cache=tmp_path, extra=Extra(pairs=Plain()))
    teacher, alike, healthy = (row["lpips"] for row in result["rows"])
    assert alike == 0 and teacher > 0.03 and healthy == pytest.approx(teacher, rel=0.5)
    low, high = result["rows"][2]["intervals"]["lpips"]
    assert low < healthy < high and result["weights_sha256"] == Plain.weights
    again = evaluate_images(rows, protocol, PROMPTS[:4], cache=tmp_path, extra=Extra(pairs=Plain()))
    assert [row["lpips"] for row in again["rows"]] == [teacher, alike, healthy]
    assert "lpips" not in evaluate_images(rows, protocol, PROMPTS[:4], cache=tmp_path)["rows"][0]


def test_so_it_is_of_emoji(world: World) -> None:
    rows = [Row("student", i, Guidance(), i, world.draw(0.3, one_seed=i == 2)) for i in (1, 2)]
    found = evaluate(rows, world.protocol, reference=world.folder, extra=Extra(pairs=Plain()))["rows"]
    assert found[0]["lpips"] > 0.01 and found[1]["lpips"] == 0


def test_its_weights_are_read_hashed_or_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path))
    with pytest.raises(
        ValueError, match=r"^--metrics lpips: its weights are not here; run: fewstep evaluate --install"
    ):
        extra_of(["lpips"], None)
    (tmp_path / FILE).parent.mkdir()
    save_file(tensors(), tmp_path / FILE)
    pairs = extra_of(["lpips"], None).pairs
    assert pairs is not None and len(pairs.weights[str(FILE)]) == 64
    assert torch.equal(pairs.distance(*pair()), Lpips(tensors()).distance(*pair()))
    save_file({k: v for k, v in tensors().items() if not k.startswith("lin4")}, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"alex\.safetensors: is damaged \(it lacks lin4\.model\.1\.weight\)"):
        load_lpips()


def test_they_are_made_by_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands that are run, without running them: a test needs no network."""
    monkeypatch.setenv(PLACE, str(tmp_path / "weights"))
    monkeypatch.setenv(ENVIRONMENTS, str(tmp_path / "environments"))
    called: list[list[str]] = []

    def run(command: Sequence[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        called.append(list(command))
        (tmp_path / "environments" / "lpips").mkdir(parents=True, exist_ok=True)
        failed = command[1] == "-c" and len(called) > 3
        return subprocess.CompletedProcess(command, int(failed), "", "no AlexNet")

    monkeypatch.setattr(subprocess, "run", run)
    assert install("lpips") == tmp_path / "weights" / FILE
    assert "lpips==0.1.4" in called[1] and called[2][1:] == [
        "-c",
        CONVERSIONS["lpips"].code,
        str(tmp_path / "weights" / FILE),
    ]
    assert not (tmp_path / "environments" / "lpips").exists()
    with pytest.raises(
        ValueError, match=r"^--install lpips: python weights failed \(no AlexNet\); look at the network$"
    ):
        install("lpips")
