"""The teacher's sampling trajectories.

Trajectories are generated in shards that survive an interruption, and are bound to the teacher that generated
them.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..atomic import read_hashed, require_room, write_json, write_tensors
from ..backbones.base import Backbone, Cond, guided, nfe_per_step
from ..backbones.generate import device_of, noise_of, require_seed
from ..config_fields import Range, check_fields, shortened
from ..core import timegrid
from ..core.guidance import Guidance
from ..core.schedule import Schedule
from ..core.solvers import Denoise, State, heun, sample, solver_named
from ..methods.method import TrajectoryBatch
from ..names import require_path
from ..processes import barrier, this_process
from ..reading import read_json, reading, reason, require_regular
from ..transfer import sent
from ..typed import typed
from ..words import speaks_python
from .prompts import Embeddings

RECORD = "trajectories.json"
HEADER = "trajectories"  # key of the same record in each shard's header, so that a shard identifies itself
PROCESS = ("prediction", "schedule")  # keys that are missing in records from before shards had headers
TRAJECTORIES = "trajectories"  # the run's folder of trajectories
OF_STUDENT = "trajectories-of-student"  # the run's folder of a student's trajectories
CURVE_SAMPLES = 64  # trajectories that are kept with all states, for the curve and plots of the curve


@speaks_python("data")
@dataclass(frozen=True, kw_only=True)
class TrajectoryConfig:
    """Which trajectories the student learns from.

    Raises ValueError for invalid settings.
    """

    count: Annotated[int, Range(1)] = 3000
    """Number of trajectories."""

    steps: Annotated[int, Range(1)] = 50
    """Solver steps of each, about: the grid stops at all times of the student."""

    solver: Literal["auto", "heun", "ddim", "dpmpp"] = "auto"
    """Solver of the teacher; `auto` is Heun, or DPM-Solver++ where pure noise holds no signal."""

    guidance: Guidance | None = None
    """The teacher's guidance on its trajectories; by default the method's."""

    seed: int = 0
    """Seed of the first trajectory's noise."""

    student: str | None = None
    """Folder of a finished student that is followed instead of the teacher, in its own steps, for a few NFE
    each."""

    folder: str | None = None
    """Folder that keeps the trajectories, for other runs too; by default one in the run's own."""

    def __post_init__(self) -> None:
        check_fields(self, "data")
        require_seed(self.seed, "data.seed")
        for option, folder in (("data.from_student", self.student), ("data.folder", self.folder)):
            if folder is not None:
                require_path(folder, option)


def union(schedule: Schedule, grids: Sequence[Tensor]) -> Tensor:
    """Return all times of several grids, decreasing, each once."""
    return torch.unique(torch.cat([g.double() for g in grids])).flip(0)


def refine(schedule: Schedule, times: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Return a finer grid that contains all of `times`.

    Returns (a grid of about `steps` steps, the indices of `times` in the grid).
    """
    u = schedule.fraction(times)
    parts, places = [times[:1]], [0]
    for high, low, end in zip(u[:-1], u[1:], times[1:], strict=True):
        n = max(1, round(float(high - low) / float(u[0]) * steps))
        inner = timegrid.time_at(schedule, high + (low - high) * torch.arange(1, n, dtype=torch.float64) / n)
        inner = torch.unique(inner[(inner > end) & (inner < parts[-1][-1])]).flip(0)
        parts.append(torch.cat([inner, end[None]]))
        places.append(places[-1] + len(parts[-1]))
    return torch.cat(parts), torch.tensor(places)


def solver_on(schedule: Schedule, grid: Tensor, solver: str) -> str:
    """Return the solver that `auto` means on this grid.

    Any other solver is returned unchanged.
    """
    if solver != "auto":
        return solver
    return "heun" if float(schedule.alpha(grid[:1])) > 0 else "dpmpp"


def trajectory_nfe(backbone: Backbone, cond: Cond, config: TrajectoryConfig, times: Tensor, guidance: Guidance) -> int:
    """Return the network evaluations (NFE) of one teacher trajectory.

    The trajectory stops at `times`.
    """
    schedule, (grid, _) = backbone.schedule, refine(backbone.schedule, times, config.steps)
    called = grid[:-1] if solver_on(schedule, grid, config.solver) != "heun" else torch.cat([grid[:-1], grid[1:-1]])
    stopped = int(guidance.stopped(schedule, called).sum()) if guidance.stop else 0
    return nfe_per_step(cond, guidance) * (len(called) - stopped) + stopped


def solve(backbone: Backbone, denoise: Denoise, x: Tensor, grid: Tensor, solver: str) -> list[State]:
    """Integrate from x down the grid, and return all states."""
    solver = solver_on(backbone.schedule, grid, solver)
    with torch.no_grad():
        if solver == "heun":
            return list(heun(denoise, backbone.schedule, x, grid))
        return list(sample(denoise, backbone.schedule, x, grid, solver_named(solver)))


@dataclass(frozen=True)
class TrajectorySource:
    """A source of trajectories.

    The source generates states from noise x [B, ...] under a condition, down a `grid [F]`, in `nfe` network
    calls per trajectory. `places [J]` are the indices of the requested times in the grid. `about` identifies
    the source: another source gives other trajectories from the same noise.
    """

    grid: Tensor
    places: Tensor
    nfe: int
    about: Mapping[str, Any]
    states: Callable[[Cond, Tensor], list[State]]


def guided_teacher(
    backbone: Backbone, null: Cond, config: TrajectoryConfig, times: Tensor, guidance: Guidance
) -> TrajectorySource:
    """Return the guided teacher as a source of trajectories.

    The grid has about `config.steps` steps and contains all `times`.
    """
    guidance = config.guidance or guidance
    grid, places = refine(backbone.schedule, times, config.steps)
    about: dict[str, Any] = {"guidance": asdict(guidance), "solver": config.solver}

    def states(cond: Cond, x: Tensor) -> list[State]:
        teacher = guided(backbone, backbone.module, cond, null, guidance)
        return solve(backbone, teacher, x, grid, config.solver)

    return TrajectorySource(grid, places, trajectory_nfe(backbone, null, config, times, guidance), about, states)


def stops(grid: Tensor, times: Tensor) -> Tensor | None:
    """Return the indices of `times` in the grid, or None.

    None means that a time is not in the grid.
    """
    apart = (grid.double()[None] - times.double()[:, None]).abs()
    return apart.argmin(1) if bool((apart.amin(1) < 1e-6 * grid.max()).all()) else None


class Trajectories:
    """The teacher's trajectories with conditions, on the CPU.

    States are [count, J, ...] at `times [J]`, from noise to data. `whole [n, F, ...]` are some trajectories
    with all states of the teacher's own `grid [F]`; `seconds` is the time of generation.
    """

    def __init__(
        self,
        states: Tensor,
        times: Tensor,
        embeddings: Embeddings,
        whole: Tensor,
        grid: Tensor,
        key: str,
        seconds: float = 0.0,
    ) -> None:
        self.states, self.times, self.embeddings, self.key = states, times, embeddings, key
        self.whole, self.grid, self.seconds = whole, grid, seconds

    def draw(self, batch: int, rng: torch.Generator, device: torch.device) -> TrajectoryBatch:
        """Draw a random batch, each trajectory with its own condition."""
        picked = torch.randint(len(self.states), (batch,), generator=rng)
        prompts = tuple(self.embeddings.prompts[i] for i in picked.tolist())
        cond = self.embeddings.at(picked, device)
        return TrajectoryBatch(sent(self.states[picked], device), self.times, cond, prompts)


def generate_trajectories(
    backbone: Backbone,
    data: Embeddings,
    config: TrajectoryConfig,
    times: Tensor,
    source: TrajectorySource,
    folder: Path | None,
    identity: str,
    chunk: int = 32,
) -> Generator[int, None, Trajectories]:
    """Generate `config.count` trajectories, yielding the number so far.

    Trajectories that are in `folder` are not generated again. A folder may grow: a larger set begins with the
    existing trajectories, and a smaller set is the first of them. `identity` names teacher and encoders.
    Several processes each generate a share into the folder and wait for the others, so all processes have to
    call.

    Raises ValueError if the folder holds another teacher's trajectories, or other trajectories of this
    teacher; OSError if the disk has no room.
    """
    device, whole = device_of(backbone.module), torch.empty(0)
    record = {
        "teacher": identity, "shape": list(backbone.shape), "prompts": data.key, **source.about, "count": config.count,
        "seed": config.seed, "times": times.tolist(), "grid": source.grid.tolist(), "chunk": chunk,
        **process_of(backbone, source.grid),
    }  # fmt: skip
    known = TrajectoryRecord(record) if folder is None else _claim(folder, record)
    if folder is not None:
        there = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        require_room(
            folder / RECORD,
            trajectory_bytes(config.count, backbone.shape, len(source.places), len(source.grid)) - there,
        )
    order = torch.randperm(data.count, generator=torch.Generator().manual_seed(config.seed))
    of = order.repeat(-(-config.count // data.count))[: config.count]
    own = data.take(of, data.key)
    shards, seconds = [], 0.0
    processes = 1 if folder is None else this_process().num_processes
    starts = range(0, config.count, chunk)

    def shard_from(start: int) -> dict[str, Tensor]:
        part = slice(start, min(start + chunk, config.count))
        path = None if folder is None else folder / f"trajectories-{start // chunk:05d}.safetensors"
        shard = _read(path, part, known)
        if shard is None:
            cond = own.at(part, device)
            shard = _walked(backbone, source, cond, range(part.start, part.stop), config)
            shard["seconds"] /= processes
            if path is not None:
                write_tensors(path, shard, {HEADER: known.header})
        return shard

    if processes > 1:
        for start in starts[this_process().process_index :: processes]:
            shard_from(start)
            yield min(start + chunk, config.count)
        barrier()
    for start in starts:
        shard = shard_from(start)
        shards.append(shard["states"])
        seconds += float(shard["seconds"])
        whole = torch.cat([whole, shard["whole"]]) if "whole" in shard else whole
        if processes == 1:
            yield min(start + chunk, config.count)
    return Trajectories(torch.cat(shards), times, own, whole, source.grid, known.key, seconds)


def trajectory_bytes(count: int, shape: tuple[int, ...], asked: int, grid: int) -> int:
    """Return the bytes of `count` trajectories on disk.

    States at the `asked` times are stored in single precision, and some trajectories at all times of the
    `grid`.
    """
    return 4 * math.prod(shape) * (count * asked + min(count, CURVE_SAMPLES) * grid)


def run_to_completion(
    walking: Generator[int, None, Trajectories], seen: Callable[[int], None] = lambda done: None
) -> Trajectories:
    """Return what `generate_trajectories` returns.

    `seen` is called with the number of trajectories so far.
    """
    while True:
        try:
            seen(next(walking))
        except StopIteration as end:
            return end.value


def _walked(
    backbone: Backbone, source: TrajectorySource, cond: Cond, samples: range, config: TrajectoryConfig
) -> dict[str, Tensor]:
    """Generate one shard.

    The first shards also hold whole trajectories.
    """
    began = time.perf_counter()
    generators = [torch.Generator().manual_seed(config.seed + i) for i in samples]
    x = noise_of(generators, backbone.shape).to(device_of(backbone.module)) * backbone.schedule.start_std
    with torch.no_grad():
        states = source.states(cond, x)
    shard = {"states": torch.stack([states[i].x.float().cpu() for i in source.places.tolist()], 1)}
    if not _finite(shard):
        who, cure = f"data.solver: {config.solver} led the teacher's", "choose dpmpp, more data.steps"
        if config.student is not None:
            who, cure = f"data.from_student: {config.student} leads", "choose another student"
        raise ValueError(
            f"{who} trajectories {samples.start} to {samples.stop - 1} to numbers that are not finite; "
            f"{cure} or dtype=float32"
        )
    if samples.start < CURVE_SAMPLES:
        shard["whole"] = torch.stack([s.x.float().cpu() for s in states], 1)
    shard["seconds"] = torch.tensor(time.perf_counter() - began)
    return shard


def _fits(shard: Mapping[str, Tensor], record: Mapping[str, Any], start: int) -> bool:
    """Return whether a file holds these trajectories from `start` on."""
    wanted = {"states": len(record["times"])} | ({"whole": len(record["grid"])} if start < CURVE_SAMPLES else {})
    shapes = {k: (shard[k].shape[1:], shard[k].dtype) for k in wanted if k in shard and shard[k].ndim}
    own = {k: ((n, *record["shape"]), torch.float32) for k, n in wanted.items()}
    seconds = shard.get("seconds")
    counts = {len(shard[k]) for k in shapes}
    return (
        shapes == own and len(counts) == 1 and seconds is not None and seconds.numel() == 1 and bool(seconds.isfinite())
    )


def _finite(shard: Mapping[str, Tensor]) -> bool:
    """Return whether all trajectories end in finite states.

    A state that is not finite stays so until the end.
    """
    return bool(shard["states"][:, -1].isfinite().all())


def process_of(backbone: Backbone, times: Tensor) -> dict[str, list[float]]:
    """Return how a network's output is interpreted, as rounded numbers.

    The weights do not say this. The numbers are the row at alpha 0.6 and sigma 0.8, and the schedule's
    (alpha, sigma) at these times. The numbers are rounded because machines differ in the last digit.
    """
    row, schedule = backbone.row(*torch.tensor([0.6, 0.8], dtype=torch.float64)), backbone.schedule
    values = {"prediction": torch.stack(row), "schedule": torch.cat([schedule.alpha(times), schedule.sigma(times)])}
    return {name: [round(v, 6) for v in value.tolist()] for name, value in values.items()}


@dataclass(frozen=True)
class TrajectoryRecord:
    """The record of a set of trajectories.

    `old` marks a folder from before shards had the record in their headers: then the record also holds for
    shards without a header.
    """

    record: Mapping[str, Any]
    old: bool = False

    @property
    def header(self) -> str:
        """The record in a shard's header, without the number of trajectories."""
        return json.dumps({k: v for k, v in self.record.items() if k != "count"}, sort_keys=True)

    @property
    def key(self) -> str:
        """A hash that names these trajectories.

        The hash of an old folder has not changed.
        """
        own = {k: v for k, v in self.record.items() if not (self.old and k in PROCESS)}
        return hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:24]


def _claim(folder: Path, record: Mapping[str, Any]) -> TrajectoryRecord:
    """Check the folder's record, or write the record.

    Without a record, the shards' headers are checked before the record is written.
    """
    path, known = folder / RECORD, TrajectoryRecord(record)
    if path.exists():
        there = read_json(path, f"delete {folder} and run the same command again")
        old = not any(k in there for k in PROCESS)
        _require_same(there, {k: v for k, v in record.items() if not (old and k in PROCESS)}, folder)
        count = there.get("count")
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(
                f"data.folder: {path} is damaged: count is {shortened(count)}, allowed are whole numbers from 1; "
                f"delete {folder} and run the same command again"
            )
        return TrajectoryRecord(record, old)
    for shard in folder.glob("*.safetensors"):  # check before the record is written, which would vouch for the shards
        try:
            about = _about(shard)
        except SafetensorError:
            continue  # truncated by a crash
        _require_own(shard, about, known)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, dict(record))
    return known


def _require_same(there: Mapping[str, Any], record: Mapping[str, Any], place: Path) -> None:
    """Check that a record describes the same trajectories.

    Raises ValueError otherwise; the number of trajectories does not matter.
    """
    if there.get("teacher") != record["teacher"]:
        raise ValueError(
            f"data.folder: the trajectories in {place} are those of teacher {there.get('teacher')}, this is "
            f"{record['teacher']}; choose another folder"
        )
    if odd := [
        k for k in {**record, **there} if k != "count" and there.get(k) != json.loads(json.dumps(record.get(k)))
    ]:
        raise ValueError(
            f"data.folder: the trajectories in {place} were made with another {odd[0]}; "
            "choose another folder, or delete it"
        )


def _about(path: Path) -> dict[str, str]:
    """Return a shard's header.

    Raises SafetensorError for a damaged shard.
    """
    try:
        with safe_open(require_regular(path), "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        raise
    except Exception as error:  # damage raises many types of errors
        raise SafetensorError(reason(error)) from error


def _require_own(path: Path, about: Mapping[str, str], known: TrajectoryRecord) -> None:
    """Check that a shard belongs to these trajectories.

    Raises ValueError if the header names other trajectories, or if a header is missing and the folder's
    record does not vouch for the shard.
    """
    said = about.get(HEADER)
    if said is None and not known.old:
        raise ValueError(
            f"data.folder: {path} does not say whose trajectories it holds, and no {RECORD} speaks for it; "
            "choose another folder, or delete it"
        )
    if said is not None and said != known.header:
        with reading(f"data.folder: what {path} says of itself", "delete it and run the same command again"):
            there = typed(dict[str, Any], json.loads(said))
        _require_same(there, json.loads(known.header), path)


def _read(path: Path | None, part: slice, known: TrajectoryRecord) -> dict[str, Tensor] | None:
    """Read the `part` of the trajectories that a shard holds.

    Returns None for a shard that is missing, damaged or too short. Raises ValueError for a shard of other
    trajectories.
    """
    if path is None or not path.exists():
        return None
    try:
        about = _about(path)
        _require_own(path, about, known)
        shard, _ = read_hashed(path)
    except SafetensorError:
        shard = {}
    count = part.stop - part.start
    if not _fits(shard, known.record, part.start) or not _finite(shard):
        # Truncated, changed, or written before non-finite states were refused: generate the shard again.
        path.unlink()
        return None
    return {k: v[:count] if v.ndim else v for k, v in shard.items()} if len(shard["states"]) >= count else None
