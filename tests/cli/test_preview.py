"""What a run shows says what it cost."""

import pytest

from fewstep.cli.distill import drawing_of
from fewstep.cli.recipe import DistillRecipe
from fewstep.methods.paths import PathImitation
from fewstep.roles.roles import RolesConfig, make_roles
from fewstep.runs.preview import Preview, labelled
from fewstep.training.prompts import embed

from .. import tiny
from .test_distill import RECIPE


@pytest.mark.parametrize(
    ("labels", "guidance", "first"),
    [
        (("cat", "dog"), 2.0, "teacher, 3 guided steps (6 evaluations)"),
        (("cat", "dog"), 1.0, "teacher, 3 steps (3 evaluations)"),
        ((), 2.0, "teacher, 3 steps (3 evaluations)"),
    ],
)
def test_pictures_say_their_network_evaluations(labels: tuple[str, ...], guidance: float, first: str) -> None:
    """A guided step is two, one that leaves the network out is none; without classes there is nothing to guide."""
    method = PathImitation(steps=(4, 2), guidance=guidance, free_first=True, head="none", condition=False)
    recipe = DistillRecipe.model_validate({**RECIPE, "method": {"name": "trajp-l", "guidance": guidance}})
    teacher = tiny.pixels(labels)
    shown = embed(teacher, labels or [""], None, "x")
    pictures = Preview(drawing_of(recipe), teacher, shown, None).compare(make_roles(teacher, RolesConfig(rank=2), fake=False), method)
    assert list(pictures.rows) == [
        first,
        "teacher, 4 steps (4 evaluations)",
        "student, 4 steps (3 evaluations)",
        "teacher, 2 steps (2 evaluations)",
        "student, 2 steps (1 evaluation)",
    ]
    assert list(pictures.trajectories) == [labelled("teacher", "step", 4), labelled("student", "step", 4)]
