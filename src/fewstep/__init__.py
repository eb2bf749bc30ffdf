"""fewstep: pretrained diffusion models as generators of 1 to 4 steps.

Distillation needs prompts alone.

    teacher = fewstep.load_teacher("emoji")
    train = fewstep.TrainConfig(iterations=400)
    for step in fewstep.distill(teacher, fewstep.TDM(steps=4), prompts, train=train, out="runs/mine"):
        print(step.iteration, step.metrics)
    pipe = fewstep.load("emoji", "runs/mine")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .notices import mute_others

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import (
        EDM,
        TDM,
        VP,
        ConsistencyDistillation,
        Denoiser,
        DistillationWarning,
        DistributionMatching,
        FakeScoreConfig,
        FirstStepConfig,
        Flow,
        GanConfig,
        Guidance,
        ImageSource,
        MatchConfig,
        ProcessCheck,
        ProgressiveDistillation,
        RewardConfig,
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
    "EDM",
    "TDM",
    "VP",
    "ConsistencyDistillation",
    "Denoiser",
    "DistillationWarning",
    "DistributionMatching",
    "FakeScoreConfig",
    "FirstStepConfig",
    "Flow",
    "GanConfig",
    "Guidance",
    "ImageSource",
    "MatchConfig",
    "ProcessCheck",
    "ProgressiveDistillation",
    "RewardConfig",
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
    """Import a public name when the name is first used.

    `fewstep --help` does not wait for torch. Notices that other libraries print when imported are muted.
    """
    if name not in __all__:
        raise AttributeError(f"module 'fewstep' has no attribute {name!r}")
    mute_others()
    return getattr(import_module(".api", __name__), name)


def __dir__() -> list[str]:
    """List the public names, for completion and help."""
    return sorted([*__all__, "__version__"])
