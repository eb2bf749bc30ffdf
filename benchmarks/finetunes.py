"""Load LoRA students into fine-tunes that they have never seen.

    python benchmarks/finetunes.py --students runs/bench-tdm/{tdm-4,unify,lcm,dmd2-5}-{0,1,2}

The analogue of the paper's table 2. The bundled teacher is fine-tuned into two more styles, Twemoji and Fluent. LoRA
students of the bundled teacher are loaded into each fine-tune. Their images are compared with the fine-tune's own
samples (DPM-Solver++ in 12 guided steps): a lower FD-efflite0 means that more of the style is kept. `plain` is the
bundled teacher, which has nothing of the style. `own` is a student that was distilled from the fine-tune itself, with
the settings of `tdm-4`: supervised fine-tuning, then TDM (tables 1 and 3). Retrieval, in percent, is among Noto's
images, so it is lower in other styles. The paper (tab. 2): TDM keeps most, FID 20.2 against 26.9 for LCM in Realistic.

The styles are fetched with npm (checksums below). Everything finished is kept in --out. Writes benchmarks/finetunes.md
and .json.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from fewstep.api import Student, load_student, load_teacher, sample
from fewstep.atomic import write_json
from fewstep.backbones.base import Backbone
from fewstep.backbones.load import quiet
from fewstep.cli.distill import run_distill
from fewstep.cli.train_teacher import run_train_teacher
from fewstep.core.guidance import Guidance
from fewstep.evaluation.protocols import Row, evaluate, protocol_named
from fewstep.training.state import seeded
from fewstep.zoo import emoji_data
from fewstep.zoo.teacher import DataConfig
from records import Facts, Record, about, markdown, new_record, provenance, spread, wrapped, write_record
from tdm_variants import VARIANTS, recipe_value

GOOGLE = ("emoji-datasource-google", "16.0.0", "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438")
STYLES = {
    "twemoji": (
        "emoji-datasource-twitter",
        "16.0.0",
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
    ),
    "fluent": ("@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58"),
}
RECIPE = """# The bundled teacher in another style: all weights, {steps} steps.
kind: finetune
name: {style}
teacher: emoji
data: {{source: {images}}}
roles: {{lora: false}}
fit:
  steps: {steps}
  batch: 32
  lr: 3.0e-4
  warmup: 100
  decay: {decay}
  ema: 0.99
  checkpoint_every: 100
  optimizer: muon
"""
PLACES = 3  # images of every emoji, each at a place of its own


def images_of(style: str, out: Path, packages: Path) -> Path:
    """Return a folder of captioned images in one style."""
    folder = out / style / "images"
    if (folder / "metadata.jsonl").exists():
        return folder
    emoji, _ = emoji_data.load(emoji_data.fetch(*GOOGLE, packages), DataConfig.model_fields["hold_out"].default)
    emoji, images = emoji_data.load_style(emoji_data.fetch(*STYLES[style], packages), emoji, style)
    folder.mkdir(parents=True, exist_ok=True)
    mirrors, lines = torch.tensor([e.mirrors for e in emoji]), []
    for place in range(PLACES):
        moved = emoji_data.placed(images, mirrors, 0.7, seeded(0, place, style))
        for i, (e, x) in enumerate(zip(emoji, moved, strict=True)):
            if not e.held_out:
                name = f"{i:05d}-{place}.png"
                Image.fromarray(x.permute(1, 2, 0).numpy()).save(folder / name)
                lines.append(json.dumps({"file_name": name, "text": e.caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def finetune(style: str, a: argparse.Namespace) -> Path:
    """Fine-tune the teacher into a style, and return its pipeline folder."""
    run = a.out / style
    recipe = run / "recipe.yaml"
    if not (run / "teacher" / "model_index.json").exists():
        source = images_of(style, a.out, a.packages)
        recipe.write_text(RECIPE.format(style=style, steps=a.steps, decay=a.steps // 2, images=source))
        with timed(run / "finetune-seconds.json"):
            run_train_teacher(str(recipe), [], run)
    return run / "teacher"


def own_student(style: str, teacher: Path, seed: int, a: argparse.Namespace) -> Path:
    """Distil the fine-tune with the settings of `tdm-4`, and return the run."""
    run = a.out / style / f"own-{seed}"
    (tdm,) = (v for v in VARIANTS if v.key == "tdm-4")
    recipe = run.with_suffix(".yaml")  # JSON is YAML, too
    own = {"teacher": str(teacher), "prompts": {"source": str(a.prompts)}}
    write_json(recipe, recipe_value(tdm, seed, a.iterations) | own)
    if not (run / "final").exists():
        with timed(a.out / style / f"own-{seed}-seconds.json"):
            run_distill(str(recipe), [], run, False, [])
    return run


@contextmanager
def timed(file: Path) -> Iterator[None]:
    """Add the seconds of a block to those in a file, which an interrupted run left."""
    began = time.perf_counter()
    try:
        yield
    finally:
        before = json.loads(file.read_text())["seconds"] if file.exists() else 0.0
        write_json(file, {"seconds": before + time.perf_counter() - began})


def seconds(folder: Path, part: str) -> float:
    """Return the seconds that `timed` kept."""
    return float(json.loads((folder / f"{part}-seconds.json").read_text())["seconds"])


def row(name: str, model: Backbone | Student, steps: int, guidance: float, solver: str | None = None) -> Row:
    """Return a row to evaluate."""
    return Row(
        name,
        steps,
        Guidance(scale=guidance),
        steps * (2 if guidance != 1 else 1),
        lambda p, s: sample(model, list(p), list(s), steps=steps, guidance=guidance, solver=solver),
    )


def measure(style: str, folder: Path, a: argparse.Namespace) -> list[Facts]:
    """Measure the fine-tune, the bundled teacher, and each student's LoRA in the fine-tune."""
    tuned = load_teacher(folder)
    rows = [
        row("teacher", tuned, 12, a.guidance, "dpmpp"),
        row("teacher", tuned, 4, a.guidance),
        row("teacher", tuned, 4, 1.0),
        row("plain", load_teacher("emoji"), 12, a.guidance, "dpmpp"),
    ]
    for run in (*a.students, *(own_student(style, folder, seed, a) for seed in a.seeds)):
        student = load_student(run / "final", folder)
        rows.append(row(run.name, student, student.card.steps[0], 1.0))
    found = evaluate(rows, protocol_named(a.protocol), a.out / style / "evaluation")["rows"]
    return [{"style": style} | r for r in found]


def lines_of(rows: Sequence[Facts]) -> list[list[object]]:
    """Return a line for each model in each style; students of several seeds share one."""
    lines: list[list[object]] = []
    kinds = {(r["style"], _kind(r), r["steps"], r["guidance"]): r["nfe"] for r in rows}
    for (style, kind, steps, guidance), nfe in kinds.items():
        own = [r for r in rows if (r["style"], _kind(r), r["steps"], r["guidance"]) == (style, kind, steps, guidance)]
        cells = [
            spread([scale * r[k] for r in own if r[k] is not None])
            for k, scale in (("fd_teacher", 1), ("retrieval_top1", 100), ("diversity_ratio", 1))
        ]
        lines.append([style, kind, steps, f"{guidance:g}", nfe, *cells, len(own)])
    return lines


def _kind(row: Facts) -> str:
    """Return the variant of a run that is named after its variant and seed."""
    return re.sub(r"-\d$", "", row["model"])


def page(record: Record) -> str:
    """Return the page of a record."""
    head = [
        "style",
        "model",
        "steps",
        "guidance",
        "NFE",
        "FD to the fine-tune",
        "retrieval top-1",
        "diversity",
        "seeds",
    ]
    common = record.common
    spent = [
        f"- {style}: fine-tuning {spread(c['finetune'], 0)} s ({common['steps']} steps of batch 32, all weights), "
        f"TDM on it {spread(c['own'], 0)} s ({common['iterations']} iterations of batch 16)"
        for style, c in common["costs"].items()
    ]
    return f"""# LoRA students in fine-tunes they have never seen

{wrapped(f"{provenance(record)}, protocol `{common['protocol']}`, guidance {common['guidance']:g}.")}

{about(__doc__)}

{markdown(head, lines_of(record.rows))}

What "fine-tune, then TDM" costs:

{chr(10).join(spent)}
"""


def main() -> None:
    """Fine-tune, measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--students", nargs="+", type=Path, required=True, help="runs whose final/ is a LoRA of the bundled teacher"
    )
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2], help="of the fine-tune's own students")
    parser.add_argument("--steps", type=int, default=600, help="of fine-tuning, in each style")
    parser.add_argument("--iterations", type=int, default=260, help="of the fine-tune's own students")
    parser.add_argument("--prompts", type=Path, default=Path("src/fewstep/zoo/emoji/prompts.txt"))
    parser.add_argument("--protocol", default="emoji-medium")
    parser.add_argument("--guidance", type=float, default=4.5)
    parser.add_argument("--packages", type=Path, default=Path("runs/packages"), help="where npm's archives are kept")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-finetunes"), help="where runs are kept")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    quiet()
    rows: list[Facts] = []
    common = {key: getattr(a, key) for key in ("protocol", "guidance", "steps", "iterations")} | {"costs": {}}
    students, seeds = (" ".join(map(str, found)) for found in (a.students, a.seeds))
    command = f"python benchmarks/finetunes.py --students {students} --seeds {seeds}"
    for style in STYLES:
        rows += measure(style, finetune(style, a), a)
        parts = {"finetune": ["finetune"], "own": [f"own-{seed}" for seed in a.seeds]}
        common["costs"][style] = {key: [seconds(a.out / style, name) for name in names] for key, names in parts.items()}
        record = new_record("finetunes", command, rows, a.seeds, common)
        write_record(record, page(record), a.to)


if __name__ == "__main__":
    main()
