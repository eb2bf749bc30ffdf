"""Runs in Python: several on one teacher, again, longer, stopped; what they leave and what they say."""

import json
import math
import warnings
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fewstep
from fewstep.backbones.base import Backbone, Denoiser
from fewstep.checks import check_backbone
from fewstep.core.guidance import Guidance
from fewstep.core.schedule import VP, Flow
from fewstep.methods.matching_settings import MatchConfig
from fewstep.methods.method import Method

from .. import tiny

ODD: Any = 3
WORD: Any = "linear"
METHOD = fewstep.TDM(steps=2, warmup=2, guidance=2.0)
TRAIN: dict[str, Any] = {"iterations": 6, "batch": 4, "lr": 1e-2}
THREE = fewstep.TrainConfig(iterations=3)


def drawn(model: Any) -> torch.Tensor:
    return fewstep.sample(model, tiny.WORDS, steps=2)


def run(
    teacher: Backbone,
    method: Method = METHOD,
    out: Path | None = None,
    watch: fewstep.Watch | None = None,
    trajectories: fewstep.TrajectoryConfig | None = None,
    **changed: Any,
) -> Generator[fewstep.Step, None, None]:
    """Six iterations of a LoRA of rank 2; `changed` are settings of the training."""
    train, roles = fewstep.TrainConfig(**(TRAIN | changed)), fewstep.RolesConfig(rank=2)
    return fewstep.distill(
        teacher, method, tiny.WORDS, train=train, roles=roles, out=out, watch=watch, trajectories=trajectories
    )


def last(teacher: Backbone, **changed: Any) -> fewstep.Step:
    *_, step = run(teacher, **changed)
    return step


def test_runs_and_students_on_one_teacher_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Interleaved, one after the other, beside a loaded student; and the teacher stays what it was."""
    teacher = tiny.denoiser()
    teacher.module.requires_grad_(True).train()
    before, layers = drawn(teacher), [n for n, _ in teacher.module.named_modules()]
    alone = [drawn(last(tiny.denoiser(), seed=s)) for s in (0, 1)]
    runs = [run(teacher, seed=s) for s in (0, 1)]
    for _ in range(6):
        steps = [next(r) for r in runs]
    assert all(torch.equal(drawn(step), expected) for step, expected in zip(steps, alone, strict=True))
    loaded = fewstep.load_student(steps[0].save(tmp_path / "kept"), base=teacher)
    last(teacher, seed=2)
    check_backbone(teacher)
    assert torch.allclose(drawn(loaded), alone[0], atol=1e-6) and torch.equal(drawn(steps[1]), alone[1])
    assert torch.equal(drawn(teacher), before) and [n for n, _ in teacher.module.named_modules()] == layers
    assert teacher.module.training and all(p.requires_grad for p in teacher.module.parameters())


def test_a_finished_run_yields_its_last_step_and_the_living_one_stays(tmp_path: Path) -> None:
    """A notebook's cell, run again."""
    teacher = tiny.denoiser()
    first = last(teacher, out=tmp_path)
    written = (tmp_path / "final" / "fewstep.json").stat().st_mtime_ns
    again = last(teacher, out=tmp_path)
    assert (again.iteration, again.seconds) == (6, 0.0) and str(again.metrics) == str(first.metrics)
    assert torch.equal(drawn(again), drawn(first))
    assert (tmp_path / "final" / "fewstep.json").stat().st_mtime_ns == written
    lines = [json.loads(line)["iteration"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 6]
    longer = list(run(teacher, out=tmp_path, iterations=8))
    assert [s.iteration for s in longer] == [7, 8]
    assert fewstep.load_student(tmp_path / "final", base=teacher).card.iterations == 8
    with pytest.warns(fewstep.DistillationWarning, match="has 8 iterations already"):
        assert last(teacher, out=tmp_path).iteration == 8


def test_a_run_that_is_broken_off_goes_on_with_its_log(tmp_path: Path) -> None:
    for step in run(tiny.denoiser(), out=tmp_path):
        if step.iteration == 4:
            break
    assert not (tmp_path / "final").exists()
    assert fewstep.write_report(tmp_path).is_file()
    resumed = list(run(tiny.denoiser(), out=tmp_path))
    assert [s.iteration for s in resumed] == [5, 6]
    lines = [json.loads(line)["iteration"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [1, 2, 3, 4, 5, 6]
    assert torch.equal(drawn(resumed[-1]), drawn(last(tiny.denoiser())))


def test_other_settings_are_refused_in_pythons_words_and_nothing_is_lost(tmp_path: Path) -> None:
    step = last(tiny.denoiser(), out=tmp_path)
    record = (tmp_path / "run.json").read_text()
    with pytest.raises(
        ValueError,
        match=r"was made with other settings: lr 0\.01 -> 0\.02, ema 0\.98 -> 0\.5; "
        r"set them back, or choose another out$",
    ):
        last(tiny.denoiser(), out=tmp_path, lr=0.02, ema=0.5)
    for other, said in (
        (tiny.denoiser(prediction="eps"), "prediction v -> eps"),
        (tiny.denoiser(schedule=Flow()), "schedule VP -> Flow"),
    ):
        with pytest.raises(ValueError, match=f"teacher.{said}"):
            last(other, out=tmp_path)
    assert (tmp_path / "run.json").read_text() == record
    assert torch.allclose(drawn(fewstep.load_student(tmp_path / "final", base=tiny.denoiser())), drawn(step), atol=1e-6)


def test_another_mapping_from_prompts_is_another_run(tmp_path: Path) -> None:
    """Also where the embeddings of the first lie in the run's folder."""
    last(tiny.denoiser(), out=tmp_path)
    other = replace(tiny.denoiser(), conditions=lambda prompts: {"label": torch.ones(len(prompts), 3)})
    with pytest.raises(ValueError, match=r"conditions\.label\.says"):
        last(other, out=tmp_path)


def test_metrics_have_the_same_keys_in_every_iteration() -> None:
    method = fewstep.TDM(steps=(4, 2), warmup=2, guidance=2.0)
    steps = list(run(tiny.denoiser(), method))
    assert len({tuple(s.metrics) for s in steps}) == 1
    assert list(steps[0].metrics) == [
        "student_loss",
        "fake_loss",
        *(f"gap_4_{k}" for k in range(4)),
        "gap_2_0",
        "gap_2_1",
        "student_grad",
        "fake_grad",
    ]
    assert math.isnan(steps[0].metrics["student_loss"]) and not math.isnan(steps[-1].metrics["student_loss"])
    assert steps[0].seconds_left > 0 and steps[-1].seconds_left == 0


def test_a_student_of_a_pipeline_is_kept_with_its_images(tmp_path: Path) -> None:
    tiny.pipeline().save_pretrained(tmp_path / "teacher")
    teacher = fewstep.load_teacher(tmp_path / "teacher")
    watch = fewstep.Watch(every=3, count=2, teacher_steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fewstep.DistillationWarning)
        step = last(teacher, out=tmp_path / "run", watch=watch, iterations=3)
    student = fewstep.load_student(tmp_path / "run" / "final")  # its card names the folder
    assert torch.equal(fewstep.sample(student, tiny.WORDS), fewstep.sample(step, tiny.WORDS))
    assert (tmp_path / "run" / "samples" / "step_000003.png").is_file() and (tmp_path / "run" / "report.html").is_file()
    assert fewstep.load(teacher, tmp_path / "run" / "final")("red cat").images
    with pytest.raises(ValueError, match="run: fewstep evaluate FOLDER"):
        fewstep.evaluate(student)


def test_trajectories_are_shared_by_a_folder_and_say_their_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method, ways = (
        fewstep.TrajectoryImitation(steps=2, guidance=Guidance(scale=2.0)),
        fewstep.TrajectoryConfig(count=8, steps=4, folder=str(tmp_path / "walks")),
    )
    teacher, runs = tiny.denoiser(), []
    for seed in (0, 1):
        runs += list(run(teacher, method, trajectories=ways, iterations=2, seed=seed))
    assert "generating 8 trajectories of the teacher (14 NFE each, 112 in total)" in capsys.readouterr().err
    assert len(list((tmp_path / "walks").glob("*.safetensors"))) == 1
    with pytest.raises(ValueError, match=r"^trajectories\.folder: the trajectories in .* are those of teacher"):
        next(run(tiny.denoiser(seed=1), method, trajectories=ways))


# Names of methods


def test_a_method_by_its_name_has_all_its_settings() -> None:
    made: Any = fewstep.method("dmd2", steps=2, guidance=3.0)
    assert (made.name, made.steps, made.guidance, made.solver) == ("dmd2", 2, Guidance(scale=3.0), "renoise")
    assert (made.match.state, made.match.tau_range, made.fake.updates) == ("clean", "full", 10)
    with pytest.raises(ValueError, match=r"^name: got 'dmd3', allowed are tdm, "):
        fewstep.method("dmd3")
    with pytest.raises(ValueError, match=r"^stpes: method dmd2 has no such setting"):
        fewstep.method("dmd2", stpes=4)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (fewstep.DistributionMatching, {"name": "dmd2"}),
        (fewstep.DistributionMatching, {"name": "sid", "match": MatchConfig(state="clean", tau_range="full")}),
        (fewstep.DistributionMatching, {"name": "tdm-fisher"}),
        (fewstep.DistributionMatching, {"name": "diff-instruct", "steps": 1}),
        (fewstep.ConsistencyDistillation, {"name": "progressive"}),
        (fewstep.ProgressiveDistillation, {"name": "lcm"}),
        (fewstep.TrajectoryImitation, {"name": "sfd"}),
    ],
)
def test_a_name_on_other_settings_is_refused(kind: Callable[..., Any], settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^name: got {settings['name']} (with [\w.]+=|for \w+, ).*fewstep\.method\("):
        kind(**settings)


def test_settings_without_a_name_have_that_of_what_they_are() -> None:
    assert fewstep.TDM().name == "tdm" and fewstep.DistributionMatching(steps=(2, 1)).name == "tdm-unify"
    assert fewstep.DistributionMatching(match=MatchConfig(divergence="fisher")).name == "tdm-fisher"
    assert replace(fewstep.method("dmd2"), name="tdm").name == "dmd2"


# What cannot be


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            lambda t: fewstep.distill(t, METHOD, "red cat", train=THREE),
            r"^prompts: got the string 'red cat', allowed is a list",
        ),
        (lambda t: fewstep.sample(t, "abc"), r"^prompts: got the string 'abc'"),
        (lambda t: fewstep.distill(t, METHOD, [], train=THREE), r"^prompts: got none"),
        (lambda t: fewstep.distill(t, METHOD, ["a", ODD], train=THREE), r"^prompts: got 3 among them"),
        (lambda t: fewstep.distill(t, METHOD, train=fewstep.TrainConfig(iterations=0)), r"^iterations: got 0"),
        (
            lambda t: fewstep.distill(t, METHOD, train=THREE, roles=fewstep.RolesConfig(lora=False, quantize="int8")),
            r"^quantize: got int8, .* set lora=True, or quantize=None",
        ),
        (
            lambda t: fewstep.distill(t, fewstep.ConsistencyDistillation(steps=2), train=THREE),
            r"^images: method lcm needs some",
        ),
        (
            lambda t: fewstep.distill(t, METHOD, train=THREE, images="teacher"),
            r"^images: method tdm is trained from prompts alone",
        ),
        (lambda t: fewstep.sample(t, ["a"], seeds=ODD), r"^seeds: got 3"),
        (lambda t: fewstep.DistributionMatching(steps=0), r"^steps: got 0"),
        (lambda t: fewstep.TrajectoryConfig(count=0), r"^count: got 0"),
        (
            lambda t: fewstep.distill(replace(t, shape=(2, 5)), METHOD, train=THREE),
            r"^teacher: the network of own-network gives \[2, 2, 2, 5\] for states \[2, 2, 5\]",
        ),
        (
            lambda t: fewstep.distill(replace(t, shape=(3, 4, 4)), METHOD, train=THREE),
            r"^teacher: the network of own-network does not take states \[2, 3, 4, 4\]",
        ),
        (
            lambda t: fewstep.distill(
                replace(t, conditions=lambda p: {"label": torch.zeros(1, 3)}), METHOD, train=THREE
            ),
            r"^conditions: ",
        ),
        (lambda t: replace(t, time_layer="tiem"), r"^time_layer: the network has no layer 'tiem'; did you mean 'time'"),
        (lambda t: replace(t, time_layer="inp"), r"^time_layer: 'inp' is a Conv2d"),
        (lambda t: replace(t, feature_layers=("oot",)), r"^feature_layers: the network has no layer 'oot'"),
        (lambda t: replace(t, schedule=torch.linspace(0.9, 0.1, 10)), r"^schedule: got a Tensor"),
        (lambda t: replace(t, schedule=np.linspace(0.9, 0.1, 10)), r"^schedule: got a ndarray"),
        (lambda t: replace(t, shape=4), r"^shape: got 4"),
        (lambda t: replace(t, conditions={}), r"^conditions: got a dict"),
        (lambda t: replace(t, module=nn.Identity()), r"^module: got a Identity"),
        (
            lambda t: VP(torch.linspace(0.9999, 0.98, 1000)),
            r"^schedule: alpha_bar goes from 0\.9999 to 0\.98.* not its alphas",
        ),
        (lambda t: VP(WORD), r"^schedule: alpha_bar is a str"),
        (lambda t: fewstep.check(t, torch.zeros(64, 2, 4, 4)), r"^real: "),
        (lambda t: fewstep.check(t, torch.randn(64, 3)), r"^real: got \[64, 3\]"),
    ],
)
def test_what_cannot_be_is_said_at_once_in_pythons_words(wrong: Callable[[Denoiser], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said) as error:
        wrong(tiny.denoiser())
    assert "\n" not in str(error.value)


def test_tables_of_numpy_and_lists_are_tables() -> None:
    table = np.linspace(0.999, 0.01, 100)
    tables: list[Any] = [table, table.tolist(), torch.from_numpy(table)]
    for given in tables:
        assert VP(given).alpha(torch.tensor([99.0])) == pytest.approx(0.1)


def test_a_network_that_python_cannot_copy_is_one_line() -> None:
    teacher = tiny.denoiser()
    teacher.module.register_buffer("odd", torch.ones(1, requires_grad=True) * 2, persistent=False)
    teacher.module.lock = (i for i in range(3))  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"^teacher: the network of own-network cannot be copied \("):
        next(run(teacher))
