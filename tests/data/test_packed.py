"""Caches of conditions without their padding, of every size, and encoded by several processes."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from fewstep.backbones.base import Cond, Denoiser
from fewstep.backbones.load import at_size, load_teacher
from fewstep.data.packed import pack, packed
from fewstep.data.prompts import embed

from .. import pipelines, tiny
from ..project import ROOT

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(), (5,), (5, 3), (4, 2, 3)])
def test_conditions_come_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    whole = (4 * torch.randn(7, *shape, generator=torch.Generator().manual_seed(0))).to(dtype)
    if shape:
        for i in range(7):
            whole[i, i % (shape[0] + 1) :] = 0
    found = packed([pack(whole[:4]), pack(whole[4:])], shape)
    assert len(found) == 7 and found.dtype == dtype
    assert torch.equal(found[:], whole) and torch.equal(found[2:6], whole[2:6])
    of = torch.tensor([6, 0, 6, 3])
    assert torch.equal(found[of], whole[of]) and torch.equal(found.take(of)[1:3], whole[of][1:3])
    assert torch.equal(found[-1], whole[-1]) and all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


def test_minus_zero_is_no_padding() -> None:
    whole = torch.tensor([[[1.0, 2.0], [-0.0, 0.0], [0.0, 0.0]]])
    rows, lengths = pack(whole)
    assert lengths.tolist() == [2]
    assert torch.equal(packed([(rows, lengths)], (3, 2))[:].view(torch.int32), whole.view(torch.int32))


class Padded:
    """Conditions of [N, 64, 8]: a row for each letter, zeros behind."""

    def __init__(self) -> None:
        self.encoded: list[str] = []

    def __call__(self, prompts: Sequence[str]) -> Cond:
        self.encoded += prompts
        text = torch.zeros(len(prompts), 64, 8)
        for i, prompt in enumerate(prompts):
            for j, letter in enumerate(prompt):
                text[i, j] = ord(letter)
        return {"text": text}


def padded() -> tuple[Denoiser, Padded]:
    conditions = Padded()
    return replace(tiny.denoiser(), conditions=conditions), conditions


def test_padding_is_not_stored(tmp_path: Path) -> None:
    backbone, _ = padded()
    prompts = [f"{'a' * (i % 5 + 1)}{i}" for i in range(150)]
    told: list[int] = []
    data = embed(backbone, prompts, tmp_path, "base", keep=lambda path, size: told.append(size))
    (file,) = tmp_path.iterdir()
    letters, whole = sum(map(len, prompts)) * 8 * 4, 150 * 64 * 8 * 4
    assert letters < file.stat().st_size < letters + 10_000 < 0.3 * whole
    assert told == [pytest.approx(file.stat().st_size, rel=0.5)]
    assert torch.equal(data.all(CPU)["text"], backbone.encode(prompts)["text"])


def test_a_text_is_stored_once_however_many_sizes(tmp_path: Path) -> None:
    """SDXL is told the size of the image; the text does not know it."""
    teacher = load_teacher(pipelines.save("sdxl", tmp_path / "sdxl"))
    small, large = at_size(teacher, 16), at_size(teacher, 32)
    prompts, cache = ["red cat", "blue dog"], tmp_path / "cache"
    first, second = (embed(b, prompts, cache, "base") for b in (small, large))
    assert (first.encoded, second.encoded) == (2, 0) and len(list(cache.iterdir())) == 1
    for data, backbone in ((first, small), (second, large)):
        for found, wanted in (
            (data.all(CPU), backbone.encode(prompts)),
            (data.unconditional(CPU), backbone.encode([""])),
            (data.take(torch.tensor([1]), "").all(CPU), backbone.encode(["blue dog"])),
        ):
            assert found.keys() == wanted.keys()
            for key, tensor in wanted.items():
                torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5)
                assert found[key].dtype == tensor.dtype


def test_the_padding_of_masked_text_makes_no_difference(tmp_path: Path) -> None:
    """PixArt's transformer gives the same output, bit for bit, for zeros in place of the padding's states."""
    teacher = load_teacher(pipelines.save("pixart", tmp_path / "pixart"))
    cond = teacher.encode(["red cat", "blue dog"])
    padding = cond["mask"] == 0
    assert padding.any() and not cond["text"][padding].any()
    other = {**cond, "text": torch.where(padding[..., None], torch.randn(cond["text"].shape), cond["text"])}
    x, t = torch.randn(2, *teacher.shape), torch.tensor([900.0, 30.0], dtype=torch.float64)
    with torch.no_grad():
        outputs = [teacher.predict(teacher.module, x, t, c) for c in (cond, other)]
    assert torch.equal(*outputs)


SCRIPT = """
import json, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from accelerate import debug_launcher
from fewstep.data.prompts import embed
from tests.data.test_packed import CPU, NUMBERED, padded

def work(folder):
    backbone, conditions = padded()
    cache = Path(folder) / "cache"
    data, again = (embed(backbone, NUMBERED, cache, "base", chunk=3, together=True) for _ in range(2))
    about = {"encoded": json.dumps(conditions.encoded), "again": str(again.encoded)}
    save_file(data.all(CPU), f"{folder}/{torch.distributed.get_rank()}.safetensors", about)

debug_launcher(work, args=(sys.argv[1],), num_processes=2)
"""
NUMBERED = [f"prompt {i}" for i in range(10)]


@pytest.mark.slow
def test_several_processes_encode_a_share_each_and_all_have_all(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    texts, said = [], []
    for i in range(2):
        with safe_open(tmp_path / f"{i}.safetensors", "pt") as file:
            texts.append(file.get_tensor("text"))
            said.append({k: json.loads(v) for k, v in file.metadata().items()})
    assert [s["encoded"] for s in said] == [["", *NUMBERED[:3], *NUMBERED[6:9]], ["", *NUMBERED[3:6], *NUMBERED[9:]]]
    assert len(list(cache.iterdir())) == 2 and [s["again"] for s in said] == [0, 0]
    backbone, conditions = padded()
    alone = embed(backbone, NUMBERED, cache, "base", chunk=3)  # one process reads what two wrote
    assert conditions.encoded == [] and alone.encoded == 0
    for text in (*texts, alone.all(CPU)["text"]):
        assert torch.equal(text, backbone.encode(NUMBERED)["text"])
