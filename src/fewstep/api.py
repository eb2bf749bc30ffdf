"""The public functions: load a teacher, distil it, sample, load a student. The command line is written against these."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .backbones.base import Backbone, Denoiser, guided
from .backbones.files import FewStepPipeline, Serving, few_step_pipeline, load_lora, load_network, load_vectors
from .backbones.generate import trajectory
from .backbones.load import fingerprint, load_teacher, pipeline_of
from .core import timegrid
from .core.solvers import State
from .export.card import StudentCard, read_card
from .methods.imitation import Imitation
from .methods.matching import Matching
from .methods.method import Method
from .roles.roles import Roles, RolesConfig, make_roles
from .roles.step_condition import attach, nearest, unfold
from .roles.student import Student, with_lora, with_vectors, without_fold
from .training.loop import Step, TrainConfig
from .training.loop import distill as train
from .training.pictures import encode_pictures
from .training.pool import TEACHER_PICTURES, TEACHER_STEPS, teacher_pictures
from .training.prompts import embed


def TDM(steps: int | tuple[int, ...] = 4, guidance: float = 3.5, **settings: Any) -> Matching:  # noqa: N802 - reads as the method's name
    """Trajectory Distribution Matching with the defaults of `Matching`; `settings` are its other fields.

    Several `steps` make one student for all of them (TDM-unify).
    """
    return Matching(steps=steps, guidance=guidance, name="tdm" if isinstance(steps, int) else "tdm-unify", **settings)


def distill(
    teacher: Backbone,
    method: Method,
    prompts: Sequence[str] = ("",),
    *,
    iterations: int,
    batch: int = 16,
    lr: float = 1e-5,
    fake_lr: float = 1e-4,
    ema: float = 0.98,
    share: bool = True,
    rank: int = 32,
    seed: int = 0,
    out: str | Path | None = None,
    checkpoint_every: int = 100,
    pictures: str | Path | None = None,
    start: str | Path | None = None,
) -> Generator[Step, None, None]:
    """Distil `teacher` and yield after every iteration: stop, log or look at any step.

    `pictures` is for methods that start from them (`Imitation`) and for an adversarial term (`Matching(gan=...)`): a folder of captioned
    ones, webdataset shards, or `teacher` for some that the guided teacher draws first. `start` is a finished student to begin from. With
    `out`, checkpoints go there and the same call resumes. `step.roles` holds the networks; `fewstep.sample` takes a step.
    """
    against = method.counts if method.adversary else ()
    roles = make_roles(teacher, RolesConfig(share=share, rank=rank), seed, method.conditioned, against)
    if start is not None:
        start_from(roles, Path(start))
    config = TrainConfig(iterations=iterations, batch=batch, lr=lr, fake_lr=fake_lr, ema=ema, seed=seed, checkpoint_every=checkpoint_every)
    folder = None if out is None else Path(out)
    cache, identity = None if folder is None else folder / "embeddings", fingerprint(teacher.module, *teacher.encoders)
    data = embed(teacher, list(prompts), cache, identity)
    real = None
    if pictures == "teacher":
        real = teacher_pictures(teacher, data, TEACHER_PICTURES, TEACHER_STEPS, method.guidance, cache, seed)
    elif pictures is not None:
        real = encode_pictures(teacher, str(pictures), cache, identity)
    yield from train(roles, method, data, config, folder, real)


def start_from(roles: Roles, folder: Path) -> None:
    """Let the student of a run begin as the finished one in `folder`, told its step counts where both are.

    Raises ValueError where it does not fit.
    """
    card = read_card(folder)
    if (card.weights == "lora") != roles.config.share:
        raise ValueError(f"start: {folder} is a student of weights {card.weights}; set roles.share={str(card.weights == 'lora').lower()}")
    if card.time_layer or roles.counts:
        raise ValueError(
            f"start: {folder} serves steps {list(card.steps)}; only students of one step count can be started from, and for one"
        )
    roles.start_from(load_lora(folder) if roles.config.share else load_network(folder, roles.backbone.module).state_dict())


@dataclass(frozen=True)
class LoadedStudent:
    """A student from its folder, ready to sample, with its card."""

    student: Student
    card: StudentCard


def load_student(folder: str | Path, base: str | Path | Backbone | None = None, device: str | torch.device = "cpu") -> LoadedStudent:
    """Read a student onto its base: by default the one its card names, on `device`. Raises ValueError with one line.

    Another base of the same architecture is allowed - that is how a LoRA meets a fine-tune - and keeps its own weights.
    """
    folder = Path(folder)
    card = read_card(folder)
    backbone = load_teacher(card.base if base is None else base, device=device) if base is None or isinstance(base, str | Path) else base
    vectors = load_vectors(folder) if card.time_layer else {}
    if card.weights == "full":
        student = Student(backbone, load_network(folder, backbone.module), (), "student")
        if vectors:
            unfold(student.network, card.time_layer, vectors[card.steps[0]])
    else:
        assert card.rank is not None and card.alpha is not None
        state = load_lora(folder)
        student = with_lora(backbone, without_fold(state, card.time_layer) if vectors else state, card.rank, card.alpha)
    return LoadedStudent(with_vectors(student, vectors) if vectors else student, card)


def load(base: Any, student: str | Path) -> FewStepPipeline:
    """A diffusers pipeline that is right at `pipe(prompt)`: scheduler, times, steps and guidance come from the student.

    `base` is a pipeline, or what `load_teacher` takes.
    """
    folder = Path(student)
    card = read_card(folder)
    pipe = few_step_pipeline(pipeline_of(base), folder, Serving(card.steps), card.weights == "full")
    if card.time_layer:
        vectors = load_vectors(folder)
        unfold(pipe.unet, card.time_layer, vectors[card.steps[0]], "fewstep")
        condition = attach(pipe.unet, card.time_layer)

        def tell(steps: int) -> None:
            condition.active = nearest(vectors, steps)

        pipe.tell = tell
    return pipe


def sample(
    model: Backbone | LoadedStudent | Step,
    prompts: Sequence[str],
    seeds: Sequence[int] | None = None,
    *,
    steps: int | None = None,
    guidance: float = 1.0,
    solver: str | None = None,
    told: int | None = None,
) -> Tensor:
    """Pictures [B, 3, H, W] in [0, 1], one per prompt (plain states for backbones without a picture).

    A step or a student takes its own steps, solver and no guidance; a teacher takes `steps` (default 50) and `guidance`.
    Seeds default to 0, 1, 2, ...; a seed gives the same picture in any batch. A student of several step counts is told the one
    it takes, or `told`.
    """
    states = sample_states(model, prompts, seeds, steps=steps, guidance=guidance, solver=solver, told=told)
    return backbone_of(model).decode(states[-1].x)


def sample_states(
    model: Backbone | LoadedStudent | Step,
    prompts: Sequence[str],
    seeds: Sequence[int] | None = None,
    *,
    steps: int | None = None,
    guidance: float = 1.0,
    solver: str | None = None,
    told: int | None = None,
) -> list[State]:
    """As `sample`, but the whole trajectory: K + 1 states with the clean estimate that led to each."""
    if not prompts:
        raise ValueError("prompts: got none; pass at least one")
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    if len(seeds) != len(prompts):
        raise ValueError(f"seeds: got {len(seeds)} for {len(prompts)} prompts; pass one seed a prompt")
    backbone = backbone_of(model)
    with torch.no_grad():
        cond = backbone.encode(prompts)
        null = backbone.encode([""])
    if isinstance(model, Step):
        count = steps or model.method.counts[0]
        times = model.method.times(backbone.schedule, count)
        with model.roles.averaged():
            denoise = model.roles.denoise("student", cond, told or count)
            return trajectory(backbone, denoise, seeds, times, solver or model.method.solver)
    if isinstance(model, LoadedStudent):
        count = steps or model.card.steps[0]
        times = _student_grid(model.card, backbone, count)
        own = model.card.solver.get(str(count), model.card.solver[str(model.card.steps[0])])
        return trajectory(backbone, model.student.denoise(cond, told or count), seeds, times, solver or own)
    denoise = guided(backbone, backbone.module, cond, null, guidance)
    return trajectory(backbone, denoise, seeds, _grid(backbone, steps or 50), solver or "ddim")


def backbone_of(model: Backbone | LoadedStudent | Step) -> Backbone:
    """The backbone behind anything that samples."""
    if isinstance(model, Step):
        return model.roles.backbone
    return model.student.backbone if isinstance(model, LoadedStudent) else model


def _grid(backbone: Backbone, steps: int) -> Tensor:
    return timegrid.uniform(backbone.schedule, steps)


def _student_grid(card: StudentCard, backbone: Backbone, steps: int) -> Tensor:
    """The trained times of this step count, or a uniform grid for a count that was not trained."""
    known = card.timesteps.get(str(steps))
    return _grid(backbone, steps) if known is None else timegrid.check(backbone.schedule, torch.tensor(known, dtype=torch.float64))


__all__ = [
    "TDM",
    "Denoiser",
    "Imitation",
    "LoadedStudent",
    "Matching",
    "Step",
    "backbone_of",
    "distill",
    "load",
    "load_student",
    "load_teacher",
    "sample",
    "sample_states",
]
