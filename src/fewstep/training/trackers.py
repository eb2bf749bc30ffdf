"""Trackers that show a run's numbers and previews.

TensorBoard, Weights & Biases, Trackio and MLflow. The trackers are accelerate's. A tracker that fails is left
out, and the run goes on.
"""

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic import write_json
from ..data.image_files import in_colour, opened
from ..reading import read_json, reading, reason

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
IDS = "trackers.json"  # by which a resumed run is found again
PROJECT = "fewstep"
PREVIEW = "preview"


def require_trackers(names: Sequence[str]) -> None:
    """Check that trackers of these names can be used.

    Raises ValueError for an unknown name, a name given twice, and a package that is missing.
    """
    for name in names:
        if name not in PACKAGES:
            raise ValueError(f"--log-to: got {name!r}, allowed are {', '.join(PACKAGES)}")
        if list(names).count(name) > 1:
            raise ValueError(f"--log-to: got {name} twice; name each tracker once")
        if find_spec(PACKAGES[name]) is None:
            raise ValueError(f"--log-to: {name} needs the package {PACKAGES[name]}; run: pip install {PACKAGES[name]}")


class Trackers:
    """The trackers of one run.

    `start` is the iteration that the run continues from; from 0 on every tracker begins a new run of its own.
    `say` is called with a line for each tracker that fails.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: Path,
        title: str,
        config: Mapping[str, Any],
        start: int,
        say: Callable[[str], None],
    ) -> None:
        self.run, self.say, self.open = run, say, dict[str, Any]()
        ids = read_ids(run / IDS) if start else {}
        for name in names:
            self._try(name, partial(self._begin, name, title, config, start, ids.get(name, ""), ids))
        if names:
            write_json(run / IDS, ids)

    def _begin(
        self, name: str, title: str, config: Mapping[str, Any], start: int, known: str, ids: dict[str, str]
    ) -> None:
        """Start one tracker, and note by what its run is found again."""
        own = known or secrets.token_hex(4)
        tracker = self.open[name] = made(name, self.run, title, own, bool(known), start)
        tracker.start()
        ids[name] = tracker.tracker.info.run_id if name == "mlflow" else own
        if not known:
            tracker.store_init_configuration(plain(config))

    def log(self, iteration: int, values: Mapping[str, Any]) -> None:
        """Send the numbers and the preview of an iteration."""
        found = numbers(values)
        image = self.run / "samples" / f"step_{iteration:06d}.png"
        for name in list(self.open):
            if found:
                self._try(name, partial(self.open[name].log, found, step=iteration))
            if PREVIEW in values and name in self.open and image.is_file():
                self._try(name, partial(send, name, self.open[name], image, iteration))

    def finish(self) -> None:
        """Close all trackers."""
        for name in list(self.open):
            self._try(name, self.open[name].finish)

    def _try(self, name: str, work: Callable[[], None]) -> None:
        """Call a tracker.

        A tracker that fails is left out from then on.
        """
        try:
            work()
        except Exception as error:  # noqa: BLE001  # of any kind: no run ends because of a tracker
            self.open.pop(name, None)
            self.say(f"warning: --log-to {name} failed ({reason(error)}); the run goes on without it")


def made(name: str, run: Path, title: str, own: str, again: bool, start: int) -> Any:
    """Make one of accelerate's trackers, not started yet."""
    from accelerate.tracking import MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker

    if name == "tensorboard":
        later = {"purge_step": start + 1} if start else {}  # what a stopped run had logged past its checkpoint
        return TensorBoardTracker(name, run, **later)
    if name == "wandb":
        return WandBTracker(PROJECT, id=own, name=title, resume="allow", dir=str(run))
    if name == "trackio":
        return TrackioTracker(PROJECT, name=f"{title}-{own}", resume="allow", embed=False)
    return MLflowTracker(PROJECT, run_id=own if again else None, run_name=title)


def send(name: str, tracker: Any, path: Path, iteration: int) -> None:
    """Send one preview."""
    if name == "mlflow":
        tracker.log_artifact(str(path), "samples")
        return
    with reading(path, "delete it"), opened(path.read_bytes(), path.name, "preview") as held:
        image = in_colour(held)
    if name == "tensorboard":
        tracker.log_images({PREVIEW: np.asarray(image)[None]}, step=iteration, dataformats="NHWC")
    elif name == "wandb":
        tracker.log_images({PREVIEW: [image]}, step=iteration)
    else:
        import trackio

        tracker.log({PREVIEW: trackio.Image(image)}, step=iteration)


def read_ids(path: Path) -> dict[str, str]:
    """Read by what the trackers' runs are found again.

    Empty where there is no file.
    """
    if not path.exists():
        return {}
    found = read_json(path, "delete it: the trackers begin new runs")
    return {name: own for name, own in found.items() if isinstance(own, str)}


def numbers(values: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the finite numbers of a line of the log.

    `{"quality": {"fd_real": 3.0}}` becomes `{"quality/fd_real": 3.0}`.
    """
    found = dict[str, float]()
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
            found[f"{prefix}{key}"] = value
    return found


def plain(values: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return settings as `train.lr: 1e-5`, with lists as text."""
    found = dict[str, bool | int | float | str]()
    for key, value in values.items():
        if isinstance(value, Mapping):
            found |= plain(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return found
