"""The drift monitor flags what goes wrong in practice, and stays silent on what does not."""

import math
from dataclasses import replace

import pytest
import torch

from fewstep.training.monitor import drift, look, unfit


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand(8, 3, 1, 1, generator=torch.Generator().manual_seed(seed)).expand(
        8, 3, 16, 16
    ).clone() * torch.linspace(0.3, 1, 16)


def test_a_healthy_student_raises_nothing() -> None:
    healthy = (images() + 0.03 * torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    assert drift(look(healthy), look(images())) == []


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
    found = drift(look(broken(images())), look(images()))
    assert any(line.startswith(f"DRIFT {name} is ") and ";" in line for line in found)


def test_what_the_teacher_s_images_lack_is_not_missed() -> None:
    """One prompt has no variety, grey images have no saturation."""
    one, grey = images()[:1], images().mean(1, keepdim=True).expand(8, 3, 16, 16)
    assert drift(look(one), look(one)) == []
    assert drift(look(grey), look(grey)) == []
    assert any(line.startswith("DRIFT saturation is ") for line in drift(look(images()), look(grey)))


def test_states_of_too_much_spread_are_seen_where_the_images_are_as_they_were() -> None:
    """What guidance that is too high does: an autoencoder decodes such states to images of ordinary colours."""
    states = torch.randn(8, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    teacher, blown = look(images(), states), look(images(), 2 * states)
    assert [line.split(";")[0] for line in drift(blown, teacher)] == ["DRIFT spread is 2.00 of the teacher's"]
    assert drift(look(images(), 1.2 * states), teacher) == []
    said = unfit(blown, teacher, 50)
    assert (
        len(said) == 1 and "what it is at guidance 4.5, in the teacher's own previews at method.guidance=50" in said[0]
    )
    assert unfit(teacher, None, 4.5) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_off(value: float) -> None:
    """A value that is not finite is a drift.

    No comparison with it is true: neither in the student's previews, nor in the teacher's, nor in what the student
    began as.
    """
    healthy, broken = look(images()), look(torch.full((8, 3, 16, 16), value))
    for found in (
        drift(broken, healthy),
        drift(healthy, broken),
        drift(broken, broken),
        drift(broken, healthy, start=broken),
    ):
        assert any(line.startswith("DRIFT brightness is ") for line in found)
    assert any("8 of 8 previews are of one colour or not finite" in line for line in drift(broken, healthy))
    assert any("the teacher's own 8 previews" in line for line in unfit(broken, None, 4.5))


@pytest.mark.parametrize("colour", [0.0, 1.0, 0.5, math.nan])
def test_a_few_images_that_show_nothing_are_counted(colour: float) -> None:
    """Two black ones of eight move no average by a third."""
    some = images()
    some[:2] = colour
    assert any(
        "DRIFT 2 of 8 previews are of one colour or not finite" in line for line in drift(look(some), look(images()))
    )
    assert not any(
        "of one colour" in line for line in drift(look(some), look(some))
    )  # where the teacher's show nothing either


def test_a_coloured_field_is_blank_and_a_fine_pattern_is_not() -> None:
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 16, 16)
    pattern = torch.zeros(3, 16, 16)
    pattern[0, 5, 5] = 1.0
    assert look(torch.stack([red, pattern])).blank == (True, False)


def test_what_a_student_began_as_is_no_drift_and_what_is_worse_is() -> None:
    """One step begins blurred, far outside of what is allowed."""
    teacher = look(images())
    start, better, worse = (replace(teacher, contrast=share * teacher.contrast) for share in (0.4, 0.5, 0.3))
    assert drift(start, teacher, start) == [] == drift(better, teacher, start)
    assert [line.split()[1] for line in drift(worse, teacher, start)] == ["contrast"]
    assert [line.split()[1] for line in drift(better, teacher)] == ["contrast"]


def clips(speed: float) -> torch.Tensor:
    """Eight clips of a bar that moves `speed` pixels a frame, [8, 5, 3, 16, 16]."""
    return torch.stack([torch.roll(images(), round(speed * f), -1) for f in range(5)], 1)


def moved(x: torch.Tensor) -> torch.Tensor:
    return x.diff(dim=1).abs().mean((1, 2, 3, 4))


def test_clips_that_stand_still_are_flagged() -> None:
    teacher, still = (look(x, motions=moved(x)) for x in (clips(2), clips(0)))
    found = drift(still, teacher)
    assert any(line.startswith("DRIFT motion is 0.00 of the teacher's") for line in found)
    assert any("8 of 8 clips stand still where the teacher's move" in line for line in found)
    assert (
        drift(teacher, teacher) == [] == drift(still, still)
    )  # there is nothing to move where the teacher's stand still


def test_one_clip_of_eight_that_stands_still_is_flagged() -> None:
    some = clips(2)
    some[3] = some[3, :1]
    found = drift(look(some, motions=moved(some)), look(clips(2), motions=moved(clips(2))))
    assert len(found) == 1 and "DRIFT 1 of 8 clips stand still" in found[0]
