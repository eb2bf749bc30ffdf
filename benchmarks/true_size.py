"""Train, kill, resume, export and sample a family at its true size, on a CPU.

    python benchmarks/true_size.py sd15                  # at 512 pixels; writes benchmarks/true_size.md and .json
    python benchmarks/true_size.py cogvideox --size 720x480x9    # adds this family
    python benchmarks/true_size.py sd15 --tiny --to /tmp/true    # rehearses it on a tiny pipeline

Networks have their true size and random weights; T5-XXL has one of its 24 layers, at true width. The family's own LoRA
recipe runs with batch 1 for three iterations by `fewstep distill`, without warm-up, warm start and previews. On a CPU
without units for bfloat16 weights and calculations are in float32, since it takes 25 to 40 times as long there. It is
killed (SIGKILL) once its first checkpoint is there, and the same command resumes. The student is exported in every
format, loaded again and drawn once. `peak` is the largest resident memory of a training process above that of its
imports; memory that it frees goes back at once. `planned` is the training as `fewstep plan` counts it, with what stays
in a CPU's memory and not in a GPU's: the encoders, and the copy of a checkpoint that is written beside the training;
the largest phase counts. Sizes are those of files. Bar: the peak within 10 % of the plan.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

import configurations
from fewstep.cli.plan import plans_of
from fewstep.names import quoted
from fewstep.runs.recipe import DistillRecipe, read_recipe
from fewstep.student.formats import FORMATS
from fewstep.training.ledger import module_bytes
from fewstep.training.state import checkpoints
from records import Facts, Record, about, markdown, new_record, origin, provenance, stored_rows, wrapped, write_record

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
SIZES = {  # pixels, and frames; larger ones take too long on a CPU
    "sd15": "512",
    "pixart": "512",
    "sdxl": "512",
    "sd35m": "512",
    "cogvideox": "720x480x9",
    "wan21": "480x272x9",
    "flux2-klein-4b": "256",
}
ITERATIONS = 3
RELEASE = {f"MALLOC_{what}_THRESHOLD_": str(2**18) for what in ("MMAP", "TRIM")}  # for glibc
BAR = 0.10
PROMPTS = ("a red fox in the snow", "a bowl of ramen", "a house by the sea", "an old fisherman")


def has_bfloat16() -> bool:
    """Tell whether the CPU has units for bfloat16."""
    return any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))


def built(family: str, folder: Path, dtype: torch.dtype, tiny: bool) -> Path:
    """Write a family's pipeline with random weights, network by network."""
    if tiny:
        sys.path.append(str(ROOT))
        try:
            from tests import pipelines
        finally:
            sys.path.remove(str(ROOT))
        return pipelines.save({"sd15": "sd"}.get(family, family), folder / family)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    place = configurations.write(family, folder)
    for name, (library, called, config) in configurations.PIPELINES[family][1].items():
        kind: Any = getattr({"diffusers": diffusers, "transformers": transformers}[library], called)
        if isinstance(kind, type) and issubclass(kind, torch.nn.Module):
            made: Any = network(kind, config)
            made.save_pretrained(place / name)
            del made
    torch.set_default_dtype(torch.float32)
    return place


def network(kind: Any, config: Any) -> Any:
    """Return a network of its configuration; T5 with one layer."""
    if issubclass(kind, transformers.PreTrainedModel):
        few = {"num_layers": 1} if config["model_type"] in ("t5", "umt5") else {}
        return kind(kind.config_class(**{**config, **few}))
    return kind.from_config(dict(config))


def settings(name: str, size: str | None, single: bool, tiny: bool) -> list[str]:
    """Return what the recipe is told otherwise; `single`: float32 throughout."""
    sets = {
        **({"dtype": "float32", "train.precision": "no"} if single else {}),
        "train.iterations": ITERATIONS,
        "train.batch": 1,
        "train.global_batch": 1,
        "train.decay": 0,
        "train.checkpoint_every": 1,
        "method.warmup": 0,
        "preview.every": 1000,
        "preview.teacher_steps": 1,
        "preview.prompts": f'["{PROMPTS[0]}"]',
        **({"roles.rank": 4} if tiny else {}),
        **({"warm_start": "null"} if read_recipe(name, [], DistillRecipe).warm_start is not None else {}),
        **({} if size is None or tiny else {"size": size}),
    }
    return [f"{key}={value}" for key, value in sets.items()]


def resident(process: int) -> int:
    """Return the largest resident memory of a process so far, in bytes; 0 once it has ended.

    It includes weights that are pages of their files.
    """
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def watched(command: Sequence[str], log: Path, kill_at: Path | None = None) -> tuple[int, float]:
    """Run a command, and kill it once `kill_at` has a checkpoint.

    Returns the largest resident bytes and the seconds.
    """
    began, peak = time.perf_counter(), 0
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **RELEASE}
    with log.open("a") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env)
        try:
            while process.poll() is None:
                peak = max(peak, resident(process.pid))
                if kill_at is not None and checkpoints(kill_at):
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    return peak, time.perf_counter() - began
                time.sleep(0.1)
        finally:  # a training does not outlive its benchmark
            process.kill()
    if process.returncode or kill_at is not None:
        raise SystemExit(f"{quoted(*command)}: exit {process.returncode}\n{log.read_text()[-3000:]}")
    return peak, time.perf_counter() - began


def planned(recipe: DistillRecipe) -> int:
    """Return the bytes that a training on a CPU is planned to take."""
    (plan,) = plans_of(recipe)
    encoders = sum(module_bytes(e) for e in plan.hollow.teacher.encoders)
    largest = max(phase.bytes for phase in plan.phases if phase not in plan.around.encoders)
    return encoders + largest + plan.training.host


def bytes_of(place: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return sum(f.stat().st_size for f in ([place] if place.is_file() else place.rglob("*")) if f.is_file())


def row(family: str, size: str | None, single: bool, tiny: bool, whole: bool, work: Path) -> Facts:
    """Return one row; not `whole`: of the training alone."""
    teacher = built(family, work, torch.float32 if single else torch.bfloat16, tiny)
    run, log = work / "run", work / "log.txt"
    prompts = work / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n")
    name, sets = f"{family}-tdm4-lora", settings(f"{family}-tdm4-lora", size, single, tiny)
    fewstep = [sys.executable, "-m", "fewstep"]
    command = [*fewstep, "distill", name, "--teacher", str(teacher), "--prompts", str(prompts), "--out", str(run)]
    command += [part for s in sets for part in ("--set", s)]
    floor, _ = watched([sys.executable, "-c", "import fewstep.cli.distill"], log)
    killed_peak, killed_after = watched(command, log, kill_at=run)
    at = checkpoints(run)[-1].name
    peak, resumed_in = watched(command, log)
    files: dict[str, int | None] = {
        "teacher": bytes_of(teacher),
        "checkpoint": bytes_of(checkpoints(run)[-1]),
        "student": bytes_of(run / "final"),
    }
    for form in FORMATS if whole else ():
        out = work / form
        exported = subprocess.run(
            [*fewstep, "export", str(run), str(out), "--format", form], capture_output=True, text=True
        )
        files[form] = bytes_of(out) if exported.returncode == 0 else None
        if exported.returncode:
            print(exported.stderr[-500:], flush=True)
        shutil.rmtree(out, ignore_errors=True)
    image, drawn_in = work / "image.png", None
    if whole:
        _, drawn_in = watched([*fewstep, "sample", str(run), "-p", PROMPTS[0], "-o", str(image)], log)
    recipe = read_recipe(name, sets, DistillRecipe, {"teacher": str(teacher)})
    return {
        "family": family,
        "size": size,
        "numbers": "float32" if single else "bfloat16",
        "tiny": tiny,
        "planned": planned(recipe),
        "peak": max(peak, killed_peak) - floor,
        "imports": floor,
        "killed_at": at,
        "killed_after_s": killed_after,
        "resumed_in_s": resumed_in,
        "drawn_in_s": drawn_in,
        "image": bytes_of(image) if whole else None,
        "files": files,
        **origin(),
    }


def page(record: Record) -> str:
    """Return the page of a record."""
    lines, kept = [], []
    for r in record.rows:
        ratio = r["peak"] / r["planned"]
        sizes = (f"{r[key] / GIB:.2f}" for key in ("planned", "peak"))
        took = (r[key] for key in ("killed_after_s", "resumed_in_s", "drawn_in_s"))
        seconds = ("" if s is None else f"{s:.0f}" for s in took)
        lines.append(
            [
                r["family"],
                r["size"] or "own",
                r["numbers"],
                *sizes,
                f"{ratio:.2f}",
                "yes" if abs(ratio - 1) <= BAR else "no",
                *seconds,
            ]
        )
        kept += [[r["family"], n, "failed" if b is None else f"{b / 2**20:.1f}"] for n, b in r["files"].items()]
    head = [
        "family",
        "pixels",
        "numbers",
        "planned GiB",
        "peak GiB",
        "ratio",
        "within 10 %",
        "killed after s",
        "resumed in s",
        "drawn in s",
    ]
    return f"""# Families at true size on a CPU

{about(__doc__)}

{wrapped(provenance(record))}

{markdown(head, lines)}

{markdown(["family", "files", "MiB"], kept)}
"""


def main() -> None:
    """Measure a family and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "family", choices=[n for n in configurations.PIPELINES if (ROOT / "recipes" / f"{n}-tdm4-lora.yaml").exists()]
    )
    parser.add_argument("--size", help=f"as recipes have it; by default the family's own, or {SIZES}")
    parser.add_argument("--float32", action="store_true", help="also where the CPU has units for bfloat16")
    parser.add_argument("--tiny", action="store_true", help="a tiny pipeline of the family")
    parser.add_argument("--training", action="store_true", help="neither exports nor a drawing")
    parser.add_argument("--work", type=Path, help="folder for the pipeline and the run, deleted afterwards")
    parser.add_argument("--to", type=Path, default=Path(__file__).parent, help="where the table goes")
    a = parser.parse_args()
    rows = [r for r in stored_rows(a.to / "true_size.json") if r["family"] != a.family]
    with tempfile.TemporaryDirectory(dir=a.work) as folder:
        size = None if a.tiny else a.size or SIZES.get(a.family)
        rows.append(row(a.family, size, a.float32 or not has_bfloat16(), a.tiny, not a.training, Path(folder)))
    print(rows[-1], flush=True)
    record = new_record("true_size", "python benchmarks/true_size.py FAMILY", rows, None, {})
    write_record(record, page(record), a.to)


if __name__ == "__main__":
    main()
