"""Make the arena of `benchmarks/arena.py`: data, classifier, teacher and measures.

Fashion-MNIST in half of its size, ten kinds of clothing of which none determines an image, and a teacher so small that
a minute of a core holds a training.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep import Denoiser
from fewstep.atomic import write_tensors
from fewstep.backbones.base import Backbone
from fewstep.backbones.load import fingerprint
from fewstep.backbones.miniature import scheduler
from fewstep.backbones.schedulers import process_of
from fewstep.core.prediction import target
from fewstep.core.schedule import diffuse, expand
from fewstep.data.images import ImageData
from fewstep.data.prompts import embed
from fewstep.evaluation.alignment import diversity
from fewstep.evaluation.distances import Moments, frechet_distance, moments
from fewstep.objectives.rewards import Reward
from fewstep.training.fit import FitConfig, fit
from fewstep.training.state import seeded
from fewstep.zoo.pixel_data import FASHION, load_idx
from fewstep.zoo.pixel_teacher import draw_times

SIZE, COUNT, UNIT, NEAREST = 14, 5000, 100.0, 3  # UNIT: the total variance of real features
FIT = FitConfig(steps=2200, batch=128, lr=2e-3, warmup=200, decay=1200, ema=0.995, checkpoint_every=100)


class Painter(nn.Module):
    """A residual perceptron on images of 14x14, told the time and the class (one more: none)."""

    def __init__(self, width: int = 256, blocks: int = 3) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(0, 2, 24) * math.pi / 2, persistent=False)
        self.time, self.label = nn.Linear(48, width), nn.Embedding(len(FASHION) + 1, width)
        self.into, self.out = nn.Linear(SIZE**2, width), nn.Linear(width, SIZE**2)
        self.told = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(blocks))
        self.wide = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.back = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        for last in (*self.back, self.out):
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """Return v for x [N, 1, 14, 14] at the table's times t [N] and labels [N]."""
        phase = (t / 1000)[:, None] * self.get_buffer("frequencies")
        at = F.silu(self.time(torch.cat([phase.sin(), phase.cos()], 1)) + self.label(label))
        h = self.into(x.flatten(1))
        for told, wide, back in zip(self.told, self.wide, self.back, strict=True):
            scale, shift = told(at).chunk(2, 1)
            h = h + back(F.silu(wide(F.layer_norm(h, h.shape[1:])) * (1 + scale) + shift))
        return self.out(F.layer_norm(h, h.shape[1:])).view(x.shape)


def labels_of(prompts: Sequence[str]) -> dict[str, Tensor]:
    """Return the labels of kinds of clothing; any other prompt is of none."""
    known = {name: i for i, name in enumerate(FASHION)}
    return {"label": torch.tensor([known.get(p, len(FASHION)) for p in prompts])}


@dataclass(frozen=True)
class Clothes:
    """Images [N, 1, 14, 14] in [-1, 1] with labels [N]."""

    images: Tensor
    labels: Tensor


def clothes(folder: Path, part: str) -> Clothes:
    """Read a part of Fashion-MNIST, `train` or `t10k`, each 2x2 pixels as their mean."""
    images = load_idx(folder / f"{part}-images-idx3-ubyte.gz")[:, None].float() / 127.5 - 1
    return Clothes(F.avg_pool2d(images, 2), load_idx(folder / f"{part}-labels-idx1-ubyte.gz").long())


def painter(data: Clothes, run: Path) -> Iterator[tuple[int, float]]:
    """Train the teacher, which resumes; yields (step, loss)."""
    torch.manual_seed(0)
    net = Painter()
    average = copy.deepcopy(net)
    teacher = backbone_of(net)

    def loss_at(step: int) -> Tensor:
        rng = seeded(0, step, "arena")
        rows = torch.randint(len(data.images), (FIT.batch,), generator=rng)
        none = torch.rand(FIT.batch, generator=rng) < 0.1
        label, x0 = data.labels[rows].masked_fill(none, len(FASHION)), data.images[rows]
        t, eps = draw_times(teacher.schedule, FIT.batch, rng), torch.randn(x0.shape, generator=rng)
        alpha, sigma = (expand(f(t), x0) for f in (teacher.schedule.alpha, teacher.schedule.sigma))
        raw = net(diffuse(teacher.schedule, x0, t, eps), t.float(), label)
        return F.mse_loss(raw, target(x0, eps, alpha, sigma, teacher.row))

    for step in fit(net, average, loss_at, FIT, run):
        yield step.step, step.loss
    write_tensors(run / "teacher.safetensors", average.state_dict())


def backbone_of(net: Painter) -> Backbone:
    """Return the network as a backbone: the cosine table with zero terminal SNR, and v."""
    layers = ("wide.1", "back.2")
    return Denoiser(net, process_of(scheduler()), (1, SIZE, SIZE), "v", labels_of, "arena", "time", layers)


def teacher_of(run: Path) -> Backbone:
    """Return the trained teacher."""
    net = Painter()
    net.load_state_dict(load_file(run / "teacher.safetensors"))
    return backbone_of(net.eval())


def states_of(teacher: Backbone, data: Clothes) -> ImageData:
    """Return real images as clean states, each with its class."""
    known = embed(teacher, list(FASHION), None, fingerprint(teacher.module))
    return ImageData(data.images, known.take(data.labels, "arena"), "arena")


class Classifier(nn.Module):
    """A classifier of 14x14 images, with 64 features."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((1, 32, 1), (32, 64, 2), (64, 96, 2))
        convolutions = (
            nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.SiLU()) for a, b, stride in sizes
        )
        self.layers = nn.Sequential(*convolutions, nn.Flatten(), nn.Dropout(0.2), nn.Linear(96 * 16, 64), nn.SiLU())
        self.out = nn.Linear(64, len(FASHION))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [N, 10] of images [N, 1, 14, 14] in [-1, 1]."""
        return self.out(self.layers(x))


def classifier(data: Clothes, file: Path, steps: int = 4000, seed: int = 0) -> Classifier:
    """Train a classifier once, on mirrored images; the 64 features of seed 0 make the distances."""
    torch.manual_seed(seed)
    net = Classifier()
    if file.exists():
        net.load_state_dict(load_file(file))
        return net.eval().requires_grad_(False)
    rng, optimizer = torch.Generator().manual_seed(seed), torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        rows = torch.randint(len(data.images), (128,), generator=rng)
        x = data.images[rows] if step % 2 else data.images[rows].flip(3)
        optimizer.zero_grad()
        F.cross_entropy(net(x), data.labels[rows], label_smoothing=0.05).backward()
        optimizer.step()
    write_tensors(file, net.state_dict())
    return net.eval().requires_grad_(False)


def confidence(judge: Classifier) -> Reward:
    """Return the reward of a classifier's log-probability of an image's own class."""

    def reward(images: Tensor, prompts: Sequence[str]) -> Tensor:
        label = labels_of(prompts)["label"]
        return F.log_softmax(judge(images.clamp(-1, 1)), 1).gather(1, label[:, None])[:, 0]

    return reward


def saturation(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Return how near pixels are to black or white; blots of both have the most."""
    return images.clamp(-1, 1).abs().flatten(1).mean(1)


@dataclass(frozen=True)
class Measures:
    """What an image set is compared with: real images in the classifier's features, of unit total variance x 100."""

    net: Classifier
    scale: float
    truth: Moments
    real: Tensor  # [COUNT, 64]
    spread: float  # mean distance of two real images of a class

    def features(self, images: Tensor) -> Tensor:
        """Return the features [N, 64] of images in [-1, 1]."""
        return self.net.layers(images.clamp(-1, 1)).double() * self.scale

    def distance(self, images: Tensor) -> float:
        """Return the Frechet distance of images to real ones."""
        return frechet_distance(self.truth, moments(self.features(images)))

    def __call__(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Return distance, class accuracy in percent, precision, recall, and diversity relative to real images."""
        own = self.features(images)
        right = self.net(images.clamp(-1, 1)).argmax(1) == labels
        return {
            "fd": frechet_distance(self.truth, moments(own)),
            "accuracy": 100 * float(right.double().mean()),
            "precision": inside(own, self.real),
            "recall": inside(self.real, own),
            "diversity": spread_of(own, labels) / self.spread,
        }


def measures(net: Classifier, test: Clothes) -> Measures:
    """Return the measures against the test images."""
    raw = net.layers(test.images).double()
    scale = (UNIT / float(raw.var(0).sum())) ** 0.5
    own = raw * scale
    return Measures(net, scale, moments(own), own[:COUNT], spread_of(own[:COUNT], test.labels[:COUNT]))


def inside(x: Tensor, y: Tensor) -> float:
    """Return the share of x [N, K] that lies within the NEAREST-th neighbour's distance of a point of y [M, K].

    Precision of samples x against real y, recall with both exchanged (arXiv 1904.06991).
    """
    radius = torch.cdist(y, y).kthvalue(NEAREST + 1, 1).values  # each is its own nearest
    return float((torch.cdist(x, y) <= radius).any(1).double().mean())


def spread_of(x: Tensor, labels: Tensor) -> float:
    """Return the mean distance of two images of one class."""
    groups = [x[labels == k] for k in labels.unique()]
    least = min(map(len, groups))
    return float(diversity(torch.stack([g[:least] for g in groups])).mean())


Draw = Callable[[Tensor, Tensor, torch.Generator], Tensor]  # (noise, labels, generator of a solver) -> images


def drawn(draw: Draw, seed: int) -> tuple[Tensor, Tensor]:
    """Return COUNT images and labels, all classes in turn, from the noise of a seed."""
    rng, images = torch.Generator().manual_seed(10**6 + seed), []
    labels = torch.arange(COUNT) % len(FASHION)
    for part in labels.split(250):
        images.append(draw(torch.randn((len(part), 1, SIZE, SIZE), generator=rng), part, rng))
    return torch.cat(images), labels
