"""A check that a network is interpreted as it was trained.

The clean estimates on real data are compared with a bound for the right reading, and with other readings of
the network.

The posterior mean has the smallest mean square error of all functions of `x_t`. So a right reading is no
worse than the best linear estimate, `v sigma^2 / (alpha^2 v + sigma^2)` for an element of variance v; and at
the same data and the same ratio of noise to data no other reading of the same network is better.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backbones.base import Backbone, Cond, rows
from ..core.prediction import ROWS, Row, row_named, split, target
from ..core.schedule import VP, Flow, Schedule, expand
from .states import SURE

FRACTIONS = (0.02, 0.05, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85)
LOWEST = (1, 2, 3)  # indices of a table at which one index makes up most of the noise
DRAWS = 2048  # smallest number of noise values per time, to estimate how much noise the network finds
OFF = 0.05  # tolerated share of noise that the network finds too much or too little
BETTER = 0.9  # share of the stated reading's error; another reading below this share is suspected
WORSE = 1.15  # multiple of the linear estimate's error; no right reading exceeds this multiple
FLAWED = 0.05  # share of its output's mean square that a sound network's error may be, when readings are compared
POOR = 0.1  # the same share, beyond which an estimate worse than a linear one is suspected
CLEARLY = 0.3  # share of the excess of noise that is left under another schedule which is named
OFTEN = 3  # smallest number of times at which the noise is wrong, where no schedule is better
LARGEST = 4.0  # mean square of an output, which networks are trained to give in units of one
SHIFTS = (-0.2, -0.1, -0.05, 0.05, 0.1, 0.2)  # fractions of the path from clean data to noise
GRID = 4096  # times of a continuum among which the time of a noise ratio is searched
# name -> (scale, offset)
RANGES = {
    "2 x - 1": (2.0, -1.0),
    "(x + 1) / 2": (0.5, 0.5),
    "x / 127.5 - 1": (1 / 127.5, -1.0),
    "x / 255": (1 / 255, 0.0),
}


@dataclass(frozen=True)
class Reading:
    """One interpretation of a network's inputs and outputs.

    At a time of the stated schedule, the reading makes a state of data `scale x0 + offset` under the
    reading's own `schedule`, at the time of the same ratio of noise to data. The network is conditioned on
    `told` of that time, and the output is interpreted by `row`.
    """

    name: str
    schedule: Schedule
    row: Row
    told: Callable[[Tensor], Tensor] = lambda t: t
    scale: float = 1.0
    offset: float = 0.0
    same: bool = True  # schedule and times are the stated ones


@dataclass(frozen=True)
class At:
    """Mean square errors at one time.

    `error` is that of the clean estimate; `bound` is that of the best linear estimate, which a right model
    does not exceed.
    """

    t: float
    error: float
    bound: float


@dataclass(frozen=True)
class ProcessCheck:
    """The result of `fewstep.check`.

    `times` are the errors by time, and `suspected` has a line for every suspicion; empty where all is well.
    """

    times: tuple[At, ...]
    suspected: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"t {at.t:.6g}: error of the clean estimate {at.error:.4g}, of the best linear one {at.bound:.4g}"
            for at in self.times
        ]
        return "\n".join([*lines, *(self.suspected or ("nothing is suspected",))])


def check_process(backbone: Backbone, real: Tensor, cond: Cond, seed: int = 0, batch: int = 64) -> ProcessCheck:
    """Compare the stated reading of a backbone with other readings.

    The comparison uses clean states `real` [N, ...] with conditions. Other readings: another prediction,
    another range of the data, times that are one index off, scaled or reversed, another noise schedule. A
    reading is suspected if the reading's error is far below the error of the stated reading, by more than
    chance. Costs about 25 times as many network calls as there are states and times.
    """
    schedule, table = backbone.schedule, backbone.schedule.resolution > 0
    times = schedule.at(torch.tensor(FRACTIONS, dtype=torch.float64))
    times = times.round() if table else times
    noise = torch.randn((len(times), *real.shape), generator=torch.Generator().manual_seed(seed))

    def judged(reading: Reading) -> tuple[Tensor, Tensor, Tensor]:
        """Return a reading's errors, with the bounds of these errors.

        The errors are [T, N]; the bounds are the errors of the best linear estimate [T] and of an all-wrong
        network output [T].
        """
        own, x0 = _own_times(reading, schedule, times), reading.scale * real + reading.offset
        estimates = _estimates(backbone, reading, own, reading.told(own), x0, noise, cond, batch)
        errors = torch.stack([(clean - x0).square().flatten(1).mean(1) for clean in estimates])
        errors = errors.nan_to_num(nan=1e12, posinf=1e12).clamp(max=1e12)
        alpha, sigma = reading.schedule.alpha(own), reading.schedule.sigma(own)
        return errors, _linear(x0, alpha, sigma), _flaw(reading.row, x0, noise, alpha, sigma)

    def score(errors: Tensor, bound: Tensor, flaw: Tensor) -> Tensor:
        return errors / (bound + FLAWED * flaw)[:, None]

    own = judged(Reading("", schedule, backbone.row))
    found = _better(score(*own), [(other.name, score(*judged(other))) for other in _others(backbone)])
    at = tuple(At(float(t), float(e), float(b)) for t, e, b in zip(times, own[0].mean(1), own[1], strict=True))
    if found:
        ratio, name = min(found)
        return ProcessCheck(
            at, (f"suspected: {name} (beside a sound network's, its error is {100 * ratio:.2g} % of the stated one's)",)
        )
    if other := _miscalibrated(backbone, times, real, cond, seed, batch):
        return ProcessCheck(at, (f"suspected: {other}",))
    beyond = [a for a, f in zip(at, own[2], strict=True) if not a.error <= WORSE * a.bound + POOR * float(f)]
    if not beyond:
        return ProcessCheck(at, ())
    worst = max(beyond, key=lambda a: a.error / a.bound if a.error == a.error else float("inf"))
    return ProcessCheck(at, (
        f"suspected: schedule, prediction or range of the data: at t {worst.t:.6g} the error of its clean estimate "
        f"is {worst.error / worst.bound:.2g} times that of a linear one, and no other reading that was tried does "
        "better; look at what the network was trained with",
    ))  # fmt: skip


def _flaw(row: Row, real: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the clean estimate's error [T] for an all-wrong network output.

    `|d x0 / d m|^2 E m^2` for an output m of this row. A network errs by a share of its output: a sound network
    that predicts noise has a large error of its clean estimate where there is little but noise.
    """
    found, one = [], torch.ones((), dtype=torch.float64)
    for a, s, eps in zip(alpha, sigma, noise, strict=True):
        output = target(real.double(), eps.double(), a, s, row)
        found.append(split(one, 0 * one, a, s, row).x0.square() * output.square().mean().clamp(max=LARGEST))
    return torch.stack(found)


def _linear(x0: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """Return the error [T] of the best linear estimate.

    The estimate is linear in each element of x0 [N, ...]: `v sigma^2 / (alpha^2 v + sigma^2)` for an element
    of variance v.
    """
    variance = x0.double().flatten(1).var(0)
    found = [(variance * s**2 / (a**2 * variance + s**2)).mean() for a, s in zip(alpha, sigma, strict=True)]
    return torch.stack(found).clamp(min=1e-12)


def _better(own: Tensor, others: Sequence[tuple[str, Tensor]]) -> list[tuple[float, str]]:
    """Return the readings that are better, and not by chance.

    Returns (error as a share of the stated reading's error, name). own, others [T, N].
    """
    found = []
    for name, theirs in others:
        gain, ratio = (own - theirs).mean(0), float(theirs.mean() / own.mean().clamp(min=1e-30))
        if ratio < BETTER and bool(gain.mean() > SURE * gain.std() / len(gain) ** 0.5):
            found.append((ratio, name))
    return found


def _miscalibrated(backbone: Backbone, times: Tensor, real: Tensor, cond: Cond, seed: int, batch: int) -> str:
    """Return a suspicion if the network finds a wrong amount of noise.

    A network that was trained by regression has `E <eps - eps_hat, eps_hat> = 0` at every time, however well the
    network fits. Evaluated for noise s' at a state of noise s, the network is off by about s / s'.

    Few networks fit well where there is little noise, and times one index off show only there. So a schedule is
    suspected if the amount is right everywhere under another one, or wrong at several ordinary times.
    """
    schedule = backbone.schedule
    lowest = torch.tensor(LOWEST if schedule.resolution else (), dtype=torch.float64)
    times = torch.cat([lowest, times[~torch.isin(times, lowest)]])
    draws = max(1, -(-DRAWS // real[0].numel() // len(real)))
    of = torch.arange(len(real)).repeat(draws)
    noise = torch.randn((len(times), len(of), *real.shape[1:]), generator=torch.Generator().manual_seed(seed + 1))
    x0, cond = real[of], rows(cond, of)

    def excess(reading: Reading) -> tuple[Tensor, Tensor]:
        """Return (share of noise found in excess, standard error) [T]."""
        own = _own_times(reading, schedule, times)
        alpha, sigma, found = reading.schedule.alpha(own), reading.schedule.sigma(own), []
        for i, clean in enumerate(_estimates(backbone, reading, own, reading.told(own), x0, noise, cond, batch)):
            eps = noise[i] + alpha[i] / sigma[i] * (x0 - clean)
            left, size = ((noise[i] - eps) * eps).flatten(1).mean(1), eps.square().mean().clamp(min=1e-12)
            left = left.view(draws, -1).mean(0)  # draws of one sample are not independent
            found.append(torch.stack([left.mean() / size, left.std() / size / len(left) ** 0.5]))
        return torch.stack(found).nan_to_num(nan=1e6).unbind(1)  # type: ignore[return-value]

    def total(share: Tensor, error: Tensor) -> float:
        return float((share.abs() - 2 * error).clamp(min=0).mean())

    def odd(share: Tensor, error: Tensor) -> Tensor:
        return (share.abs() > OFF) & (share.abs() > (SURE + 1) * error)

    share, error = excess(Reading("", schedule, backbone.row))
    if not bool((wrong := odd(share, error)).any()):
        return ""
    found = [(other.name, excess(other)) for other in _schedules(backbone)]
    name, best = min(found, key=lambda reading: (total(*reading[1]), reading[0]))
    if total(*best) < CLEARLY * total(share, error) and not bool(odd(*best).any()):
        return name
    wrong[: len(lowest)] = False
    if int(wrong.sum()) < OFTEN:
        return ""
    worst = int((share.abs() * wrong).argmax())
    return (
        f"the schedule: at t {float(times[worst]):.6g} the network finds too "
        f"{'little' if share[worst] > 0 else 'much'} noise, and on no schedule that was tried the right "
        "amount; the network was trained on another schedule, "
        "or for too short a time"
    )


def _others(backbone: Backbone) -> list[Reading]:
    """Return other readings that are often confused."""
    schedule, row = backbone.schedule, backbone.row
    here = torch.tensor([[0.6, 1.0], [0.8, 2.0]], dtype=torch.float64).unbind(0)
    found = [
        Reading(f"prediction is {name!r}, not the one stated", schedule, row_named(name))
        for name in ("x0", "eps", "v", "flow")
        if any(not torch.allclose(a, b) for a, b in zip(ROWS[name](*here), row(*here), strict=True))
    ]
    found += [
        Reading(f"the range of the data: pass {name} of these", schedule, row, scale=scale, offset=offset, same=False)
        for name, (scale, offset) in RANGES.items()
    ]

    def told(name: str, how: Callable[[Tensor], Tensor]) -> None:
        found.append(Reading(name, schedule, row, how))

    told("time runs the other way: the network knows t as t_max - t", lambda t: schedule.t_max - t)
    if schedule.resolution:
        told("the scale of time: the network wants t / 1000", lambda t: t / 1000)
        told("the scale of time: the network wants t as a fraction of the table", lambda t: t / (schedule.t_max + 1))
    else:
        told("the scale of time: the network wants 1000 t", lambda t: 1000 * t)
        told(
            "the scale of time: the network wants log(sigma) / 4",
            lambda t: schedule.sigma(t).clamp(min=1e-12).log() / 4,
        )
    return found


def _moved(schedule: Schedule, shift: float) -> Callable[[Tensor], Tensor]:
    def told(t: Tensor) -> Tensor:
        moved = schedule.at((schedule.fraction(t) + shift).clamp(0.001, 1))
        return moved.round() if schedule.resolution else moved

    return told


def _schedules(backbone: Backbone) -> list[Reading]:
    """Return readings with other schedules.

    Times one index off, times moved along the path, and the usual tables.
    """
    schedule, row, found = backbone.schedule, backbone.row, []
    for step in (1, -1) if schedule.resolution else ():
        name = f"times are off by one: the network knows the noise of t as that of t {'+' if step > 0 else '-'} 1"
        found.append(Reading(name, schedule, row, _stepped(schedule, step)))
    for shift in SHIFTS:
        way = "noisier" if shift > 0 else "cleaner"
        name = f"the schedule: the network finds the right noise at times {abs(shift):.0%} of the way {way}"
        found.append(Reading(name, schedule, row, _moved(schedule, shift)))
    return found + [
        Reading(f"the schedule: the network was trained on {n}", s, row, same=False) for n, s in _usual(schedule)
    ]


def _stepped(schedule: Schedule, step: int) -> Callable[[Tensor], Tensor]:
    return lambda t: (t + step).clamp(0, schedule.t_max)


def _usual(schedule: Schedule) -> list[tuple[str, Schedule]]:
    """Return the usual schedules on the same times.

    Schedules that equal the stated schedule are left out.
    """
    if not schedule.resolution:
        return [] if isinstance(schedule, Flow) else [("a straight line (Flow)", Flow())]
    n = round(schedule.t_max) + 1
    scale = 1000 / n
    u = (torch.arange(n + 1, dtype=torch.float64) / n + 0.008) / 1.008
    cosine = (u * torch.pi / 2).cos().square()
    betas = {
        "betas linear from 0.0001 to 0.02 (DDPM)": torch.linspace(1e-4 * scale, 0.02 * scale, n, dtype=torch.float64),
        "betas scaled linear from 0.00085 to 0.012 (Stable Diffusion)": torch.linspace(
            (8.5e-4 * scale) ** 0.5, (0.012 * scale) ** 0.5, n, dtype=torch.float64
        )
        ** 2,
        "the cosine schedule": 1 - cosine[1:] / cosine[:-1],
    }
    index = torch.arange(n, dtype=torch.float64)
    tables = {name: VP((1 - b.clamp(max=0.999)).cumprod(0)) for name, b in betas.items()}
    return [
        (name, vp)
        for name, vp in tables.items()
        if not torch.allclose(vp.sigma(index), schedule.sigma(index), atol=1e-3)
    ]


def _time_of(schedule: Schedule, ratio: Tensor) -> Tensor:
    """Return the times [T] of these ratios sigma / alpha.

    The times are as near as the schedule allows.
    """
    if schedule.resolution:
        times = torch.arange(0, round(schedule.t_max) + 1, dtype=torch.float64)
    else:
        times = schedule.at(torch.linspace(1e-4, 1, GRID, dtype=torch.float64))
    known = _ratio(schedule, times).clamp(min=1e-12).log()
    return times[(known[None] - ratio.log()[:, None]).abs().argmin(1)]


def _own_times(reading: Reading, stated: Schedule, times: Tensor) -> Tensor:
    """Return the reading's times [T] with the stated noise ratios.

    The stated schedule has these ratios of noise to data at `times`.
    """
    return times if reading.same else _time_of(reading.schedule, reading.scale * _ratio(stated, times))


def _ratio(schedule: Schedule, times: Tensor) -> Tensor:
    return schedule.sigma(times) / schedule.alpha(times).clamp(min=1e-12)


@torch.no_grad()
def _estimates(
    backbone: Backbone, reading: Reading, times: Tensor, told: Tensor, x0: Tensor, noise: Tensor, cond: Cond, batch: int
) -> list[Tensor]:
    """Return clean estimates [N, ...] at each of the times [T].

    float64. NaN where a network fails at a time that only another reading uses.
    """
    device, found = next(backbone.module.parameters()).device, []
    alpha, sigma = reading.schedule.alpha(times), reading.schedule.sigma(times)
    for i in range(len(times)):
        a, s, t = (v[i].expand(len(x0)) for v in (alpha, sigma, told))
        x = (expand(a, x0) * x0 + expand(s, x0) * noise[i]).float()
        parts = [slice(j, j + batch) for j in range(0, len(x0), batch)]
        try:
            m = torch.cat(
                [
                    backbone.predict(backbone.module, x[p].to(device), t[p].to(device), rows(cond, p)).cpu()
                    for p in parts
                ]
            )
        except (IndexError, ValueError, RuntimeError):
            if not reading.name:
                raise
            m = torch.full_like(x, torch.nan)
        found.append(split(m.double(), x.double(), expand(a, x.double()), expand(s, x.double()), reading.row).x0)
    return found
