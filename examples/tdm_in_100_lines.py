"""TDM (Luo et al. 2025, algorithm 1) in torch alone.

    python examples/tdm_in_100_lines.py

A flow model of eight modes on a ring is distilled to two steps. A state is x_t = (1 - t) x0 + t eps, and a network
predicts the velocity eps - x0. Nothing is imported from fewstep; a test compares the gradients with those of
fewstep's TDM.
"""

import copy
import math

import torch
from torch import Tensor, nn

K, BATCH, CLIP, HUBER = 2, 256, 5.0, 0.00054


class Velocity(nn.Module):
    """Predict the velocity from a state [B, 2] and a time [B]."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        layers = [
            nn.Linear(6, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
        ]
        self.layers = nn.Sequential(*layers, nn.Linear(width, 2))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        t = t[:, None].to(x)
        return self.layers(torch.cat([x, t, (math.pi * t).sin(), (math.pi * t).cos(), torch.ones_like(t)], 1))


def data(count: int, rng: torch.Generator) -> Tensor:
    """Draw points at eight modes of a ring."""
    angle = 2 * math.pi * torch.randint(8, (count,), generator=rng) / 8
    return torch.stack([angle.cos(), angle.sin()], 1) + 0.05 * torch.randn((count, 2), generator=rng)


def clean(net: nn.Module, x: Tensor, t: Tensor) -> Tensor:
    """Return the clean estimate x0 = x - t v."""
    return x - t[:, None].to(x) * net(x, t)


def step(net: nn.Module, x: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
    """Take one DDIM step; return the next state and the clean estimate."""
    x0 = clean(net, x, t)
    eps = (x - (1 - t[:, None].to(x)) * x0) / t[:, None].to(x)
    return (1 - t_next[:, None].to(x)) * x0 + t_next[:, None].to(x) * eps, x0


def rollout(student: nn.Module, x: Tensor, times: Tensor, segment: Tensor) -> Tensor:
    """Bring each sample to the start of its segment, without gradient."""
    x = x.clone()
    with torch.no_grad():
        for k in range(len(times) - 2):
            rows = segment > k
            x[rows] = step(student, x[rows], times[k].expand(int(rows.sum())), times[k + 1].expand(int(rows.sum())))[0]
    return x


def tdm_losses(
    student: nn.Module,
    fake: nn.Module,
    teacher: nn.Module,
    x: Tensor,
    times: Tensor,
    segment: Tensor,
    tau: Tensor,
    e: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the losses of fake score and student.

    Noise x is [B, 2], segments are [B], tau [B] lies in them, and the transition noise e is [B, 2].
    """
    start, end = times[segment], times[segment + 1]
    landed, x0 = step(student, rollout(student, x, times, segment), start, end)
    r = (1 - tau) / (1 - end)  # x_tau = r x_t + beta e
    beta = (tau**2 - (r * end) ** 2).clamp(min=0).sqrt()
    x_tau = (r[:, None].to(x) * landed + beta[:, None].to(x) * e).detach()
    f_fake = clean(fake, x_tau, tau)
    with torch.no_grad():
        f_teacher = clean(teacher, x_tau, tau)
    weight = (1 / tau**2).clamp(max=CLIP).to(x)
    fake_loss = (weight * (f_fake - x0.detach()).square().mean(1)).mean()  # eq. 7
    goal = (landed - (f_fake - f_teacher)).detach()
    offset = HUBER * x.shape[1] ** 0.5
    student_loss = (((landed - goal).square().sum(1) + offset**2).sqrt() - offset).mean()  # eq. 6, 11
    return fake_loss, student_loss


def train_teacher(iterations: int, rng: torch.Generator) -> Velocity:
    """Train a flow model by regression on the velocity."""
    net = Velocity()
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    for _ in range(iterations):
        x0, eps, t = data(BATCH, rng), torch.randn((BATCH, 2), generator=rng), torch.rand(BATCH, generator=rng)
        x = (1 - t[:, None]) * x0 + t[:, None] * eps
        loss = (net(x, t) - (eps - x0)).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    return net


def distill(teacher: nn.Module, iterations: int, warmup: int, rng: torch.Generator) -> nn.Module:
    """Distil the teacher into a student of K steps."""
    student, fake = copy.deepcopy(teacher), copy.deepcopy(teacher)
    times = torch.linspace(1, 0, K + 1, dtype=torch.float64)
    rates = {student: 3e-5, fake: 3e-4}
    optimizers = {net: torch.optim.Adam(net.parameters(), lr, betas=(0.0, 0.999)) for net, lr in rates.items()}
    for i in range(iterations):
        x, e = torch.randn((2, BATCH, 2), generator=rng)
        segment = torch.arange(BATCH) * K // BATCH
        start, end = times[segment], times[segment + 1].clamp(min=0.02)
        tau = end + (start - end) * (1 - torch.rand(BATCH, generator=rng, dtype=torch.float64))
        losses = tdm_losses(student, fake, teacher, x, times, segment, tau, e)
        for net, loss in zip((fake, student), losses, strict=True):
            if net is fake or i >= warmup:
                optimizers[net].zero_grad(), loss.backward(), optimizers[net].step()
    return student


def sample(net: nn.Module, steps: int, x: Tensor) -> Tensor:
    """Sample from noise x [B, 2] in this many DDIM steps."""
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    return rollout(net, x, torch.cat([times, times[-1:]]), torch.full((len(x),), steps))


def energy_distance(a: Tensor, b: Tensor) -> float:
    """Return `2 E|a - b| - E|a - a'| - E|b - b'|`, zero for equal laws."""
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


def main(teacher_iterations: int = 4000, iterations: int = 1500, warmup: int = 200) -> dict[str, float]:
    """Train, distil, and compare energy distances to the data."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(0)
    teacher = train_teacher(teacher_iterations, rng)
    student = distill(teacher, iterations, warmup, rng)
    truth, noise = data(2000, rng), torch.randn((2000, 2), generator=rng)
    found = {"teacher, 64 steps": sample(teacher, 64, noise), f"teacher, {K} steps": sample(teacher, K, noise)}
    found[f"student, {K} steps"] = sample(student, K, noise)
    return {name: energy_distance(x, truth) for name, x in found.items()}


if __name__ == "__main__":
    for name, distance in main().items():
        print(f"{name:20} energy distance to the data {distance:.4f}")
