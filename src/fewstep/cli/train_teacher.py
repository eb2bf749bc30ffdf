"""`fewstep train-teacher`: train the bundled teachers from their data.

A stopped training resumes.
"""

from collections.abc import Generator
from pathlib import Path

from ..atomic import write_json, write_text
from ..backbones.load import fingerprint, pipeline_of, quiet
from ..data.captioned import read_images
from ..data.images import encode_images_of
from ..findings import require
from ..runs.place import place_checks
from ..runs.recipe import FinetuneRecipe, kind_of, read_recipe, recorded
from ..training.finetune import finetune
from ..training.fit import FitStep
from ..training.loop import default_device
from ..training.state import checkpoints
from ..zoo.pixel_teacher import PixelTeacherConfig, train_pixel_teacher
from ..zoo.teacher import TeacherConfig, train_teacher
from .before import look_before_finetune
from .loading import loaded
from .preflight import held
from .progress import OnScreen, console, meter, put_result
from .prompts import say_found
from .signals import stop_request


def run_train_teacher(source: str, overrides: list[str], out: Path | None) -> None:
    """Train every stage of the recipe in turn.

    The same command again resumes.
    """
    quiet()
    run = out or Path("runs") / Path(source).stem
    steps: Generator[tuple[str, FitStep], None, None]
    if kind_of(source) == "pixel-teacher":
        pixels = read_recipe(source, overrides, PixelTeacherConfig)
        steps, stages = train_pixel_teacher(pixels, run), {"denoiser": pixels.fit.steps}
    elif kind_of(source) == "finetune":
        recipe = read_recipe(source, overrides, FinetuneRecipe)
        run = out or Path("runs") / recipe.name
        steps, stages = finetune_teacher(recipe, run), {"finetune": recipe.fit.steps}
    else:
        config = read_recipe(source, overrides, TeacherConfig)
        stages = {
            "codec": config.codec.fit.steps,
            "decoder": config.codec.decoder.steps,
            "denoiser": config.denoiser.fit.steps,
        }
        steps = train_teacher(config, run)
    require(place_checks(run), "--out")
    with held(run), stop_request() as request:
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
    put_result({"teacher": (run / "teacher").resolve()})


def finetune_teacher(recipe: FinetuneRecipe, run: Path) -> Generator[tuple[str, FitStep], None, None]:
    """Fine-tune a teacher on real images.

    Ends with `run/teacher`, an ordinary pipeline folder with the captions as prompts.
    """
    teacher = loaded(recipe.teacher, device=default_device())
    run.mkdir(parents=True, exist_ok=True)
    if not checkpoints(run):
        look_before_finetune(recipe, teacher, run)
    write_json(run / "run.json", recorded(recipe))
    identity, source = fingerprint(teacher.module, *teacher.encoders), recipe.data.source
    data = encode_images_of(teacher, source, run / "embeddings", identity, found=say_found, keep=OnScreen().writing)
    training = finetune(teacher, data, recipe.roles, recipe.fit, run, recipe.seed, recipe.drop_caption)
    yield from (("finetune", step) for step in training)
    pipeline_of(teacher).save_pretrained(run / "teacher")
    captions = dict.fromkeys(" ".join(p.caption.split()) for p in read_images(source)[0])  # one per line
    write_text(run / "teacher" / "prompts.txt", "".join(f"{c}\n" for c in captions if c))
