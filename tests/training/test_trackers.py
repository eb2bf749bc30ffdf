"""Trackers get a run's numbers and previews under one run id, and never end a run."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from fewstep.training import trackers
from fewstep.training.trackers import IDS, Trackers, numbers, plain, require_trackers

CONFIG = {"name": "x", "method": {"steps": [4, 2], "guidance": {"scale": 4.5}, "ema": None, "unify": True}}


class Fake:
    """A tracker that notes what it is told, and fails in one of its calls."""

    def __init__(self, name: str, own: str, told: list[Any], failing: str = "") -> None:
        self.name, self.told, self.failing = name, told, failing
        self.tracker = SimpleNamespace(info=SimpleNamespace(run_id=own))

    def note(self, call: str, *values: Any) -> None:
        if call == self.failing:
            raise RuntimeError("the service\nis gone")
        self.told.append((self.name, call, *values))

    def start(self) -> None:
        self.note("start", self.tracker.info.run_id)

    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        self.note("config", values)

    def log(self, values: Mapping[str, Any], step: int) -> None:
        self.note("log", values, step)

    def log_images(self, values: Mapping[str, Any], step: int, **_: str) -> None:
        self.note("images", list(values), step)

    def finish(self) -> None:
        self.note("finish")


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], dict[str, str]]:
    """What all fakes are told, and where each of them fails."""
    told, failing = list[Any](), dict[str, str]()

    def make(name: str, run: Path, title: str, own: str, again: bool, start: int) -> Fake:
        told.append((name, "made", title, again, start))
        return Fake(name, own, told, failing.get(name, ""))

    monkeypatch.setattr(trackers, "made", make)
    return told, failing


def preview(run: Path, iteration: int) -> None:
    (run / "samples").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 4), (iteration, 20, 30)).save(run / "samples" / f"step_{iteration:06d}.png")


def test_numbers_and_settings_are_flat() -> None:
    values = {"a": 1, "quality": {"fd_real": 2.5, "odd": float("nan")}, "warnings": ["x"], "on": True, "none": None}
    assert numbers(values) == {"a": 1, "quality/fd_real": 2.5}
    assert plain(CONFIG) == {
        "name": "x",
        "method.steps": "[4, 2]",
        "method.guidance.scale": 4.5,
        "method.ema": "None",
        "method.unify": True,
    }


def test_a_resumed_run_is_the_same_run_and_a_new_one_is_not(
    tmp_path: Path, faked: tuple[list[Any], dict[str, str]]
) -> None:
    told, _ = faked
    preview(tmp_path, 2)
    first = Trackers(["wandb"], tmp_path, "mine", CONFIG, 0, print)
    first.log(1, {"loss": 1.0})
    first.log(2, {"preview": {"distance": 0.5}})
    first.finish()
    own = told[1][2]
    assert told == [
        ("wandb", "made", "mine", False, 0), ("wandb", "start", own), ("wandb", "config", plain(CONFIG)),
        ("wandb", "log", {"loss": 1.0}, 1), ("wandb", "log", {"preview/distance": 0.5}, 2),
        ("wandb", "images", ["preview"], 2), ("wandb", "finish"),
    ]  # fmt: skip
    told.clear()
    Trackers(["wandb", "mlflow"], tmp_path, "mine", CONFIG, 2, print)
    assert told[:2] == [("wandb", "made", "mine", True, 2), ("wandb", "start", own)]
    assert told[2][:4] == ("mlflow", "made", "mine", False) and told[4][1] == "config"
    assert json.loads((tmp_path / IDS).read_text())["wandb"] == own
    told.clear()
    Trackers(["wandb"], tmp_path, "mine", CONFIG, 0, print)
    assert told[0][3] is False and told[1][2] != own


@pytest.mark.parametrize("call", ["start", "config", "log", "images", "finish"])
def test_a_tracker_that_fails_is_left_out_in_one_line(
    call: str, tmp_path: Path, faked: tuple[list[Any], dict[str, str]]
) -> None:
    told, failing = faked
    failing["wandb"] = call
    preview(tmp_path, 1)
    said = list[str]()
    both = Trackers(["wandb", "tensorboard"], tmp_path, "mine", CONFIG, 0, said.append)
    for i in (1, 2):
        both.log(i, {"loss": 1.0, "preview": {}})
    both.finish()
    assert said == ["warning: --log-to wandb failed (the service is gone); the run goes on without it"]
    assert [t[1] for t in told if t[0] == "tensorboard"][-4:] == ["log", "images", "log", "finish"]


def test_a_tracker_that_cannot_be_used_is_said_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "PACKAGES", {"wandb": "no_such_package_at_all", "mlflow": "json"})
    require_trackers(["mlflow"])
    for names, said in (
        (["tensorbord"], "--log-to: got 'tensorbord', allowed are wandb, mlflow"),
        (["mlflow", "mlflow"], "--log-to: got mlflow twice; name each tracker once"),
        (
            ["wandb"],
            "--log-to: wandb needs the package no_such_package_at_all; run: pip install no_such_package_at_all",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            require_trackers(names)


def stopped_and_resumed(name: str, run: Path) -> str:
    """Two iterations, and one more after a resume from the first; returns the run's id."""
    said = list[str]()
    first = Trackers([name], run, "mine", CONFIG, 0, said.append)
    for i in (1, 2):
        preview(run, i)
        first.log(i, {"loss": float(i)})
        first.log(i, {"preview": {"distance": 0.5}})
    first.finish()
    second = Trackers([name], run, "mine", CONFIG, 1, said.append)
    for i in (2, 3):
        second.log(i, {"loss": 10.0 * i})
    second.finish()
    assert said == []
    return str(json.loads((run / IDS).read_text())[name])


def test_tensorboard_shows_a_resumed_run_as_one(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    stopped_and_resumed("tensorboard", tmp_path)
    seen = events.EventAccumulator(str(tmp_path / "tensorboard"), {"images": 0, "scalars": 0}).Reload()
    assert [(s.step, s.value) for s in seen.Scalars("loss")] == [(1, 1.0), (2, 20.0), (3, 30.0)]
    assert [(i.step, i.width, i.height) for i in seen.Images("preview")][:1] == [(1, 8, 4)]


@pytest.mark.slow
def test_wandb_offline_goes_on_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    own = stopped_and_resumed("wandb", tmp_path)
    found = list((tmp_path / "wandb").glob("offline-run-*"))
    assert found and all(p.name.endswith(f"-{own}") for p in found)
    assert list((tmp_path / "wandb").rglob("preview*.png"))


@pytest.mark.slow
def test_trackio_goes_on_under_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    storage = pytest.importorskip("trackio.sqlite_storage").SQLiteStorage
    own = stopped_and_resumed("trackio", tmp_path)
    logs = storage.get_logs(trackers.PROJECT, f"mine-{own}")
    assert {(line["step"], line["loss"]) for line in logs if "loss" in line} >= {(1, 1.0), (3, 30.0)}
    assert any("preview" in line for line in logs)


@pytest.mark.slow
def test_mlflow_goes_on_under_the_same_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    own = stopped_and_resumed("mlflow", tmp_path)
    client = mlflow.MlflowClient()
    history: list[Any] = client.get_metric_history(own, "loss")
    assert {(m.step, m.value) for m in history} == {(1, 1.0), (2, 2.0), (2, 20.0), (3, 30.0)}
    assert client.get_run(own).data.params["method.guidance.scale"] == "4.5"
    assert sorted(a.path for a in client.list_artifacts(own, "samples")) == [
        "samples/step_000001.png",
        "samples/step_000002.png",
    ]
