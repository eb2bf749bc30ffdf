"""`fewstep train-teacher`: the bundled teachers from their data, resumable."""

from collections.abc import Generator
from pathlib import Path

from ..training.fit import FitStep
from ..zoo.pixel_teacher import PixelTeacherConfig, train_pixel_teacher
from ..zoo.teacher import TeacherConfig, train_teacher
from .progress import console, meter
from .recipe import kind_of, read_recipe
from .signals import stop_request


def run_train_teacher(source: str, overrides: list[str], out: Path | None) -> None:
    """Train every stage of the recipe in turn; the same command again resumes."""
    run = out or Path("runs") / Path(source).stem
    steps: Generator[tuple[str, FitStep], None, None]
    if kind_of(source) == "pixel-teacher":
        pixels = read_recipe(source, overrides, PixelTeacherConfig)
        steps, stages = train_pixel_teacher(pixels, run), {"denoiser": pixels.fit.steps}
    else:
        config = read_recipe(source, overrides, TeacherConfig)
        steps, stages = train_teacher(config, run), {"codec": config.codec.fit.steps, "denoiser": config.denoiser.fit.steps}
    with stop_request() as request:
        current = next(steps, None)
        while current is not None:
            stage = current[0]
            with meter(stage, stages[stage], current[1].step - 1) as bar:
                while current is not None and current[0] == stage:
                    bar.advance(current[1].step, {"loss": current[1].loss})
                    if request.asked:
                        steps.close()
                        console.print("stopped; the same command resumes")
                        return
                    current = next(steps, None)
    console.print(f"teacher  {run / 'teacher'}")
