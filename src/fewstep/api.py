"""The public functions: load a teacher, distil it, sample, load a student. The command line is written against these."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .atomic import sha256_of
from .backbones.base import Backbone, Cond, Denoiser, guided
from .backbones.few_step import FewStepPipeline, Serving, few_step_pipeline
from .backbones.files import load_lora, load_network, load_vectors, loads_lora
from .backbones.generate import device_of, trajectory
from .backbones.load import around, at_size, beside, fingerprint, load_teacher, pipeline_of
from .backbones.parts import denoiser_of
from .backbones.student_scheduler import Walking
from .begin import begun_head, roles_for
from .core import solvers, timegrid
from .core.solvers import State, solver_named
from .export.card import StudentCard, card_evaluations, read_card
from .methods.imitation import Imitation
from .methods.matching import Matching
from .methods.method import Method, student_of
from .methods.paths import PathImitation
from .methods.presets import require_roles
from .roles.adapters import switch
from .roles.quantised import Kind
from .roles.roles import RolesConfig
from .roles.step_condition import attach, nearest, unfold
from .roles.student import Student, with_lora, with_vectors, without_fold
from .tensors import finite
from .training.loop import Precision, Step, TrainConfig
from .training.loop import distill as train
from .training.optimizer import OptimizerName
from .training.paths import OF_STUDENT, TRAJECTORIES, PathsConfig, Walker, stops, teacher_paths, to_end, union
from .training.pictures import encode_pictures
from .training.pool import TEACHER_PICTURES, TEACHER_STEPS, teacher_pictures
from .training.prompts import embed
from .trajp.files import load_head
from .trajp.head import Head, kind_of, require_steps


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
    decay: int = 0,
    accumulate: int = 1,
    precision: Precision = "no",
    optimizer: OptimizerName = "adamw",
    compile: bool = False,
    share: bool = True,
    rank: int = 32,
    checkpointing: bool = False,
    base: Kind | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    checkpoint_every: int = 100,
    pictures: str | Path | None = None,
    paths: PathsConfig | None = None,
    start: str | Path | None = None,
) -> Generator[Step, None, None]:
    """Distil `teacher` and yield after every iteration: stop, log or look at any step.

    `pictures` is for methods that start from them (`Imitation`) and for an adversarial term (`Matching(gan=...)`): a folder of captioned
    ones, webdataset shards, or `teacher` for some that the guided teacher draws first. `paths` are the teacher's
    trajectories that `PathImitation` and `Matching(anchor=...)` learn from. `start` is a finished student to begin from. With
    `out`, checkpoints go there and the same call resumes. `step.roles` holds the networks; `fewstep.sample` takes a step.
    All else is as in a recipe: `TrainConfig` and `RolesConfig` say what.
    """
    config = TrainConfig(
        iterations=iterations, batch=batch, lr=lr, fake_lr=fake_lr, decay=decay, accumulate=accumulate, ema=ema, checkpoint_every=checkpoint_every, seed=seed,
        precision=precision, optimizer=optimizer, compile=compile,
    )  # fmt: skip
    networks = RolesConfig(share=share, rank=rank, checkpointing=checkpointing, base=base)
    require_roles(method.name, networks)
    folder, begin = (None if given is None else Path(given) for given in (out, start))
    begun_head(method, teacher, begin)  # what does not fit is said before anything is walked
    cache, identity = None if folder is None else folder / "embeddings", fingerprint(teacher.module, *teacher.encoders)
    data = embed(teacher, list(prompts), cache, identity)
    real, walked = None, None
    if method.needs.paths:
        ways, times = paths or PathsConfig(), path_times(method, teacher)
        place = None if folder is None else folder / (OF_STUDENT if ways.student else TRAJECTORIES)
        walker = student_walker(teacher, ways.student, times) if ways.student else None
        walked = to_end(
            teacher_paths(teacher, data, ways, times, method.guidance, place, identity, parallel=method.guidance_parallel, walker=walker)
        )
    if pictures == "teacher":
        real = teacher_pictures(
            teacher, data, TEACHER_PICTURES, TEACHER_STEPS, method.guidance, cache, seed, parallel=method.guidance_parallel
        )
    elif pictures is not None:
        real = encode_pictures(teacher, str(pictures), cache, identity)
    yield from train(roles_for(teacher, method, networks, seed, walked, begin), method, data, config, folder, real, walked)


def path_times(method: Method, backbone: Backbone) -> Tensor:
    """All times at which a student of this method wants to know where the teacher is."""
    return union(backbone.schedule, [method.times(backbone.schedule, k) for k in method.counts])


def student_walker(teacher: Backbone, folder: str | Path, times: Tensor) -> Walker:
    """A finished student of this teacher, on its way in its default number of steps. Raises ValueError where that does not stop at all `times`, or is at random."""
    folder, (loaded, schedule) = Path(folder), (load_student(folder, teacher), teacher.schedule)
    card, student, count = loaded.card, loaded.student, loaded.card.steps[0]
    grid, solver = _student_grid(card, teacher, count), card.solver[str(count)]
    if solver == "renoise":
        raise ValueError(
            f"data.student: {folder} adds new noise at every step, which leaves nothing to follow; choose a student of another solver"
        )
    places = stops(grid, times)
    if places is None:
        visits, asked = (", ".join(f"{t:.4g}" for t in of.tolist()) for of in (grid, times))
        raise ValueError(
            f"data.student: {folder} stops at {visits}, this one at {asked}; set method.steps and method.shift so that these are among those"
        )

    def states(cond: Cond, x: Tensor) -> list[State]:
        return list(solvers.sample(student.denoise(cond, card.told[0]), schedule, x, grid, solver_named(solver), student.head))

    about = {"student": sha256_of(*sorted(folder.rglob("*.safetensors"))), "solver": solver, "free_first": card.free_first}
    return Walker(grid, places, card_evaluations(card, count), about, states)


@dataclass(frozen=True)
class LoadedStudent:
    """A student from its folder, ready to sample, with its card."""

    student: Student
    card: StudentCard


def load_student(
    folder: str | Path, base: str | Path | Backbone | None = None, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> LoadedStudent:
    """Read a student onto its base: by default the one its card names, in the card's dtype, on `device`. Raises ValueError with one line.

    Another base of the same architecture is allowed - that is how a LoRA meets a fine-tune - and keeps its own weights.
    """
    folder = Path(folder)
    card = read_card(folder)
    named = beside(card.base, folder) if base is None else base
    if isinstance(named, str | Path):
        named = load_teacher(named, dtype or getattr(torch, card.dtype), device, guidance_rescale=card.guidance_rescale)
    backbone = at_size(named, card.size or None)
    require_same_prediction(card, backbone, folder)
    vectors = load_vectors(folder) if card.time_layer else {}
    head = load_head(folder, backbone.schedule).to(device_of(backbone.module)) if card.head else None
    if card.weights == "none":
        student = Student(backbone, backbone.module, (), "student")
    elif card.weights == "full":
        student = Student(backbone, load_network(folder, backbone.module), (), "student")
        if vectors:
            unfold(student.network, card.time_layer, vectors[card.told[0]])
    else:
        assert card.rank is not None and card.alpha is not None
        state = load_lora(folder)
        student = with_lora(backbone, without_fold(state, card.time_layer) if vectors else state, card.rank, card.alpha)
    student = with_vectors(student, {k: vectors[k] for k in card.told}) if vectors else student
    return LoadedStudent(replace(student, head=head, free=card.free_first), card)


def require_same_prediction(card: StudentCard, backbone: Backbone, folder: Path) -> None:
    """Raises ValueError where a student would be put on a base whose network predicts something else than the one it was made on."""
    own = str(backbone.scheduler_config.get("prediction_type", ""))
    if own != card.prediction:
        raise ValueError(
            f"student: {folder} was made on a base that predicts {card.prediction or 'a flow'}, this one predicts {own or 'a flow'}; load it on {card.base}, or on another base of its kind"
        )


def load(base: Any, student: str | Path) -> FewStepPipeline:
    """A diffusers pipeline that is right at `pipe(prompt)`: scheduler, times, steps and guidance come from the student.

    `base` is a pipeline, or what `load_teacher` takes.
    """
    folder = Path(student)
    card = read_card(folder)
    pipeline, adapter = pipeline_of(base), "fewstep"
    backbone = around(pipeline, card.base)
    require_same_prediction(card, backbone, folder)
    walking = _walking(card, backbone, folder)
    pipe = few_step_pipeline(pipeline, folder, Serving(card.steps, card.size, card.scales), card.weights, walking, adapter)
    network = denoiser_of(pipe)
    if card.weights == "lora" and not loads_lora(network):
        assert card.rank is not None and card.alpha is not None
        student_on_it = with_lora(around(pipe, card.base), load_lora(folder), card.rank, card.alpha)
        switch(student_on_it.layers, adapter := student_on_it.adapter)
    if card.time_layer:
        vectors = load_vectors(folder)
        unfold(network, card.time_layer, vectors[card.told[0]], adapter)
        condition = attach(network, card.time_layer)

        def tell(steps: int, guidance: float) -> None:
            condition.active = nearest(vectors, guidance if card.scales else steps)

        pipe.tell = tell
    return pipe


def _walking(card: StudentCard, backbone: Backbone, folder: Path) -> Walking | None:
    """How a student is sampled that no stock scheduler can walk; None for all others."""
    solver = card.solver[str(card.steps[0])]
    grids = {int(k): torch.tensor(times, dtype=torch.float64) for k, times in card.timesteps.items()}
    even = all(timegrid.even(backbone.schedule, times) for times in grids.values())
    if even and not (card.head or card.free_first or solver == "ipndm"):
        return None
    head = load_head(folder, backbone.schedule).to(device_of(backbone.module)) if card.head else None
    return Walking(backbone.schedule, backbone.row, solver_named(solver), grids, head, card.free_first)


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

    A step or a student takes its own steps, solver and no guidance, unless it was trained to be told its `guidance`; a teacher takes
    `steps` (default 50) and `guidance`.
    Seeds default to 0, 1, 2, ...; a seed gives the same picture in any batch. A student of several step counts is told the one
    it takes, or `told`.
    """
    states = sample_states(model, prompts, seeds, steps=steps, guidance=guidance, solver=solver, told=told)
    shown = backbone_of(model).decode(states[-1].x)
    if not finite(shown):
        raise FloatingPointError(
            f"sample: the pictures of {backbone_of(model).name} are not finite; load it in float32 or bfloat16, or run fewstep doctor TEACHER"
        )
    return shown


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
    scale = None if guidance == 1.0 else guidance
    if isinstance(model, Step):
        count = steps or model.method.counts[0]
        check_steps(model, count)
        times = model.method.times(backbone.schedule, count)
        with model.roles.averaged():
            denoise = student_of(model.method, model.roles, cond, told or count, scale)
            return trajectory(backbone, denoise, seeds, times, solver or model.method.solver, model.roles.head)
    if isinstance(model, LoadedStudent):
        count = steps or model.card.steps[0]
        check_steps(model, count)
        times = _student_grid(model.card, backbone, count)
        own = model.card.solver.get(str(count), model.card.solver[str(model.card.steps[0])])
        return trajectory(
            backbone,
            model.student.denoise(cond, scale if model.card.scales else told or count),
            seeds,
            times,
            solver or own,
            model.student.head,
        )
    denoise = guided(backbone, backbone.module, cond, null, guidance)
    return trajectory(backbone, denoise, seeds, _grid(backbone, steps or 50), solver or "ddim")


def check_steps(model: LoadedStudent | Step, steps: int, option: str = "steps") -> None:
    """Raises ValueError where the student's head does not serve so many steps."""
    head = model.roles.head if isinstance(model, Step) else model.student.head
    if isinstance(head, Head):
        require_steps(kind_of(head), head.counts, steps, option, "take as many or fewer, or train a student for more (method.steps)")


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
    "PathImitation",
    "PathsConfig",
    "Step",
    "backbone_of",
    "distill",
    "load",
    "load_student",
    "load_teacher",
    "sample",
    "sample_states",
]
