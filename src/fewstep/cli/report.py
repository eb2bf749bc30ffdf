"""`fewstep report`: a run's page, written again from its folder.

The run may be finished, stopped or still training.
"""

from pathlib import Path

from ..report.run import render_run
from .faults import logged_in
from .progress import console, put_result


def run_report(source: str) -> None:
    """Write `report.html` into the run's folder and print its path.

    Raises ValueError where the folder is no run's.
    """
    with logged_in(Path(source)):
        report = render_run(Path(source)).resolve()
        console.print(str(report))
        put_result({"report": report})
