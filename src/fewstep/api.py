"""The public functions: load a teacher, run_stage it, sample, load a student. The command line is written against these."""

import warnings
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .backbones.apart import apart
from .backbones.base import Backbone, Denoiser
from .backbones.conformance import conformance
from .backbones.generate import device_of
from .backbones.load import fingerprint, load_teacher
from .backbones.own_network import require_network
from .backbones.parts import DiffusersBackbone
from .core.guidance import Guidance, guidance_of
from .data.trajectories import TrajectoryConfig
from .evaluation.process import ProcessCheck, check_process
from .findings import require
from .methods.consistency import ConsistencyDistillation
from .methods.distribution_matching import DistributionMatching, FakeScoreConfig, GanConfig, MatchConfig
from .methods.method import Method
from .methods.presets import ROLES, preset, require_roles
from .methods.progressive import ProgressiveDistillation
from .methods.trajectory_imitation import TrajectoryImitation
from .report.run import render_run
from .roles.adapters import fitting_rank, targets
from .roles.roles import RolesConfig, large_rank
from .runs import sampling
from .runs.init import inherited_head
from .runs.measure import evaluate
from .runs.prepare import ImageSource, Lines, RunSpec, prepare, require_exportable
from .runs.rehearsal import disk_check, student_check, trial_of
from .runs.run import Run, steps_of
from .runs.sampling import backbone_of, check_steps, require_prompts
from .runs.step import Step
from .runs.trajectory_sources import student_source, trajectory_times
from .runs.watch import DistillationWarning, Watch
from .student import formats
from .student.folder import require_folder
from .student.pipeline import load
from .student.student import Origin, Student, base_of, size_of
from .training.loop import TrainConfig, require_updates
from .training.state import checkpoints
from .words import in_python, python_words, told_in_python

# The command line takes them from where they are, and gives errors in its own words.
load_student = told_in_python(Student.read)
sample = told_in_python(sampling.sample)
sample_trajectory = told_in_python(sampling.sample_trajectory)
LEAST_REAL = 32  # samples by which a network's reading is judged


@told_in_python
def TDM(steps: int | tuple[int, ...] = 4, guidance: Guidance | float = 3.5, **settings: Any) -> DistributionMatching:  # noqa: N802 - reads as the method's name
    """Return Trajectory Distribution Matching; `settings` are the other fields of `DistributionMatching`.

    Several `steps` make one student for all of them (TDM-unify).
    """
    name = "tdm" if isinstance(steps, int) else "tdm-unify"
    return DistributionMatching(name=name, steps=steps, guidance=guidance_of(guidance), **settings)


@told_in_python
def method(name: str, **settings: Any) -> Method:
    """Return a method by its name in recipes, with settings changed: `fewstep.method("dmd2", steps=4, guidance=3.5)`.

    Names: tdm, tdm-unify, tdm-fisher, dmd2, diff-instruct, sid, lcm, progressive, trajp-l, pas, sfd. A dictionary changes some settings
    of a block: `fake={"updates": 5}`. Raises ValueError for an unknown name or setting.
    """
    return preset(name, **settings)


@told_in_python
def distill(
    teacher: Backbone,
    method: Method,
    prompts: Sequence[str] = ("",),
    *,
    train: TrainConfig,
    roles: RolesConfig | None = None,
    out: str | Path | None = None,
    images: str | Path | ImageSource | None = None,
    trajectories: TrajectoryConfig | None = None,
    init_from: str | Path | None = None,
    watch: Watch | None = Watch(),  # noqa: B008 - frozen
) -> Generator[Step, None, None]:
    """Distil `teacher` and yield after every iteration: stop, log or look at any step.

    `train` and `roles` are those of a recipe; without `roles` a LoRA is trained, of rank 32 or less on a small network. `images` are for
    methods that start from them (LCM, progressive distillation) and for an adversarial term: a folder of captioned ones, webdataset
    shards, or `teacher` for images that the guided teacher samples first. `trajectories` are the teacher's, for trajectory imitation and
    a regression term; their number of network calls is shown before they are generated. `init_from` is a finished student to continue:
    a run, or its `final/`.

    With `out`, checkpoints go there and the same call resumes; a finished run yields its last step again, and more `iterations` go on
    from it. At the end `out/final` holds the student, which `load_student`, `init_from` and the command line read, and
    `out/report.html` says how it went. `watch` says how the student is watched next to its teacher (None: its losses alone); what goes
    wrong is in `step.warnings`, and shown once as a `fewstep.DistillationWarning`.

    The run has modules of its own around the teacher's weights: the teacher stays as it is, but for its encoders, which are on the CPU
    while it trains. Several runs and students on one teacher do not disturb each other. Raises ValueError before anything is trained.
    """
    networks = RolesConfig(lora=ROLES.get(method.name, {}).get("lora", True) is not False) if roles is None else roles
    if roles is None and networks.lora:
        names = targets(teacher.module, networks.targets, networks.exclude)
        networks = replace(networks, rank=ROLES.get(method.name, {}).get("rank", fitting_rank(teacher.module, names)))
    require_roles(method.name, networks)
    if note := large_rank(teacher.module, networks):
        warnings.warn(python_words(note), DistillationWarning, stacklevel=3)
    require_updates(method, train.iterations)
    if method.needs.images != (images is not None):
        raise ValueError(
            f"images: method {method.name} needs some; pass a folder of captioned ones, or 'teacher' for the teacher's own"
            if method.needs.images
            else f"images: method {method.name} is trained from prompts alone; leave them out, or take a method with gan.weight above 0"
        )
    asked = require_prompts(prompts)
    source = images if images is None or isinstance(images, ImageSource) else ImageSource(str(images))
    initial = None if init_from is None else require_folder(init_from, "init_from")
    inherited_head(method, teacher, initial)  # what does not fit is said before anything is generated
    require_network(teacher, asked)
    if out is not None:
        require_exportable(teacher, method)
    spec = RunSpec(method, train, networks, asked, source, trajectories, initial)
    return _distilled(teacher, spec, None if out is None else Path(out), watch)


def _distilled(teacher: Backbone, spec: RunSpec, folder: Path | None, watch: Watch | None) -> Generator[Step, None, None]:
    """Run `distill` from its first step on, when its arguments are known to be right."""
    with in_python():
        own, base_hash = apart(teacher), fingerprint(teacher.module)
        origin = Origin(base_of(teacher), base_hash, 0, 0.0, spec.method.name, data=spec.origin, size=size_of(teacher))
        if folder is not None and not checkpoints(folder):
            trial = trial_of(teacher, spec.method, spec.roles, spec.train, origin)
            require([disk_check(trial.disk, folder)], "out")
            require([*conformance(own, spec.prompts[0]), student_check(trial, folder / "trial")], f"teacher: {teacher.name}")
        ready = prepare(own, spec, folder, folder, Lines())
        run = Run(teacher, ready.roles, spec.method, ready.data, spec.train, origin, folder, watch, ready.images, ready.trajectories)
        yield from steps_of(run)


@told_in_python
def export_student(model: Student | Step, folder: str | Path, form: str = "student", steps: int | None = None) -> Path:
    """Write a student to a new `folder` as files for others, load them again and compare. Return `folder`.

    `form` is `student`, or `merged` for one network without LoRA, which `module.load_state_dict` takes; students of diffusers pipelines
    also have `kohya` and `pipeline`. Raises ValueError with nothing kept.
    """
    student = model.snapshot() if isinstance(model, Step) else model
    formats.export(student if steps is None else student.single(steps), Path(folder), form)
    return Path(folder)


@told_in_python
def check(teacher: Backbone, real: Any, prompts: Sequence[str] | None = None, seed: int = 0) -> ProcessCheck:
    """Whether a wrapped network is read as it was trained: the error of its clean estimate on clean states `real` [N, ...] at a few times.

    A wrong noise schedule, prediction type, range of the data or index of times makes it larger than a right model's can be, or than another reading's is; what is
    suspected is in `.suspected` and told as a `fewstep.DistillationWarning`. `real` is a tensor or an array of what the network was trained on, some hundred samples;
    of a pipeline pictures [N, 3, H, W] in [0, 1]. `prompts` are theirs, one each; by default none. Printed, the result is a line for each time.
    """
    states = torch.as_tensor(real).float()
    if isinstance(teacher, DiffusersBackbone) and states.shape[1:] != teacher.shape:
        states = teacher.encode_images(states)
    if states.shape[1:] != tuple(teacher.shape) or len(states) < LEAST_REAL:
        raise ValueError(
            f"real: got {list(states.shape)}, allowed are at least {LEAST_REAL} states [N, {', '.join(map(str, teacher.shape))}]"
        )
    if not bool(states.isfinite().all()) or not bool(states.var(0).any()):
        raise ValueError("real: its numbers are not finite, or all samples are the same; pass clean data")
    asked = [""] * len(states) if prompts is None else require_prompts(prompts)
    if len(asked) != len(states):
        raise ValueError(f"prompts: got {len(asked)} for {len(states)} real samples; pass one each, or none")
    require_network(teacher, asked)
    own = apart(teacher)
    with torch.no_grad():
        cond = {k: v.to(device_of(own.module)) for k, v in own.encode(asked).items()}
        result = check_process(own, states.cpu(), cond, seed)
    for line in result.suspected:
        warnings.warn(f"{teacher.name}: {line}", DistillationWarning, stacklevel=3)
    return result


@told_in_python
def write_report(run: str | Path) -> Path:
    """Write `run/report.html` again from what the folder of a run holds by now; returns its path. As `fewstep report RUN`."""
    return render_run(Path(run))


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
    "backbone_of",
    "check",
    "check_steps",
    "distill",
    "evaluate",
    "export_student",
    "load",
    "load_student",
    "load_teacher",
    "method",
    "sample",
    "sample_trajectory",
    "student_source",
    "trajectory_times",
    "write_report",
]
