"""What `benchmarks/trajpl.py` measures on: teachers, the noise and the conditions they are asked for, where they end from there, and the distances to real pictures."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fewstep import Denoiser, TrajectoryConfig, TrajectoryImitation
from fewstep.api import load_teacher
from fewstep.atomic import write_tensors
from fewstep.backbones.base import Backbone, Cond, denoiser, guided, rows
from fewstep.backbones.load import BUNDLED
from fewstep.backbones.toy import Mixture
from fewstep.core import timegrid
from fewstep.core.guidance import Guidance
from fewstep.core.schedule import EDM, diffuse, expand
from fewstep.core.solvers import Correction, Denoise, Solver, sample, solver_named
from fewstep.data.prompts import read_prompts
from fewstep.data.trajectories import solve
from fewstep.evaluation.distances import frechet_distance, moments, principal_components
from fewstep.evaluation.features import feature_network, features
from fewstep.evaluation.plan import plan
from fewstep.evaluation.protocols import protocol_named
from fewstep.evaluation.reference import load_reference
from fewstep.training.loop import TrainConfig
from fewstep.zoo.pixel_data import Pictures, load_idx, read_pixel_data

D, FRESH = 128, 1000
AT_ONCE = 125  # samples
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
    data, rng, average = (
        mixture(),
        torch.Generator().manual_seed(0),
        {k: v.clone() for k, v in net.state_dict().items()},
    )
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


Call = Callable[[int, Cond], Denoise]  # a step count and conditions -> the student that takes it


def in_parts(
    made: Callable[[Cond], Denoise], teacher: Backbone, cond: Cond, noise: Tensor, times: Tensor, solver: Solver, head: Correction | None = None
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
    paths: TrajectoryConfig
    train: TrainConfig
    noise: Tensor
    goal: Tensor
    cond: Cond
    distances: dict[str, Callable[[Tensor], float]] = field(default_factory=dict)  # by the measure's name
    floors: dict[str, float] = field(default_factory=dict)  # of the goal
    guidance: float = 1.0

    def measure(self, call: Call, method: TrajectoryImitation, head: Correction | None) -> dict[str, dict[int, float]]:
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
    """Fresh noise, 64 steps of Heun's method from it, and the distance to draws of the mixture as they are."""
    noise = PROCESS.t_max * torch.randn((FRESH, D), generator=torch.Generator().manual_seed(10**6))
    goal = solve(teacher, denoiser(teacher, teacher.module, {}), noise, timegrid.uniform(PROCESS, 64), "heun")[-1].x
    train = TrainConfig(
        iterations=a.iterations, batch=a.batch, lr=a.lr, fake_lr=a.lr, decay=a.iterations // 2, ema=0.99
    )
    truth = moments(mixture().draw(100_000, torch.Generator().manual_seed(0)))
    part = Part(
        teacher, ("",), TrajectoryConfig(count=count, steps=64), train, noise, goal, teacher.encode([""] * FRESH)
    )
    return against(part, fd_data=lambda x: frechet_distance(truth, moments(x)))


def picture_part(
    name: str, teacher: Backbone, guidance: float, train: TrainConfig, paths: TrajectoryConfig, prompts: Sequence[str], asked: Sequence[str], a: argparse.Namespace
) -> Part:  # fmt: skip
    """A teacher of pictures, trained on `prompts`: 50 steps of DDIM for those that are `asked`, which take a while and are kept."""
    noise = torch.randn((len(asked), *teacher.shape), generator=torch.Generator().manual_seed(10**6))
    cond, null, kept = teacher.encode(asked), teacher.encode([""]), a.folder / f"{name}-goal.safetensors"
    if not kept.exists():
        times = timegrid.uniform(teacher.schedule, 50)
        with torch.no_grad():
            ends = in_parts(
                lambda own: guided(teacher, teacher.module, own, null, Guidance(scale=guidance)),
                teacher,
                cond,
                noise,
                times,
                solver_named("ddim"),
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
    train = TrainConfig(
        iterations=a.pixel_iterations, batch=32, lr=1e-3, fake_lr=1e-3, decay=a.pixel_iterations // 2, ema=0.99
    )
    asked = [classes[i % len(classes)] for i in range(FRESH)]
    part = picture_part("pixel", teacher, 1.0, train, TrajectoryConfig(count=5000, steps=24), classes, asked, a)
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

    return against(
        part,
        fd_classes=distance(lambda p: told.layers(2 * p[:, :1] - 1).double()),
        fd=distance(partial(features, network)),
    )


def emoji_part(a: argparse.Namespace) -> Part:
    """Distances to all real emoji, of the names that `emoji-medium` asks for."""
    teacher, known, protocol = load_teacher("emoji"), load_reference(), protocol_named("emoji-medium")
    train = TrainConfig(
        iterations=a.emoji_iterations, batch=32, lr=1e-3, fake_lr=1e-3, decay=a.emoji_iterations // 2, ema=0.99
    )
    asked = plan(protocol, known)
    names = asked.prompts[asked.plain][: a.names]
    part = picture_part(
        "emoji",
        teacher,
        4.5,
        train,
        TrajectoryConfig(count=a.emoji_count, steps=12),
        read_prompts(str(BUNDLED / "emoji" / "prompts.txt")),
        names,
        a,
    )
    network, leading = feature_network(), protocol.components
    truth = moments(known.gallery[:, :leading])
    return against(
        part,
        fd=lambda x: frechet_distance(truth, moments(known.embed(features(network, teacher.decode(x)))[:, :leading])),
    )


def make_part(name: str, a: argparse.Namespace) -> Part:
    """By name."""
    if name == "pixel":
        return pixel_part(a)
    if name == "emoji":
        return emoji_part(a)
    if name == "exact":
        return mixture_part(Denoiser(Exact(), PROCESS, (D,), "x0", name="exact"), a.count, a)
    return mixture_part(small_teacher(a.folder / "small.safetensors", a.teacher_steps), a.network_count, a)
