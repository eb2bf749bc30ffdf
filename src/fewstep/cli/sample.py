"""`fewstep sample`: images from a student or a teacher.

On request the teacher's images stand next to the student's.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.base import Backbone, nfe_per_step
from ..backbones.generate import require_seed
from ..backbones.load import quiet, seen_from
from ..backbones.parts import LatentVideo
from ..backbones.unconditional import PixelModel
from ..core.guidance import Guidance
from ..core.solvers import total_nfe
from ..names import quoted
from ..report.grids import write_grid
from ..report.video import FPS, strip, write_mp4
from ..report.words import plural
from ..runs.sampling import backbone_of, check_steps, sample
from ..student.card import card_nfe
from ..student.folder import find_student, read_card
from ..student.student import Student
from ..training.loop import default_device
from .loading import hashed, loaded
from .options import in_options
from .preflight import note_shadowed, require_output
from .progress import console, put_result, working


def open_model(source: str, base: str | None = None) -> Backbone | Student:
    """Open a student or a teacher.

    Raises ValueError with one line where the source is neither.
    """
    folder = student_in(source)
    if folder is not None:
        return open_student(folder, base)
    if (Path(source) / "run.json").is_file():
        raise ValueError(f"student: {source} is a run without a finished student; run its command again to finish it")
    note_shadowed(source)
    return loaded(source, device=default_device())


def student_in(source: str) -> Path | None:
    """Return the folder of a student, None for anything else.

    A hub id may be that of a teacher, and what is wrong with it is said where the teacher is loaded.
    """
    try:
        return find_student(source, "student")
    except ValueError:
        return None


def open_student(folder: Path, base: str | Backbone | None = None, dtype: torch.dtype | None = None) -> Student:
    """Open a student on its base, or on another base.

    Prints a note where the base has other weights than the base that the student was trained on.
    """
    card = read_card(folder)
    named = base or seen_from(card.base, folder)
    if isinstance(named, str) and not card.own_network:
        named = loaded(named, dtype or getattr(torch, card.dtype), default_device())
    with working(f"reading {card.name}"):
        student = Student.read(folder, named, default_device(), dtype)
    network = student.backbone if student.base is None else student.base
    if note := student.base_note(card.base_hash and hashed(network.module, getattr(torch, card.dtype))):
        console.print(f"note: {note}")
    return student


def prompts_of(backbone: Backbone, given: Sequence[str]) -> list[str]:
    """Return the prompts that this model samples.

    These are the given prompts, or the empty prompt for a model that takes none. Raises ValueError for
    prompts that the model does not take. To a model of classes the empty prompt is no class.
    """
    if not backbone.encode([""]):
        if asked := next((p for p in given if p.strip()), ""):
            raise ValueError(f"--prompt: got {asked!r}, {backbone.name} takes no prompt; leave it out")
        return list(given) or [""]
    if isinstance(backbone, PixelModel):
        if not given:
            raise ValueError(
                f"--prompt: got none, {backbone.name} draws {backbone.classes}; "
                f"say which, e.g. -p {quoted(backbone.labels[0])}"
            )
        backbone.encode(given)
        return list(given)
    if not all(p.strip() for p in given or [""]):
        raise ValueError(f"--prompt: got {'an empty prompt' if given else 'none'}; name one, e.g. -p rocket")
    return list(given)


MOST = 1024  # images per prompt
FLAT = 1 / 255  # an image whose pixels differ by less is one colour


def run_sample(
    source: str,
    prompts: list[str],
    steps: int | None,
    guidance: float | None,
    rescale: float | None,
    seed: int,
    count: int,
    compare: bool,
    base: str | None,
    solver: str | None,
    out: Path,
) -> None:
    """Sample, write one PNG grid, and print its path.

    The grid has a row per model. Videos are shown as strips of frames, and written as mp4 next to the grid.
    The time per image is printed, too.
    """
    quiet()
    require_output(out, "-o")
    if out.suffix.lower() != ".png":
        raise ValueError(f"-o: got {out.name}, allowed are names that end in .png; pass {out.with_suffix('.png').name}")
    if steps is not None and steps < 1:
        raise ValueError(f"--steps: got {steps}, allowed are whole numbers from 1")
    if not 1 <= count <= MOST:
        raise ValueError(f"--count: got {count}, allowed are whole numbers from 1 to {MOST}")
    with in_options({"guidance.scale": "--guidance", "guidance.rescale": "--guidance-rescale"}):
        wished = Guidance(scale=1.0 if guidance is None else guidance, rescale=rescale or 0.0)
    require_seed(seed, "--seed")
    if rescale is not None and student_in(source) is not None:
        raise ValueError(f"--guidance-rescale: got {rescale:g}, this is a student and needs no guidance; leave it out")
    model = open_model(source, base)
    prompts = prompts_of(backbone_of(model), prompts)
    wanted = [p for p in prompts for _ in range(count)]
    seeds = [seed + i for _ in prompts for i in range(count)]
    drawn = dict[str, tuple[Tensor, float]]()
    if isinstance(model, Student):
        card = model.card
        if guidance not in (None, 1.0) and not card.guidance_scales:
            raise ValueError(
                f"--guidance: got {guidance}, this student has guidance baked "
                f"in (teacher's scale {card.guidance.scale:g}); leave it out"
            )
        if guidance is not None and card.guidance_scales and guidance not in card.guidance_scales:
            known = ", ".join(f"{w:g}" for w in card.guidance_scales)
            console.print(
                f"warning: --guidance {guidance:g}: this student was trained for {known}; the nearest is taken"
            )
        taken = steps or model.card.steps[0]
        check_steps(model, taken, "--steps")
        if taken not in model.card.steps:
            console.print(
                f"warning: --steps {taken}: this student was trained for {', '.join(map(str, model.card.steps))}"
            )
        if compare:
            label = f"teacher, 50 steps, guidance {card.guidance.scale:g}"
            drawn[label] = _timed(model.backbone, wanted, seeds, 50, card.guidance, "ddim")
        drawn[f"student, {plural(taken, 'step')}"] = _timed(model, wanted, seeds, taken, wished, solver)
    else:
        taken = steps or 50
        label = f"teacher, {plural(taken, 'step')}, guidance {wished.scale:g}"
        drawn[label] = _timed(model, wanted, seeds, taken, wished, solver)
    rows, seconds = [images for images, _ in drawn.values()], {label: each for label, (_, each) in drawn.items()}
    files = [write_grid(out, torch.stack([strip(p) for p in rows]), list(drawn), wanted)]
    console.print(str(out.resolve()))
    if rows[-1].ndim == 5:
        drawn_by = model.backbone if isinstance(model, Student) else model
        fps = drawn_by.fps if isinstance(drawn_by, LatentVideo) else FPS
        for i, video in enumerate(rows[-1]):
            files.append(write_mp4(out.with_name(f"{out.stem}-{i}.mp4"), video, fps))
            console.print(str(files[-1].resolve()))
    put_result({"files": [f.resolve() for f in files], "prompts": wanted, "seeds": seeds, "seconds_per_image": seconds})


@contextmanager
def rows_told(network: nn.Module, tell: Callable[[int], None]) -> Iterator[None]:
    """Tell how many samples a network has been called with, calls together."""
    done = 0

    def seen(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], out: object) -> None:
        nonlocal done
        first = next((v for v in (*given, *named.values()) if isinstance(v, Tensor) and v.ndim > 1), None)
        done += 0 if first is None else len(first)
        tell(done)

    hook = network.register_forward_hook(seen, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _timed(
    model: Backbone | Student, prompts: list[str], seeds: list[int], steps: int, guidance: Guidance, solver: str | None
) -> tuple[Tensor, float]:
    """Return images, and the seconds that each took."""
    if isinstance(model, Student):
        who, cost, network = "student", card_nfe(model.card, steps), model.network
    else:
        who, cost = "teacher", total_nfe(steps, nfe_per_step(model.encode([""]), guidance))
        network = model.module
    began = time.perf_counter()
    with (
        in_options({"steps": "--steps", "solver": "--solver", "prompts": "--prompt"}),
        working(f"drawing with the {who}", cost * len(prompts)) as tell,
        rows_told(network, tell),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", "steps: got")  # said with the option's name
        result = sample(model, prompts, seeds, steps=steps, guidance=guidance, solver=solver)
    seconds = (time.perf_counter() - began) / len(prompts)
    if flat := sum(float(image.amax() - image.amin()) < FLAT for image in result):
        console.print(f"warning: {flat} of {len(result)} images are one colour; run fewstep doctor TEACHER")
    console.print(f"{who}: {plural(steps, 'step')}, {cost} NFE and {seconds:.3f} s per image")
    return result, seconds
