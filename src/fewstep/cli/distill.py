"""`fewstep distill`: from a recipe to a student and a report."""

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
from ..backbones.encoders import others, put
from ..backbones.load import at_size, fused, quiet
from ..backbones.meta import require_loadable
from ..backbones.unconditional import PixelModel
from ..core import timegrid
from ..data.captioned import require_there
from ..data.prompts import Embeddings, Split, embed, embedding_bytes
from ..data.trajectories import Trajectories, TrajectoryConfig
from ..evaluation.scorer import NO_EXTRA
from ..findings import require
from ..processes import (
    any_rank,
    barrier,
    context_mesh,
    distributed_errors,
    in_turn,
    is_first,
    mesh_of,
    require_replicas,
    require_same,
    this_process,
)
from ..reading import read_json
from ..report.run import BEST, BEST_FILE, REPORT, SHAPE
from ..report.words import finite, plural
from ..roles.quantized import quantize, weight_count
from ..roles.roles import Roles, large_rank
from ..runs.encoder_record import known_encoders
from ..runs.foreign import is_foreign, require_initial
from ..runs.init import check_conditioning, inherited_head, require_same_lora, roles_for
from ..runs.metrics_log import MetricsLog
from ..runs.place import place_checks
from ..runs.prepare import EMBEDDINGS, ImageSource, RunSpec, prepare, require_exportable
from ..runs.preview import Drawing, Preview
from ..runs.recipe import DataConfig, DistillRecipe, first_stage, read_recipe, recorded
from ..runs.record import versions
from ..runs.watch import Trend
from ..student.folder import card_time, find_folder, read_card, require_folder
from ..training.ledger import storage_bytes
from ..training.loop import Step, default_device, distill, require_images, require_trajectories, restore
from ..training.optimizer import OptimizerName, state_bytes
from ..training.optimizer import require as require_optimizer
from ..training.precision import dtype_of_blocks, fix_workspace
from ..training.state import checkpoints, latest_checkpoint
from ..training.trackers import Trackers, require_trackers
from .before import look_before, look_in_dry_run
from .best import Best, measured_by, stalled
from .evaluate import EVALUATION, Measures, check_measures, measure_step, split_prompts
from .extra import ending, preview_metrics
from .finish import errors_along, finish, shape_seen, write_best
from .loading import hashed, loaded
from .options import in_options
from .plan import plan_values, plans_of, show
from .preflight import held, note_guidance, note_shadowed
from .progress import OnScreen, console, count_in, meter, put_result, working
from .prompts import say_of_prompts, training_prompts
from .run_record import command_line, run_record
from .signals import stop_request


def run_distill(
    source: str,
    overrides: list[str],
    out: Path | None,
    dry_run: bool,
    styles: list[str],
    given: Mapping[str, str] = MappingProxyType({}),
    log_to: Sequence[str] = (),
) -> None:
    """Train, preview, export, evaluate and write the report.

    Every part is skipped where the result is there already. `styles` are LoRAs fused into the teacher.
    `given` are settings that have command-line options of their own. `log_to` names trackers.
    """
    quiet()
    require_trackers(log_to)
    recipe = read_recipe(source, overrides, DistillRecipe, given)
    recipe = recipe.model_copy(update={"teacher": fused(recipe.teacher, styles)})
    check_measures(recipe)
    run = out or Path("runs") / recipe.name
    require(place_checks(run), "--out")
    fix_workspace(any(part.train.deterministic for part in (recipe, recipe.warm_start) if part is not None))
    note_shadowed(recipe.teacher)
    note_guidance(recipe.method.guidance.scale)
    if recipe.warm_start is not None and recipe.init_from is not None:
        raise ValueError("init_from: the recipe has a warm_start, whose student is continued; leave one of the two out")
    if dry_run:
        print_dry_run(recipe, run)
        return
    own = {} if recipe.warm_start is None else {"warm_start.train": recipe.warm_start.train}
    for option, train in {"train": recipe.train, **own}.items():
        train.on(this_process().num_processes, option)
        require_replicas(train.replicas, option)
    require_same(
        {"recipe": recorded(recipe), "versions": {k: v for k, v in versions().items() if k in ("fewstep", "torch")}}
    )
    with held(run):
        run_stages(recipe, run, source, [*overrides, *(f"{key}={text}" for key, text in given.items())], log_to)
    if is_first():
        files = {"student": run / "final", "report": run / REPORT}
        put_result({"run": run.resolve(), "stopped": False, **{k: path.resolve() for k, path in files.items()}})


def run_stages(recipe: DistillRecipe, run: Path, source: str, overrides: list[str], log_to: Sequence[str] = ()) -> None:
    """Train the stages of a recipe in a locked folder.

    The folder `run` belongs to this run alone. A finished warm start is not trained again.
    """
    stages = [recipe] if recipe.warm_start is None else [first_stage(recipe), second_stage(recipe, run / WARM_START)]
    for stage in stages:
        require_optimizer(stage.train.optimizer)
    teacher, base_hash = teacher_of(recipe, run, together=True)
    check_measures(recipe, teacher)
    check_initial(recipe, teacher)
    console.quiet = not is_first()
    split = training_split(recipe, teacher)
    prompts = list(split.trained)
    begun = checkpoints(run) or checkpoints(run / WARM_START)
    barrier()  # no process writes before all have looked
    if not begun:
        look_before(stages, teacher, base_hash, prompts, run, run)
    asked = Measures(split, preview_metrics(recipe.preview.metrics) if is_first() else NO_EXTRA)
    with ending(asked.extra):
        for stage in stages[:-1]:
            console.print(f"warm start: {stage.method.name}, {stage.train.iterations} iterations")
            done = finished(run / WARM_START, stage)
            barrier()
            if not done:
                run_stage(stage, teacher, base_hash, asked, run / WARM_START, source, overrides, run, log_to)
                barrier()
                teacher = teacher_of(recipe, run, together=True)[0] if sharded(stage) else teacher
        run_stage(stages[-1], teacher, base_hash, asked, run, source, overrides, run, log_to)


def teacher_of(recipe: DistillRecipe, run: Path, together: bool = False) -> tuple[Backbone, str]:
    """Load the recipe's teacher and hash the weights.

    The hash is that of the weights before quantization. The encoders stay on the CPU; those that made the
    embeddings of `run` are loaded when they are called. The device never holds more than the quantized weights.
    `together` says that all processes load the teacher.
    """

    def load() -> tuple[Backbone, str]:
        teacher = loaded(
            recipe.teacher, getattr(torch, recipe.dtype), "cpu", recipe.size, known_encoders(run / EMBEDDINGS)
        )
        base_hash = hashed(teacher.module)
        quantize(teacher, recipe.roles.quantize)
        put(others(teacher), default_device())
        return teacher, base_hash

    # On its way to the device a base that takes several devices fills a machine's memory once, not once for each.
    return in_turn(load) if together and sharded(recipe) else load()


def sharded(recipe: DistillRecipe) -> bool:
    """Return whether the recipe's weights are sharded over processes."""
    return recipe.train.shard and this_process().num_processes > 1


def second_stage(recipe: DistillRecipe, first: Path) -> DistillRecipe:
    """Return the recipe of the stage that continues the warm start.

    The student is initialized from the folder `first`. Where `data.from_student` is `warm_start`, the
    trajectories come from the student in `first`, too.
    """
    data = recipe.data
    if data is not None and data.from_student == WARM_START:
        data = data.model_copy(update={"from_student": str(first)})
    return recipe.model_copy(update={"init_from": str(first), "data": data})


def spent_before(recipe: DistillRecipe, run: Path, paths: Trajectories | None) -> float:
    """Sum the seconds spent on a first stage and on trajectories.

    The seconds are part of a student's cost. Trajectories that both stages share are counted once.
    """
    walked = 0.0 if paths is None else paths.seconds
    if recipe.warm_start is None:
        return walked
    first, own = recipe.warm_start.data, recipe.data
    shared = first is not None and own is not None and first.model_copy(update={"real": own.real}) == own
    return read_card(run / WARM_START / "final").train_seconds + (0.0 if shared else walked)


def finished(run: Path, recipe: DistillRecipe) -> bool:
    """Return whether a stage has nothing left to do.

    A finished stage has the same recipe, a checkpoint and a student of the last iteration, and a report that
    is newer than the student.
    """
    found, record, report = latest_checkpoint(run, whole=False), run / "run.json", run / REPORT
    final = find_folder(run)
    if found is None or not record.exists() or final is None or not report.exists():
        return False
    same = read_json(record, "put its copy back, or choose another --out to begin again").get("recipe") == recorded(
        recipe
    )
    step, card = int(found[1]["step"]), read_card(final)
    reached = step if recipe.preview.final == "best" else min(step, card.iterations)
    trained = reached >= recipe.train.iterations or stalled(run, recipe)
    return same and trained and report.stat().st_mtime_ns >= card_time(final)


def run_stage(
    recipe: DistillRecipe,
    teacher: Backbone,
    base_hash: str,
    asked: Measures,
    run: Path,
    source: str,
    overrides: list[str],
    place: Path,
    log_to: Sequence[str] = (),
) -> None:
    """Train one stage and write all files of a run.

    The folder `place` holds what all stages share: embeddings and trajectories.
    """
    teacher = at_size(teacher, recipe.size)
    require_exportable(teacher, recipe.method)
    check_initial(recipe, teacher)
    prompts = list(asked.split.trained)
    spec, first = spec_of(recipe, prompts), is_first()
    if first:
        run.mkdir(parents=True, exist_ok=True)
        write_json(run / "run.json", run_record(recipe, base_hash, source, overrides))
    shown: list[Embeddings] = []

    def embed_previews(identity: str) -> None:
        wanted = recipe.preview.prompts or (prompts * 8)[:8]
        shown.append(embed(teacher, wanted, place / EMBEDDINGS, identity))

    ready = prepare(teacher, spec, run, place, OnScreen(), embed_previews)
    roles, paths, data = ready.roles, ready.trajectories, ready.data
    print_roles(roles, recipe.train.optimizer)
    shape = {} if paths is None or not first else shape_seen(roles, paths)
    if shape:
        shape |= {"sampled_from": recipe.data and recipe.data.from_student}
        # Without the student's errors yet: a run that is stopped has a report, too.
        write_json(run / SHAPE, shape)
    if sharded(recipe):
        barrier()  # the first process may have prepared for long
        if (context := recipe.train.context) > 1:
            roles.share_tokens(context_mesh(context), default_device())
        mesh, dtype = mesh_of(recipe.train.replicas), dtype_of_blocks(recipe.train.precision)
        roles.shard(mesh, default_device(), dtype, from_first=True)
    found = latest_checkpoint(run, whole=False)
    barrier()  # no process writes before all have looked
    start = 0 if found is None else int(found[1]["step"])
    title = run.resolve().name if run == place else f"{place.resolve().name}, warm start"
    trackers = Trackers(log_to if first else (), run, title, recorded(recipe), start, say)
    log = MetricsLog(run / "metrics.jsonl" if first else None, start, trackers.log)
    if start:
        console.print(f"resuming {run} at iteration {start} of {recipe.train.iterations}")
    else:
        log.seconds = spent_before(recipe, run, paths)
        (run / BEST / BEST_FILE).unlink(missing_ok=True)  # left by another training
    with distributed_errors():
        # Networks whose weights are sharded sample in all processes or in none.
        preview: Preview | None = None
        if first or sharded(recipe):
            with working("drawing the previews of the teacher"):
                preview = Preview(drawing_of(recipe), teacher, shown[0], run if first else None)
        keep = (
            partial(write_best, run, recipe, roles, base_hash, preview)
            if first and recipe.preview.keep_best and not sharded(recipe)
            else None
        )

        def resumed(step: Step) -> None:
            complete(recipe, step, preview, log, asked, keep)

        steps = distill(roles, recipe.method, data, recipe.train, run, ready.images, paths, resumed)
        try:
            stopped = training(recipe, roles, steps, preview, log, asked, keep)
        finally:
            trackers.finish()
    if stopped:
        console.print(f"stopped after iteration {log.iteration}; the same command resumes:\n  {command_line()}")
        put_result({"run": run.resolve(), "stopped": True, "iteration": log.iteration})
        sys.exit(130)
    if not first:
        return
    if sharded(recipe):
        teacher = at_size(teacher_of(recipe, run)[0], recipe.size)
        roles = roles_for(teacher, recipe.method, recipe.roles, recipe.train.seed, paths, initial_folder(recipe))
        restore(roles, run)
        preview = Preview(drawing_of(recipe), teacher, shown[0], run)
    if paths is not None:
        write_json(run / SHAPE, shape | {"errors": errors_along(recipe.method, roles, paths)})
    assert preview is not None
    finish(recipe, roles, preview, run, base_hash, log.iteration, log.seconds, asked.split)


def say(line: str) -> None:
    """Print one line."""
    console.print(line, markup=False)


def spec_of(recipe: DistillRecipe, prompts: list[str]) -> RunSpec:
    """Return what one stage of a recipe trains."""
    data, images, trajectories = recipe.data, None, None
    seed = recipe.train.seed if data is None or data.seed is None else data.seed
    if data is not None and data.source == "trajectories":
        student = initial_student(data)
        trajectories = TrajectoryConfig(
            count=data.count,
            steps=data.steps,
            solver=data.solver,
            guidance=data.guidance,
            seed=seed,
            student=None if student is None else str(student),
            folder=data.folder,
        )
    elif data is not None:
        images = ImageSource(data.source, data.count, data.steps, seed)
    require_trajectories(recipe.method, trajectories is not None)
    return RunSpec(recipe.method, recipe.train, recipe.roles, prompts, images, trajectories, initial_folder(recipe))


Keep = Callable[[Best, float], list[str]]  # (a preview's quality, seconds so far) -> warnings


def drawing_of(recipe: DistillRecipe) -> Drawing:
    """Return what the previews of a recipe's run sample."""
    return Drawing(
        recipe.method,
        recipe.train.batch,
        recipe.preview.teacher_steps,
        recipe.preview.seed,
        recipe.train.precision,
    )


def training(
    recipe: DistillRecipe,
    roles: Roles,
    steps: Generator[Step, None, None],
    preview: Preview | None,
    log: MetricsLog,
    asked: Measures,
    keep: Keep | None = None,
) -> bool:
    """Run the training, with previews, log and measurements.

    Returns whether the training was stopped before the end. Without `preview` nothing is shown or measured.
    """
    start, last, trend = log.iteration, recipe.train.iterations, Trend()
    if not start and preview is not None:
        with working("drawing the first preview"):
            judge(recipe, Step(0, {}, 0.0, roles, recipe.method), preview, log, asked)
    with stop_request() as request, meter(recipe.name, last, start) as bar, closing(steps):
        if start and log.path is not None and stalled(log.path.parent, recipe):
            restore(roles, log.path.parent)  # it has ended early, and is not trained on
            return False
        for step in steps:
            if step.iteration <= start:  # a finished run yields the last step again
                break
            log.add(step)
            bar.advance(step.iteration, {k: v for k, v in step.metrics.items() if k.endswith("_loss")})
            if grown := trend.add(step.metrics):
                console.print("\n".join(f"iteration {step.iteration}: {w}" for w in grown))
                log.note(step.iteration, {"warnings": grown})
            look_at(recipe, step, preview, log, asked, keep)
            waited = recipe.preview.patience is not None and due(recipe, step.iteration)
            if waited and any_rank(log.path is not None and stalled(log.path.parent, recipe)):
                console.print(
                    f"iteration {step.iteration}: {recipe.preview.patience} previews in a row are no better than one "
                    "before; the training ends here (preview.patience)"
                )
                break
            if any_rank(request.asked) and step.iteration < last:
                return True
    return False


def due(recipe: DistillRecipe, iteration: int) -> bool:
    """Return whether there is a preview after this iteration."""
    return iteration % recipe.preview.every == 0 or iteration == recipe.train.iterations


def look_at(
    recipe: DistillRecipe,
    step: Step,
    preview: Preview | None,
    log: MetricsLog,
    asked: Measures,
    keep: Keep | None = None,
) -> None:
    """Show and measure the student where a preview is due."""
    if preview is not None and due(recipe, step.iteration):
        judge(recipe, step, preview, log, asked, keep)


def judge(
    recipe: DistillRecipe,
    step: Step,
    preview: Preview,
    log: MetricsLog,
    asked: Measures,
    keep: Keep | None = None,
) -> None:
    """Make one preview, measure the student and keep the best.

    The preview's warnings are printed. What the log already has of this iteration is not measured, logged or
    printed again.
    """
    seen = preview.show(step.roles, step.iteration, recipe.method)
    values = {"distance": seen.distance, **{f"distance_{k}": d for k, d in seen.distances.items()}}
    if "preview" not in log.known:
        log.note(step.iteration, {"preview": {k: v if finite(v) else None for k, v in values.items()}})
    quality = log.known.get("quality", {}) if is_first() else {}
    if any_rank(not quality and is_first()) if sharded(recipe) else not quality and is_first():
        quality = measure(recipe, step, log, asked)
    measured = measured_by(recipe, quality)
    value = seen.distance if recipe.preview.protocol is None else quality.get(measured.removeprefix("quality."))
    kept = keep(Best(step.iteration, value if finite(value) else math.nan, measured), log.seconds) if keep else []
    # After the last iteration `missed` says what the best student was.
    said = [*seen.warnings, *(kept if step.iteration < recipe.train.iterations else [])]
    if said and "warnings" not in log.known:
        console.print("\n".join(f"iteration {step.iteration}: {w}" for w in said))
        log.note(step.iteration, {"warnings": said})


def complete(
    recipe: DistillRecipe,
    step: Step,
    preview: Preview | None,
    log: MetricsLog,
    asked: Measures,
    keep: Keep | None = None,
) -> None:
    """Redo what a kill after this step's checkpoint took.

    The step's line in the log, the preview and the point of the quality curves are made where missing.
    """
    if "seconds" not in log.known and step.metrics:
        log.add(step)
    look_at(recipe, step, preview, log, asked, keep)
    log.known = {}


def initial_student(data: DataConfig | None) -> Path | None:
    """Return the folder of the student that generates the trajectories.

    Raises ValueError if there is none.
    """
    return None if data is None or data.from_student is None else require_folder(data.from_student, "data.from_student")


def initial_folder(recipe: DistillRecipe) -> Path | None:
    """Return the folder of the student to initialize from.

    Raises ValueError if there is none.
    """
    return None if recipe.init_from is None else require_initial(recipe.init_from)


def check_initial(recipe: DistillRecipe, teacher: Backbone) -> None:
    """Check that the students named in a recipe exist and fit.

    The students are those of `init_from`, `data.from_student` and the warm start. The previews' steps and
    prompts are checked, too. Raises ValueError.
    """
    for stage in [recipe] if recipe.warm_start is None else [first_stage(recipe), recipe]:
        given = None if stage.data is None else stage.data.source
        require_trajectories(stage.method, given == "trajectories")
        of = None if given == "trajectories" else given
        require_images(stage.method, of is not None)
        if of not in (None, "teacher"):
            require_there(of)
    if (folder := initial_folder(recipe)) is not None:
        inherited_head(recipe.method, teacher, folder)
        if not is_foreign(folder):
            require_same_lora(teacher, folder, recipe.roles, max(recipe.method.counts))
    require_preview_steps(recipe, teacher)
    if isinstance(teacher, PixelModel) and recipe.preview.prompts:
        with in_options({"prompts": "preview.prompts"}):
            teacher.encode(recipe.preview.prompts)
    roles, layer = recipe.roles, teacher.time_layer
    if (own := recipe.warm_start) is not None and (roles.rank or not roles.lora):  # a head alone is not conditioned
        bare = not roles.lora or any(skipped in layer for skipped in roles.exclude)
        check_conditioning(
            "the warm start's student",
            own.method.condition_values,
            recipe.method.condition_values,
            "" if bare else layer,
        )
    if recipe.warm_start is not None:
        initial_student(recipe.warm_start.data)
    # The warm start's student does not exist yet.
    if recipe.warm_start is None or recipe.data is None or recipe.data.from_student != WARM_START:
        initial_student(recipe.data)


def require_preview_steps(recipe: DistillRecipe, teacher: Backbone) -> None:
    """Check that the teacher can take the previews' steps.

    Raises ValueError before anything is generated or trained.
    """
    try:
        timegrid.uniform(teacher.schedule, recipe.preview.teacher_steps)
    except ValueError as error:
        raise ValueError(f"preview.teacher_steps: {str(error).removeprefix('steps: ')}") from error


WARM_START = "warm_start"  # the folder of the first stage inside a run


def training_split(recipe: DistillRecipe, teacher: Backbone) -> Split:
    """Return the recipe's prompts: those of the training, and those kept out.

    Prints what encoders cut, and how many are kept out.
    """
    split = split_prompts(teacher, training_prompts(recipe, teacher), recipe.prompts.held_out)
    say_of_prompts(teacher, split.trained)
    if split.held_out:
        console.print(
            f"prompts: {len(split.trained):,} to train on, {len(split.held_out)} kept out to evaluate with "
            "(prompts.held_out)",
            markup=False,
        )
    return split


def measure(recipe: DistillRecipe, step: Step, log: MetricsLog, asked: Measures) -> Mapping[str, Any]:
    """Measure a point of the quality curves.

    Returns an empty mapping where the recipe asks for no curves.
    """
    if recipe.preview.protocol is None:
        return {}
    cache = None if log.path is None or sharded(recipe) else log.path.parent / EVALUATION
    if quality := measure_step(step, recipe.preview.protocol, recipe.real, asked, cache):
        log.note(step.iteration, {"quality": quality})
    return quality


def print_dry_run(recipe: DistillRecipe, run: Path) -> None:
    """Print what `--dry-run` shows, and leave no files.

    Prints each stage's settings, memory, first batch and times, then the checks before a training.
    """
    initial_folder(recipe)
    require_loadable(recipe.teacher)
    with working("counting its memory"):
        plans = plans_of(recipe)
    teacher = plans[0].hollow.teacher
    put_result({"run": run, "plans": [plan_values(made) for made in plans]})
    check_initial(recipe, teacher)
    check_measures(recipe, teacher)
    prompts = list(training_split(recipe, teacher).trained)
    say_of_prompts(teacher, prompts)
    needed = embedding_bytes(at_size(teacher, recipe.size), prompts)
    console.print(f"embeddings of {len(prompts):,} prompts, at most: {count_in(needed, run)}", markup=False)
    for made in plans:
        stage = made.recipe
        console.print(yaml.safe_dump(recorded(stage), sort_keys=False), markup=False)
        show(made)
        rng = torch.Generator().manual_seed(stage.train.seed)
        first = [prompts[i] for i in torch.randint(len(prompts), (min(stage.train.batch, 8),), generator=rng).tolist()]
        console.print(f"prompts: {len(prompts)}; a batch: {first}", markup=False)
        for count in stage.method.counts:
            console.print(f"times, {plural(count, 'step')}: {stage.method.times(teacher.schedule, count).tolist()}")
    look_in_dry_run([made.recipe for made in plans], lambda: teacher_of(recipe, run), teacher, prompts, run)


def print_roles(roles: Roles, optimizer: OptimizerName) -> None:
    """Print what each role trains, in weights and bytes.

    Bytes are counted by storage, so that shared weights count once.
    """
    held = {id(t): t for n in roles.networks.values() for t in (*n.parameters(), *n.buffers())}
    for p in (p for r in roles.trained.values() for p in r.values() if roles.config.lora):
        held.pop(id(p), None)
    how = (
        f"one shared network, {roles.config.quantize or 'as it is'}"
        if roles.config.lora
        else "three networks"
        if len(roles.networks) == 3
        else f"{len(roles.networks)} networks"
    )
    console.print(f"network weights in memory: {storage_bytes(*held.values()) / 2**20:.1f} MiB ({how})")
    if note := large_rank(roles.networks["teacher"], roles.config):
        console.print(f"note: {note.removeprefix('LORA ')}")
    weights = weight_count(roles.networks["teacher"])
    for role, parameters in roles.trained.items():
        count, size = sum(p.numel() for p in parameters.values()), storage_bytes(*parameters.values())
        state = state_bytes(parameters.values(), optimizer)
        console.print(
            f"  {role}: trains {count / 1e6:.2f} M of {weights / 1e6:.1f} M weights, {100 * count / weights:.1f} %, "
            f"in {len(parameters)} tensors, {size / 2**20:.1f} MiB, {optimizer} state {state / 2**20:.1f} MiB"
        )
