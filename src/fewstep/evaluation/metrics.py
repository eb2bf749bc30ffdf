"""All metrics of a row, in the order of tables.

To add a metric, add an entry to `METRICS`.
"""

from collections.abc import Sequence
from typing import Any

from .alignment import COLLAPSED, top
from .distances import frechet_distance, kernel_distance
from .metric import Measurement, Metric


def _fd_real(m: Measurement) -> float | None:
    return None if m.real is None else frechet_distance(m.real, m.own)


def _fd_teacher(m: Measurement) -> float | None:
    return None if m.teacher is None else frechet_distance(m.teacher, m.own)


def _kid_real(m: Measurement) -> float | None:
    return None if m.gallery is None else kernel_distance(m.gallery, m.embeddings)


def _diversity_ratio(m: Measurement) -> float | None:
    return m.diversity / m.teacher_diversity if m.diversity is not None and m.teacher_diversity else None


def _collapsed(m: Measurement) -> bool | None:
    ratio = _diversity_ratio(m)
    return None if ratio is None else ratio < COLLAPSED


METRICS: dict[str, Metric] = {
    metric.key: metric
    for metric in (
        Metric("fd_real", "FD to real images", _fd_real, 1, "low", curve=True),
        Metric("fd_teacher", "FD to teacher", _fd_teacher, 1, "low"),
        Metric("kid_real", "KID to real images", _kid_real, 3, "low", shown=False, printed=False),
        Metric(
            "retrieval_top1",
            "Prompt match, top 1",
            lambda m: None if m.ranks is None else top(m.ranks, 1),
            1,
            "high",
            "%",
            100,
            curve=True,
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
        ),
        Metric(
            "tone", "Skin tone", lambda m: None if m.tones is None else m.tones[0], 1, "high", "%", 100, shown=False
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
        ),
        Metric(
            "held_out_tone",
            "Held-out skin tone",
            lambda m: None if m.tones is None else m.tones[1],
            1,
            "high",
            "%",
            100,
            shown=False,
        ),
        Metric("diversity", "Diversity", lambda m: m.diversity, 2, shown=False, printed=False, curve=True),
        Metric("diversity_ratio", "Diversity, teacher = 1", _diversity_ratio, 2),
        Metric("collapsed", "Collapsed", _collapsed, shown=False, printed=False),
        Metric("seconds_per_image", "Time per image", lambda m: m.seconds, 3, "low", "s"),
    )
}


def values(measurement: Measurement, metrics: Sequence[Metric] = ()) -> dict[str, Any]:
    """Return every metric of a row by key."""
    return {metric.key: metric.compute(measurement) for metric in metrics or tuple(METRICS.values())}
