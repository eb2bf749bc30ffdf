"""The public functions: load a teacher, distil it, sample, load a student. The command line is written against these."""

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
from .backbones.parts import Piped
from .backbones.process import mapping_of
from .begin import begun_head, require_network, roles_for
from .evaluation.process import ProcessCheck, check_process
from .findings import require
from .methods.imitation import Imitation
from .methods.matching import Matching
from .methods.method import Method
from .methods.paths import PathImitation
from .methods.presets import ROLES, preset, require_roles
from .report.run import render_run
from .roles.adapters import fitting_rank, targets
from .roles.quantised import Kind
from .roles.roles import RolesConfig, large_rank
from .runs import sampling, students
from .runs.exporting import export_student
from .runs.measure import evaluate
from .runs.pipelines import load
from .runs.rehearsal import disk_check, student_check, trial_of
from .runs.run import Run, require_files, steps_of
from .runs.sampling import backbone_of, check_steps, require_prompts
from .runs.step import Step
from .runs.students import LoadedStudent, Made, base_of, size_of, student_folder
from .runs.walking import path_times, student_walker, walked_paths
from .runs.watch import DistillationWarning, Watch
from .training.loop import Precision, TrainConfig, require_updates
from .training.optimizer import OptimizerName
from .training.paths import PathsConfig
from .training.pictures import encode_pictures
from .training.pool import TEACHER_PICTURES, TEACHER_STEPS, teacher_pictures
from .training.prompts import embed
from .training.state import checkpoints
from .words import in_python, python_words, told_in_python

# The command line takes them from where they are, and tells mistakes in its own words.
load_student = told_in_python(students.load_student)
sample = told_in_python(sampling.sample)
sample_states = told_in_python(sampling.sample_states)
LORA_RATES, COPY_RATES = (1e-4, 1e-3), (1e-5, 1e-4)  # of student and fake score: what the demo and its run with all weights have
LEAST_REAL = 32  # samples of which a network's reading is judged


@told_in_python
def TDM(steps: int | tuple[int, ...] = 4, guidance: float = 3.5, **settings: Any) -> Matching:  # noqa: N802 - reads as the method's name
    """Trajectory Distribution Matching with the defaults of `Matching`; `settings` are its other fields.

    Several `steps` make one student for all of them (TDM-unify).
    """
    return Matching(steps=steps, guidance=guidance, name="tdm" if isinstance(steps, int) else "tdm-unify", **settings)


@told_in_python
def method(name: str, **settings: Any) -> Matching | Imitation | PathImitation:
    """A method by its name, as recipes have it, with `settings` changed: tdm, tdm-unify, tdm-fisher, dmd2, diff-instruct, sid, lcm, progressive, trajp-l, pas, sfd.

    `fewstep.method("dmd2", steps=4, guidance=3.5)`. Raises ValueError for a name or a setting that is not known.
    """
    return preset(name, **settings)


@told_in_python
def distill(
    teacher: Backbone,
    method: Method,
    prompts: Sequence[str] = ("",),
    *,
    iterations: int,
    batch: int = 16,
    lr: float | None = None,
    fake_lr: float | None = None,
    ema: float = 0.98,
    decay: int = 0,
    lr_warmup: int = 0,
    betas: tuple[float, float] = (0.0, 0.999),
    clip: float = 1.0,
    accumulate: int = 1,
    precision: Precision = "no",
    optimizer: OptimizerName = "adamw",
    compile: bool = False,
    share: bool = True,
    rank: int | None = None,
    checkpointing: bool = False,
    base: Kind | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    checkpoint_every: int = 100,
    pictures: str | Path | None = None,
    paths: PathsConfig | None = None,
    start: str | Path | None = None,
    watch: Watch | None = Watch(),  # noqa: B008 - frozen
) -> Generator[Step, None, None]:
    """Distil `teacher` and yield after every iteration: stop, log or look at any step.

    `pictures` is for methods that start from them (`Imitation`) and for an adversarial term (`Matching(gan=...)`): a folder of captioned
    ones, webdataset shards, or `teacher` for some that the guided teacher draws first. `paths` are the teacher's
    trajectories that `PathImitation` and `Matching(anchor=...)` learn from; their number of network calls is told before they are walked. `start` is a finished student to begin from. With
    `out`, checkpoints go there and the same call resumes; a finished run yields its last step again, and more `iterations` go on from it. At the end `out/final` holds the student,
    which `load_student`, `start` and the command line read, and `out/report.html` says how it went.

    `watch` says how the student is watched beside its teacher (None: its losses alone); what goes wrong is in `step.warnings` and told once as a
    `fewstep.DistillationWarning`. The run has modules of its own around the teacher's weights: the teacher stays as it is, and several runs and students on one teacher
    do not disturb each other. `lr` and `fake_lr` are by default `LORA_RATES`, or `COPY_RATES` where `share` is false; `rank` is 32, less on a small network
    (`roles.adapters.fitting_rank`), and what a method's name stands for. All else is as in a recipe: `TrainConfig` and `RolesConfig` say what.
    """
    rates = LORA_RATES if share else COPY_RATES
    config = TrainConfig(
        iterations=iterations, batch=batch, lr=rates[0] if lr is None else lr, fake_lr=rates[1] if fake_lr is None else fake_lr, decay=decay, lr_warmup=lr_warmup,
        accumulate=accumulate, ema=ema, betas=betas, clip=clip, checkpoint_every=checkpoint_every, seed=seed, precision=precision, optimizer=optimizer, compile=compile,
    )  # fmt: skip
    networks = RolesConfig(share=share, checkpointing=checkpointing, base=base)
    if share:
        names = targets(teacher.module, networks.targets, networks.skip)
        networks = replace(
            networks, rank=ROLES.get(method.name, {}).get("rank", fitting_rank(teacher.module, names)) if rank is None else rank
        )
    require_roles(method.name, networks)
    if note := large_rank(teacher.module, networks):
        warnings.warn(python_words(note), DistillationWarning, stacklevel=3)
    require_updates(method, iterations)
    if method.needs.pictures != (pictures is not None):
        raise ValueError(
            f"pictures: method {method.name} needs some; pass a folder of captioned ones, or 'teacher' for the teacher's own"
            if method.needs.pictures
            else f"pictures: method {method.name} is trained from prompts alone; leave them out, or take a method with gan above 0"
        )
    asked = require_prompts(prompts)
    folder, begin = (None if given is None else Path(given) for given in (out, start))
    if begin is not None and (found := student_folder(begin)) is not None:
        begin = found
    begun_head(method, teacher, begin)  # what does not fit is said before anything is walked
    require_network(teacher, asked)
    if folder is not None:
        require_files(teacher, method)
    return _distilled(teacher, method, asked, config, networks, folder, begin, pictures, paths, watch)


def _distilled(
    teacher: Backbone,
    method: Method,
    prompts: list[str],
    config: TrainConfig,
    networks: RolesConfig,
    folder: Path | None,
    begin: Path | None,
    pictures: str | Path | None,
    paths: PathsConfig | None,
    watch: Watch | None,
) -> Generator[Step, None, None]:
    """`distill` from its first step on, which is when its arguments are known to be right."""
    with in_python():
        base_hash, own = fingerprint(teacher.module), apart(teacher)
        made = Made(base_of(teacher), base_hash, 0, 0.0, method.name, size=size_of(teacher))
        if folder is not None and not checkpoints(folder):
            trial = trial_of(teacher, method, networks, config, made)
            require([disk_check(trial.disk, folder)], "out")
            require([*conformance(teacher, prompts[0]), student_check(trial, folder / "trial")], f"teacher: {teacher.name}")
        cache, identity = None if folder is None else folder / "embeddings", identity_of(teacher, prompts)
        data = embed(own, prompts, cache, identity)
        real, walked, origin = None, None, "prompts alone" if data.null else "its teacher alone"
        if method.needs.paths:
            walked = walked_paths(own, method, data, paths or PathsConfig(), folder, identity)
        if pictures == "teacher":
            origin = "prompts and pictures that the teacher drew"
            real = teacher_pictures(
                own, data, TEACHER_PICTURES, TEACHER_STEPS, method.guidance, cache, config.seed, parallel=method.guidance_parallel
            )
        elif pictures is not None:
            origin, real = "captioned pictures", encode_pictures(own, str(pictures), cache, identity)
        rounded = f"{origin}, beside its base in {networks.base}" if networks.base else origin
        roles = roles_for(own, method, networks, config.seed, walked, begin)
        yield from steps_of(Run(teacher, roles, method, data, config, replace(made, data=rounded), folder, watch, real, walked))


def identity_of(teacher: Backbone, prompts: Sequence[str]) -> str:
    """Names a network with its encoders; for conditions that have no weights, what they say of some prompts."""
    weights, mapping = fingerprint(teacher.module, *teacher.encoders), mapping_of(teacher, prompts)
    return f"{weights}-{mapping}" if mapping else weights


@told_in_python
def check(teacher: Backbone, real: Any, prompts: Sequence[str] | None = None, seed: int = 0) -> ProcessCheck:
    """Whether a wrapped network is read as it was trained: the error of its clean estimate on clean states `real` [N, ...] at a few times.

    A wrong noise schedule, prediction type, range of the data or index of times makes it larger than a right model's can be, or than another reading's is; what is
    suspected is in `.suspected` and told as a `fewstep.DistillationWarning`. `real` is a tensor or an array of what the network was trained on, some hundred samples;
    of a pipeline pictures [N, 3, H, W] in [0, 1]. `prompts` are theirs, one each; by default none. Printed, the result is a line for each time.
    """
    states = torch.as_tensor(real).float()
    if isinstance(teacher, Piped) and states.shape[1:] != teacher.shape:
        states = teacher.picture_states(states)
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
    "Denoiser",
    "DistillationWarning",
    "Imitation",
    "LoadedStudent",
    "Matching",
    "PathImitation",
    "PathsConfig",
    "ProcessCheck",
    "Step",
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
    "path_times",
    "sample",
    "sample_states",
    "student_walker",
    "write_report",
]
