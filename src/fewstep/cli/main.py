"""The command line.

Heavy imports happen inside the commands, so that `--help` is immediate.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..names import expanded
from ..notices import mute_others
from .collection import without_collection
from .faults import FaultError, logged_in
from .progress import Plain, set_output, show_all_letters
from .signals import Interrupted, interruptible

app = typer.Typer(
    name="fewstep", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None
)


def _path(text: str | Path) -> Path:
    """Parse an option that takes a path."""
    if not str(text):
        raise typer.BadParameter("got an empty text; pass a path, or leave the option out")
    return Path(expanded(str(text)))


Out = Annotated[
    Path | None, typer.Option("--out", parser=_path, metavar="PATH", help="Folder of the run; runs/NAME by default.")
]
Fuse = Annotated[
    list[str] | None,
    typer.Option("--fuse-lora", help="LoRA that becomes part of the teacher, PATH or PATH@STRENGTH. May be repeated."),
]
Teacher = Annotated[
    str | None,
    typer.Option(
        help=(
            "Bundled name, diffusers folder, hub id or checkpoint (FILE.safetensors, "
            "FILE@v, FILE@eps, FILE@FOLDER); the recipe's by default."
        )
    ),
]
Recipe = Annotated[str, typer.Argument(help="A shipped recipe's name (`fewstep recipes` lists them), or a YAML file.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override one setting, e.g. --set train.lr=1e-5. May be repeated.")
]


def _set_quiet(wanted: bool) -> bool:
    set_output(quiet=wanted)
    return wanted


def _set_json(wanted: bool) -> bool:
    set_output(as_json=wanted)
    return wanted


Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=_set_quiet, help="Show no progress: results, warnings and errors alone."),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", callback=_set_json, help="Print the result as one line of JSON, and all else to the standard error."
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        Plain().print(f"fewstep {__version__}")
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Turn a pretrained diffusion model into a generator that needs 1 to 4 steps, from prompts alone."""
    mute_others()


@app.command()
def distill(
    recipe: Recipe,
    set_: Set = None,
    out: Out = None,
    teacher: Teacher = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompt file (.txt, .jsonl, .csv, .tsv) or hub data set id.")
    ] = None,
    fuse_lora: Fuse = None,
    log_to: Annotated[
        list[str] | None,
        typer.Option(
            "--log-to", metavar="NAME", help="Also log to tensorboard, wandb, trackio or mlflow. May be repeated."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the resolved recipe, the memory it needs and the first batch; train nothing."
        ),
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train a few-step student. The same command again resumes where the last one stopped."""
    from .distill import run_distill

    run_distill(
        recipe,
        set_ or [],
        out,
        dry_run,
        fuse_lora or [],
        _given({"teacher": teacher, "prompts.source": prompts}),
        log_to or [],
    )


def _given(options: dict[str, str | None]) -> dict[str, str]:
    """Return the options that were given, with their texts unchanged.

    The texts are not read as YAML: people call their files what they like.
    """
    return {key: text for key, text in options.items() if text is not None}


@app.command()
def plan(
    recipe: Recipe,
    set_: Set = None,
    teacher: Teacher = None,
    memory: Annotated[str | None, typer.Option(help="Find settings that fit this much, e.g. 24GiB.")] = None,
    cards: Annotated[int, typer.Option(min=1, help="Cards that train together, e.g. 8; the plan is of each.")] = 1,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Print what a recipe needs in memory, part by part, without loading or downloading any weights."""
    with without_collection():
        from .plan import run_plan

    run_plan(recipe, set_ or [], memory, _given({"teacher": teacher}), cards)


@app.command()
def sample(
    student: Annotated[
        str,
        typer.Argument(
            help=(
                "A student (a run, its final/, a hub id), or a teacher: "
                "bundled, a diffusers folder, a hub id, a checkpoint."
            )
        ),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "-p",
            "--prompt",
            help="Prompt, or class name for class-conditional models. May be repeated; not for unconditional models.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps; the student's own by default, 50 for a teacher.")] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale of a teacher; students have it baked in.")
    ] = None,
    guidance_rescale: Annotated[float | None, typer.Option(help="Guidance rescale of a teacher, 0 to 1.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the first image; the next ones count up.")] = 0,
    count: Annotated[int, typer.Option("-n", "--count", help="Images per prompt.")] = 1,
    compare: Annotated[
        bool, typer.Option("--compare", help="Also sample the teacher, with the same prompts and seeds.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="Base model to load the student on, if not the one it names.")
    ] = None,
    solver: Annotated[str | None, typer.Option(help="ddim, dpmpp, ipndm or renoise; a student brings its own.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", parser=_path, metavar="PATH", help="PNG file to write.")] = Path(
        "sample.png"
    ),
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Draw images with a student or a teacher."""
    from .sample import run_sample

    run_sample(
        expanded(student),
        prompt or [],
        steps,
        guidance,
        guidance_rescale,
        seed,
        count,
        compare,
        base and expanded(base),
        solver,
        out,
    )


@app.command()
def evaluate(
    student: Annotated[str, typer.Argument(help="A student: a run, its final/, or a hub id.")] = "",
    protocol: Annotated[
        str | None,
        typer.Option(
            help=(
                "Which protocol: how many prompts and seeds, which reference; "
                "or its size (quick, medium, full), or images-N of N images. By default "
                "emoji-full for models of emoji, own-quick (the run's held-out prompts) for others."
            )
        ),
    ] = None,
    real: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help=(
                "Real images of the model's size that it is measured against too: "
                "a folder or an npz; the recipe's data.real by default."
            ),
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="Prompts that a text-to-image model and its teacher are measured by; the run's own by default."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            parser=_path,
            metavar="PATH",
            help="JSON file to write; eval.json in the student's folder (or NAME-evaluation/) by default.",
        ),
    ] = None,
    metrics: Annotated[
        str,
        typer.Option(
            help=(
                "More metrics, with commas between: clip_score, pickscore, hpsv21, aesthetic, imagereward, hpsv3, "
                "vqascore, geneval, dpg, vbench, vbench_actions, vbench_objects, fid, fid_torch, kid, lpips. A line "
                "says what each needs."
            )
        ),
    ] = "",
    reference: Annotated[
        Path | None,
        typer.Option(parser=_path, metavar="PATH", help="Reference statistics of FID: an npz with mu and sigma."),
    ] = None,
    against: Annotated[
        str,
        typer.Option(help="Other students to run beside it, with commas between: names of public ones, or folders."),
    ] = "",
    install: Annotated[
        str | None,
        typer.Option(
            help="Make what a metric needs: imagereward, hpsv3, vqascore, dpg, vbench, vbench_objects, lpips or "
            "inception."
        ),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure a student beside its teacher and write eval.json."""
    if install is not None:
        from .extra import run_install

        run_install(install)
        if not student:
            return
    if not student:
        raise typer.BadParameter("got no student; pass a run, or its final/", param_hint="STUDENT")
    from .evaluate import More, run_evaluate

    more = More(_listed(metrics), reference, _listed(against))
    run_evaluate(expanded(student), protocol, real and expanded(real), prompts and expanded(prompts), out, more)


def _listed(text: str) -> tuple[str, ...]:
    """Split a list with commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


Students = Annotated[
    list[str] | None,
    typer.Argument(metavar="RUN", help="Students: runs, their final/, or hub ids; RUN@STEPS for another step count."),
]
WithTeacher = Annotated[
    bool, typer.Option("--teacher/--no-teacher", help="Also sample the teacher, in 50 guided steps.")
]
Base = Annotated[str | None, typer.Option(help="Base model to load all students on, if not the one they name.")]


@app.command()
def compare(
    students: Students = None,
    prompt: Annotated[list[str] | None, typer.Option("-p", "--prompt", help="Prompt. May be repeated.")] = None,
    prompts: Annotated[
        str, typer.Option(metavar="N|FILE", help="How many of the first run's own prompts, or a prompt file.")
    ] = "6",
    teacher: WithTeacher = True,
    base: Base = None,
    out: Annotated[Path, typer.Option("-o", "--out", parser=_path, metavar="DIR", help="Folder to write to.")] = Path(
        "comparison"
    ),
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Show students side by side, from the same prompts and noise.

    Writes a page with a slider, a contact sheet and a table. The same command again resumes.
    """
    from .compare import run_compare

    run_compare(students or [], prompt or [], prompts, teacher, base and expanded(base), out)


@app.command()
def study(
    students: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN",
            help="Students: runs, their final/, or hub ids; RUN@STEPS for another step count. With --count, answers.",
        ),
    ] = None,
    prompts: Annotated[
        str, typer.Option(metavar="N|FILE", help="How many of the first run's own prompts, or a prompt file.")
    ] = "20",
    teacher: WithTeacher = True,
    base: Base = None,
    count: Annotated[
        bool, typer.Option("--count", help="Count the ANSWERS that the page saved, with the key in --out.")
    ] = False,
    out: Annotated[Path, typer.Option("-o", "--out", parser=_path, metavar="DIR", help="Folder of the study.")] = Path(
        "study"
    ),
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Let people vote on images without knowing whose they are.

    Writes a page of blind pairs, and its key; with --count, counts the answers. The same command again resumes.
    """
    if count:
        from .count import run_count

        run_count(students or [], out)
    else:
        from .study import run_study

        run_study(students or [], prompts, teacher, base and expanded(base), out)


@app.command()
def export(
    student: Annotated[str, typer.Argument(help="A student: a run, its final/, or a hub id.")],
    folder: Annotated[Path, typer.Argument(parser=_path, metavar="DIR", help="A new folder to write.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format", help="student, kohya (ComfyUI, A1111), merged (one network), or pipeline (a whole folder)."
        ),
    ] = "student",
    steps: Annotated[
        int | None, typer.Option(help="Which of the student's step counts; its default one if not given.")
    ] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Which of its guidance scales, where it was trained for several.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Base model to load the student on, if not the one it names.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Of merged and pipeline: float32, bfloat16 or float16; the one the base was read in if not given."
        ),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write a student as files for other programs, load them again, and compare them with it."""
    from .export import run_export

    run_export(expanded(student), folder, format_, steps, base and expanded(base), guidance, dtype)


@app.command()
def push(
    student: Annotated[str, typer.Argument(metavar="RUN", help="A student folder (a run or its final/).")],
    name: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository on the hub, new or with a student.")],
    public: Annotated[
        bool, typer.Option("--public", help="Let everybody see it; a new repository is private without this.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the files with their sizes, print the card, and send nothing.")
    ] = False,
    base: Annotated[
        str | None,
        typer.Option(metavar="HUB_ID", help="The base on the hub, where the student names a folder or file."),
    ] = None,
    licence: Annotated[
        str | None, typer.Option(metavar="NAME", help="The base's licence, where the hub does not say it: apache-2.0.")
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Upload a student to the Hugging Face hub, with a card, images and measurements."""
    from .push import run_push

    run_push(expanded(student), name, public, dry_run, base, licence)


@app.command()
def inspect(
    file: Annotated[
        str, typer.Argument(help="A student or teacher folder, a run, a .safetensors file, or a student's hub id.")
    ],
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Print what a file is: base, method, steps, times, rank, hashes."""
    from .inspect import run_inspect

    run_inspect(expanded(file))


@app.command()
def report(
    run: Annotated[str, typer.Argument(help="Folder of a run, finished, stopped or still training.")],
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Write a run's report.html again, from what its folder holds by now."""
    from .report import run_report

    run_report(expanded(run))


@app.command()
def doctor(
    teacher: Annotated[
        str | None,
        typer.Argument(help="A teacher to look at as before a training: what it is, and whether it is sound."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="The type of the teacher's weights: float32, bfloat16 or float16.")
    ] = "float32",
    size: Annotated[
        str | None,
        typer.Option(help="Height and width of its images, or WIDTHxHEIGHTxFRAMES of its videos, if not its own."),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Print versions, devices, and what is missing with the command that installs it; or check a TEACHER."""
    from .doctor import run_doctor

    run_doctor(teacher, dtype, size)


@app.command()
def studio(
    folder: Annotated[
        Path, typer.Argument(parser=_path, metavar="FOLDER", help="Folder of the runs, also of those to come.")
    ] = Path("runs"),
    host: Annotated[
        str, typer.Option(help="Address to listen at. One beyond this machine needs a password.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen at; a free one from 7860 on by default.")
    ] = None,
    password: Annotated[
        str | None, typer.Option(envvar="FEWSTEP_STUDIO_PASSWORD", help="Ask for this password.")
    ] = None,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Open a web page that starts, shows and uses runs."""
    from .studio import run_studio

    run_studio(folder, host, port, password, browser)


@app.command()
def recipes(
    word: Annotated[str | None, typer.Argument(help="Only recipes whose name or first line has this word.")] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """List the shipped recipes, each with what it trains."""
    from .recipes import run_recipes

    run_recipes(word)


@app.command("train-teacher")
def train_teacher(
    recipe: Annotated[str, typer.Argument(help="A shipped teacher recipe's name, or a YAML file.")],
    set_: Set = None,
    out: Out = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Train one of the bundled teachers again, from its data. Resumes."""
    from .train_teacher import run_train_teacher

    run_train_teacher(recipe, set_ or [], out)


def run() -> None:
    """Run the command line.

    A user's mistake prints one line and exits with code 2. A mistake of fewstep prints one line, writes a
    log and exits with code 1. A signal prints one line and exits with 128 plus the signal's number.
    """
    # transformers prints a notice about torchvision when imported, which is of no use to users.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Threads that spin while they wait take the cores from each other: beside another program small operations were
    # 200 times as slow. Read once, when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    show_all_letters()
    try:
        with interruptible(), logged_in(None):
            app(standalone_mode=True)
    except FaultError as fault:
        _leave(fault.line, fault.status)
    except Interrupted as signal:
        _leave(
            f"interrupted by {signal.name}; the same command goes on: a training from its last checkpoint",
            128 + signal.number,
        )


def _leave(text: str, status: int) -> None:
    with suppress(OSError):  # the terminal may be gone
        Plain(stderr=True).print(text)
    sys.exit(status)


if __name__ == "__main__":
    run()
