"""Make the teachers that `benchmarks/trajpl.py` measures on.

A part has a teacher, noise and conditions, the teacher's ends from there, and distances to real data.
"""

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
from fewstep.zoo.pixel_data import LabelledImages, load_idx, read_pixel_data

D, FRESH = 128, 1000
AT_ONCE = 125  # samples
PROCESS = EDM()


def mixture() -> Mixture:
    """Return six modes of standard deviation 0.25, with means from N(0, 0.5^2).

    Two steps of DDIM miss the end by more than half.
    """
    return Mixture(0.5 * torch.randn((6, D), generator=torch.Generator().manual_seed(0), dtype=torch.float64), 0.25)


class Exact(nn.Module):
    """The mixture's closed-form denoiser."""

    def __init__(self) -> None:
        super().__init__()
        self.mixture, self.scale = mixture(), nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the clean estimate."""
        return (self.scale * self.mixture.denoise(PROCESS, x.double(), t.double()).x0).to(x)


class Small(nn.Module):
    """A residual perceptron with EDM's preconditioning.

    Its output is the raw F of `D = c_skip x + c_out F`.
    """

    def __init__(self, width: int = 256, blocks: int = 4, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.sigma_data = sigma_data
        self.register_buffer("frequencies", torch.logspace(-1, 1, 16))
        self.time = nn.Linear(32, width)
        self.into, self.out = nn.Linear(D, width), nn.Linear(width, D)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Return F for x [N, D] at times t [N]."""
        phase = (t.clamp(min=1e-3).log() / 4)[:, None] * self.get_buffer("frequencies")
        at = self.time(torch.cat([phase.sin(), phase.cos()], 1))
        h = self.into(x / (t.square() + self.sigma_data**2).sqrt()[:, None])
        for block in self.blocks:
            h = h + block(h + at)
        return self.out(h)


def small_teacher(file: Path, steps: int) -> Backbone:
    """Train the small network once on draws of the mixture, with EDM's weighting and draws of log sigma."""
    torch.manual_seed(0)
    net = Small()
    teacher = Denoiser(net, PROCESS, (D,), "edm", name="small", time_layer="time")
    if file.exists():
        net.load_state_dict(load_file(file))
        return teacher
    data, rng = mixture(), torch.Generator().manual_seed(0)
    average = {k: v.clone() for k, v in net.state_dict().items()}
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


Call = Callable[[int, Cond], Denoise]  # a step count and conditions -> the student for that count


def in_parts(
    made: Callable[[Cond], Denoise],
    teacher: Backbone,
    cond: Cond,
    noise: Tensor,
    times: Tensor,
    solver: Solver,
    head: Correction | None = None,
) -> Tensor:
    """Return the ends of the trajectories from `noise`, solved in batches that fit the caches."""
    ends = []
    for start in range(0, len(noise), AT_ONCE):
        own = slice(start, start + AT_ONCE)
        *_, last = sample(made(rows(cond, own)), teacher.schedule, noise[own], times, solver, head)
        ends.append(last.x)
    return torch.cat(ends)


@dataclass(frozen=True)
class Part:
    """A teacher and what its students are compared with: its ends from `noise`, and distances to real data."""

    teacher: Backbone
    prompts: tuple[str, ...]
    trajectories: TrajectoryConfig
    train: TrainConfig
    noise: Tensor
    goal: Tensor
    cond: Cond
    distances: dict[str, Callable[[Tensor], float]] = field(default_factory=dict)  # by the measure's name
    floors: dict[str, float] = field(default_factory=dict)  # of the goal
    guidance: float = 1.0

    def measure(self, call: Call, method: TrajectoryImitation, head: Correction | None) -> dict[str, dict[int, float]]:
        """Return each measure by step count, lower is better."""
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
    """Return a part with 64 steps of Heun's method from fresh noise.

    Its distance is to draws of the mixture, in the data's own dimensions.
    """
    noise = PROCESS.t_max * torch.randn((FRESH, D), generator=torch.Generator().manual_seed(10**6))
    goal = solve(teacher, denoiser(teacher, teacher.module, {}), noise, timegrid.uniform(PROCESS, 64), "heun")[-1].x
    train, trajectories = train_config(a.iterations, a.batch, a.lr), TrajectoryConfig(count=count, steps=64)
    truth = moments(mixture().draw(100_000, torch.Generator().manual_seed(0)))
    part = Part(teacher, ("",), trajectories, train, noise, goal, teacher.encode([""] * FRESH))
    return against(part, fd_data=lambda x: frechet_distance(truth, moments(x)))


def train_config(iterations: int, batch: int, lr: float) -> TrainConfig:
    """Return the settings of a part's trainings."""
    return TrainConfig(iterations=iterations, batch=batch, lr=lr, fake_lr=lr, decay=iterations // 2, ema=0.99)


def image_part(
    teacher: Backbone,
    guidance: float,
    train: TrainConfig,
    trajectories: TrajectoryConfig,
    prompts: Sequence[str],
    measured: Sequence[str],
    file: Path,
) -> Part:
    """Return the part of an image teacher whose students train on `prompts`.

    The ends for the `measured` prompts are of 50 steps of DDIM, and are kept in the file.
    """
    noise = torch.randn((len(measured), *teacher.shape), generator=torch.Generator().manual_seed(10**6))
    cond, null = teacher.encode(measured), teacher.encode([""])

    def denoise(own: Cond) -> Denoise:
        return guided(teacher, teacher.module, own, null, Guidance(scale=guidance))

    if not file.exists():
        times = timegrid.uniform(teacher.schedule, 50)
        with torch.no_grad():
            ends = in_parts(denoise, teacher, cond, noise, times, solver_named("ddim"))
        write_tensors(file, {"goal": ends})
    goal = load_file(file)["goal"]
    return Part(teacher, tuple(prompts), trajectories, train, noise, goal, cond, guidance=guidance)


def against(part: Part, **distances: Callable[[Tensor], float]) -> Part:
    """Return the part with distances, and the teacher's own."""
    return replace(part, distances=distances, floors={k: distance(part.goal) for k, distance in distances.items()})


class Classes(nn.Module):
    """A classifier of small grey images, with 64 features."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        sizes = ((1, 24, 2), (24, 48, 1), (48, 64, 2), (64, 64, 1))
        self.layers = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.SiLU()) for a, b, stride in sizes),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, 64),
            nn.SiLU(),
        )
        self.out = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits of images [N, 1, H, W] in [-1, 1]."""
        return self.out(self.layers(x))


def class_features(data: LabelledImages, file: Path) -> Classes:
    """Train the classifier once, 1,200 steps of batch 128."""
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
    """Return the part of the pixel teacher.

    Its distances are to the first images of the test set, in principal components of their features.
    """
    teacher, data = load_teacher("fashion"), read_pixel_data(str(a.pixels))
    classes, train = data.classes, train_config(a.pixel_iterations, 32, 1e-3)
    measured = [classes[i % len(classes)] for i in range(FRESH)]
    trajectories, goal = TrajectoryConfig(count=5000, steps=24), a.out / "pixel-goal.safetensors"
    part = image_part(teacher, 1.0, train, trajectories, classes, measured, goal)
    network, classifier = feature_network(), class_features(data, a.out / "classes.safetensors")
    real = load_idx(a.pixels / "t10k-images-idx3-ubyte.gz")[:FRESH, None].float() / 255
    right = classifier(2 * real - 1).argmax(1) == load_idx(a.pixels / "t10k-labels-idx1-ubyte.gz")[:FRESH]
    print(f"the classifier is right about {right.float().mean():.1%} of the test set", flush=True)

    def distance(look: Callable[[Tensor], Tensor]) -> Callable[[Tensor], float]:
        with torch.no_grad():
            seen = look(real.expand(-1, 3, -1, -1))
        basis = principal_components(seen, 32)
        truth = moments(basis(seen))
        return lambda x: frechet_distance(truth, moments(basis(look(teacher.decode(x)))))

    return against(
        part,
        fd_classes=distance(lambda p: classifier.layers(2 * p[:, :1] - 1).double()),
        fd=distance(partial(features, network)),
    )


def emoji_part(a: argparse.Namespace) -> Part:
    """Return the part of the emoji teacher, with distances to all real emoji of names of `emoji-medium`."""
    teacher, known, protocol = load_teacher("emoji"), load_reference(), protocol_named("emoji-medium")
    drawn, train = plan(protocol, known), train_config(a.emoji_iterations, 32, 1e-3)
    names, prompts = drawn.prompts[drawn.plain][: a.names], read_prompts(str(BUNDLED / "emoji" / "prompts.txt"))
    trajectories, goal = TrajectoryConfig(count=a.emoji_count, steps=12), a.out / "emoji-goal.safetensors"
    part = image_part(teacher, 4.5, train, trajectories, prompts, names, goal)
    network, leading = feature_network(), protocol.components
    truth = moments(known.gallery[:, :leading])

    def distance(x: Tensor) -> float:
        return frechet_distance(truth, moments(known.embed(features(network, teacher.decode(x)))[:, :leading]))

    return against(part, fd=distance)


def make_part(name: str, a: argparse.Namespace) -> Part:
    """Return the part of a name."""
    if name == "pixel":
        return pixel_part(a)
    if name == "emoji":
        return emoji_part(a)
    if name == "exact":
        return mixture_part(Denoiser(Exact(), PROCESS, (D,), "x0", name="exact"), a.count, a)
    return mixture_part(small_teacher(a.out / "small.safetensors", a.teacher_steps), a.network_count, a)
