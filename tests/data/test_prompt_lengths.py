"""Prompts that are cut are counted, with those that become the same; signs of other programs are named."""

import pytest

from fewstep.backbones.load import around
from fewstep.data.prompt_lengths import said_of_prompts

from .. import pipelines, tiny

LONG = "a photo of a green house " * 12


def test_prompts_that_fit_are_not_spoken_of() -> None:
    assert said_of_prompts(tiny.stable_diffusion(), ["red cat", "blue dog", ""]) == []
    assert said_of_prompts(tiny.denoiser(), [LONG]) == []
    assert said_of_prompts(tiny.pixels(), ["cat"]) == []


def test_prompts_that_are_cut_and_become_the_same() -> None:
    prompts = [LONG + end for end in ("red", "blue", "cat", "dog")]
    cut, same = said_of_prompts(tiny.stable_diffusion(), prompts)
    assert cut.startswith("prompts: 4 of 4 are longer than the 8 tokens of text_encoder (the longest has ")
    assert same == "prompts: of 4 different ones 3 become the condition of another when they are cut"
    (cut,) = said_of_prompts(tiny.stable_diffusion(), ["blue dog", "red " + LONG, "red cat"])
    assert cut.startswith("prompts: 1 of 3 are longer")


@pytest.mark.parametrize(
    ("family", "lengths"),
    [
        ("sdxl", [16, 16]),
        ("sd3", [16, 16, 256]),
        ("pixart", [120]),
        ("pixart-sigma", [300]),
        ("cogvideox", [16]),
        ("qwenimage21", [493]),
    ],
)
def test_every_encoder_has_its_own_length(family: str, lengths: list[int]) -> None:
    said = said_of_prompts(around(pipelines.FAMILIES[family](), "tiny"), [LONG * 2, "red cat"])
    assert [int(line.split("longer than the ")[1].split()[0]) for line in said] == lengths


@pytest.mark.parametrize(
    ("prompt", "sign"),
    [
        ("a cat <lora:style:0.8>", "<lora:NAME:1>"),
        ("a (red:1.2) cat", "(words:1.2)"),
        ("a (red cat: -1)", "(words:1.2)"),
        ("a [red] cat", "[words]"),
        ("a ((red)) cat", "((words))"),
        ("a cat BREAK a dog", "BREAK"),
        ("embedding:bad", "embedding:NAME"),
        ("a {red|blue} cat", "{one|other}"),
        ("a __colour__ cat", "__wildcard__"),
        ("a (red) cat, BREAKFAST at 12:30, so-called", ""),
        ("breaking, (a: b)", ""),
    ],
)
def test_signs_of_other_programs(prompt: str, sign: str) -> None:
    said = [line for line in said_of_prompts(tiny.stable_diffusion(), ["a", prompt]) if "sign" in line]
    assert said == (
        [f"prompts: 1 of 2 have {sign}, a sign of other programs, which is read as plain letters here"] if sign else []
    )
