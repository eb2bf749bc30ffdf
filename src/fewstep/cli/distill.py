"""`fewstep distill`: from a recipe to a student, its pictures, its numbers and its report."""

import math
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml

from ..atomic import write_json
from ..backbones.base import Backbone
from ..backbones.generate import device_of
from ..backbones.hollow import require_loadable
from ..backbones.load import at_size, fingerprint, fused, load_teacher, pipeline_of, place_encoders, quiet
from ..backbones.schedulers import student_scheduler
from ..begin import begun_head, require_told, roles_for
from ..core import timegrid
from ..export.card import FILE, read_card
from ..findings import require
from ..reading import read_json
from ..report.run import BEST, BEST_FILE, REPORT, SHAPE
from ..report.words import finite, plural
from ..roles.quantised import quantise, weight_count
from ..roles.roles import Roles, large_rank
from ..runs.metrics_log import MetricsLog
from ..runs.preview import Drawing, Preview
from ..runs.record import versions
from ..runs.students import student_folder
from ..runs.walking import path_times, student_walker
from ..runs.watch import Trend
from ..training.loop import Step, default_device, distill, restore
from ..training.memory import storage_bytes
from ..training.optimizer import OptimizerName, state_bytes
from ..training.optimizer import require as require_optimizer
from ..training.paths import (
    OF_STUDENT,
    TRAJECTORIES,
    Paths,
    PathsConfig,
    guided_teacher,
    path_bytes,
    teacher_paths,
    to_end,
)
from ..training.pictures import RealData, encode_pictures
from ..training.pool import teacher_pictures
from ..training.processes import any_of, is_first, mesh_of_all, require_same, this_process, together, with_others
from ..training.prompts import Embeddings, embed, embedding_bytes
from ..training.state import checkpoints, latest_checkpoint
from .before import look_before, look_in_dry_run
from .best import Best, measured_by
from .ending import errors_along, finish, shape_seen, write_best
from .evaluate import check_measures, measure_step
from .plan import plans_of, show
from .preflight import held, note_shadowed, place_checks
from .progress import console, meter
from .prompts import count_in, say_found, say_of_prompts, say_size, training_prompts
from .recipe import DataConfig, DistillRecipe, first_stage, read_recipe, recorded
from .run_record import command_line, run_record
from .signals import stop_request


def run_distill(
    source: str, overrides: list[str], out: Path | None, dry_run: bool, styles: list[str], given: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Train, preview, export, evaluate, report; every part is skipped where its result is there already. `styles` are fused into the teacher.

    `given` are settings that have options of their own.
    """
    quiet()
    recipe = read_recipe(source, overrides, DistillRecipe, given)
    recipe = recipe.model_copy(update={"teacher": fused(recipe.teacher, styles)})
    check_measures(recipe)
    run = out or Path("runs") / recipe.name
    require(place_checks(run), "--out")
    note_shadowed(recipe.teacher)
    if recipe.first is not None and recipe.start is not None:
        raise ValueError("start: the recipe has a first stage, which is what its student begins as; leave one of the two out")
    if dry_run:
        print_dry_run(recipe, run)
        return
    require_same({"recipe": recorded(recipe), "versions": {k: v for k, v in versions().items() if k in ("fewstep", "torch")}})
    with held(run):
        run_stages(recipe, run, source, [*overrides, *(f"{key}={text}" for key, text in given.items())])


def run_stages(recipe: DistillRecipe, run: Path, source: str, overrides: list[str]) -> None:
    """Train what there is to train, in a folder that is this run's alone."""
    stages = [recipe] if recipe.first is None else [first_stage(recipe), second_stage(recipe, run / FIRST)]
    for stage in stages:
        require_optimizer(stage.train.optimizer)
    teacher, base_hash = teacher_of(recipe)
    check_measures(recipe, teacher)
    check_start(recipe, teacher)
    console.quiet = not is_first()
    prompts = training_prompts(recipe, teacher)
    say_of_prompts(teacher, prompts)
    begun = checkpoints(run) or checkpoints(run / FIRST)
    together()  # nobody writes before all have looked
    if not begun:
        look_before(stages, teacher, base_hash, prompts, run, run)
    for stage in stages[:-1]:
        console.print(f"first: {stage.method.name}, {stage.train.iterations} iterations")
        done = finished(run / FIRST, stage)
        together()
        if not done:
            distil(stage, teacher, base_hash, prompts, run / FIRST, source, overrides, run)
            together()
            teacher = teacher_of(recipe)[0] if sharded(stage) else teacher
    distil(stages[-1], teacher, base_hash, prompts, run, source, overrides, run)


def teacher_of(recipe: DistillRecipe) -> tuple[Backbone, str]:
    """The recipe's teacher, and the hash of its weights as they were. Where it is rounded, the device never holds more than what is left."""
    device, rounded = default_device(), recipe.roles.base
    teacher = load_teacher(recipe.teacher, getattr(torch, recipe.dtype), "cpu" if rounded else device, recipe.size, recipe.guidance_rescale)
    base_hash = fingerprint(teacher.module)
    quantise(teacher, rounded)
    pipeline_of(teacher).to(device)
    return teacher, base_hash


def sharded(recipe: DistillRecipe) -> bool:
    """Whether its weights are spread over processes."""
    return recipe.train.shard and this_process().num_processes > 1


def second_stage(recipe: DistillRecipe, first: Path) -> DistillRecipe:
    """The recipe of the training that goes on from the first stage's student, whose trajectories it may ask for."""
    data = recipe.data
    if data is not None and data.student == FIRST:
        data = data.model_copy(update={"student": str(first)})
    return recipe.model_copy(update={"start": str(first), "data": data})


def spent_before(recipe: DistillRecipe, run: Path, paths: Paths | None) -> float:
    """Seconds that went into a first stage and into trajectories, each once: they are part of what a student costs."""
    walked = 0.0 if paths is None else paths.seconds
    if recipe.first is None:
        return walked
    first, own = recipe.first.data, recipe.data
    shared = first is not None and own is not None and first.model_copy(update={"real": own.real}) == own
    return read_card(run / FIRST / "final").train_seconds + (0.0 if shared else walked)


def finished(run: Path, recipe: DistillRecipe) -> bool:
    """Whether a stage has nothing left to do: it was trained as far as the recipe says, the student of then is there, and its report after it."""
    found, record, report = latest_checkpoint(run), run / "run.json", run / REPORT
    final = student_folder(str(run))
    if found is None or not record.exists() or final is None or not report.exists():
        return False
    same = read_json(record, "put its copy back, or choose another --out to begin again").get("recipe") == recorded(recipe)
    trained = min(int(found[1]["step"]), read_card(final).iterations) >= recipe.train.iterations
    return same and trained and report.stat().st_mtime_ns >= (final / FILE).stat().st_mtime_ns


def distil(
    recipe: DistillRecipe, teacher: Backbone, base_hash: str, prompts: list[str], run: Path, source: str, overrides: list[str], whole: Path
) -> None:
    """One training with all that a run leaves. In the folder of the `whole` lies what has been encoded and walked, for all stages."""
    teacher = at_size(teacher, recipe.size)
    place_encoders(teacher, device_of(teacher.module))
    if teacher.scheduler_config:
        even = all(timegrid.even(teacher.schedule, recipe.method.times(teacher.schedule, k)) for k in recipe.method.counts)
        # What cannot be exported is not trained.
        student_scheduler(teacher.scheduler_config, recipe.method.counts, recipe.method.solver, even)
    check_start(recipe, teacher)
    first, identity, cache = is_first(), fingerprint(teacher.module, *teacher.encoders), whole / EMBEDDINGS
    if first:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "run.json", run_record(recipe, base_hash, source, overrides))
    with this_process().main_process_first():  # what it makes the others find
        data = embed(teacher, prompts, cache, identity, keep=say_size)
        real = real_data(recipe, teacher, data, cache, identity)
        shown = embed(teacher, recipe.preview.prompts or (prompts * 8)[:8], cache, identity)
    place_encoders(teacher, "cpu")
    with with_others():
        paths = trajectories(recipe, teacher, data, whole, identity)
    if sharded(recipe):
        teacher.module.cpu()  # whence it and its copies come back in parts
    roles = roles_of(recipe, teacher, paths)
    print_roles(roles, recipe.train.optimizer)
    shape = {} if paths is None or not first else shape_seen(roles, paths)
    if shape:
        shape |= {"walked_by": recipe.data and recipe.data.student}
        write_json(run / SHAPE, shape)  # without the student's errors yet: a run that is stopped has a report too
    if sharded(recipe):
        roles.shard(mesh_of_all(), default_device())
    found = latest_checkpoint(run)
    together()  # nobody writes before all have looked
    start = 0 if found is None else int(found[1]["step"])
    log = MetricsLog(run / "metrics.jsonl" if first else None, start)
    if start:
        console.print(f"resuming {run} at iteration {start} of {recipe.train.iterations}")
    else:
        log.seconds = spent_before(recipe, run, paths)
        (run / BEST / BEST_FILE).unlink(missing_ok=True)  # what lies there is another training's
    with with_others():
        # Networks whose weights are spread draw in all processes or in none.
        preview = Preview(drawing_of(recipe), teacher, shown, run if first else None) if first or sharded(recipe) else None
        keep = partial(write_best, run, recipe, roles, base_hash) if first and recipe.preview.keep_best and not sharded(recipe) else None

        def resumed(step: Step) -> None:
            complete(recipe, step, preview, log, prompts, keep)

        steps = distill(roles, recipe.method, data, recipe.train, run, real, paths, resumed)
        stopped = training(recipe, roles, steps, preview, log, prompts, keep)
    if stopped:
        console.print(f"stopped after iteration {log.iteration}; the same command resumes:\n  {command_line()}")
        sys.exit(130)
    if not first:
        return
    if sharded(recipe):
        teacher = at_size(teacher_of(recipe)[0], recipe.size)
        roles = roles_of(recipe, teacher, paths)
        restore(roles, run)
        preview = Preview(drawing_of(recipe), teacher, shown, run)
    if paths is not None:
        write_json(run / SHAPE, shape | {"errors": errors_along(recipe.method, roles, paths)})
    assert preview is not None
    finish(recipe, roles, preview, run, base_hash, log.seconds, prompts)


Keep = Callable[[Best, float], list[str]]  # (a preview's quality, seconds so far) -> what is to be said of it


def drawing_of(recipe: DistillRecipe) -> Drawing:
    """What the recipe's run draws."""
    return Drawing(recipe.method, recipe.train.batch, recipe.preview.teacher_steps, recipe.preview.seed)


def training(
    recipe: DistillRecipe,
    roles: Roles,
    steps: Generator[Step, None, None],
    preview: Preview | None,
    log: MetricsLog,
    prompts: Sequence[str],
    keep: Keep | None = None,
) -> bool:
    """Go through the training and show, log and measure what comes; returns whether it was stopped before its end. Without `preview` only train."""
    start, last, trend = log.iteration, recipe.train.iterations, Trend()
    if not start and preview is not None:
        judge(recipe, Step(0, {}, 0.0, roles, recipe.method), preview, log, prompts)
    with stop_request() as request, meter(recipe.name, last, start) as bar, closing(steps):
        for step in steps:
            if step.iteration <= start:  # a finished run's last step once more: it has been logged and shown
                break
            log.add(step)
            bar.advance(step.iteration, {k: v for k, v in step.metrics.items() if k.endswith("_loss")})
            if grown := trend.add(step.metrics):
                console.print("\n".join(f"iteration {step.iteration}: {w}" for w in grown))
                log.note(step.iteration, {"warnings": grown})
            look_at(recipe, step, preview, log, prompts, keep)
            if any_of(request.asked) and step.iteration < last:
                return True
    return False


def look_at(
    recipe: DistillRecipe, step: Step, preview: Preview | None, log: MetricsLog, prompts: Sequence[str], keep: Keep | None = None
) -> None:
    """Show and measure the student after an iteration where that is due."""
    if preview is not None and (step.iteration % recipe.preview.every == 0 or step.iteration == recipe.train.iterations):
        judge(recipe, step, preview, log, prompts, keep)


def judge(recipe: DistillRecipe, step: Step, preview: Preview, log: MetricsLog, prompts: Sequence[str], keep: Keep | None = None) -> None:
    """One preview: its pictures, what is measured on them, the best student so far, and everything that is to be said.

    What the log knows of this iteration already is not made or said again.
    """
    seen = preview.show(step.roles, step.iteration, recipe.method)
    values = {"distance": seen.distance, **{f"distance_{k}": d for k, d in seen.distances.items()}}
    if "preview" not in log.known:
        log.note(step.iteration, {"preview": {k: v if finite(v) else None for k, v in values.items()}})
    quality = log.known.get("quality", {}) if is_first() else {}
    if any_of(not quality and is_first()) if sharded(recipe) else not quality and is_first():
        quality = measure(recipe, step, log, prompts)
    value = seen.distance if recipe.preview.measure is None else quality.get("fd_real")
    kept = keep(Best(step.iteration, value if finite(value) else math.nan, measured_by(recipe)), log.seconds) if keep else []
    said = [*seen.warnings, *(kept if step.iteration < recipe.train.iterations else [])]  # at its end a run says what it missed
    if said and "warnings" not in log.known:
        console.print("\n".join(f"iteration {step.iteration}: {w}" for w in said))
        log.note(step.iteration, {"warnings": said})


def complete(
    recipe: DistillRecipe, step: Step, preview: Preview | None, log: MetricsLog, prompts: Sequence[str], keep: Keep | None = None
) -> None:
    """Make again what a kill after the checkpoint of this step took: its line, its preview, its point of the quality curves."""
    if "seconds" not in log.known and step.metrics:
        log.add(step)
    look_at(recipe, step, preview, log, prompts, keep)
    log.known = {}


def data_seed(recipe: DistillRecipe, data: DataConfig) -> int:
    """Of what the teacher draws."""
    return recipe.train.seed if data.seed is None else data.seed


def real_data(recipe: DistillRecipe, teacher: Backbone, prompts: Embeddings, cache: Path, identity: str) -> RealData | None:
    """The pictures that the recipe's method starts from, if it does."""
    data = recipe.data
    if data is None or data.source == "trajectories":
        return None
    if data.source == "teacher":
        with meter("teacher's pictures", data.count) as bar:
            return teacher_pictures(
                teacher,
                prompts,
                data.count,
                data.steps,
                recipe.method.guidance,
                cache,
                data_seed(recipe, data),
                show=lambda done: bar.advance(done, {}),
                parallel=recipe.method.guidance_parallel,
            )
    return encode_pictures(teacher, data.source, cache, identity, found=say_found, keep=say_size)


def trajectories(recipe: DistillRecipe, teacher: Backbone, prompts: Embeddings, run: Path, identity: str) -> Paths | None:
    """The teacher's, or a finished student's, if the recipe asks for them; walked with a progress bar, what is there already left out."""
    data = recipe.data
    if data is None or data.source != "trajectories":
        return None
    method, times, student = recipe.method, path_times(recipe.method, teacher), walking_student(data)
    config = PathsConfig(data.count, data.steps, data.solver, data_seed(recipe, data), data.guidance_until, data.student)
    folder = Path(data.folder) if data.folder is not None else run / (TRAJECTORIES if student is None else OF_STUDENT)
    if student is None:
        walker = guided_teacher(
            teacher, prompts.unconditional(device_of(teacher.module)), config, times, method.guidance, method.guidance_parallel
        )
    else:
        walker = student_walker(teacher, student, times)
    needed = path_bytes(config.count, teacher.shape, len(walker.places), len(walker.grid))
    who = "the teacher" if student is None else f"the student in {student}"
    console.print(
        f"trajectories: {config.count:,} of {walker.calls} network calls of {who}, {config.count * walker.calls:,} in all, "
        f"{count_in(needed, folder)}; those in {folder} are not walked again"
    )
    with meter("trajectories", config.count) as bar:
        walking = teacher_paths(teacher, prompts, config, times, method.guidance, folder, identity, walker=walker)
        return to_end(walking, lambda done: bar.advance(done, {}))


def walking_student(data: DataConfig | None) -> Path | None:
    """Where the student lies whose trajectories are asked for. Raises ValueError where there is none."""
    if data is None or data.student is None:
        return None
    folder = student_folder(data.student)
    if folder is None:
        raise ValueError(f"data.student: {data.student} is no student folder; pass a run or its final/ folder")
    return folder


def roles_of(recipe: DistillRecipe, teacher: Backbone, paths: Paths | None) -> Roles:
    """The networks that the recipe's method needs, where it says so begun as a finished student."""
    return roles_for(teacher, recipe.method, recipe.roles, recipe.train.seed, paths, start_folder(recipe))


def start_folder(recipe: DistillRecipe) -> Path | None:
    """Where the student lies that the recipe's begins as. Raises ValueError where it says one and there is none."""
    folder = None if recipe.start is None else student_folder(recipe.start)
    if recipe.start is not None and folder is None:
        raise ValueError(f"start: {recipe.start} is no student folder; pass a run or its final/ folder")
    return folder


def check_start(recipe: DistillRecipe, teacher: Backbone) -> None:
    """Raises ValueError where the student that the recipe's begins as is not there, or does not serve it, and where one whose trajectories are asked for is not."""
    if (folder := start_folder(recipe)) is not None:
        begun_head(recipe.method, teacher, folder)
    require_preview_steps(recipe, teacher)
    roles, layer = recipe.roles, teacher.time_layer
    if (own := recipe.first) is not None and (roles.rank or not roles.share):  # a head alone is told nothing
        bare = not roles.share or any(skipped in layer for skipped in roles.skip)
        require_told("the first stage's", own.method.conditioned, recipe.method.conditioned, "" if bare else layer)
    if recipe.first is not None:
        walking_student(recipe.first.data)
    if recipe.first is None or recipe.data is None or recipe.data.student != FIRST:  # that one is still to come
        walking_student(recipe.data)


def require_preview_steps(recipe: DistillRecipe, teacher: Backbone) -> None:
    """Raises ValueError where the teacher cannot take the steps of the previews' top row, before anything is walked or trained."""
    try:
        timegrid.uniform(teacher.schedule, recipe.preview.teacher_steps)
    except ValueError as error:
        raise ValueError(f"preview.teacher_steps: {str(error).removeprefix('steps: ')}") from error


FIRST = "first"  # the folder inside a run that holds its first stage
EMBEDDINGS = "embeddings"  # that with what was encoded


def measure(recipe: DistillRecipe, step: Step, log: MetricsLog, prompts: Sequence[str]) -> Mapping[str, Any]:
    """A point of the quality curves, where the recipe asks for them; empty where it does not."""
    if recipe.preview.measure is None:
        return {}
    if quality := measure_step(step, recipe.preview.measure, recipe.real, prompts):
        log.note(step.iteration, {"quality": quality})
    return quality


def print_dry_run(recipe: DistillRecipe, run: Path) -> None:
    """What `--dry-run` prints: the settings, what they need, and what is looked at before a training. Nothing is left of it."""
    start_folder(recipe)
    require_loadable(recipe.teacher)
    teacher, plans = plans_of(recipe)
    check_start(recipe, teacher)
    check_measures(recipe, teacher)
    prompts = training_prompts(recipe, teacher)
    say_of_prompts(teacher, prompts)
    needed = embedding_bytes(at_size(teacher, recipe.size), len(prompts))
    console.print(f"embeddings of {len(prompts):,} prompts: {count_in(needed, run)}", markup=False)
    for made in plans:
        stage = made.recipe
        console.print(yaml.safe_dump(recorded(stage), sort_keys=False), markup=False)
        show(made)
        rng = torch.Generator().manual_seed(stage.train.seed)
        first = [prompts[i] for i in torch.randint(len(prompts), (min(stage.train.batch, 8),), generator=rng).tolist()]
        console.print(f"prompts: {len(prompts)}; a batch: {first}", markup=False)
        for count in stage.method.counts:
            console.print(f"times, {plural(count, 'step')}: {stage.method.times(teacher.schedule, count).tolist()}")
    look_in_dry_run([made.recipe for made in plans], lambda: teacher_of(recipe), teacher, prompts, run)


def print_roles(roles: Roles, optimizer: OptimizerName) -> None:
    """What each role trains, of how many weights, and bytes, counted by storage."""
    held = {id(t): t for n in roles.networks.values() for t in (*n.parameters(), *n.buffers())}
    for p in (p for r in roles.trained.values() for p in r.values() if roles.config.share):
        held.pop(id(p), None)
    how = "three networks" if not roles.config.share else f"one shared network, {roles.config.base or 'as it is'}"
    console.print(f"network weights in memory: {storage_bytes(*held.values()) / 2**20:.1f} MiB ({how})")
    if note := large_rank(roles.networks["teacher"], roles.config):
        console.print(f"note: {note.removeprefix('LORA ')}")
    weights = weight_count(roles.networks["teacher"])
    for role, parameters in roles.trained.items():
        count, size = sum(p.numel() for p in parameters.values()), storage_bytes(*parameters.values())
        state = state_bytes(parameters.values(), optimizer)
        console.print(
            f"  {role}: trains {count / 1e6:.2f} M of {weights / 1e6:.1f} M weights, {100 * count / weights:.1f} %, in {len(parameters)} tensors, "
            f"{size / 2**20:.1f} MiB, {optimizer} state {state / 2**20:.1f} MiB"
        )
