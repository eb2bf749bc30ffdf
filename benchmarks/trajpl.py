"""TrajP-L, its ablations and its rivals where the truth is known: a mixture of Gaussians in 128 dimensions.

    python benchmarks/trajpl.py                    # trains what is missing, then writes benchmarks/trajpl.md and .json
    python benchmarks/trajpl.py --only exact       # one part; --seeds 0 for one seed; --iterations N for another budget

`exact`: the teacher is the closed form, so there is nothing for a LoRA to train and heads stand alone. `network`: a small network that
was trained on draws of the mixture is the teacher. One student serves all step counts. The error is `||x - x_teacher|| / ||x_teacher||`
at the end of the trajectory, from the same noise, averaged over trajectories that no student has seen.
"""

import argparse
import json
import statistics
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep import Denoiser, PathImitation, PathsConfig
from fewstep.api import path_times, roles_for
from fewstep.atomic import write_json
from fewstep.backbones.base import Backbone, denoiser
from fewstep.backbones.toy import Mixture
from fewstep.core import timegrid
from fewstep.core.schedule import EDM, diffuse, expand
from fewstep.core.solvers import Correct, Denoise, sample, solver_named
from fewstep.methods.method import student_of
from fewstep.roles.roles import RolesConfig
from fewstep.training.loop import TrainConfig, distill
from fewstep.training.paths import Paths, teacher_paths, to_end, walk
from fewstep.training.prompts import embed

D, COUNTS, FRESH = 128, (1, 2, 3, 4, 5, 6), 1000
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


ALONE = {"rank": 0}
SOLVERS = {name: Student(label, {"solver": name, "head": "none"}, trained=False) for name, label in (("ddim", "DDIM"), ("ipndm", "iPNDM"), ("dpmpp", "DPM-Solver++(2M)"))}  # fmt: skip
HEADS = {"pas": Student("shared weights (PAS)", {"head": "shared"}, ALONE), "head": Student("span head alone", {"head": "span"}, ALONE)}
PARTS: dict[str, dict[str, Student]] = {
    "exact": {**SOLVERS, **HEADS, "head-ipndm": Student("span head on iPNDM", {"head": "span", "solver": "ipndm"}, ALONE)},
    "network": {
        **SOLVERS,
        **HEADS,
        "lora": Student("LoRA alone", {"head": "none"}, {"rank": 8}),
        "sfd": Student("all weights, no head (SFD)", {"head": "none"}, {"share": False}),
        "lora-pas": Student("LoRA and shared weights", {"head": "shared"}, {"rank": 8}),
        "trajp-l": Student("LoRA and span head (TrajP-L)", {"head": "span"}, {"rank": 8}),
    },
}


def errors_of(
    denoise: Denoise, method: PathImitation, head: Correct | None, fresh: tuple[Tensor, Tensor], counts: tuple[int, ...] = COUNTS
) -> dict[int, float]:
    """Mean relative error at the end of fresh trajectories, by step count."""
    noise, goal = fresh
    with torch.no_grad():
        ends = {k: list(sample(denoise, PROCESS, noise, method.times(PROCESS, k), solver_named(method.solver), head))[-1].x for k in counts}
    return {k: float(((x - goal).norm(dim=1) / goal.norm(dim=1)).mean()) for k, x in ends.items()}


def run(key: str, student: Student, teacher: Backbone, paths: Paths, fresh: tuple[Tensor, Tensor], seed: int, a: argparse.Namespace) -> dict[str, Any]:  # fmt: skip
    """Train one student, and measure it at every step count."""
    method = PathImitation(steps=COUNTS, guidance=1.0, **student.method)
    if not student.trained:
        errors = errors_of(denoiser(teacher, teacher.module, {}), method, None, fresh)
        return {"key": key, "label": student.label, "seed": seed, "errors": errors, "seconds": 0.0, "trained": 0, "share": 0.0}
    roles = roles_for(teacher, method, RolesConfig(**student.roles), seed, paths)
    settings = TrainConfig(a.iterations, a.batch, a.lr, a.lr, ema=0.99, seed=seed)
    began = time.perf_counter()
    for step in distill(roles, method, embed(teacher, [""], None, ""), settings, paths=paths):
        if step.iteration % 500 == 0:
            print(f"{key}-{seed} {step.iteration}/{a.iterations} {time.perf_counter() - began:.0f} s", flush=True)
    seconds = time.perf_counter() - began
    with roles.averaged():
        errors = {}
        for count in COUNTS:
            errors |= errors_of(student_of(method, roles, {}, count), method, roles.head, fresh, (count,))
    trained = sum(p.numel() for p in roles.trained["student"].values())
    share = trained / sum(p.numel() for p in teacher.module.parameters())
    return {"key": key, "label": student.label, "seed": seed, "errors": errors, "seconds": seconds, "trained": trained, "share": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=list(PARTS), help="parts to run")
    parser.add_argument("--keys", nargs="*", default=None, help="students to run")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--count", type=int, default=3000, help="trajectories")
    parser.add_argument("--teacher-steps", type=int, default=6000, help="training steps of the small network")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-trajpl"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    a = parser.parse_args()
    results = []
    for part in a.only:
        teacher: Backbone = Denoiser(Exact(), PROCESS, (D,), "x0", name="exact") if part == "exact" else small_teacher(a.folder / "small.safetensors", a.teacher_steps)  # fmt: skip
        times = path_times(PathImitation(steps=COUNTS), teacher)
        paths = to_end(
            teacher_paths(teacher, embed(teacher, [""], None, ""), PathsConfig(a.count, 64), times, 1.0, a.folder / part, part, chunk=500)
        )
        noise = PROCESS.t_max * torch.randn((FRESH, D), generator=torch.Generator().manual_seed(10**6))
        goal = walk(teacher, denoiser(teacher, teacher.module, {}), noise, timegrid.uniform(PROCESS, 64), "heun")[-1].x
        for key, student in PARTS[part].items():
            if a.keys and key not in a.keys:
                continue
            for seed in a.seeds if student.trained else a.seeds[:1]:
                file = a.folder / f"{part}-{key}-{seed}.json"
                if not file.exists():
                    write_json(file, {"part": part, **run(key, student, teacher, paths, (noise, goal), seed, a)})
                results.append(json.loads(file.read_text()))
                print(
                    part,
                    key,
                    seed,
                    {k: round(v, 4) for k, v in results[-1]["errors"].items()},
                    f"{results[-1]['seconds']:.0f} s",
                    flush=True,
                )
    write(results, a)


def write(results: list[dict[str, Any]], a: argparse.Namespace) -> None:
    """`trajpl.json` with every run, and `trajpl.md` with means and deviations over seeds."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(a).items()}
    hardware = f"{torch.get_num_threads()} CPU threads"
    write_json(
        a.out / "trajpl.json",
        {"rows": results, "hardware": hardware, "commit": commit, "settings": settings, "command": "python benchmarks/trajpl.py"},
    )
    lines = [f"# TrajP-L on a mixture of Gaussians, D = {D}", "", __doc__.split("\n\n")[2].strip(), ""]
    for part in a.only:
        lines += [
            f"## Teacher: {part}",
            "",
            "| student | trained weights | seconds | " + " | ".join(f"{k} NFE" for k in COUNTS) + " |",
            "|---" * (3 + len(COUNTS)) + "|",
        ]
        for key, student in PARTS[part].items():
            rows = [r for r in results if r["part"] == part and r["key"] == key]
            if not rows:
                continue
            cells = []
            for count in COUNTS:
                values = [r["errors"][str(count)] for r in rows]
                cells.append(f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""))
            trained = (
                f"{rows[0]['trained']} ({rows[0]['share']:.1%})" if rows[0]["trained"] and part == "network" else str(rows[0]["trained"])
            )
            lines.append(f"| {student.label} | {trained} | {statistics.mean(r['seconds'] for r in rows):.0f} | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        f"{a.count} trajectories, {a.iterations} iterations of {a.batch}, {len(a.seeds)} seeds, {hardware}, commit {commit}: `python benchmarks/trajpl.py`.",
        "",
    ]
    (a.out / "trajpl.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
