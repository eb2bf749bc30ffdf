"""`fewstep report`: the page of a run written again from what its folder holds by now, also while it trains and where it was stopped."""

from pathlib import Path

from ..report.run import render_run
from .faults import logged_in
from .progress import console


def run_report(source: str) -> None:
    """Write `report.html` into the run's folder and print its path. Raises ValueError where it is no run's."""
    with logged_in(Path(source)):
        console.print(str(render_run(Path(source)).resolve()))
