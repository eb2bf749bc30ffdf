"""Named protocols: prompts, seeds and reference.

Every run of a protocol by name measures the same thing. The distance is labelled FD-efflite0 and is no FID:
the distance uses another network, and only the leading components of the features. The value depends on the
number of images, so compare only rows of one protocol; `fd_floor` is the value of as many real emoji.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from .. import __version__
from ..core.guidance import Guidance
from .bootstrap import FEW_DRAWS, Groups, Interval, groups_of, intervals, paired, spread
from .faults import findings
from .measure import FeatureExtractor, Measured, SamplePlan, Sampler, measure
from .metric import Measurement
from .metrics import DRAWN, METRICS, OTHERS, SLOW, values
from .plan import EmojiProtocol, digest, plan
from .quality import MetricSuite
from .reference import FOLDER, load_reference
from .scorer import NO_EXTRA, Extra, require_list

REFERENCE = "4228312292527cfbffcd641eaf5df5757565bfad90002a8d6ed067dbd6705a42"

PROTOCOLS = (
    EmojiProtocol("emoji-quick", names=128, repeated=8, seeds=4, toned=16, held_out=16, reference=REFERENCE),
    EmojiProtocol("emoji-medium", names=512, repeated=32, seeds=4, toned=50, held_out=95, reference=REFERENCE),
    EmojiProtocol("emoji-full", names=1910, repeated=64, seeds=5, toned=200, held_out=95, reference=REFERENCE),
)


def protocol_named(name: str) -> EmojiProtocol:
    """Return the protocol called `name`.

    Raises ValueError that lists the protocols for an unknown name.
    """
    for protocol in PROTOCOLS:
        if protocol.name == name:
            return protocol
    raise ValueError(f"protocol: got {name!r}; choose one of {', '.join(p.name for p in PROTOCOLS)}")


@dataclass(frozen=True)
class Row:
    """One generator.

    `sampler(prompts, seeds)` returns images [B, 3, H, W] or clips [B, F, 3, H, W] in [0, 1], alone or with the
    states that they were decoded from; `nfe` is the number of network evaluations per image.
    """

    model: str
    steps: int
    guidance: Guidance
    nfe: int
    sampler: Sampler
    lasting: bool = True  # whether measurements may be kept: those of a model in training may not


def evaluate(
    rows: Sequence[Row],
    protocol: EmojiProtocol,
    cache: Path | None = None,
    progress: Callable[[int], None] = lambda done: None,
    *,
    shipped: Path | None = None,
    reference: Path = FOLDER,
    extra: Extra = NO_EXTRA,
) -> dict[str, Any]:
    """Return the content of eval.json for all rows.

    Every row is measured on the same prompts and, image by image, the same seeds. `progress` is called with
    the number of finished images, of `protocol.total(len(rows))`. Measurements are kept in `cache`, finished
    or not: the same call continues from there, to the same numbers. `shipped` is such a folder too, but only
    read. A kept row is trusted if the first image is the same when sampled again, so a student that was
    trained further is measured anew.

    The teacher that `fd_teacher` and `diversity_ratio` compare with is the first row called "teacher" with
    the most steps. Raises ValueError for another reference than the protocol's, and for a sampler that does
    not return images in [0, 1].
    """
    if extra.deep is not None:
        raise ValueError(
            f"--metrics: got fid or kid, protocol {protocol.name} has its own distance to real emoji; leave it out"
        )
    require_list(extra, protocol.name, "")
    known = load_reference(reference)
    if known.sha256 != protocol.reference:
        found = f"the reference {reference} has hash {known.sha256[:12]}, expected {protocol.reference[:12]}"
        raise ValueError(
            f"protocol {protocol.name}: {found}; install fewstep again, or name your own reference's hash in the "
            "protocol"
        )
    drawn, gauge = plan(protocol, known), FeatureExtractor(known, extra=extra)
    stamp = {
        "prompts_sha256": digest(drawn.prompts),
        "seeds_sha256": digest(drawn.seeds),
        "reference_sha256": known.sha256,
    }
    measured = measured_rows(rows, drawn, gauge, list(stamp.values()), protocol.batch, cache, progress, shipped)
    suite, most = MetricSuite(protocol, drawn, known, extra), best_teacher(rows)
    best = None if most is None else measured[most]
    return {
        "protocol": protocol.name,
        "distance": f"FD-efflite0, {protocol.components} components",
        "versions": {"fewstep": __version__, "torch": str(torch.__version__)},
        **stamp,
        "weights_sha256": extra.weights(),
        "batch": protocol.batch,
        "fd_floor": suite.floor(),
        **compared(
            rows,
            [suite.measured(m, best) for m in measured],
            suite.all(),
            suite.draws,
            groups_of(drawn.prompts[drawn.plain]),
            protocol.names,
        ),
    }


D = TypeVar("D")  # a choice of prompts


def compared(
    rows: Sequence[Row],
    measured: Sequence[Callable[[D], Measurement]],
    whole: D,
    draws: Callable[[], Iterable[D]],
    groups: Groups,
    count: int,
) -> dict[str, Any]:
    """Return the numbers of all rows, the paired comparisons and the findings.

    `measured` has, for each row, its measurement as a function of the prompts: of `whole`, all of them, and of each
    of `draws`, for intervals. `groups` are the images of one prompt, among the `count` images of a row that are
    compared one by one. The keys are `rows`, `paired` and `findings`.
    """
    found = []
    for row, at in zip(rows, measured, strict=True):
        numbers = values(at(whole))
        for metric in OTHERS:
            if numbers[metric.key] is None:
                del numbers[metric.key]
        ends: dict[str, Interval] = {}
        if len(groups) > 1:
            ends = intervals(numbers, (values(at(drawn), DRAWN) for drawn in draws()))
            slow = [metric for metric in SLOW if numbers.get(metric.key) is not None]
            few = islice(draws(), FEW_DRAWS if slow else 0)
            ends |= intervals(numbers, (values(at(drawn), slow) for drawn in few), spread)
        about = {
            "model": row.model,
            "steps": row.steps,
            "guidance": row.guidance.scale,
            "nfe": row.nfe,
            "n": count,
        }
        found.append({**about, **numbers, "intervals": {key: list(end) for key, end in ends.items()}})
    return {
        "rows": found,
        "paired": list(_paired(rows, [at(whole) for at in measured], groups)),
        "findings": findings(found),
    }


def _paired(rows: Sequence[Row], whole: Sequence[Measurement], groups: Groups) -> Iterator[dict[str, Any]]:
    """Compare each student with the other rows, image by image.

    The teacher is taken at its best and at the student's cost. A metric that either row lacks is left out: the
    teacher at its best is not compared with itself.
    """
    best = best_teacher(rows)
    for i, row in enumerate(rows):
        if row.model == "teacher":
            continue
        for j, other in enumerate(rows):
            teacher = other.model == "teacher" and (j == best or other.nfe == row.nfe)
            if not teacher and other.model in ("teacher", row.model):
                continue
            for metric in METRICS.values():
                own, theirs = (None if metric.each is None else metric.each(whole[k]) for k in (i, j))
                if own is None or theirs is None or metric.better is None:
                    continue
                if not bool((own - theirs).isfinite().any()):
                    continue
                result = paired(own, theirs, groups, metric.better)
                told = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(result).items()}
                yield {"row": i, "against": j, "metric": metric.key, **told}


def best_teacher(rows: Sequence[Row]) -> int | None:
    """Return the row of the teacher that others are compared with.

    The first row called "teacher" with the most steps; None without a teacher.
    """
    teachers = [i for i, row in enumerate(rows) if row.model == "teacher"]
    return max(teachers, key=lambda i: rows[i].steps) if teachers else None


def measured_rows(
    rows: Sequence[Row],
    asked: SamplePlan,
    gauge: FeatureExtractor,
    stamp: Sequence[str],
    batch: int,
    cache: Path | None,
    progress: Callable[[int], None],
    shipped: Path | None = None,
) -> list[Measured]:
    """Return the measurements of every row.

    Measurements kept in `cache` or `shipped` under the same `stamp` are reused.
    """
    measured: list[Measured] = []
    kind = [*stamp, "looks", "thumbnails", *gauge.extra.stamp()]  # earlier measurements have none
    for row in rows:
        title = f"{row.model}-{row.steps}steps-guidance{row.guidance.scale:g}"
        special = [] if row.guidance == Guidance(scale=row.guidance.scale) else [json.dumps(asdict(row.guidance))]
        file = f"{title}-{digest([*kind, batch, row.nfe, *special])[:12]}.safetensors"
        kept = [folder / file for folder in (cache, shipped) if folder is not None and row.lasting]
        before = len(measured) * len(asked.prompts)

        def tell(done: int, before: int = before) -> None:
            progress(before + done)

        keep = None if cache is None or not row.lasting else cache / file
        measured.append(measure(gauge, row.sampler, asked, batch=batch, row=title, kept=kept, keep=keep, progress=tell))
    return measured
