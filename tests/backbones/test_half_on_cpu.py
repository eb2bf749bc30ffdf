"""A CPU that is slow in half precision is named before a training."""

import pytest
import torch

from fewstep.backbones import half_on_cpu
from fewstep.backbones.conformance import facts
from fewstep.backbones.half_on_cpu import half_types, slow_half, slowdown

from .. import tiny


def test_float32_is_as_fast_as_itself() -> None:
    assert 0.2 < min(slowdown(torch.float32) for _ in range(5)) < 2


@pytest.mark.parametrize(("times", "said"), [(40.0, "about 40 times as slowly as float32; set dtype"), (0.6, "")])
def test_a_slow_type_is_said(times: float, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_on_cpu, "slowdown", lambda dtype: times)
    found = slow_half(torch.bfloat16, "set dtype to float32")
    assert (said in found) if said else found == ""
    teacher = tiny.denoiser()
    assert not any(check.name == "speed" for check in facts(teacher)) and not half_types(teacher.module)
    teacher.module.bfloat16()
    assert any(check.name == "speed" for check in facts(teacher)) == bool(said)
