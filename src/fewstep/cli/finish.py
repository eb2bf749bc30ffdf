"""What follows a training: student files, evaluation, report."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..backbones.base import guided, nfe_per_step
from ..backbones.generate import device_of
from ..backbones.load import absolute
from ..core.solvers import DDIM, sample, solver_named, total_nfe
from ..data.prompts import Split
from ..data.trajectories import Trajectories
from ..heads.head import Head
from ..methods.method import Method, student_of
from ..report.images import save_images
from ..report.run import BEST, BEST_FILE, IMAGES, best_preview, next_commands, render_run
from ..report.summary import at_equal_cost, called
from ..report.trajectories import shape_of, trajectory_errors
from ..roles.roles import Roles
from ..runs.prepare import data_words
from ..runs.preview import Preview
from ..runs.recipe import DistillRecipe
from ..runs.record import hardware
from ..student.card import counted
from ..student.folder import copy_student
from ..student.student import Origin, Student
from .best import Best, keep_best, missed
from .evaluate import EVALUATION, evaluate_student
from .export import in_other_programs
from .progress import console, working


def finish(
    recipe: DistillRecipe,
    roles: Roles,
    preview: Preview,
    run: Path,
    base_hash: str,
    iterations: int,
    seconds: float,
    split: Split,
) -> None:
    """Export the student, evaluate, and write the report.

    The student is the averaged one of the last of `iterations`, or that of the best preview. Prints where the results
    are and what to do next.
    """
    method, best = recipe.method, best_preview(run)
    chosen = recipe.preview.final == "best" and best and int(best["iteration"]) < iterations
    with roles.averaged():
        student = Student.of(roles, method, origin_of(recipe, base_hash, iterations, seconds))
        if chosen:
            copy_student(run / BEST, run / "final", (BEST_FILE, IMAGES))
            shutil.copyfile(run / BEST / IMAGES, run / IMAGES)
        else:
            with working("writing the student"):
                student.write(run / "final")
            with working("drawing the images of the report"):
                save_images(run / IMAGES, preview.compare(roles, method))
    result = (
        evaluate_student(run / "final", recipe.evaluate, run / EVALUATION, recipe.real, split=split)
        if recipe.evaluate
        else None
    )
    with working("writing the report"):
        report = render_run(run)
    most = recipe.preview.teacher_steps
    teacher = total_nfe(most, nfe_per_step(preview.null, method.guidance))
    cost = f"{counted(student.card)}; the teacher takes {teacher} in {most}"
    print_ending(run, report, result, seconds, cost, next_commands(run, preview.prompts))
    if chosen:
        said = f"iteration {best['iteration']} of {iterations}, {best['measured']} {best['value']:.4g}"
        console.print(f"final    the student of {said}", markup=False)
    elif said := missed(run, iterations):
        console.print(f"best     {said}", markup=False)


def write_best(
    run: Path, recipe: DistillRecipe, roles: Roles, base_hash: str, preview: Preview | None, now: Best, seconds: float
) -> list[str]:
    """Keep the averaged student in `run/best` if better than before.

    Where it may become the run's student, its images for the report are kept, too. Returns the warnings of
    `keep_best`.
    """

    def write(folder: Path) -> None:
        with roles.averaged():
            Student.of(roles, recipe.method, origin_of(recipe, base_hash, now.iteration, seconds)).write(folder)
            if recipe.preview.final == "best" and preview is not None:
                save_images(folder / IMAGES, preview.compare(roles, recipe.method))

    return keep_best(run, now, write, recipe.method.warmup)


def origin_of(recipe: DistillRecipe, base_hash: str, iterations: int, seconds: float) -> Origin:
    """Return how the student of so many iterations came about."""
    called = (
        recipe.method.name if recipe.warm_start is None else f"{recipe.warm_start.method.name}-{recipe.method.name}"
    )
    base, size = absolute(recipe.teacher), recipe.size or 0
    images = None if recipe.data is None or recipe.data.source == "trajectories" else recipe.data.source
    data = data_words(images, recipe.roles)
    return Origin(base, base_hash, iterations, seconds, called, hardware(), data, size, recipe.dtype)


def shape_seen(roles: Roles, paths: Trajectories) -> dict[str, Any]:
    """Return what a report shows of the teacher's trajectories.

    Prints how well the curve fits the trajectories. A head has a curve of its own, which is then used.
    """
    curve = roles.head.facts.curve if isinstance(roles.head, Head) else None
    shape = shape_of(roles.backbone.schedule, paths.whole, paths.grid, curve)
    fits, bends = (
        ", ".join(f"{x:.4f}" for x in shape["r2"]),
        ", ".join(f"{100 * (1 - x):.1f}" for x in shape["unexplained"]),
    )
    console.print(
        f"curve of the trajectories: R² {fits}; 1, 2, 3 directions explain {bends} % of what is off the straight line"
    )
    return shape


def errors_along(method: Method, roles: Roles, paths: Trajectories, count: int = 16) -> dict[str, Any]:
    """Measure how few steps stray from the teacher's trajectories.

    Compares the teacher's own DDIM steps and the student's steps, for every step count, on the first `count`
    trajectories.
    """
    teacher, goals, walks = roles.backbone, paths.states[:count], {}
    device = device_of(teacher.module)
    cond = paths.embeddings.at(slice(count), device)
    null = {k: v.to(device) for k, v in paths.embeddings.null.items()}
    with roles.averaged(), torch.no_grad():
        for steps in method.counts:
            times = method.times(teacher.schedule, steps)
            own = {
                f"DDIM, {steps}": (guided(teacher, teacher.module, cond, null, method.guidance), DDIM, None),
                f"student, {steps}": (student_of(method, roles, cond, steps), solver_named(method.sampler), roles.head),
            }
            for name, (denoise, solver, correct) in own.items():
                states = [
                    s.x.cpu() for s in sample(denoise, teacher.schedule, goals[:, 0].to(device), times, solver, correct)
                ]
                walks[name] = (times, torch.stack(states, 1))
    return trajectory_errors(teacher.schedule, goals, paths.times, walks)


def print_ending(
    run: Path, report: Path, result: dict[str, Any] | None, seconds: float, cost: str, commands: list[tuple[str, str]]
) -> None:
    """Print the run's files, the main numbers and the next commands.

    `cost` says the NFE of an image. Of `commands` the first and the last are printed.
    """
    console.print(f"\nstudent  {run / 'final'}\nreport   {report.resolve()}\ncalls    {cost}")
    if result is not None:
        rows = result["rows"]
        student, best = max((r for r in rows if r["model"] == "student"), key=lambda r: r["steps"]), rows[0]
        console.print(f"quality  {quality_of(student, best, rows)}")
        console.print(
            f"speed    {best['seconds_per_image'] / student['seconds_per_image']:.1f}x "
            "faster per image than the teacher"
        )
    console.print(f"cost     {seconds / 60:.1f} minutes of training on {hardware()}")
    for line in in_other_programs(run / "final", str(run)):
        console.print(line, markup=False, highlight=False)
    console.print(f"\ntry      {commands[0][1]}\nyours    {commands[-1][1]}")


def quality_of(student: Mapping[str, Any], teacher: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] = ()) -> str:
    """Say how far a student is from real images.

    Where nothing was compared with real images, the distance is that to the teacher. `student`, `teacher`
    and `rows` are rows of eval.json. The teacher's distance stands next to the student's; of the teacher's
    `rows` at the student's cost the best is named, too.
    """
    cost, real = f"{student['nfe']} NFE", student["fd_real"] is not None
    key = "fd_real" if real else "fd_teacher"
    same = at_equal_cost(rows, student, key)
    beside = "" if same is None else f", {same[key]:.1f} at the student's cost ({called(same)})"
    if not real:
        far = f"FD to the teacher in {teacher['nfe']} NFE {student['fd_teacher']:.1f} in {cost}"
        return f"{far}{beside and f', the teacher{beside[1:]}'}, {student['n']} images"
    return (
        f"FD to real {student['fd_real']:.1f} in {cost}, teacher {teacher['fd_real']:.1f} in {teacher['nfe']}{beside}"
    )
