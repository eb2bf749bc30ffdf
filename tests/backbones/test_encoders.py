"""Encoders: on a device one at a time, on the CPU where they do not fit, and loaded when they are called."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fewstep.backbones import encoders as module
from fewstep.backbones import parts
from fewstep.backbones.base import Backbone
from fewstep.backbones.encoders import deferred, encoding_on, is_deferred, weight_bytes
from fewstep.backbones.load import fingerprint, load_teacher
from fewstep.data.prompts import embed

from .. import pipelines

CARD = torch.device("cuda")
NAMES = ("text_encoder", "text_encoder_2")


class Card:
    """A device of a size: which networks are on it, and what it has held."""

    def __init__(self, networks: dict[str, nn.Module], size: int) -> None:
        self.names = {id(n): name for name, n in networks.items()}
        self.bytes = {name: weight_bytes(n) for name, n in networks.items()}
        self.size, self.here, self.held, self.log = size, set[str](), set[frozenset[str]](), list[str]()

    def put(self, networks: list[nn.Module], device: str | torch.device) -> None:
        for name in (self.names[id(n)] for n in networks):
            (self.here.add if str(device) == "cuda" else self.here.discard)(name)
            self.log.append(f"{name} {device}")
        self.held.add(frozenset(self.here))

    def free(self, device: torch.device) -> int:
        return self.size - sum(self.bytes[n] for n in self.here)


def encoded(teacher: Backbone, size: float, monkeypatch: pytest.MonkeyPatch) -> Card:
    """Encode twice on a card of a size, in bytes of the first encoder, where the denoiser and the autoencoder are."""
    pipe: Any = teacher.pipe  # type: ignore[attr-defined]
    networks = {"one": pipe.text_encoder, "two": pipe.text_encoder_2, "unet": pipe.unet, "vae": pipe.vae}
    card = Card(networks, int(size))
    card.here |= {"unet", "vae"}
    monkeypatch.setattr(module, "put", card.put)
    monkeypatch.setattr(module, "free_bytes", card.free)
    monkeypatch.setattr(module, "_to", lambda values, device: values)
    with encoding_on(teacher, CARD):
        for _ in range(2):
            teacher.encode(["red cat"])
    return card


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_teacher(pipelines.save("sdxl", tmp_path_factory.mktemp("encoders") / "sdxl"))


def test_encoders_that_fit_stay_together(teacher: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    card = encoded(teacher, 1e12, monkeypatch)
    assert frozenset({"one", "two", "unet", "vae"}) in card.held
    assert [line for line in card.log if line.endswith("cuda")] == ["one cuda", "two cuda"]
    assert card.here == {"unet", "vae"}


def test_encoders_that_do_not_fit_take_turns(teacher: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Any = teacher.pipe  # type: ignore[attr-defined]
    rest = weight_bytes(pipe.unet) + weight_bytes(pipe.vae)
    larger = max(weight_bytes(pipe.text_encoder), weight_bytes(pipe.text_encoder_2))
    card = encoded(teacher, rest + 1.3 * larger, monkeypatch)
    assert not any({"one", "two"} <= held for held in card.held) and {"one", "two"} <= set().union(*card.held)
    assert all({"unet", "vae"} <= held for held in card.held) and card.here == {"unet", "vae"}


def test_other_networks_leave_and_come_back(teacher: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Any = teacher.pipe  # type: ignore[attr-defined]
    larger = max(weight_bytes(pipe.text_encoder), weight_bytes(pipe.text_encoder_2))
    rest = weight_bytes(pipe.unet) + weight_bytes(pipe.vae)
    card = encoded(teacher, max(1.3 * larger, rest), monkeypatch)
    assert {"one", "two"} <= set().union(*card.held) and card.here == {"unet", "vae"}
    assert any(not {"unet", "vae"} <= held for held in card.held)


def test_an_encoder_that_does_not_fit_alone_works_on_the_cpu(
    teacher: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = encoded(teacher, 10, monkeypatch)
    assert not {"one", "two"} & set().union(*card.held) and card.here == {"unet", "vae"}


def test_an_encoder_is_loaded_at_its_first_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pipelines.save("sdxl", tmp_path / "sdxl")
    plain = load_teacher(folder)
    calls: list[str] = []
    load_part = parts.load_part

    def counted_part(*arguments: Any) -> Any:
        calls.append(arguments[2])
        return load_part(*arguments)

    monkeypatch.setattr(module, "load_part", counted_part)
    later = load_teacher(
        folder, defer=lambda k, f, n, d: deferred(k, f, n, d) if n.startswith("text_encoder") else None
    )
    assert all(map(is_deferred, later.encoders)) and not is_deferred(later.module) and calls == []
    assert [e.dtype for e in later.encoders] == [e.dtype for e in plain.encoders]
    with encoding_on(later, torch.device("cpu")):
        found, wanted = later.encode(["red cat"]), plain.encode(["red cat"])
    assert all(torch.equal(found[k], v) for k, v in wanted.items()) and found.keys() == wanted.keys()
    later.encode(["blue dog"])
    assert calls == ["text_encoder", "text_encoder_2"] and not any(map(is_deferred, later.encoders))
    assert fingerprint(*later.encoders) == fingerprint(*plain.encoders)


@pytest.mark.parametrize(("family", "count"), [("sd", 64), ("pixart", 64), ("flux2", 8), ("zimage", 8)])
def test_language_models_encode_few_prompts_at_once(family: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, seen = pipelines.backbone(family), list[int]()
    assert module.at_once(teacher.encoders) == count

    def encode(_: object, prompts: list[str]) -> Any:
        seen.append(len(prompts))
        return text(len(prompts))

    monkeypatch.setattr(type(teacher), "encode", encode)
    embed(teacher, [f"prompt {i}" for i in range(70)], None, "")
    assert max(seen) == count and sum(seen) == 71  # with the empty prompt


def text(count: int) -> dict[str, torch.Tensor]:
    return {"text": torch.zeros(count, 2, 3)}
