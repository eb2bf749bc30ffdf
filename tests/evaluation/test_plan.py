"""Prompts and seeds depend on nothing but the protocol's name."""

from dataclasses import replace

import pytest

from fewstep.evaluation.plan import EmojiProtocol, digest, plan
from fewstep.evaluation.protocols import PROTOCOLS, protocol_named
from fewstep.evaluation.reference import load_reference

# What was measured under a protocol's name can be compared only with the same prompts and seeds: these never change.
FROZEN = {
    "emoji-quick": ("e45ba8f827e3f165", "a15eaecf073ad04f"),
    "emoji-medium": ("f5666fa48fa1e6bd", "b8a98eaa074a8c8a"),
    "emoji-full": ("b1b3f9e20aefe057", "9bde4707df3f375d"),
}


@pytest.mark.parametrize("name", [p.name for p in PROTOCOLS])
def test_prompts_and_seeds_are_frozen(name: str) -> None:
    drawn = plan(protocol_named(name), load_reference())
    assert (digest(drawn.prompts)[:16], digest(drawn.seeds)[:16]) == FROZEN[name]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda p: p.name)
def test_parts(protocol: EmojiProtocol) -> None:
    reference = load_reference()
    drawn = plan(protocol, reference)
    assert len(drawn.prompts) == len(drawn.seeds) == protocol.total(1)
    assert protocol.total(3) == 3 * protocol.total(1)
    assert len(set(zip(drawn.prompts, drawn.seeds, strict=True))) == len(drawn.prompts)
    assert all(0 <= s < 2**31 for s in drawn.seeds)
    plain, again, toned, held_out = (
        drawn.prompts[part] for part in (drawn.plain, drawn.again, drawn.toned, drawn.held_out)
    )
    assert len(set(plain)) == protocol.names
    assert set(plain) <= set(reference.names)
    assert list(again) == [p for p in plain[: protocol.repeated] for _ in range(protocol.seeds - 1)]
    assert len(set(toned)) == protocol.toned
    assert not set(toned) & set(reference.held_out)
    assert set(held_out) <= set(reference.held_out)
    assert len(set(held_out)) == protocol.held_out
    assert plain + again + toned + held_out == drawn.prompts


def test_a_small_protocol_is_the_beginning_of_a_large_one() -> None:
    reference = load_reference()
    small, large = (plan(protocol_named(n), reference) for n in ("emoji-quick", "emoji-full"))
    for part in ("plain", "toned", "held_out"):
        few, many = (
            list(zip(p.prompts[getattr(p, part)], p.seeds[getattr(p, part)], strict=True)) for p in (small, large)
        )
        assert many[: len(few)] == few


QUICK = protocol_named("emoji-quick")


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (replace(QUICK, names=1911), r"names: got 1911; choose 1\.\.1910"),
        (replace(QUICK, names=0), r"names: got 0; choose 1\.\.1910"),
        (replace(QUICK, repeated=129), r"repeated: got 129; choose 1\.\.128"),
        (replace(QUICK, held_out=96), r"held_out: got 96; choose 1\.\.95"),
        (replace(QUICK, seeds=1), "seeds: got 1; diversity takes at least 2"),
    ],
)
def test_what_cannot_be_had(protocol: EmojiProtocol, message: str) -> None:
    with pytest.raises(ValueError, match=rf"protocol\.{message}"):
        plan(protocol, load_reference())
