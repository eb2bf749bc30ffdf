"""Metrics of other packages, by their names on the command line."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..hashes import sha256_of
from .options import in_options

if TYPE_CHECKING:
    from ..evaluation.scorer import Extra


def extra_of(names: Sequence[str], reference: Path | None = None) -> "Extra":
    """Load the networks of these metrics.

    Raises ValueError in one line for an unknown metric, and where weights or an environment are missing.
    """
    from ..evaluation.scorer import NO_EXTRA, SETS, TASKS, Extra, Scorer, spelled

    if not names and reference is None:
        return NO_EXTRA
    # These imports take seconds.
    from ..evaluation.environments import ENVIRONMENTS, environment_scorer
    from ..evaluation.geneval_judge import GenEvalScorer, load_judge
    from ..evaluation.inception import load_inception, read_statistics
    from ..evaluation.lpips import load_lpips
    from ..evaluation.scorers import SCORERS
    from ..report.video import write_mp4

    others = ("fid", "fid_torch", "kid", "lpips")
    tasks = {f"geneval_{task}": task for task in TASKS}
    known = (*SCORERS, *tasks, *ENVIRONMENTS, *others)
    names = spelled(names)
    if odd := [name for name in names if name not in known]:
        raise ValueError(f"--metrics: got {odd[0]}; choose from {', '.join((*known, *SETS))}")
    if "fid_torch" in names and {"fid", "kid"} & set(names):
        raise ValueError("--metrics: got fid_torch with fid or kid, whose images are resized otherwise; ask for one")
    if reference is not None and not {"fid", "fid_torch"} & set(names):
        raise ValueError("--reference: is for FID alone; pass --metrics fid, or leave it out")
    deep = next((name for name in ("fid", "fid_torch", "kid") if name in names), None)
    judge = load_judge() if set(tasks) & set(names) else None

    def scorer(name: str) -> Scorer:
        if judge is not None and name in tasks:
            return GenEvalScorer(tasks[name], judge)
        return SCORERS[name]() if name in SCORERS else environment_scorer(name, write_mp4)

    return Extra(
        tuple(scorer(name) for name in dict.fromkeys(names) if name not in others),
        None if deep is None else load_inception(deep),
        None if reference is None else read_statistics(reference),
        "" if reference is None else sha256_of(reference),
        "fid" in names,
        "kid" in names,
        "fid_torch" in names,
        load_lpips() if "lpips" in names else None,
    )


def preview_metrics(names: Sequence[str]) -> "Extra":
    """Load the networks of a recipe's `preview.metrics`.

    Raises ValueError as `extra_of` does.
    """
    from ..evaluation.scorer import spelled

    ends = ("", *(f" {name}" for name in (*names, *spelled(names))))
    with in_options({f"--metrics{end}": f"preview.metrics{end}" for end in ends}):
        return extra_of(names)


def run_install(name: str) -> None:
    """Make the environment of a metric and print where it is."""
    from ..evaluation.environments import install
    from .progress import console

    console.print(f"making the environment of {name}; its packages are large")
    console.print(str(install(name)), markup=False)


@contextmanager
def ending(extra: "Extra") -> Iterator[None]:
    """End the processes of all scorers at the end of the block."""
    try:
        yield
    finally:
        for scorer in extra.scorers:
            scorer.close()
