"""All metrics of a row, in the order of tables.

To add a metric, add an entry to `METRICS`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .alignment import COLLAPSED, top
from .distances import frechet_distance, kernel_distance, moments
from .looks import column
from .metric import Measurement, Metric
from .scorer import ACTIONS, DIMENSIONS, OBJECTS, TASKS

GENEVAL = "the prompts of `geneval`, Mask2Former and CLIP ViT-L/14"
LEAST = 1e-4  # of a teacher's appearance, below which nothing is compared with it


def _fd_real(m: Measurement) -> float | None:
    return None if m.real is None else frechet_distance(m.real, m.own)


def _fd_teacher(m: Measurement) -> float | None:
    return None if m.teacher is None else frechet_distance(m.teacher, m.own)


def _kid_real(m: Measurement) -> float | None:
    return None if m.gallery is None else kernel_distance(m.gallery, m.embeddings)


def _apart(m: Measurement) -> Tensor | None:
    return m.apart


def _teacher_distance(m: Measurement) -> float | None:
    return None if m.apart is None else float(m.apart.mean())


def _diversity_ratio(m: Measurement) -> float | None:
    return m.diversity / m.teacher_diversity if m.diversity is not None and m.teacher_diversity else None


def _variety_ratio(m: Measurement) -> float | None:
    return m.variety / m.teacher_variety if m.variety is not None and m.teacher_variety else None


def _collapsed(m: Measurement) -> bool | None:
    ratio = _diversity_ratio(m)
    return None if ratio is None else ratio < COLLAPSED


def _ratio(name: str) -> Callable[[Measurement], float | None]:
    """Return the ratio of one column of appearance.

    It is a multiple of the teacher's.
    """

    def ratio(m: Measurement) -> float | None:
        if m.teacher_looks is None:
            return None
        goal = float(column(m.teacher_looks, name).double().mean())
        return float(column(m.looks, name).double().mean()) / goal if goal > LEAST else None

    return ratio


def _state_shift(m: Measurement) -> float | None:
    if m.teacher_looks is None:
        return None
    own, goal = (column(t, "state_mean").double().mean() for t in (m.looks, m.teacher_looks))
    spread = float(column(m.teacher_looks, "state_std").double().mean())
    return float(own - goal) / spread if spread > LEAST else None


def _fid(m: Measurement) -> float | None:
    return None if m.deep is None or m.deep_moments is None else frechet_distance(m.deep_moments, moments(m.deep))


def _fid_torch(m: Measurement) -> float | None:
    return None if m.deep is None or m.torch_moments is None else frechet_distance(m.torch_moments, moments(m.deep))


def _kid(m: Measurement) -> float | None:
    return None if m.deep is None or m.deep_real is None else kernel_distance(m.deep_real, m.deep)


def _lpips(m: Measurement) -> float | None:
    return None if m.perceptual is None else float(m.perceptual.double().mean())


def _score(key: str, heading: str, digits: int, needs: str, unit: str = "", factor: float = 1.0) -> Metric:
    """Return the metric of a scorer: the mean over its images."""

    def each(m: Measurement) -> Tensor | None:
        return m.scores.get(key)

    def mean(m: Measurement) -> float | None:
        return _mean(each(m))

    return Metric(key, heading, mean, digits, "high", unit, factor, curve=True, needs=needs, each=each)


def _mean(scores: Tensor | None) -> float | None:
    found = None if scores is None else scores[~scores.isnan()]
    return None if found is None or not len(found) else float(found.double().mean())


def _tasks(m: Measurement) -> list[Tensor]:
    """Return the scores of all of GenEval's tasks, or none."""
    found = [m.scores[key] for task in TASKS if (key := f"geneval_{task}") in m.scores]
    return found if len(found) == len(TASKS) else []


def _geneval_each(m: Measurement) -> Tensor | None:
    return torch.stack(tasks).nansum(0) if (tasks := _tasks(m)) else None


def _geneval(m: Measurement) -> float | None:
    """Return the mean over tasks, of those that the prompts are of."""
    means = [mean for scores in _tasks(m) if (mean := _mean(scores)) is not None]
    return sum(means) / len(means) if means else None


def _vbench(dimension: str, needs: str) -> Metric:
    return _score(f"vbench_{dimension}", f"VBench, {dimension.replace('_', ' ')}", 3, needs)


def _drift(key: str, heading: str, compute: Callable[[Measurement], float | None]) -> Metric:
    return Metric(key, heading, compute, 2, shown=False, curve=True, needs="a teacher", kind="drift")


METRICS: dict[str, Metric] = {
    metric.key: metric
    for metric in (
        Metric("fd_real", "FD to real images", _fd_real, 1, "low", curve=True, needs="real images"),
        Metric("fd_teacher", "FD to teacher", _fd_teacher, 1, "low", curve=True, needs="a teacher"),
        Metric(
            "kid_real",
            "KID to real images",
            _kid_real,
            3,
            "low",
            shown=False,
            printed=False,
            needs="the emoji reference",
        ),
        Metric(
            "retrieval_top1",
            "Prompt match, top 1",
            lambda m: None if m.ranks is None else top(m.ranks, 1),
            1,
            "high",
            "%",
            100,
            curve=True,
            needs="the emoji reference",
        ),
        Metric(
            "retrieval_top5",
            "Prompt match, top 5",
            lambda m: None if m.ranks is None else top(m.ranks, 5),
            1,
            "high",
            "%",
            100,
            curve=True,
            needs="the emoji reference",
        ),
        Metric(
            "tone",
            "Skin tone",
            lambda m: None if m.tones is None else float(m.tones[0].double().mean()),
            1,
            "high",
            "%",
            100,
            shown=False,
            needs="the emoji reference",
        ),
        Metric(
            "held_out_top1",
            "Held-out match, top 1",
            lambda m: None if m.held_out_ranks is None else top(m.held_out_ranks, 1),
            1,
            "high",
            "%",
            100,
            shown=False,
            printed=False,
            needs="the emoji reference",
        ),
        Metric(
            "held_out_top5",
            "Held-out match, top 5",
            lambda m: None if m.held_out_ranks is None else top(m.held_out_ranks, 5),
            1,
            "high",
            "%",
            100,
            shown=False,
            printed=False,
            needs="the emoji reference",
        ),
        Metric(
            "held_out_tone",
            "Held-out skin tone",
            lambda m: None if m.tones is None else float(m.tones[1].double().mean()),
            1,
            "high",
            "%",
            100,
            shown=False,
            needs="the emoji reference",
        ),
        Metric(
            "teacher_distance",
            "Distance to the teacher's image, another seed = 1",
            _teacher_distance,
            2,
            "low",
            curve=True,
            needs="a teacher",
            each=_apart,
        ),
        Metric("fid", "FID", _fid, 2, "low", needs="Inception, and real images or a reference"),
        Metric(
            "fid_torch",
            "FID, resized as by torch-fidelity",
            _fid_torch,
            2,
            "low",
            needs="Inception, and real images or a reference",
        ),
        Metric("kid", "KID, Inception", _kid, 4, "low", needs="Inception and real images"),
        _score("clip_score", "CLIP score", 2, "CLIP ViT-L/14"),
        _score("hpsv21", "HPSv2.1", 2, "HPSv2.1"),
        _score("hpsv3", "HPSv3", 2, "HPSv3, in an environment of its own"),
        _score("pickscore", "PickScore", 2, "PickScore v1"),
        _score("imagereward", "ImageReward", 3, "ImageReward, in an environment of its own"),
        _score("aesthetic", "Aesthetic score", 2, "LAION's predictor, version 2"),
        Metric("geneval", "GenEval", _geneval, 3, "high", curve=True, needs=GENEVAL, each=_geneval_each),
        *(_score(f"geneval_{task}", f"GenEval, {task.replace('_', ' ')}", 3, GENEVAL) for task in TASKS),
        _score("dpg", "DPG-Bench", 1, "the prompts of `dpg`, mPLUG in an environment of its own", "%", 100),
        _score("vqascore", "VQAScore", 3, "VQAScore, in an environment of its own"),
        *(_vbench(name, "videos, VBench in an environment of its own") for name in DIMENSIONS),
        *(_vbench(name, "videos of the prompts of `vbench`, VBench in an environment of its own") for name in ACTIONS),
        *(
            _vbench(name, "videos of the prompts of `vbench`, VBench with detectron2 in an environment of its own")
            for name in OBJECTS
        ),
        Metric("diversity", "Diversity", lambda m: m.diversity, 2, shown=False, printed=False, curve=True),
        Metric("diversity_ratio", "Diversity, teacher = 1", _diversity_ratio, 2, curve=True, needs="a teacher"),
        Metric("lpips", "LPIPS between seeds", _lpips, 3, needs="LPIPS's AlexNet"),
        Metric("variety_ratio", "Variety of prompts, teacher = 1", _variety_ratio, 2, needs="a teacher and prompts"),
        Metric("collapsed", "Collapsed", _collapsed, shown=False, printed=False, needs="a teacher"),
        _drift("brightness_ratio", "Brightness", _ratio("brightness")),
        _drift("saturation_ratio", "Saturation", _ratio("saturation")),
        _drift("contrast_ratio", "Contrast", _ratio("contrast")),
        _drift("sharpness_ratio", "Sharpness", _ratio("sharpness")),
        _drift("motion_ratio", "Motion", _ratio("motion")),
        _drift("state_std_ratio", "Deviation of latents", _ratio("state_std")),
        _drift("state_shift", "Shift of latents' mean, in deviations", _state_shift),
        Metric("seconds_per_image", "Time per image", lambda m: m.seconds, 3, "low", "s", kind="cost"),
        Metric("peak_memory", "Peak memory", lambda m: m.memory, 0, "low", "MiB", kind="cost"),
    )
}


def values(measurement: Measurement, metrics: Sequence[Metric] = ()) -> dict[str, Any]:
    """Return every metric of a row by key."""
    return {metric.key: metric.compute(measurement) for metric in metrics or tuple(METRICS.values())}


# Metrics that are in eval.json only where they were asked for.
OTHERS = tuple(
    m for m in METRICS.values() if m.key in ("fid", "fid_torch", "kid", "lpips") or m.each not in (None, _apart)
)
# What drawn prompts change: time and memory are not numbers of prompts. The slow ones take seconds for each draw.
SLOW = tuple(METRICS[key] for key in ("kid_real", "fid", "fid_torch", "kid"))
DRAWN = tuple(m for m in METRICS.values() if m.kind != "cost" and m not in SLOW and m.key != "collapsed")
