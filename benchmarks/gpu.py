"""Measure on a GPU what only a GPU shows, stage by stage.

    python benchmarks/gpu.py                          # every stage, the worthiest first; writes gpu.md and .json
    python benchmarks/gpu.py --only sd15 resume       # these stages alone; the rows of the others are kept
    python benchmarks/gpu.py --tiny --out /tmp/gpu    # rehearses every stage on a CPU, in a minute

The networks have their true size and random weights, conditions are random tensors of the true shapes, and nothing is
fetched. TDM in 4 steps with a guided teacher, LoRA of rank 32, bfloat16, checkpointing as in the recipes. `bare` are
the network calls of an iteration and nothing else, made after it with the segments that it drew; both are the mean of
several iterations, and `ratio` is iteration over bare. Reads are counted by torch: whatever the CPU waits for in an
iteration. `peak` is what tensors took, `reserved` what the allocator took from the card, `plan` what `memory.json`
counts without a GPU. Limits: a ratio of 1.10, 3 reads, and the memory of the card that a recipe is made for.

Stages:

- `tests`: the tests marked `gpu`.
- `sd15`: Stable Diffusion 1.5 at 512 as its recipe has it, without checkpointing, compiled, without channels_last, and
  with deterministic algorithms.
- `sdxl`: SDXL at 1024, in the batch of its recipe and in the plan's, with an allocator that gives no more than 24 GiB.
- `pixart`, `cogvideox`: PixArt-alpha at 1024 in both batches, CogVideoX-2B with 49 frames of 480x720.
- `flux2`, `wan`: FLUX.2-klein-4B at 1024, Wan 2.1-1.3B with 81 frames of 832x480.
- `resume`: a training of SD 1.5 is killed and resumed, and compared with one that was not: bit for bit with
  `train.deterministic`, to rounding without.
- `teacher`: the training of a teacher like the bundled one, four times as wide.

A stage runs in its own process, so a failed one takes nothing with it, and rows are written as they come. No stage
takes longer than its limit, all together no longer than `--seconds`. On another machine: a checkout, the packages of
`pip install -e .[dev]`, and `PYTHONPATH=src`.
"""

import argparse
import gc
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import backbones
from fewstep.backbones import miniature
from fewstep.backbones.base import Backbone
from fewstep.backbones.load import around, at_size
from fewstep.backbones.parts import default_dtype
from fewstep.core import timegrid
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.roles.roles import RolesConfig, make_roles
from fewstep.training import loop
from fewstep.training.fit import FitConfig, fit
from fewstep.training.loop import TrainConfig, distill
from fewstep.training.precision import FIXED, WORKSPACE, computing
from fewstep.training.state import checkpoints
from records import (
    Facts,
    Record,
    about,
    markdown,
    new_record,
    origin,
    provenance,
    stored_rows,
    wrapped,
    write_record,
)
from step_cost import bare

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
METHOD = DistributionMatching(steps=4, warmup=0)
CHECKPOINTED, KEPT = "one base, checkpointing", "one base"
RECIPES_BATCH = 4  # of SDXL and PixArt
CARDS = {"sd15": 10, "sdxl": 24, "pixart": 16, "cogvideox": 40, "flux2": 24, "wan": 24}  # GB that a LoRA is to fit
PLANNED = {"flux2": "flux2-klein-4b", "wan": "wan21"}  # names in memory.json, where they are others
MOST_RATIO, MOST_READS = 1.10, 3
READY = "ready"  # file of a training that waits to be killed
WARM_UP, MEASURED = 2, 5  # iterations
STOP, END = 2, 4  # iterations: the checkpoint that a killed training leaves, and its end


@dataclass(frozen=True)
class Place:
    """Where a stage runs. `tiny` is a rehearsal on a CPU."""

    device: torch.device
    tiny: bool

    @property
    def dtype(self) -> torch.dtype:
        """The type of the frozen weights."""
        return torch.float32 if self.tiny else torch.bfloat16

    def config(self, iterations: int, batch: int) -> TrainConfig:
        """Return the settings of a training."""
        batch = min(batch, 2) if self.tiny else batch
        return TrainConfig(iterations=iterations, batch=batch, lr=1e-6, fake_lr=1e-6, precision="bf16")


def built(name: str, place: Place) -> Backbone:
    """Return a family's backbone, made on the device with random weights."""
    with torch.device(place.device), default_dtype(place.dtype):
        pipe = tiny_pipeline(name) if place.tiny else backbones.FAMILIES[name].build(False)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # its table is needed on the CPU
    for part in (pipe.vae, pipe.unet if "unet" in pipe.components else pipe.transformer):
        part.requires_grad_(False).eval()
    return at_size(around(pipe, name), pipelines().SIZES.get(name) if place.tiny else None)


def tiny_pipeline(name: str) -> Any:
    """Return the pipeline of the family with which the tests work."""
    return pipelines().FAMILIES[{"sd15": "sd"}.get(name, name)]()


def pipelines() -> Any:
    """Return the module of the tests' tiny pipelines."""
    sys.path.append(str(ROOT))
    try:
        from tests import pipelines as module
    finally:
        sys.path.remove(str(ROOT))
    return module


def trained(
    name: str,
    case: str,
    place: Place,
    batch: int | None = None,
    checkpointing: bool = True,
    compile: bool = False,
    deterministic: bool = False,
) -> Facts:
    """Return one row: iterations of a family's training beside their bare calls, by role, in seconds and in memory."""
    torch.manual_seed(0)
    device, (warm_up, repeats) = place.device, (1, 1) if place.tiny else (WARM_UP, MEASURED)
    fresh(device)
    backbone = built(name, place)
    roles = make_roles(backbone, RolesConfig(rank=4 if place.tiny else 32, checkpointing=checkpointing))
    config = place.config(warm_up + repeats + 1, batch or backbones.FAMILIES[name].batch)
    config = replace(config, compile=compile, deterministic=deterministic)
    data = backbones.embeddings(name, backbone, place.dtype, 8)
    cond, null = data.draw(config.batch, torch.Generator().manual_seed(0), device), data.unconditional(device)
    segments: list[Tensor] = []
    draw = timegrid.draw_segments

    def drawn(*arguments: Any) -> Tensor:
        segments.append(draw(*arguments))
        return segments[-1]

    def same_calls() -> None:
        with computing(config.precision, device, roles, config.deterministic):
            bare(roles, METHOD, cond, null, config.batch, segments[-1].cpu())

    found: dict[str, list[float]] = {"seconds": [], "bare": []}
    began = backbones.clock(device)
    with mock.patch.object(timegrid, "draw_segments", drawn):
        steps = distill(roles, METHOD, data, config)
        for i in range(warm_up + repeats):
            start = backbones.clock(device)
            next(steps)
            middle = backbones.clock(device)
            if i == warm_up - 1:
                ready, (peak, reserved) = middle - began, peak_of(device)
            if i >= warm_up:
                found["seconds"].append(middle - start)
            if i >= warm_up - 1:  # the first is not counted: kernels are tried
                same_calls()
                found["bare"].append(backbones.clock(device) - middle)
        with waits(device) as waited:
            next(steps)
        steps.close()
    with computing(config.precision, device, roles, config.deterministic):
        split = backbones.by_role(roles, data, config.batch, device, 1 if place.tiny else 2)
    seconds, calls = (sum(own) / len(own) for own in (found["seconds"], found["bare"][1:]))
    return {
        "stage": name,
        "case": case,
        "shape": list(backbone.shape),
        "batch": config.batch,
        "seconds": seconds,
        "bare": calls,
        "ratio": seconds / calls,
        "first": ready,
        "roles": split,
        "reads": len(waited),
        "read_at": waited,
        "peak": peak,
        "reserved": reserved,
        "plan": None if place.tiny else planned(name, config.batch, CHECKPOINTED if checkpointing else KEPT),
    }


def planned(name: str, batch: int, arrangement: str) -> int | None:
    """Return the bytes that were counted without a GPU, None for a batch that was not."""
    rows = stored_rows(Path(__file__).with_name("memory.json"))
    wanted = PLANNED.get(name, name), batch, arrangement
    same = [r for r in rows if "arrangement" in r and (r["family"], r["batch"], r["arrangement"]) == wanted]
    return same[0]["total"] if same else None


def peak_of(device: torch.device) -> tuple[int | None, int | None]:
    """Return the most bytes that tensors and the allocator took so far, None where no device counts them."""
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


@contextmanager
def waits(device: torch.device) -> Iterator[list[str]]:
    """Yield a list of the places where the CPU waits for the device in the block, filled at its end."""
    found: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    found += [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


# Stages: each yields rows.


def marked_tests(place: Place) -> Iterator[Facts]:
    """Run the tests marked `gpu`; in a rehearsal one of them."""
    some = ["-k", "not_finite and True", "--rehearse"] if place.tiny else []
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *some, "tests/training"]
    if place.tiny:
        command[-1] += "/test_on_gpu.py"
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {WORKSPACE: FIXED[0]}, capture_output=True, text=True)
    print(done.stdout[-4000:], done.stderr[-2000:], sep="\n", flush=True)
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout[-300:])}
    failed = re.findall(r"^(?:FAILED|ERROR) (.+)$", done.stdout, re.MULTILINE)
    yield {"stage": "tests", "case": "marked gpu", "counts": counts, "failed": failed}


def sd15(place: Place) -> Iterator[Facts]:
    """Train Stable Diffusion 1.5 in the ways that a GPU may do faster or slower."""
    cases: dict[str, Callable[[str], Facts]] = {
        "as its recipe": lambda case: trained("sd15", case, place),
        "without checkpointing": lambda case: trained("sd15", case, place, checkpointing=False),
        "compiled": lambda case: trained("sd15", case, place, compile=not place.tiny),
        "without channels_last": lambda case: trained("sd15", case, place),
        "deterministic": lambda case: trained("sd15", case, place, deterministic=True),
    }
    for case, run in cases.items():
        contiguous = case == "without channels_last"
        with mock.patch.object(loop, "lay_out") if contiguous else nullcontext():
            yield run(case)


def sdxl(place: Place) -> Iterator[Facts]:
    """Train SDXL on no more than 24 GiB of the card."""
    if place.device.type == "cuda":
        whole = torch.cuda.get_device_properties(place.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 24 * GIB / whole), place.device)
    yield from in_both_batches("sdxl", place)


def pixart(place: Place) -> Iterator[Facts]:
    """Train PixArt-alpha."""
    yield from in_both_batches("pixart", place)


def in_both_batches(name: str, place: Place) -> Iterator[Facts]:
    """Train a family in the batch of its recipe, and in that whose memory was counted."""
    yield trained(name, "as its recipe", place, batch=RECIPES_BATCH)
    if not place.tiny:
        yield trained(name, "batch of the plan", place)


def cogvideox(place: Place) -> Iterator[Facts]:
    """Train CogVideoX-2B on clips of true length."""
    yield trained("cogvideox", "as its recipe", place)


def flux2(place: Place) -> Iterator[Facts]:
    """Train FLUX.2-klein-4B on images of 1024 pixels."""
    yield trained("flux2", "batch of the plan", place)


def wan(place: Place) -> Iterator[Facts]:
    """Train Wan 2.1-1.3B on clips of true length."""
    yield trained("wan", "as its recipe", place)


def resume(place: Place) -> Iterator[Facts]:
    """Kill a training, resume it, and compare it with one that was not killed."""
    for deterministic in (True,) if place.tiny else (True, False):
        with tempfile.TemporaryDirectory() as folder:
            straight, killed = Path(folder) / "straight", Path(folder) / "killed"
            train_to(straight, END, deterministic, place)
            began = time.perf_counter()
            train_and_kill(killed, deterministic, place)
            kept = int(checkpoints(killed)[-1].name[-6:])
            train_to(killed, END, deterministic, place)
            equal, largest = compared(straight, killed)
        yield {
            "stage": "resume",
            "case": "deterministic" if deterministic else "by default",
            "killed_after": kept,
            "equal": equal,
            "difference": largest,
            "seconds": time.perf_counter() - began,
        }


def train_to(run: Path, iterations: int, deterministic: bool, place: Place, wait_at: int | None = None) -> None:
    """Train SD 1.5 up to an iteration, from the newest checkpoint in `run`.

    After the iteration `wait_at` it stands still, to be killed.
    """
    torch.manual_seed(0)
    backbone = built("sd15", place)
    roles = make_roles(backbone, RolesConfig(rank=4 if place.tiny else 32, checkpointing=True))
    config = replace(place.config(iterations, 4), deterministic=deterministic, checkpoint_every=STOP, lr=1e-4)
    data = backbones.embeddings("sd15", backbone, place.dtype, 8)
    for step in distill(roles, METHOD, data, config, run):
        if step.iteration == wait_at:
            (run / READY).touch()
            time.sleep(600)


def train_and_kill(run: Path, deterministic: bool, place: Place) -> None:
    """Train in another process, and kill it in the iteration after a checkpoint's."""
    options = [*(["--tiny"] if place.tiny else []), *(["--deterministic"] if deterministic else [])]
    with subprocess.Popen([sys.executable, str(Path(__file__).resolve()), "--train", str(run), *options]) as process:
        while process.poll() is None and not (run / READY).exists():
            time.sleep(0.05)
        process.kill()
    if not (run / READY).exists():
        raise RuntimeError("the training that was to be killed ended by itself")


def compared(one: Path, other: Path) -> tuple[bool, float]:
    """Return whether two runs' last checkpoints are equal, and the largest difference over the largest weight."""
    worst, same = 0.0, True
    for file in sorted(checkpoints(one)[-1].glob("*.safetensors")):
        a, b = load_file(file), load_file(checkpoints(other)[-1] / file.name)
        for name, tensor in a.items():
            gap = (tensor.double() - b[name].double()).abs().max()
            worst = max(worst, float(gap / tensor.double().abs().max().clamp(min=1e-30)))
            same = same and torch.equal(tensor, b[name])
    return same, worst


def teacher(place: Place) -> Iterator[Facts]:
    """Train all weights of a wide teacher on random latents."""
    torch.manual_seed(0)
    wide, size, batch, steps = ((16, 32), 8, 4, 4) if place.tiny else ((512, 768), 16, 256, 30)
    with torch.device(place.device):
        net = miniature.unet(wide, (False, True), 16, size, 192)
        average = miniature.unet(wide, (False, True), 16, size, 192).requires_grad_(False)
        rng = torch.Generator(place.device).manual_seed(0)
        x = torch.randn(batch, 16, size, size, generator=rng, device=place.device)
        text = torch.randn(batch, 24, 192, generator=rng, device=place.device)
        times = torch.randint(1000, (batch,), generator=rng, device=place.device)

    def loss(step: int) -> Tensor:
        with torch.autocast(place.device.type, torch.bfloat16):
            found = net(x, times, text)[0]
        return F.mse_loss(found.float(), x)

    with tempfile.TemporaryDirectory() as folder:
        config = FitConfig(steps=steps, batch=batch, lr=1e-4, checkpoint_every=10**6, bf16=True, optimizer="muon")
        found = []
        for _ in fit(net, average, loss, config, Path(folder)):
            found.append(backbones.clock(place.device))
            if len(found) == steps - 1:
                break
    seconds = min(b - a for a, b in pairwise(found))
    peak, reserved = peak_of(place.device)
    yield {
        "stage": "teacher",
        "case": f"{parameters(net) / 1e6:.0f}M parameters, Muon",
        "batch": batch,
        "seconds": seconds,
        "images_per_second": batch / seconds,
        "peak": peak,
        "reserved": reserved,
    }


def parameters(network: nn.Module) -> int:
    """Return the number of a network's parameters."""
    return sum(p.numel() for p in network.parameters())


def fresh(device: torch.device) -> None:
    """Free the device's memory, and count its peak anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


@dataclass(frozen=True)
class Stage:
    """A part of the benchmark, and the seconds that it may take."""

    rows: Callable[[Place], Iterator[Facts]]
    limit: int


STAGES = {
    "tests": Stage(marked_tests, 150),
    "sd15": Stage(sd15, 200),
    "sdxl": Stage(sdxl, 120),
    "resume": Stage(resume, 120),
    "pixart": Stage(pixart, 90),
    "cogvideox": Stage(cogvideox, 150),
    "flux2": Stage(flux2, 120),
    "wan": Stage(wan, 150),
    "teacher": Stage(teacher, 60),
}


# The record and its page.


def kept(out: Path) -> list[Facts]:
    """Return the rows so far: those in `out`, or else those of the repository."""
    return stored_rows(out / "gpu.json") or stored_rows(Path(__file__).with_name("gpu.json"))


def keep(rows: Sequence[Facts], out: Path) -> None:
    """Write the record and its page."""
    order = list(STAGES)
    rows = sorted(rows, key=lambda r: order.index(r["stage"]))
    record = new_record("gpu", "python benchmarks/gpu.py", rows, [0], {})
    write_record(record, page(record), out)


def run_stage(name: str, place: Place, out: Path) -> None:
    """Run one stage in this process, and write each row as it comes."""
    rows = [r for r in kept(out) if r["stage"] != name]
    for own in STAGES[name].rows(place):
        rows.append(origin() | own)
        print(own, flush=True)
        keep(rows, out)
    fresh(place.device)


def run_apart(name: str, out: Path, limit: float) -> None:
    """Run one stage in a process of its own; if it fails, that becomes its last row."""
    command = [sys.executable, str(Path(__file__).resolve()), "--only", name, "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            said = process.communicate(timeout=limit)[1].strip()
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that the stage started
            said = f"took longer than {limit:.0f} s"
    if process.returncode != 0:
        print(said[-2000:], flush=True)
        error = (said.splitlines() or [f"exit code {process.returncode}"])[-1][:300]
        keep([*kept(out), origin() | {"stage": name, "case": "failed", "error": error}], out)


def gib(found: int | None) -> str:
    """Return bytes as GiB."""
    return "-" if found is None else f"{found / GIB:.2f}"


def page(record: Record) -> str:
    """Return the page of a record."""
    timed = [r for r in record.rows if "ratio" in r]
    lines = []
    for r in timed:
        lines.append([
            r["stage"], "x".join(map(str, r["shape"])), r["batch"], r["case"], f"{r['seconds']:.3f}",
            f"{r['bare']:.3f}", f"{r['ratio']:.2f}", r["reads"], gib(r["peak"]), gib(r["plan"]), gib(r["reserved"]),
            CARDS[r["stage"]], f"{r['first']:.0f}", ", ".join(f"{k} {v:.3f}" for k, v in r["roles"].items()),
        ])  # fmt: skip
    head = ["family", "state", "batch", "case", "iteration, s", "bare calls, s", f"ratio (at most {MOST_RATIO:.2f})"]
    head += [f"reads (at most {MOST_READS})", "peak, GiB", "plan, GiB", "reserved, GiB", "card, GB"]
    head += ["first two iterations, s", "a call of each role, s"]
    others = [[r["stage"], r["case"], said(r)] for r in record.rows if "ratio" not in r]
    return f"""# What a GPU shows

{about(__doc__)}

{wrapped(f"{provenance(record)}.")}

{markdown(head, lines)}

{markdown(["stage", "case", "result"], others)}
"""


def said(row: Facts) -> str:
    """Return what a stage without iterations found, in words."""
    if "error" in row:
        return f"failed: {row['error']}"
    if row["stage"] == "tests":
        return ", ".join([*(f"{n} {kind}" for kind, n in row["counts"].items()), *row["failed"]])
    if row["stage"] == "resume":
        equal = "bit for bit" if row["equal"] else f"differs by {row['difference']:.1e} of the largest weight"
        return f"killed after {row['killed_after']}, resumed to {END}: {equal}"
    memory_taken = f", {gib(row['peak'])} GiB" if row["peak"] is not None else ""
    return f"batch {row['batch']}: {row['seconds']:.4f} s, {row['images_per_second']:.0f} samples/s{memory_taken}"


def main() -> None:
    """Run the stages that were asked for, or one training that will be killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(STAGES), default=None, help="default: all")
    parser.add_argument("--tiny", action="store_true", help="rehearse on a CPU with the tests' tiny networks")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the table goes")
    parser.add_argument("--seconds", type=float, default=780, help="of all stages together")
    parser.add_argument("--train", type=Path, default=None, help=argparse.SUPPRESS)  # the process that `resume` kills
    parser.add_argument("--deterministic", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    os.environ.setdefault(WORKSPACE, FIXED[0])  # cuBLAS reads it when it starts
    place = Place(torch.device("cpu" if a.tiny else "cuda"), a.tiny)
    names = a.only or list(STAGES)
    if a.train is not None:
        train_to(a.train, END, a.deterministic, place, wait_at=STOP + 1)
        return
    if not a.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here; rehearse with --tiny")
    if a.tiny and a.out == parser.get_default("out"):
        parser.error("--out: a rehearsal does not belong in benchmarks/; choose another folder, e.g. --out /tmp/gpu")
    if a.tiny or len(names) == 1:
        for name in names:
            run_stage(name, place, a.out)
        return
    began = time.monotonic()
    for name in names:
        left = a.seconds - (time.monotonic() - began)
        if left < 20:
            print(f"{name} and what follows: no time left", flush=True)
            return
        run_apart(name, a.out, min(left, STAGES[name].limit))


if __name__ == "__main__":
    main()
