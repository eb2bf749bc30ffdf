"""TrajP-L, its ablations and its rivals where the truth is known: a mixture of Gaussians in 128 dimensions.

    python benchmarks/trajpl.py                    # trains what is missing, then writes benchmarks/trajpl.md and .json
    python benchmarks/trajpl.py --only exact       # one part; --seeds 0 for one seed; --iterations N for another budget

`exact`: the teacher is the closed form, so there is nothing for a LoRA to train and heads stand alone. `network`: a small network that
was trained on draws of the mixture is the teacher, of more trajectories, for LoRA learn 3,000 by heart. `data`: the same with fewer, one seed. One student serves all step counts. The error is `||x - x_teacher|| / ||x_teacher||`
at the end of the trajectory, from the same noise, averaged over trajectories that no student has seen.
`pixel`: the bundled Fashion-MNIST teacher, whose way has 50 steps of DDIM (students learn from 24 of DPM-Solver++), and beside the error Frechet distances of 1,000 pictures
to as many of the test set from Debian's dataset-fashion-mnist: in the features of a small network that tells the set's classes apart, trained here in a minute, and in those of EfficientNet-lite0
(32 components of each). `emoji`: the bundled text-to-image
teacher with guidance 4.5, which students have distilled in and solvers alone go without; FD-efflite0 of 256 names to all real emoji.

Runs that `benchmarks/trajpl.json` holds, made with the same settings, are not run again.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep import Denoiser, PathImitation, PathsConfig
from fewstep.api import load_teacher, path_times, roles_for
from fewstep.atomic import write_json, write_tensors
from fewstep.backbones.base import Backbone, Cond, denoiser, guided, rows
from fewstep.backbones.load import BUNDLED
from fewstep.backbones.toy import Mixture
from fewstep.core import timegrid
from fewstep.core.schedule import EDM, diffuse, expand
from fewstep.core.solvers import Correct, Denoise, Solver, sample, solver_named
from fewstep.evaluation.distances import frechet_distance, moments, principal_components
from fewstep.evaluation.features import feature_network, features
from fewstep.evaluation.plan import plan
from fewstep.evaluation.protocols import protocol_named
from fewstep.evaluation.reference import load_reference
from fewstep.methods.method import student_of
from fewstep.roles.roles import RolesConfig
from fewstep.training.loop import TrainConfig, distill
from fewstep.training.paths import Paths, teacher_paths, to_end, walk
from fewstep.training.prompts import Embeddings, embed, read_prompts
from fewstep.zoo.pixel_data import Pictures, load_idx, read_pixel_data

D, COUNTS, FRESH = 128, (1, 2, 3, 4, 5, 6), 1000
AT_ONCE = 125  # samples
CHUNK = {"pixel": 125, "emoji": 32}  # trajectories that are walked together, where not 500
PROCESS = EDM()


def mixture() -> Mixture:
    """Six modes of standard deviation 0.25 around means drawn from N(0, 0.5^2): two steps of DDIM miss by a good half."""
    return Mixture(0.5 * torch.randn((6, D), generator=torch.Generator().manual_seed(0), dtype=torch.float64), 0.25)


class Exact(nn.Module):
    """The mixture's own denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.mixture, self.scale = mixture(), nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return (self.scale * self.mixture.denoise(PROCESS, x.double(), t.double()).x0).to(x)


class Small(nn.Module):
    """A residual perceptron with EDM's preconditioning; its output is the raw F of `D = c_skip x + c_out F`."""

    def __init__(self, width: int = 256, blocks: int = 4, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.sigma_data = sigma_data
        self.register_buffer("frequencies", torch.logspace(-1, 1, 16))
        self.time = nn.Linear(32, width)
        self.into, self.out = nn.Linear(D, width), nn.Linear(width, D)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)) for _ in range(blocks))  # fmt: skip

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        phase = (t.clamp(min=1e-3).log() / 4)[:, None] * self.get_buffer("frequencies")
        at = self.time(torch.cat([phase.sin(), phase.cos()], 1))
        h = self.into(x / (t.square() + self.sigma_data**2).sqrt()[:, None])
        for block in self.blocks:
            h = h + block(h + at)
        return self.out(h)


def small_teacher(file: Path, steps: int) -> Backbone:
    """Trained once on draws of the mixture, with EDM's weighting and draws of log sigma."""
    torch.manual_seed(0)
    net = Small()
    teacher = Denoiser(net, PROCESS, (D,), "edm", name="small", time_layer="time")
    if file.exists():
        net.load_state_dict(load_file(file))
        return teacher
    data, rng, average = mixture(), torch.Generator().manual_seed(0), {k: v.clone() for k, v in net.state_dict().items()}
    optimizer = torch.optim.AdamW(net.parameters(), 1e-3, weight_decay=0.0)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, 2 * (1 - step / steps))
        x0, eps = data.draw(512, rng).float(), torch.randn((512, D), generator=rng)
        t = (1.2 * torch.randn(512, generator=rng) - 0.6).exp().clamp(0.002, 80).double()
        a, b = teacher.row(PROCESS.alpha(t), PROCESS.sigma(t))
        goal = expand(a, x0) * x0 + expand(b, x0) * eps
        loss = (net(diffuse(PROCESS, x0, t, eps), t.float()) - goal).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for name, value in net.state_dict().items():
                average[name].lerp_(value, 1 - min(0.999, (step + 1) / (step + 10)))
    net.load_state_dict(average)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in average.items()}, file)
    return teacher


@dataclass(frozen=True)
class Student:
    """A way to few steps: settings of the method and of the roles; without training a solver alone."""

    label: str
    method: dict[str, Any] = field(default_factory=dict)
    roles: dict[str, Any] = field(default_factory=dict)
    trained: bool = True
    trajectories: int = 0  # 0: as many as its part has


ALONE = {"rank": 0}
SOLVERS = {name: Student(label, {"solver": name, "head": "none"}, trained=False) for name, label in (("ddim", "DDIM"), ("ipndm", "iPNDM"), ("dpmpp", "DPM-Solver++(2M)"))}  # fmt: skip
HEADS = {"pas": Student("shared weights (PAS)", {"head": "shared"}, ALONE), "head": Student("span head alone", {"head": "span"}, ALONE)}
LORAS = {
    "lora": Student("LoRA alone", {"head": "none"}, {"rank": 8}),
    "trajp-l": Student("LoRA and span head (TrajP-L)", {"head": "span"}, {"rank": 8}),
}
SFD = Student("all weights, no head (SFD)", {"head": "none"}, {"share": False})
PICTURES = {**SOLVERS, **HEADS, **{k: replace(v, roles={"rank": 4}) for k, v in LORAS.items()}, "sfd": SFD}
PARTS: dict[str, dict[str, Student]] = {
    "exact": {**SOLVERS, **HEADS, "head-ipndm": Student("span head on iPNDM", {"head": "span", "solver": "ipndm"}, ALONE)},
    "network": {
        **SOLVERS,
        **HEADS,
        "lora": LORAS["lora"],
        "sfd": SFD,
        "lora-pas": Student("LoRA and shared weights", {"head": "shared"}, {"rank": 8}),
        "trajp-l": LORAS["trajp-l"],
    },
    "data": {
        f"{key}-{n}": replace(student, label=f"{student.label}, {n:,} trajectories", trajectories=n)
        for key, student in (("head", HEADS["head"]), ("trajp-l", LORAS["trajp-l"]))
        for n in (50, 200, 1000, 5000)
    },
    "pixel": PICTURES | {"film": Student("LoRA and FiLM convolution head", {"head": "film"}, {"rank": 4})},
    "emoji": PICTURES,
}


Call = Callable[[int, Cond], Denoise]  # a step count and conditions -> the student that takes it


def in_parts(
    made: Callable[[Cond], Denoise], teacher: Backbone, cond: Cond, noise: Tensor, times: Tensor, solver: Solver, head: Correct | None = None
) -> Tensor:  # fmt: skip
    """The ends of the way from all of `noise`, as many at once as caches like."""
    ends = []
    for start in range(0, len(noise), AT_ONCE):
        own = slice(start, start + AT_ONCE)
        *_, last = sample(made(rows(cond, own)), teacher.schedule, noise[own], times, solver, head)
        ends.append(last.x)
    return torch.cat(ends)


@dataclass(frozen=True)
class Part:
    """A teacher, its trajectories, and what students are compared with: where it ends from `noise`, and real pictures, where there are any."""

    teacher: Backbone
    prompts: tuple[str, ...]
    paths: PathsConfig
    train: TrainConfig
    noise: Tensor
    goal: Tensor
    cond: Cond
    distances: dict[str, Callable[[Tensor], float]] = field(default_factory=dict)  # by the measure's name
    floors: dict[str, float] = field(default_factory=dict)  # of the goal
    guidance: float = 1.0

    def measure(self, call: Call, method: PathImitation, head: Correct | None) -> dict[str, dict[int, float]]:
        """Name of the measure -> step count -> number, lower is better."""
        found: dict[str, dict[int, float]] = {}
        for count in sorted(method.counts):
            times, solver = method.times(self.teacher.schedule, count), solver_named(method.solver)
            ends = in_parts(partial(call, count), self.teacher, self.cond, self.noise, times, solver, head)
            error = (ends - self.goal).flatten(1).norm(dim=1) / self.goal.flatten(1).norm(dim=1)
            found.setdefault("error", {})[count] = float(error.mean())
            for name, distance in self.distances.items():
                found.setdefault(name, {})[count] = distance(ends)
        return found


def mixture_part(teacher: Backbone, count: int, a: argparse.Namespace) -> Part:
    """Fresh noise, and 64 steps of Heun's method from it."""
    noise = PROCESS.t_max * torch.randn((FRESH, D), generator=torch.Generator().manual_seed(10**6))
    goal = walk(teacher, denoiser(teacher, teacher.module, {}), noise, timegrid.uniform(PROCESS, 64), "heun")[-1].x
    train = TrainConfig(a.iterations, a.batch, a.lr, a.lr, decay=a.iterations // 2, ema=0.99)
    return Part(teacher, ("",), PathsConfig(count, 64), train, noise, goal, teacher.encode([""] * FRESH))


def picture_part(
    name: str, teacher: Backbone, guidance: float, train: TrainConfig, paths: PathsConfig, prompts: Sequence[str], asked: Sequence[str], a: argparse.Namespace
) -> Part:  # fmt: skip
    """A teacher of pictures, trained on `prompts`: 50 steps of DDIM for those that are `asked`, which take a while and are kept."""
    noise = torch.randn((len(asked), *teacher.shape), generator=torch.Generator().manual_seed(10**6))
    cond, null, kept = teacher.encode(asked), teacher.encode([""]), a.folder / f"{name}-goal.safetensors"
    if not kept.exists():
        times = timegrid.uniform(teacher.schedule, 50)
        with torch.no_grad():
            ends = in_parts(
                lambda own: guided(teacher, teacher.module, own, null, guidance), teacher, cond, noise, times, solver_named("ddim")
            )
        write_tensors(kept, {"goal": ends})
    return Part(teacher, tuple(prompts), paths, train, noise, load_file(kept)["goal"], cond, guidance=guidance)


def against(part: Part, **distances: Callable[[Tensor], float]) -> Part:
    """The part with pictures to compare with."""
    return replace(part, distances=distances, floors={k: distance(part.goal) for k, distance in distances.items()})


class Classes(nn.Module):
    """Tells the classes of small grey pictures apart, from 64 features."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.SiLU()) for a, b, stride in ((1, 24, 2), (24, 48, 1), (48, 64, 2), (64, 64, 1))),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 64), nn.SiLU(),
        )  # fmt: skip
        self.out = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(x))


def class_features(data: Pictures, file: Path) -> Classes:
    """Trained once, 1,200 steps of batch 128."""
    torch.manual_seed(0)
    net = Classes(len(data.classes))
    if file.exists():
        net.load_state_dict(load_file(file))
        return net.eval().requires_grad_(False)
    rng, steps = torch.Generator().manual_seed(0), 1200
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        chosen = torch.randint(len(data.images), (128,), generator=rng)
        loss = nn.functional.cross_entropy(net(data.images[chosen].float() / 127.5 - 1), data.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    write_tensors(file, net.state_dict())
    return net.eval().requires_grad_(False)


def pixel_part(a: argparse.Namespace) -> Part:
    """Distances to the first pictures of the test set, in principal components of their features."""
    teacher, data = load_teacher("fashion"), read_pixel_data(str(a.pixels))
    classes = data.classes
    train = TrainConfig(a.pixel_iterations, 32, 1e-3, 1e-3, decay=a.pixel_iterations // 2, ema=0.99)
    asked = [classes[i % len(classes)] for i in range(FRESH)]
    part = picture_part("pixel", teacher, 1.0, train, PathsConfig(5000, 24), classes, asked, a)
    network, told = feature_network(), class_features(data, a.folder / "classes.safetensors")
    real = load_idx(a.pixels / "t10k-images-idx3-ubyte.gz")[:FRESH, None].float() / 255
    right = told(2 * real - 1).argmax(1) == load_idx(a.pixels / "t10k-labels-idx1-ubyte.gz")[:FRESH]
    print(f"the network of class features is right about {right.float().mean():.1%} of the test set", flush=True)

    def distance(look: Callable[[Tensor], Tensor]) -> Callable[[Tensor], float]:
        with torch.no_grad():
            seen = look(real.expand(-1, 3, -1, -1))
        basis = principal_components(seen, 32)
        truth = moments(basis(seen))
        return lambda x: frechet_distance(truth, moments(basis(look(teacher.decode(x)))))

    return against(part, fd_classes=distance(lambda p: told.layers(2 * p[:, :1] - 1).double()), fd=distance(partial(features, network)))


def emoji_part(a: argparse.Namespace) -> Part:
    """Distances to all real emoji, of the names that `emoji-medium` asks for."""
    teacher, known, protocol = load_teacher("emoji"), load_reference(), protocol_named("emoji-medium")
    train = TrainConfig(a.emoji_iterations, 32, 1e-3, 1e-3, decay=a.emoji_iterations // 2, ema=0.99)
    asked = plan(protocol, known)
    names = asked.prompts[asked.plain][: a.names]
    part = picture_part(
        "emoji", teacher, 4.5, train, PathsConfig(a.emoji_count, 25), read_prompts(str(BUNDLED / "emoji" / "prompts.txt")), names, a
    )
    network, leading = feature_network(), protocol.components
    truth = moments(known.gallery[:, :leading])
    return against(part, fd=lambda x: frechet_distance(truth, moments(known.embed(features(network, teacher.decode(x)))[:, :leading])))


def make_part(name: str, a: argparse.Namespace) -> Part:
    """By name."""
    if name == "pixel":
        return pixel_part(a)
    if name == "emoji":
        return emoji_part(a)
    if name == "exact":
        return mixture_part(Denoiser(Exact(), PROCESS, (D,), "x0", name="exact"), a.count, a)
    return mixture_part(small_teacher(a.folder / "small.safetensors", a.teacher_steps), a.network_count, a)


def walked(part: Part, data: Embeddings, config: PathsConfig, times: Tensor, folder: Path, name: str) -> Paths:
    """The teacher's trajectories, kept in the folder."""
    return to_end(teacher_paths(part.teacher, data, config, times, part.guidance, folder, name, chunk=CHUNK.get(name, 500)))


def asked_of(student: Student, part: Part) -> dict[str, Any]:
    """Settings that a run must share with one that is kept."""
    train = {k: v for k, v in asdict(part.train).items() if k != "seed"}
    paths = asdict(replace(part.paths, count=student.trajectories or part.paths.count))
    own = (
        {"train": train, "paths": paths, "roles": student.roles, "samples": len(part.noise)}
        if student.trained
        else {"samples": len(part.noise)}
    )
    value: dict[str, Any] = json.loads(json.dumps(own | {"method": student.method}))
    return value


def run(name: str, key: str, student: Student, part: Part, walks: Callable[[], Paths], data: Embeddings, seed: int) -> dict[str, Any]:
    """Train one student on what `walks` gives, and measure it at every count that it serves."""
    teacher, method = part.teacher, PathImitation(**{"steps": COUNTS, "guidance": part.guidance, **student.method})
    about: dict[str, Any] = {"commit": commit(), "hardware": f"{torch.get_num_threads()} CPU threads"}
    about |= {"part": name, "key": key, "label": student.label, "seed": seed, "teacher": part.floors, "asked": asked_of(student, part)}
    if not student.trained:
        with torch.no_grad():
            measured = part.measure(lambda _, cond: denoiser(teacher, teacher.module, cond), method, None)
        return about | {"measured": measured, "seconds": 0.0, "trained": 0, "share": 0.0}
    paths = walks()
    roles = roles_for(teacher, method, RolesConfig(**student.roles), seed, paths)
    began = time.perf_counter()
    for step in distill(roles, method, data, replace(part.train, seed=seed), paths=paths):
        if step.iteration % 100 == 0:
            print(f"{name} {key}-{seed} {step.iteration}/{part.train.iterations} {time.perf_counter() - began:.0f} s", flush=True)
    seconds = time.perf_counter() - began
    with roles.averaged(), torch.no_grad():
        measured = part.measure(lambda count, cond: student_of(method, roles, cond, count), method, roles.head)
    trained = sum(p.numel() for p in roles.trained["student"].values())
    share = trained / sum(p.numel() for n, p in teacher.module.named_parameters() if "lora_" not in n)
    return about | {"measured": measured, "seconds": seconds, "trained": trained, "share": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS), help="parts to run")
    parser.add_argument("--keys", nargs="*", default=None, help="students to run")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--count", type=int, default=3000, help="trajectories of the mixture")
    parser.add_argument("--network-count", type=int, default=20000, help="trajectories of the small network")
    parser.add_argument("--teacher-steps", type=int, default=6000, help="training steps of the small network")
    parser.add_argument("--pixels", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--pixel-iterations", type=int, default=350)
    parser.add_argument("--emoji-iterations", type=int, default=300)
    parser.add_argument("--emoji-count", type=int, default=1024, help="trajectories of the text-to-image teacher")
    parser.add_argument("--names", type=int, default=256, help="names of emoji whose pictures are measured")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-trajpl"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    a = parser.parse_args()
    for name in a.only:
        part = make_part(name, a)
        data = embed(part.teacher, list(part.prompts), None, name)
        times = path_times(PathImitation(steps=COUNTS), part.teacher)
        for key, student in PARTS[name].items():
            if a.keys and key not in a.keys:
                continue
            config, folder = part.paths, a.folder / name
            if student.trajectories:
                config, folder = replace(config, count=student.trajectories), a.folder / f"{name}-{student.trajectories}"
            walks = partial(walked, part, data, config, times, folder, name)
            for seed in a.seeds if student.trained and not student.trajectories else a.seeds[:1]:
                row = kept(a).get((name, key, seed))
                if row is None or row["asked"] != asked_of(student, part):
                    row = run(name, key, student, part, walks, data, seed)
                    write(list((kept(a) | {(name, key, seed): row}).values()), a)
                for measure, numbers in row["measured"].items():
                    print(name, key, seed, measure, {k: round(v, 4) for k, v in numbers.items()}, f"{row['seconds']:.0f} s", flush=True)
    write(list(kept(a).values()), a)


def kept(a: argparse.Namespace) -> dict[tuple[str, str, int], dict[str, Any]]:
    """(part, key, seed) -> the run that the table holds, which another process may have put there."""
    table = a.out / "trajpl.json"
    return {(r["part"], r["key"], r["seed"]): r for r in (json.loads(table.read_text())["rows"] if table.exists() else [])}


def commit() -> str:
    """Of this project."""
    return subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()


def write(results: list[dict[str, Any]], a: argparse.Namespace) -> None:
    """`trajpl.json` with every run, and `trajpl.md` with means and deviations over seeds."""
    command = shlex.join(["python", "benchmarks/trajpl.py", *sys.argv[1:]])
    results = json.loads(json.dumps(results))  # step counts are names in json
    order = [(part, key) for part, students in PARTS.items() for key in students]
    results = sorted((r for r in results if (r["part"], r["key"]) in order), key=lambda r: (order.index((r["part"], r["key"])), r["seed"]))
    write_json(a.out / "trajpl.json", {"rows": results, "command": command})
    lines = ["# TrajP-L", "", (__doc__ or "").split("\n\n")[2].strip(), ""]
    for name in dict.fromkeys(r["part"] for r in results):
        rows = [r for r in results if r["part"] == name]
        lines += [f"## Teacher: {name}", ""]
        for measure in rows[0]["measured"]:
            lines += [*_table(rows, PARTS[name], measure, trained=name != "exact"), ""]
        lines += [f"Seeds {', '.join(sorted({str(r['seed']) for r in rows if r['trained']}))}; {', '.join(sorted({r['hardware'] for r in rows}))}; commit {', '.join(sorted({r['commit'] for r in rows}))}: `python benchmarks/trajpl.py --only {name}`.", ""]  # fmt: skip
    (a.out / "trajpl.md").write_text("\n".join(lines))


def _table(rows: list[dict[str, Any]], students: dict[str, Student], measure: str, trained: bool) -> list[str]:
    """One measure of one part: its students' means over seeds. Of distances also the teacher's, and at two steps the share of DDIM's excess over it."""
    counts = list(rows[0]["measured"][measure])
    titles = {
        "error": "relative error of the end",
        "fd": "FD-efflite0 to real pictures",
        "fd_classes": "FD to real pictures, features of a classifier",
    }
    head = [titles[measure], "trained weights", "seconds", *(f"{k} NFE" for k in counts)]
    lines, floor = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"], rows[0]["teacher"].get(measure)
    ddim = next((r["measured"][measure]["2"] for r in rows if r["key"] == "ddim"), None) if floor is not None else None
    for key, student in students.items():
        if own := [r for r in rows if r["key"] == key]:
            weights = f"{own[0]['trained']}" + (f" ({own[0]['share']:.1%})" if own[0]["trained"] and trained else "")
            cells = [_cell([r["measured"][measure][k] for r in own]) if k in own[0]["measured"][measure] else "" for k in counts]
            if ddim is not None and floor is not None:
                cells[counts.index("2")] += f" ({statistics.mean((r['measured'][measure]['2'] - floor) / (ddim - floor) for r in own):.1%})"
            seconds = f"{statistics.mean(r['seconds'] for r in own):.0f}"
            lines.append(f"| {' | '.join([student.label, weights, seconds, *cells])} |")
    if floor is not None:
        lines += ["", f"The teacher's 50 steps: {floor:.3f}. In brackets: what is left of DDIM's excess over it at two steps."]
    return lines


def _cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
