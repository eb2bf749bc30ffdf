"""fewstep: turn a pretrained diffusion model into a generator of 1 to 4 steps, from prompts alone.

teacher = fewstep.load_teacher("emoji")
for step in fewstep.distill(teacher, fewstep.TDM(steps=4), prompts, train=fewstep.TrainConfig(iterations=400), out="runs/mine"):
    print(step.iteration, step.metrics)
pipe = fewstep.load("emoji", "runs/mine")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .notices import mute_others

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import (
        TDM,
        ConsistencyDistillation,
        Denoiser,
        DistillationWarning,
        DistributionMatching,
        FakeScoreConfig,
        GanConfig,
        Guidance,
        ImageSource,
        MatchConfig,
        ProcessCheck,
        ProgressiveDistillation,
        RolesConfig,
        Step,
        Student,
        TrainConfig,
        TrajectoryConfig,
        TrajectoryImitation,
        Watch,
        check,
        distill,
        evaluate,
        export_student,
        load,
        load_student,
        load_teacher,
        method,
        sample,
        sample_trajectory,
        write_report,
    )

__all__ = [
    "TDM",
    "ConsistencyDistillation",
    "Denoiser",
    "DistillationWarning",
    "DistributionMatching",
    "FakeScoreConfig",
    "GanConfig",
    "Guidance",
    "ImageSource",
    "MatchConfig",
    "ProcessCheck",
    "ProgressiveDistillation",
    "RolesConfig",
    "Step",
    "Student",
    "TrainConfig",
    "TrajectoryConfig",
    "TrajectoryImitation",
    "Watch",
    "check",
    "distill",
    "evaluate",
    "export_student",
    "load",
    "load_student",
    "load_teacher",
    "method",
    "sample",
    "sample_trajectory",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """The public names are imported when first used, so that `fewstep --help` does not wait for torch; other libraries' notices at their import are kept quiet."""
    if name not in __all__:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    mute_others()
    return getattr(import_module(".api", __name__), name)
