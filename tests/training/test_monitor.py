"""The drift monitor flags what goes wrong in practice, and stays silent on what does not."""

import pytest
import torch

from fewstep.training.monitor import drift, look


def pictures(seed: int = 0) -> torch.Tensor:
    return torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(seed)).expand(8, 3, 16, 16).clone() * torch.linspace(0.3, 1, 16)


def test_a_healthy_student_raises_nothing() -> None:
    healthy = (pictures() + 0.03 * torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    assert drift(look(healthy), look(pictures())) == []


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("brightness", lambda x: x * 0.4),
        ("saturation", lambda x: x.mean(1, keepdim=True).expand_as(x)),
        ("contrast", lambda x: x.mean((2, 3), keepdim=True).expand_as(x)),
        ("variety", lambda x: x[:1].expand_as(x)),
    ],
)
def test_each_way_of_going_wrong_is_named_with_a_cure(name: str, broken: object) -> None:
    assert callable(broken)
    found = drift(look(broken(pictures())), look(pictures()))
    assert any(line.startswith(f"DRIFT {name} is ") and ";" in line for line in found)


def test_what_the_teacher_s_pictures_lack_is_not_missed() -> None:
    """One prompt has no variety, grey pictures have no saturation."""
    one, grey = pictures()[:1], pictures().mean(1, keepdim=True).expand(8, 3, 16, 16)
    assert drift(look(one), look(one)) == []
    assert drift(look(grey), look(grey)) == []
    assert any(line.startswith("DRIFT saturation is ") for line in drift(look(pictures()), look(grey)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pictures_that_are_not_finite_have_left_the_teacher_s(value: float) -> None:
    broken = pictures().index_fill(0, torch.tensor([0]), value)
    assert drift(look(broken), look(pictures()))[0].startswith("DRIFT brightness is ")
    assert "are not finite; stop the run" in drift(look(broken), look(pictures()))[0]
    assert len(drift(look(torch.zeros_like(pictures())), look(pictures()))) >= 2
