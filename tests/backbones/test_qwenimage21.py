"""Qwen-Image-2.1: prompts of unlike length, its network by shapes alone, its processor without torchvision, alpha."""

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from fewstep.backbones.autoencoders import over_white
from fewstep.backbones.base import rows
from fewstep.backbones.few_step import drawn
from fewstep.backbones.load import around, load_teacher
from fewstep.backbones.meta import meta_teacher
from fewstep.backbones.parts import frozen
from fewstep.backbones.qwenimage21 import Qwen3VLProcessor, QwenImage21, cut, prompt_tokens
from fewstep.roles.step_condition import direction

from .. import pipelines

SHORT, LONG = "red cat", "a photo of a green house by the sea, and a small dog in front of it"
TIMES = torch.tensor([0.9, 0.5], dtype=torch.float64)


@pytest.fixture(scope="module")
def backbone() -> QwenImage21:
    torch.manual_seed(0)
    made: Any = pipelines.backbone("qwenimage21")
    return made.at(4)  # 4 x 4 tokens


def states(backbone: QwenImage21, count: int = 2) -> Tensor:
    return torch.randn(count, *backbone.shape, generator=torch.Generator().manual_seed(1))


def test_a_prompt_is_drawn_alike_alone_and_next_to_a_longer_one(
    backbone: QwenImage21, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By fewstep and its pipelines. Stock diffusers puts the image behind the padding of the longest prompt."""
    x, cond = states(backbone), backbone.encode([SHORT, LONG])
    assert cond["mask"].sum(1).tolist() == sorted(set(cond["mask"].sum(1).tolist()))
    with torch.no_grad():
        both = backbone.predict(backbone.module, x, TIMES, cond)
        for i, prompt in enumerate((SHORT, LONG)):
            alone = backbone.predict(backbone.module, x[i : i + 1], TIMES[i : i + 1], backbone.encode([prompt]))
            torch.testing.assert_close(both[i : i + 1], alone, rtol=0, atol=1e-5)
        swapped = backbone.predict(backbone.module, x, TIMES, rows(cond, torch.tensor([1, 0])))
    assert (swapped - both).abs().max() > 1e-2  # prompts show
    pipe: Any = backbone.pipe
    options = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "pt"}

    def batch() -> Tensor:
        seeds = [torch.Generator().manual_seed(i) for i in range(2)]
        return over_white(pipe([SHORT, LONG], generator=seeds, **options).images)

    each = drawn(pipe, [SHORT, LONG], 2, size=64)
    torch.testing.assert_close(batch(), each, rtol=0, atol=1e-5)
    monkeypatch.setattr(pipe.transformer, "__class__", diffusers.QwenImage21Transformer2DModel)
    torch.testing.assert_close(batch()[1], each[1], rtol=0, atol=1e-5)
    assert (batch()[0] - each[0]).abs().max() > 1e-4


def test_one_prompt_is_what_diffusers_makes_of_it(backbone: QwenImage21) -> None:
    """Without padding, by diffusers' own forward, which finds the image by a mask."""
    x, cond = states(backbone, 1), backbone.encode([LONG])
    text = cond["text"][:, cond["mask"][0]]
    slots = torch.cat([torch.zeros(1, text.shape[1]), torch.ones(1, 4)], 1).bool()  # 2 x 2 tokens each
    tokens = x.flatten(2).mT
    with torch.no_grad():
        found = diffusers.QwenImage21Transformer2DModel.forward(
            backbone.module, tokens, text, TIMES[:1].float(), [[(1, 4, 4)]], slots, return_dict=False
        )[0][:, -16:]
        own = backbone.predict(backbone.module, x, TIMES[:1], cond)
    torch.testing.assert_close(own, found.mT.unflatten(2, (4, 4)), rtol=0, atol=1e-5)


def test_its_shapes_are_known_without_numbers(backbone: QwenImage21, tmp_path: Path) -> None:
    """A plan calls it with fake tensors, of prompts and images of any number."""
    hollow: Any = meta_teacher(pipelines.save("qwenimage21", tmp_path / "qwenimage21"), torch.bfloat16, 64)
    cond = hollow.encode([SHORT, LONG])
    assert {k: tuple(v.shape) for k, v in cond.items()} == {"text": (2, 512, 16), "mask": (2, 512)}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        assert hollow.predict(hollow.module, states(backbone), TIMES, cond).shape == (2, *backbone.shape)


def test_a_step_count_is_said_to_text_too(backbone: QwenImage21) -> None:
    """Text takes part at time 0, where what is folded into a weight has to be the same vector."""
    seen = list[Tensor]()
    layer = backbone.module.get_submodule(backbone.time_layer)
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().double()))
    u = direction(backbone, backbone.module, TIMES)
    handle.remove()
    assert len(seen[0]) == 3
    torch.testing.assert_close(seen[0] @ u, torch.ones(3).double(), rtol=0, atol=1e-4)


def test_text_is_what_the_pipeline_encodes(backbone: QwenImage21) -> None:
    pipe: Any = backbone.pipe
    for prompt in (SHORT, LONG, ""):
        theirs, mask, _ = pipe.encode_prompt([prompt])
        own = backbone.encode([prompt])
        assert mask is None and own["mask"].sum() == theirs.shape[1]
        torch.testing.assert_close(own["text"][:, : theirs.shape[1]], theirs, rtol=0, atol=1e-6)


def test_a_long_prompt_is_cut_before_the_marks_behind_it(backbone: QwenImage21) -> None:
    assert cut(range(5), 5, 2) == [0, 1, 2, 3, 4] and cut(range(9), 5, 2) == [0, 1, 2, 7, 8]
    most = prompt_tokens(backbone.pipe)
    whole, longer = ("x" * n for n in (most, most + 100))
    found = backbone.encode([whole, longer])
    assert found["mask"].all()
    torch.testing.assert_close(found["text"][0], found["text"][1], rtol=0, atol=1e-6)


def test_a_processor_keeps_the_files_of_images(tmp_path: Path) -> None:
    """They go with an exported pipeline, which diffusers then loads with torchvision."""
    folder = pipelines.save("qwenimage21", tmp_path / "qwenimage21")
    told = {"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16}
    (folder / "processor" / "preprocessor_config.json").write_text(json.dumps(told))
    template = (folder / "processor" / "chat_template.jinja").read_text()
    (folder / "processor" / "chat_template.jinja").unlink()
    (folder / "processor" / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    pipe: Any = load_teacher(folder, size=32).pipe  # type: ignore[attr-defined]
    assert isinstance(pipe.processor, Qwen3VLProcessor)
    pipe.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "processor" / "preprocessor_config.json").read_text()) == told
    assert (tmp_path / "again" / "processor" / "chat_template.jinja").read_text() == template
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["processor"] == ["transformers", "Qwen3VLProcessor"]
    assert index["transformer"] == ["diffusers", "QwenImage21Transformer2DModel"]
    config = json.loads((tmp_path / "again" / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "QwenImage21Transformer2DModel"
    (folder / "processor" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"processor has no words, or no <\|image_pad\|>; download it again"):
        load_teacher(folder, size=32)
    with pytest.raises(ValueError, match=r"^image: got one, allowed is text alone in fewstep's pipelines; for images"):
        pipe.processor(["a"], True, "left", "pt", images=[1])


def test_what_is_transparent_is_white(backbone: QwenImage21) -> None:
    red, clear = torch.tensor([1.0, 0, 0, 1]), torch.tensor([1.0, 0, 0, 0])
    seen = over_white(torch.stack([red, clear, (red + clear) / 2])[..., None, None])[..., 0, 0]
    assert seen.tolist() == [[1, 0, 0], [1, 1, 1], [1, 0.5, 0.5]]
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    assert backbone.encode_images(images).shape == (2, *backbone.shape)
    assert backbone.decode(states(backbone)).shape == images.shape


def test_a_model_of_few_steps_is_refused() -> None:
    pipe = pipelines.FAMILIES["qwenimage21"]()
    pipe.register_to_config(sample_sigmas=[1.0, 0.8, 0.5])
    with pytest.raises(
        ValueError, match=r"sample_sigmas .*few-step model already.*; pass the base model, Qwen-Image-2.1"
    ):
        around(frozen(pipe, torch.float32), "turbo")
