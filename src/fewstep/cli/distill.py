"""`fewstep distill`: from a recipe to a student, its pictures, its numbers and its report."""

import json
import platform
import shlex
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from .. import __version__
from ..api import load_teacher, path_times, roles_for
from ..atomic import write_json
from ..backbones.base import Backbone, guided
from ..backbones.base import rows as rows_of
from ..backbones.generate import device_of, pictures, trajectory
from ..backbones.load import BUNDLED, bundled, fingerprint, quiet
from ..core import timegrid
from ..core.solvers import DDIM, State, sample, solver_named
from ..export.card import StudentCard, read_card
from ..export.final import write_final
from ..methods.method import Method, student_of
from ..report.grids import write_grid
from ..report.pictures import Pictures, StepGrid, Trajectory, save_pictures
from ..report.run import PICTURES, SHAPE, render_run
from ..roles.roles import Roles
from ..roles.step_condition import folded_bias
from ..training.loop import Step, default_device, distill
from ..training.monitor import drift, look
from ..training.paths import TRAJECTORIES, Paths, PathsConfig, teacher_paths, to_end
from ..training.pictures import RealData, encode_pictures
from ..training.pool import teacher_pictures
from ..training.prompts import Embeddings, embed, read_prompts
from ..training.state import latest_checkpoint
from ..trajp.analysis import shape_of, strays
from ..trajp.head import Head, kind_of
from .evaluate import check_protocols, evaluate_student, measure_step
from .progress import console, meter
from .recipe import DistillRecipe, read_recipe
from .sample import student_folder
from .signals import stop_request


def run_distill(source: str, overrides: list[str], out: Path | None, dry_run: bool) -> None:
    """Train, preview, export, evaluate, report; every part is skipped where its result is there already."""
    quiet()
    recipe = read_recipe(source, overrides, DistillRecipe)
    check_protocols(recipe.evaluate, recipe.preview.measure)
    run = out or Path("runs") / recipe.name
    if recipe.first is not None and recipe.start is not None:
        raise ValueError("start: the recipe has a first stage, which is what its student begins as; leave one of the two out")
    teacher = load_teacher(recipe.teacher, device=default_device())
    prompts = training_prompts(recipe, teacher)
    stages = [recipe] if recipe.first is None else [first_stage(recipe), recipe.model_copy(update={"start": str(run / FIRST)})]
    if dry_run:
        for stage in stages:
            print_plan(stage if recipe.first is None else stage.model_copy(update={"start": None}), teacher, prompts)
        return
    for stage in stages[:-1]:
        console.print(f"first: {stage.method.name}, {stage.train.iterations} iterations")
        if not finished(run / FIRST, stage):
            distil(stage, teacher, prompts, run / FIRST, source, overrides)
    distil(stages[-1], teacher, prompts, run, source, overrides)


def spent_before(recipe: DistillRecipe, run: Path, paths: Paths | None) -> float:
    """Seconds that went into a first stage and into trajectories: they are part of what a student costs."""
    stage = read_card(run / FIRST / "final").train_seconds if recipe.first is not None else 0.0
    return stage + (0.0 if paths is None else paths.seconds)


def first_stage(recipe: DistillRecipe) -> DistillRecipe:
    """The recipe of the training that comes first. It is measured with the whole."""
    assert recipe.first is not None
    preview = recipe.preview.model_copy(update={"measure": None})
    own = {"method": recipe.first.method, "train": recipe.first.train, "data": recipe.first.data}
    return recipe.model_copy(update={**own, "name": f"{recipe.name}, first", "first": None, "evaluate": None, "preview": preview})


def finished(run: Path, recipe: DistillRecipe) -> bool:
    """Whether a stage has nothing left to do."""
    found, record = latest_checkpoint(run), run / "run.json"
    if found is None or not record.exists() or student_folder(str(run)) is None:
        return False
    same = json.loads(record.read_text())["recipe"] == json.loads(recipe.model_dump_json())
    return same and int(found[1]["step"]) >= recipe.train.iterations


def distil(recipe: DistillRecipe, teacher: Backbone, prompts: list[str], run: Path, source: str, overrides: list[str]) -> None:
    """One training with all that a run leaves."""
    run.mkdir(parents=True, exist_ok=True)
    base_hash = fingerprint(teacher.module)
    write_json(run / "run.json", run_record(recipe, base_hash, source, overrides))
    identity = fingerprint(teacher.module, *teacher.encoders)
    data = embed(teacher, prompts, run / "embeddings", identity)
    real = real_data(recipe, teacher, data, run / "embeddings", identity)
    paths = trajectories(recipe, teacher, data, run, identity)
    preview = Preview(recipe, teacher, run)
    roles = roles_of(recipe, teacher, paths)
    print_roles(roles)
    found = latest_checkpoint(run)
    start = 0 if found is None else int(found[1]["step"])
    log = MetricsLog(run / "metrics.jsonl", start)
    if start:
        console.print(f"resuming {run} at iteration {start} of {recipe.train.iterations}")
    else:
        log.seconds = spent_before(recipe, run, paths)
        preview.show(roles, 0, recipe.method)
        measure(recipe, Step(0, {}, 0.0, roles, recipe.method), log)
    stopped = False
    with stop_request() as request, meter(recipe.name, recipe.train.iterations, start) as bar:
        for step in distill(roles, recipe.method, data, recipe.train, run, real, paths):
            log.add(step)
            bar.advance(step.iteration, {k: v for k, v in step.metrics.items() if k.endswith("_loss")})
            due = step.iteration % recipe.preview.every == 0 or step.iteration == recipe.train.iterations
            if due and (warnings := preview.show(roles, step.iteration, recipe.method)):
                console.print("\n".join(f"iteration {step.iteration}: {w}" for w in warnings))
                log.note(step.iteration, {"warnings": warnings})
            if due:
                measure(recipe, step, log)
            if request.asked and step.iteration < recipe.train.iterations:
                stopped = True
                break
    if stopped:
        console.print(f"stopped after iteration {log.iteration}; the same command resumes:\n  {command_line()}")
        sys.exit(130)
    if paths is not None:
        curve = roles.head.facts.curve if isinstance(roles.head, Head) else None
        shape = shape_of(teacher.schedule, paths.whole, paths.grid, curve)
        write_json(run / SHAPE, shape | {"errors": errors_along(recipe.method, roles, paths)})
    finish(recipe, roles, preview, run, base_hash, log.seconds)


def real_data(recipe: DistillRecipe, teacher: Backbone, prompts: Embeddings, cache: Path, identity: str) -> RealData | None:
    """The pictures that the recipe's method starts from, if it does."""
    data = recipe.data
    if data is None or data.source == "trajectories":
        return None
    if data.source == "teacher":
        return teacher_pictures(teacher, prompts, data.count, data.steps, recipe.method.guidance, cache, recipe.train.seed)
    return encode_pictures(teacher, data.source, cache, identity)


def trajectories(recipe: DistillRecipe, teacher: Backbone, prompts: Embeddings, run: Path, identity: str) -> Paths | None:
    """The teacher's, if the recipe asks for them; walked with a progress bar, what is there already left out."""
    data = recipe.data
    if data is None or data.source != "trajectories":
        return None
    config = PathsConfig(data.count, data.steps, data.solver, recipe.train.seed)
    folder = run / TRAJECTORIES if data.folder is None else Path(data.folder)
    times = path_times(recipe.method, teacher)
    with meter("trajectories", config.count) as bar:
        walking = teacher_paths(teacher, prompts, config, times, recipe.method.guidance, folder, identity)
        return to_end(walking, lambda done: bar.advance(done, {}))


def roles_of(recipe: DistillRecipe, teacher: Backbone, paths: Paths | None) -> Roles:
    """The networks that the recipe's method needs, where it says so begun as a finished student."""
    folder = None
    if recipe.start is not None and (folder := student_folder(recipe.start)) is None:
        raise ValueError(f"start: {recipe.start} is no student folder; pass a run or its final/ folder")
    return roles_for(teacher, recipe.method, recipe.roles, recipe.train.seed, paths, folder)


def training_prompts(recipe: DistillRecipe, teacher: Backbone) -> list[str]:
    """The recipe's prompts; `bundled` means those that came with a bundled teacher. A model without conditions has the empty one."""
    if not teacher.encode([""]):
        return [""]
    if recipe.prompts.source != "bundled":
        return read_prompts(recipe.prompts.source, recipe.prompts.column)
    shipped = BUNDLED / recipe.teacher / "prompts.txt"
    if not shipped.is_file():
        raise ValueError(
            f"prompts: teacher {recipe.teacher} brings no prompts of its own; pass --prompts FILE (.txt, .jsonl, .csv, .tsv) or a hub data set id"
        )
    return read_prompts(str(shipped))


FIRST = "first"  # the folder inside a run that holds its first stage


class Preview:
    """The run's fixed pictures: the teacher's row once, the student's row every time."""

    def __init__(self, recipe: DistillRecipe, teacher: Backbone, run: Path) -> None:
        self.recipe, self.teacher, self.folder = recipe, teacher, run / "samples"
        self.prompts = recipe.preview.prompts or (training_prompts(recipe, teacher) * 8)[:8]
        self.seeds = [recipe.preview.seed + i for i in range(len(self.prompts))]
        self.cond, self.null = teacher.encode(self.prompts), teacher.encode([""])
        times = timegrid.uniform(teacher.schedule, recipe.preview.teacher_steps)
        denoise = guided(teacher, teacher.module, self.cond, self.null, recipe.method.guidance)
        self.reference = pictures(teacher, denoise, self.seeds, times)

    def show(self, roles: Roles, iteration: int, method: Method) -> list[str]:
        """Write `samples/step_N.png`; returns the monitor's warnings."""
        with roles.averaged():
            rows = [self._student(roles, method, k)[-1].x for k in method.counts]
        own = [self.teacher.decode(x) for x in rows]
        labels = [f"teacher, {self.recipe.preview.teacher_steps} steps", *(f"student, {k} steps" for k in method.counts)]
        write_grid(self.folder / f"step_{iteration:06d}.png", torch.stack([self.reference, *own]), labels, self.prompts)
        return drift(look(own[0]), look(self.reference)) if iteration else []

    def _student(self, roles: Roles, method: Method, steps: int) -> list[State]:
        times = method.times(self.teacher.schedule, steps)
        return trajectory(self.teacher, student_of(method, roles, self.cond, steps), self.seeds, times, method.solver, roles.head)

    def compare(self, roles: Roles, method: Method) -> Pictures:
        """The report's pictures: teacher guided, then teacher at the student's cost and student for every step count; both trajectories."""
        teacher, guided_steps = self.teacher, self.recipe.preview.teacher_steps
        rows = {f"teacher, {guided_steps} guided steps ({2 * guided_steps} evaluations)": self.reference}
        paths, shown = {}, min(4, len(self.prompts))
        for steps in method.counts:
            times = method.times(teacher.schedule, steps)
            few = trajectory(teacher, guided(teacher, teacher.module, self.cond, self.null, 1.0), self.seeds, times)
            for who, states in (("teacher", few), ("student", self._student(roles, method, steps))):
                name = f"{who}, {steps} step{'s' if steps > 1 else ''}"
                calls = steps - (method.free_first and who == "student")
                rows[f"{name} ({calls} evaluation{'s' if calls != 1 else ''})"] = teacher.decode(states[-1].x)
                if steps == max(method.counts):
                    clean = [teacher.decode(s.x0[:shown]) for s in states[1:] if s.x0 is not None]
                    paths[name] = Trajectory(times[:-1].tolist(), torch.stack(clean, 1))
        return Pictures(self.prompts, rows, paths, self._step_grid(roles, method, shown) if roles.counts else None)

    def _step_grid(self, roles: Roles, method: Method, shown: int) -> StepGrid:
        """A student of several step counts, told each and taking each."""
        counts, cond = sorted(method.counts), rows_of(self.cond, slice(shown))

        def draw(told: int, taken: int) -> Tensor:
            times = method.times(self.teacher.schedule, taken)
            return pictures(self.teacher, student_of(method, roles, cond, told), self.seeds[:shown], times, method.solver, roles.head)

        images = torch.stack([torch.stack([draw(told, taken) for taken in counts], 1) for told in counts], 1)
        return StepGrid(counts, counts, images)


def measure(recipe: DistillRecipe, step: Step, log: "MetricsLog") -> None:
    """A point of the quality curves, where the recipe asks for them."""
    if recipe.preview.measure is not None:
        log.note(step.iteration, {"quality": measure_step(step, recipe.preview.measure)})


class MetricsLog:
    """`metrics.jsonl`: one line an iteration. On resuming, lines after the checkpoint are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        self.path, self.iteration, self.seconds = path, start, 0.0
        kept = [r for r in _records(path) if r["iteration"] <= start]
        self.seconds = max((r.get("seconds", 0.0) for r in kept), default=0.0)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(r) + "\n" for r in kept))
        temporary.replace(path)

    def add(self, step: Step) -> None:
        self.iteration, self.seconds = step.iteration, self.seconds + step.seconds
        self.note(step.iteration, {"seconds": round(self.seconds, 4), **step.metrics})

    def note(self, iteration: int, values: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"iteration": iteration, **values}) + "\n")


def _records(path: Path) -> list[dict[str, Any]]:
    """Readable lines; a last line cut off by a kill is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def finish(recipe: DistillRecipe, roles: Roles, preview: "Preview", run: Path, base_hash: str, seconds: float) -> None:
    """Export the averaged student, measure it, write the report, and say what to do next."""
    method, schedule = recipe.method, roles.backbone.schedule
    called = method.name if recipe.first is None else f"{recipe.first.method.name}-{method.name}"
    counts, default = method.counts, method.counts[0]
    grids = {k: method.times(schedule, k) for k in counts}
    weights = "full" if not recipe.roles.share else "lora" if recipe.roles.rank else "none"
    rank = recipe.roles.rank if weights == "lora" else None
    card = StudentCard(
        name=f"{Path(recipe.teacher).name}-{called}-{'-'.join(map(str, sorted(counts)))}step", method=called, base=recipe.teacher, base_hash=base_hash,
        steps=counts, timesteps={str(k): times.tolist() for k, times in grids.items()}, solver={str(k): method.solver for k in counts},
        prediction=str(roles.backbone.scheduler_config.get("prediction_type", "")), weights=weights, head="" if roles.head is None else kind_of(roles.head), free_first=method.free_first,
        rank=rank, alpha=None if rank is None else float(recipe.roles.alpha or rank), teacher_guidance=method.guidance, licence="apache-2.0" if recipe.teacher in bundled() else "other",
        iterations=recipe.train.iterations, train_seconds=seconds, hardware=hardware(), version=__version__,
        data=_trained_from(recipe), time_layer=roles.backbone.time_layer if roles.counts else "",
    )  # fmt: skip
    with roles.averaged():
        write_student(run / "final", card, roles, grids[default][:-1])
        save_pictures(run / PICTURES, preview.compare(roles, method))
    result = evaluate_student(run / "final", recipe.evaluate, run / "evaluation") if recipe.evaluate else None
    report = render_run(run)
    print_ending(run, report, result, seconds)


def _trained_from(recipe: DistillRecipe) -> str:
    """What a model card says about the data."""
    if recipe.data is None or recipe.data.source == "trajectories":
        return "prompts alone"
    return "prompts and pictures that the teacher drew" if recipe.data.source == "teacher" else "captioned pictures"


def errors_along(method: Method, roles: Roles, paths: Paths, count: int = 16) -> dict[str, Any]:
    """How the teacher's own few steps and the student stray from the teacher's trajectories, for every step count."""
    teacher, goals, walks = roles.backbone, paths.states[:count], {}
    device = device_of(teacher.module)
    cond = {k: v[:count].to(device) for k, v in paths.embeddings.cond.items()}
    null = {k: v.to(device) for k, v in paths.embeddings.null.items()}
    with roles.averaged(), torch.no_grad():
        for steps in method.counts:
            times = method.times(teacher.schedule, steps)
            own = {
                f"DDIM, {steps}": (guided(teacher, teacher.module, cond, null, method.guidance), DDIM, None),
                f"student, {steps}": (student_of(method, roles, cond, steps), solver_named(method.solver), roles.head),
            }
            for name, (denoise, solver, correct) in own.items():
                states = [s.x.cpu() for s in sample(denoise, teacher.schedule, goals[:, 0].to(device), times, solver, correct)]
                walks[name] = (times, torch.stack(states, 1))
    return strays(teacher.schedule, goals, paths.times, walks)


def write_student(folder: Path, card: StudentCard, roles: Roles, times: Tensor) -> None:
    """`final/`, whose weights alone are the student of the card's first step count, which visits these `times`."""
    count, network, vectors = card.steps[0], roles.networks["student"], roles.vectors()
    if roles.config.share:
        told, settings = roles.told(count, times), roles.adapter_settings()
        if told:
            settings["target_modules"] = sorted({*settings["target_modules"], card.time_layer})
        write_final(folder, roles.backbone, card, network, roles.student_state() | told, settings, vectors, roles.head)
        return
    with folded_bias(network, card.time_layer, vectors[count]) if vectors else nullcontext():
        write_final(folder, roles.backbone, card, network, None, {}, vectors, roles.head)


def print_ending(run: Path, report: Path, result: dict[str, Any] | None, seconds: float) -> None:
    """Where things are, the three numbers that matter, and the next command."""
    console.print(f"\nstudent  {run / 'final'}\nreport   {report.resolve()}")
    if result is not None:
        rows = result["rows"]
        student, best = max((r for r in rows if r["model"] == "student"), key=lambda r: r["steps"]), rows[0]
        console.print(
            f"quality  FD to real {student['fd_real']:.1f} in {student['nfe']} network calls, teacher {best['fd_real']:.1f} in {best['nfe']}"
        )
        console.print(f"speed    {best['seconds_per_image'] / student['seconds_per_image']:.1f}x faster per picture than the teacher")
    console.print(f"cost     {seconds / 60:.1f} minutes of training on {hardware()}")
    console.print(
        f"\ntry      fewstep sample {run / 'final'} -p 'a prompt' --compare\nyours    fewstep distill emoji-tdm4 --teacher FOLDER_OR_HUB_ID --prompts prompts.txt --out runs/mine"
    )


def print_plan(recipe: DistillRecipe, teacher: Backbone, prompts: list[str]) -> None:
    """What `--dry-run` prints."""
    roles = roles_of(recipe, teacher, None)
    console.print(yaml.safe_dump(json.loads(recipe.model_dump_json()), sort_keys=False), markup=False)
    print_roles(roles)
    rng = torch.Generator().manual_seed(recipe.train.seed)
    first = [prompts[i] for i in torch.randint(len(prompts), (min(recipe.train.batch, 8),), generator=rng).tolist()]
    console.print(f"prompts: {len(prompts)}; a batch: {first}", markup=False)
    for count in recipe.method.counts:
        console.print(f"times, {count} steps: {recipe.method.times(teacher.schedule, count).tolist()}")


def print_roles(roles: Roles) -> None:
    """Trainable parameters and bytes per role, counted by storage."""
    adapters = {p.untyped_storage().data_ptr() for r in roles.trained.values() for p in r.values()} if roles.config.share else set()
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for n in roles.networks.values() for p in n.parameters()}
    size = sum(n for pointer, n in storages.items() if pointer not in adapters)
    console.print(f"network weights in memory: {size / 2**20:.1f} MiB ({'one shared network' if roles.config.share else 'three networks'})")
    for role, parameters in roles.trained.items():
        count = sum(p.numel() for p in parameters.values())
        size = sum(p.numel() * p.element_size() for p in parameters.values())
        console.print(
            f"  {role}: {count / 1e6:.2f}M trainable in {len(parameters)} tensors, {size / 2**20:.1f} MiB, AdamW state {2 * size / 2**20:.1f} MiB"
        )


def next_commands(recipe: DistillRecipe) -> list[tuple[str, str]]:
    """What one does with a finished student."""
    prompt = shlex.quote(recipe.preview.prompts[0] if recipe.preview.prompts else "a prompt")
    return [
        ("Draw a prompt of your own, the teacher beside the student", f"fewstep sample runs/{recipe.name} -p {prompt} --compare"),
        ("Measure it under the full protocol", f"fewstep evaluate runs/{recipe.name}"),
        ("Distil a pipeline of your own", "fewstep distill emoji-tdm4 --teacher FOLDER_OR_HUB_ID --prompts prompts.txt --out runs/mine"),
    ]


def run_record(recipe: DistillRecipe, base_hash: str, source: str, overrides: list[str]) -> dict[str, Any]:
    """`run.json`."""
    return {
        "command": command_line(), "recipe_source": source, "overrides": overrides, "recipe": json.loads(recipe.model_dump_json()),
        "base_hash": base_hash, "seed": recipe.train.seed, "hardware": hardware(), "versions": versions(), "next_commands": next_commands(recipe), "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }  # fmt: skip


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"fewstep": __version__, "python": platform.python_version()} | {
        p: version(p) for p in ("torch", "diffusers", "transformers", "peft", "accelerate")
    }


def hardware() -> str:
    """The device's name as a person would say it."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{torch.get_num_threads()} CPU threads"


def command_line() -> str:
    return shlex.join(["fewstep", *sys.argv[1:]])
