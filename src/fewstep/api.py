"""The public functions: load a teacher, distil, sample, load a student.

The command line uses the modules behind these functions, with errors in its own words.
"""

import warnings
from collections.abc import Generator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .backbones.apart import apart
from .backbones.base import Backbone, Denoiser
from .backbones.conformance import conformance, distilled_already
from .backbones.generate import device_of
from .backbones.load import fingerprint, load_teacher
from .backbones.own_network import require_network
from .backbones.parts import DiffusersBackbone
from .config_fields import shortened, whole_number
from .core.guidance import Guidance
from .core.schedule import EDM, VP, Flow
from .data.trajectories import TrajectoryConfig
from .evaluation.process import ProcessCheck, check_process
from .findings import require
from .methods.consistency import ConsistencyDistillation
from .methods.distribution_matching import DistributionMatching
from .methods.matching_settings import FakeScoreConfig, FirstStepConfig, GanConfig, MatchConfig, RewardConfig
from .methods.method import Method
from .methods.per_step import require_per_step
from .methods.presets import ROLES, preset, require_roles
from .methods.progressive import ProgressiveDistillation
from .methods.trajectory_imitation import TrajectoryImitation
from .names import require_path
from .notebook import in_notebook
from .objectives.rewards import Reward
from .processes import is_first
from .report.run import render_run
from .roles.adapters import fitting_rank, targets
from .roles.roles import RolesConfig, large_rank
from .runs import sampling
from .runs.adaptation import require_adaptable
from .runs.foreign import require_initial
from .runs.init import inherited_head
from .runs.measure import evaluate, real_states
from .runs.place import place_checks, writing_check
from .runs.prepare import ImageSource, Lines, RunSpec, prepare, require_exportable, shown_progress
from .runs.record import hardware
from .runs.rehearsal import disk_check, student_check, trial_of
from .runs.rewards import require_reward
from .runs.run import Run, shown, steps_of
from .runs.sampling import backbone_of, check_steps, require_prompts
from .runs.step import Step
from .runs.trajectory_sources import student_source, trajectory_times
from .runs.watch import DistillationWarning, Watch
from .student import formats
from .student.pipeline import load
from .student.student import Origin, Student, base_of, size_of
from .training.lock import held_in_python
from .training.loop import TrainConfig, require_groups, require_updates
from .training.precision import fix_workspace
from .training.state import checkpoints
from .words import in_python, python_words, told_in_python

# The command line uses the undecorated functions, with errors in its own words.
load_student = told_in_python(Student.read)
sample = told_in_python(sampling.sample)
sample_trajectory = told_in_python(sampling.sample_trajectory)
LEAST_REAL = 32  # samples that `check` needs
EMPTY = "prompts: all of them are empty, with which guidance changes nothing; pass the prompts that the student is for"


@told_in_python
def TDM(  # noqa: N802 - the method's name
    steps: int | tuple[int, ...] = 4, guidance: Guidance | float = 3.5, **settings: Any
) -> DistributionMatching:
    """Return Trajectory Distribution Matching.

    `settings` are the other fields of `DistributionMatching`. A dictionary changes some settings of a block:
    `fake={"updates": 5}`. Several `steps` make one student for all of these step counts (TDM-unify). Raises
    ValueError.
    """
    name = "tdm-unify" if isinstance(steps, tuple | list) else "tdm"
    made = preset(name, steps=steps, guidance=guidance, **settings)
    assert isinstance(made, DistributionMatching)
    return made


@told_in_python
def method(name: str, **settings: Any) -> Method:
    """Return a method by its name in recipes, with settings changed.

    E.g. `fewstep.method("dmd2", steps=4, guidance=3.5)`. The names are tdm, tdm-unify, tdm-fisher, dmd2,
    diff-instruct, sid, lcm, progressive, trajp-l, pas, sfd. A dictionary changes some settings of a block:
    `fake={"updates": 5}`. Raises ValueError for an unknown name or setting.
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
    reward: Reward | None = None,
    watch: Watch | None = Watch(),  # noqa: B008 - frozen
) -> Generator[Step, None, None]:
    """Distil `teacher`, and yield after every iteration.

    The caller can stop, log or look at any step. `train` and `roles` are those of a recipe; without `roles`
    a LoRA is trained, of rank 32 or less on a small network. `images` are for methods that start from images
    (LCM, progressive distillation) and for an adversarial term: a folder of captioned images, webdataset
    shards, or `teacher` for images that the guided teacher samples first. `trajectories` are the teacher's,
    for trajectory imitation and a regression term; the NFE is shown before the trajectories are generated.
    `init_from` is a finished student to continue: a run, its `final/`, or the `.safetensors` of somebody else's
    student, a LoRA or a whole network, which is fitted to the rank. `reward` is a function of images
    [B, 3, H, W] in [0, 1] and their prompts, which gives each image a number, for a method with `reward.weight`
    above 0 that names no `reward.scorer`.

    With `out`, checkpoints go to `out` and the same call resumes. A finished run yields its last step again,
    and more `iterations` continue the run. At the end `out/final` holds the student, which `load_student`,
    `init_from` and the command line read, and `out/report.html` says how the run went. `watch` says how the
    student is watched next to its teacher (None: the losses alone). What goes wrong is in `step.warnings`,
    and is shown once as a `fewstep.DistillationWarning`.

    The run has modules of its own around the teacher's weights. The teacher stays as it is, but for its
    encoders, which are on the CPU during the training. Several runs and students on one teacher do not
    disturb each other.

    Raises ValueError before anything is trained.
    """
    _require_kinds(teacher, method, train, roles, trajectories, watch)
    fix_workspace(train.deterministic)
    folder = None if out is None else require_path(out, "out")
    networks = RolesConfig(lora=ROLES.get(method.name, {}).get("lora", True) is not False) if roles is None else roles
    if roles is None and networks.lora:
        names = targets(teacher.module, networks.targets, networks.exclude)
        networks = replace(networks, rank=ROLES.get(method.name, {}).get("rank", fitting_rank(teacher.module, names)))
    require_roles(method.name, networks)
    require_per_step(method, networks, train.shard)
    if note := large_rank(teacher.module, networks):
        warnings.warn(python_words(note), DistillationWarning, stacklevel=3)
    require_updates(method, train.iterations)
    require_groups(method, train.batch)
    require_reward(method, reward)
    if method.needs.images != (images is not None):
        raise ValueError(
            f"images: method {method.name} needs some; "
            "pass a folder of captioned ones, or 'teacher' for the teacher's own"
            if method.needs.images
            else (
                f"images: method {method.name} is trained from prompts alone; "
                "leave them out, or take a method with gan.weight above 0"
            )
        )
    asked = require_prompts(prompts)
    source = (
        images
        if images is None or isinstance(images, ImageSource)
        else ImageSource(str(require_path(images, "images")))
    )
    initial = None if init_from is None else require_initial(init_from)
    inherited_head(method, teacher, initial)  # raises before anything is generated
    require_network(teacher, asked)
    require_adaptable(teacher, networks)
    if folder is not None:
        require_exportable(teacher, method)
        require(place_checks(folder), "out")
    if method.guidance.active and images is None and not any(asked) and teacher.encode([""]):
        warnings.warn(EMPTY, DistillationWarning, stacklevel=3)
    spec = RunSpec(method, train, networks, asked, source, trajectories, initial, reward)
    return _distilled(teacher, spec, folder, watch)


def _require_kinds(
    teacher: object, method: object, train: object, roles: object, trajectories: object, watch: object
) -> None:
    """Check the classes of the arguments of `distill`.

    Raises ValueError that names an argument of another class.
    """
    for option, value, kinds, cure in (
        ("teacher", teacher, Backbone, "fewstep.load_teacher(...) or fewstep.Denoiser(...)"),
        ("method", method, Method, "fewstep.TDM(...) or fewstep.method(name, ...)"),
        ("train", train, TrainConfig, "fewstep.TrainConfig(iterations=...)"),
        ("roles", roles, RolesConfig | None, "fewstep.RolesConfig(...)"),
        ("trajectories", trajectories, TrajectoryConfig | None, "fewstep.TrajectoryConfig(...)"),
        ("watch", watch, Watch | None, "fewstep.Watch(...), or None to watch losses alone"),
    ):
        if isinstance(value, type) or not isinstance(value, kinds):
            raise ValueError(f"{option}: got {shortened(value)}, allowed is {cure}")


def _distilled(
    teacher: Backbone, spec: RunSpec, folder: Path | None, watch: Watch | None
) -> Generator[Step, None, None]:
    """Run `distill`, whose arguments have been checked."""
    with in_python(), ExitStack() as stack:
        if folder is not None and is_first():
            stack.enter_context(held_in_python(folder))
        note = distilled_already(teacher.pipe, teacher.source) if isinstance(teacher, DiffusersBackbone) else ""
        if note and is_first():
            Lines().say(f"teacher: {teacher.name} {note}")
        own, base_hash = apart(teacher), fingerprint(teacher.module)
        origin = Origin(
            base=base_of(teacher),
            base_hash=base_hash,
            iterations=0,
            seconds=0.0,
            called=spec.method.name,
            hardware=hardware(),
            data=spec.data,
            size=size_of(teacher),
        )
        if folder is not None and not checkpoints(folder):
            trial = trial_of(teacher, spec.method, spec.roles, spec.train, origin)
            require([writing_check(folder), disk_check(trial.disk, folder)], "out")
            require(
                [*conformance(own, spec.prompts[0]), student_check(trial, folder / "trial")],
                f"teacher: {teacher.name}",
            )
        ready = prepare(own, spec, folder, folder, shown_progress())
        run = Run(
            teacher,
            ready.roles,
            spec.method,
            ready.data,
            spec.train,
            origin,
            folder,
            watch,
            ready.images,
            ready.trajectories,
        )
        yield from shown(steps_of(run), run) if in_notebook() and is_first() else steps_of(run)


@told_in_python
def export_student(model: Student | Step, folder: str | Path, form: str = "student", steps: int | None = None) -> Path:
    """Write a student as files for other programs, and compare them.

    The files go to a new `folder` and are loaded again. `form` is `student`, or `merged` for one network
    without LoRA, which `module.load_state_dict` takes; students of diffusers pipelines also have `kohya` and
    `pipeline`. Files of a student of several step counts serve `steps`, by default the first count; `student`
    keeps all counts. Returns `folder`. Raises ValueError with nothing kept.
    """
    if not isinstance(model, Student | Step):
        raise ValueError(f"model: got {shortened(model)}, allowed is a student, or a step of fewstep.distill")
    place, student = require_path(folder, "folder"), model.snapshot() if isinstance(model, Step) else model
    steps = None if steps is None else whole_number(steps, "steps")
    one = steps if steps is not None or form == "student" else student.card.steps[0]
    if one is not None and one not in student.card.steps:
        raise ValueError(f"steps: got {one}, this student serves {', '.join(map(str, student.card.steps))}")
    formats.export(student if one is None else student.single(one), place, form)
    return place


@told_in_python
def check(teacher: Backbone, real: Any, prompts: Sequence[str] | None = None, seed: int = 0) -> ProcessCheck:
    """Check that a wrapped network is read as it was trained.

    Returns the error of the network's clean estimate on clean states `real` `[N, ...]` at a few times.
    Printed, the result is a line for each time.

    A wrong noise schedule, prediction type, range of the data or index of times makes the error larger than
    a right model's can be, or larger than the error under another reading. What is suspected is in
    `.suspected` and shown as a `fewstep.DistillationWarning`.

    `real` is a tensor or an array of what the network was trained on, some hundred samples; for a pipeline
    these are images `[N, 3, H, W]` in [0, 1]. `prompts` has one prompt for each sample; by default all
    prompts are empty. Raises ValueError.
    """
    states = real_states(real, teacher, LEAST_REAL)
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
    """Write `run/report.html` again from a run's folder.

    The report shows what the folder holds by now, as with `fewstep report RUN`. Returns the report's path.
    """
    return render_run(require_path(run, "run"))


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
