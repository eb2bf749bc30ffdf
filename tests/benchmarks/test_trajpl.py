"""`benchmarks/trajpl.py`: what makes a run another one, its errors and its table.

Its closed form runs from end to end in a handful of iterations.
"""

import json
import math
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep import TrajectoryConfig, TrajectoryImitation
from fewstep.backbones.base import denoiser
from fewstep.backbones.generate import noise_of
from fewstep.core import timegrid
from fewstep.core.guidance import Guidance
from fewstep.core.solvers import sample
from fewstep.training.loop import TrainConfig

from .. import tiny

Bench = dict[str, Any]


@pytest.fixture
def bench(load: Callable[[str], Bench]) -> Bench:
    return load("trajpl")


@pytest.fixture
def part(bench: Bench) -> Any:
    """Return a part of a tiny teacher, which has two steps itself."""
    teacher = tiny.denoiser(conditional=False)
    noise = noise_of([torch.Generator().manual_seed(i) for i in range(5)], teacher.shape)
    with torch.no_grad():
        *_, last = sample(
            denoiser(teacher, teacher.module, {}), teacher.schedule, noise, timegrid.uniform(teacher.schedule, 2)
        )
    return bench["Part"](
        teacher,
        ("",),
        TrajectoryConfig(count=10, steps=8),
        TrainConfig(iterations=40, batch=4, lr=1e-3, fake_lr=1e-3, decay=20),
        noise,
        last.x,
        {},
    )


def test_the_error_is_the_distance_to_the_teacher_s_end_over_its_size(part: Any) -> None:
    def call(count: int, cond: Any) -> Any:
        return denoiser(part.teacher, part.teacher.module, cond)

    method = TrajectoryImitation(steps=(2, 4), head="none", guidance=Guidance(scale=1.0))
    with torch.no_grad():
        own, other = (
            replace(part, goal=goal).measure(call, method, None)["error"] for goal in (part.goal, 2 * part.goal)
        )
    assert own[2] == pytest.approx(0, abs=1e-6)
    assert other[2] == pytest.approx(0.5, abs=1e-6)
    assert own[4] > 1e-3
    measured = replace(part, distances={"fd": lambda ends: float(len(ends))})
    with torch.no_grad():
        assert measured.measure(call, method, None)["fd"] == {2: 5.0, 4: 5.0}


def test_a_row_is_kept_for_its_settings_alone(bench: Bench, part: Any) -> None:
    """Every setting that changes a number makes another run. A seed has its own row, a solver alone no training."""
    settings, students = bench["settings_of"], bench["PARTS"]["exact"]
    head = students["head"]
    assert settings(head, part) == settings(head, replace(part, train=replace(part.train, seed=7)))
    others = [
        settings(head, replace(part, train=replace(part.train, iterations=41))),
        settings(head, replace(part, trajectories=replace(part.trajectories, count=11))),
        settings(head, replace(part, noise=part.noise[:4])),
        settings(replace(head, trajectories=11), part),
        settings(replace(head, iterations=10), part),
        settings(replace(head, matching={"steps": 2}), part),
        settings(students["pas"], part),
        settings(students["head-ipndm"], part),
    ]
    assert all(other != settings(head, part) for other in others)
    assert settings(students["ddim"], part) == settings(
        students["ddim"], replace(part, train=replace(part.train, iterations=41))
    )
    assert json.loads(json.dumps(settings(head, part))) == settings(head, part)
    assert (
        bench["completed"]({"train": {"iterations": 40}})["train"]["lr_warmup"] == 0
    )  # a row from before that setting
    assert bench["train_config"](replace(head, iterations=10), part) == replace(part.train, iterations=10, decay=5)
    assert bench["train_config"](head, part) == part.train
    assert bench["train_config"](replace(head, rate=0.2), part) == replace(part.train, lr=2e-4, fake_lr=2e-4)


def row(part: str, key: str, seed: int, measured: dict[str, dict[str, float]], trained: int = 0) -> dict[str, Any]:
    about = {
        "hardware": {"device": "CPU", "instructions": None, "threads": None},
        "versions": {"commit": "abc", "torch": None},
        "label": key,
        "teacher": {"fd": 10.0},
        "settings": {},
        "share": 0.04,
        "seconds": 3.0,
    }
    return {**about, "part": part, "key": key, "seed": seed, "measured": measured, "trained": trained}


def test_the_table_has_means_deviations_and_what_is_left_of_ddims_excess(bench: Bench, tmp_path: Path) -> None:
    a = Namespace(to=tmp_path)
    results = [
        row("pixel", "lora", 1, {"fd": {"2": 24.0, "4": 12.0}}, 50),
        row("pixel", "ddim", 0, {"fd": {"2": 30.0, "4": 20.0}}),
        row("pixel", "lora", 0, {"fd": {"2": 16.0, "4": 12.0}}, 50),
        row("pixel", "two", 0, {"fd": {"2": 12.0}}, 50),
        row("exact", "no-longer-there", 0, {"error": {"2": 0.5}}),
    ]
    bench["write"](results, a)
    assert [(r["key"], r["seed"]) for r in json.loads((tmp_path / "trajpl.json").read_text())["rows"]] == [
        ("ddim", 0), ("lora", 0), ("lora", 1), ("two", 0)
    ]  # fmt: skip
    assert bench["kept"](a)["pixel", "lora", 1] == results[0]
    lines = (tmp_path / "trajpl.md").read_text().splitlines()
    assert "| DDIM | 0 | 3 | 30.000 (100.0%) | 20.000 |" in lines
    assert "| LoRA alone | 50 (4.0%) | 3 | 20.000 ± 5.657 (50.0%) | 12.000 ± 0.000 |" in lines
    assert "| TrajP-L for 2 steps alone | 50 (4.0%) | 3 | 12.000 (10.0%) |  |" in lines
    assert any(line.startswith("Seeds 0, 1; CPU; commit abc: ") for line in lines)


def test_nothing_is_kept_where_nothing_was_run(bench: Bench, tmp_path: Path) -> None:
    assert bench["kept"](Namespace(to=tmp_path)) == {}


def test_the_closed_form_is_a_network_of_the_mixture_s_own_estimate(bench: Bench) -> None:
    teachers = bench["make_part"].__globals__
    net, mixture, process = teachers["Exact"](), teachers["mixture"](), teachers["PROCESS"]
    x = 3 * torch.randn((4, teachers["D"]), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.1, 1.0, 10.0, 80.0])
    torch.testing.assert_close(net(x, t), mixture.denoise(process, x.double(), t.double()).x0.float())


def finite(value: Any) -> bool:
    """Whether every number in there is one."""
    if isinstance(value, dict | list):
        return all(finite(v) for v in (value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.slow
def test_the_closed_form_part_runs_and_is_not_run_again(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["--iterations", "4", "--count", "64", "--batch", "16", "--seeds", "0", "--keys", "ddim", "head"]
    places = ["--out", str(tmp_path / "kept"), "--to", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["trajpl.py", "--only", "exact", *settings, *places])
    main: Callable[[], None] = bench["main"]
    main()
    table = json.loads((tmp_path / "trajpl.json").read_text())
    assert [(r["part"], r["key"], r["seed"]) for r in table["rows"]] == [("exact", "ddim", 0), ("exact", "head", 0)]
    assert finite(table)
    assert {"hardware", "versions", "label", "settings", "seconds"} <= table["rows"][0].keys()
    errors = table["rows"][0]["measured"]["error"]
    assert list(errors) == list("123456")
    assert errors["2"] > errors["6"] > 0
    assert table["rows"][1]["trained"] > 0
    assert (tmp_path / "trajpl.md").read_text().count("\n| ") == 2 * (2 + 2)  # of errors and of distances

    def again(*_: object) -> None:
        pytest.fail("a kept run was run again")

    generated = sorted((f, f.stat().st_mtime_ns) for f in (tmp_path / "kept").rglob("*") if f.is_file())
    assert generated
    monkeypatch.setitem(bench["main"].__globals__, "run", again)
    main()
    assert json.loads((tmp_path / "trajpl.json").read_text())["rows"] == table["rows"]
    assert sorted((f, f.stat().st_mtime_ns) for f in (tmp_path / "kept").rglob("*") if f.is_file()) == generated
    monkeypatch.setattr("sys.argv", ["trajpl.py", "--only", "exact", *settings, *places, "--iterations", "5"])
    with pytest.raises(pytest.fail.Exception, match="run again"):  # it is another run
        main()
