"""Options of odd types and values in Python: taken as what they say, or refused in one line that names them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fewstep
from fewstep.core.guidance import Guidance
from fewstep.core.schedule import EDM, VP, Flow
from fewstep.training.lock import LOCK

from .odd import METHOD, Net, started, trained, wrapped

# Any, for the types are wrong on purpose
Train: Any = fewstep.TrainConfig
Roles: Any = fewstep.RolesConfig
Watch: Any = fewstep.Watch
Images: Any = fewstep.ImageSource
TDM: Any = fewstep.TDM
Scaled: Any = Guidance
NAN = float("nan")
TABLE = torch.linspace(0.999, 0.001, 10, dtype=torch.float64)


@pytest.fixture(scope="module")
def student() -> fewstep.Student:
    """A student of a small network, trained a little."""
    return trained(wrapped(started(Net()))).snapshot()


def distilled(**settings: Any) -> Any:
    """Begin a training with some arguments changed."""
    arguments: dict[str, Any] = {
        "teacher": wrapped(started(Net())),
        "method": METHOD,
        "train": Train(iterations=2, batch=2),
    }
    return next(fewstep.distill(**{**arguments, "roles": Roles(rank=2), "watch": None, **settings}))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: Train(iterations=3.0), r"iterations: got 3\.0, allowed are whole numbers from 1"),
        (lambda: Train(iterations=True), "iterations: got True, allowed are whole numbers from 1"),
        (lambda: Train(iterations="4"), "iterations: got '4', allowed are whole numbers from 1"),
        (lambda: Train(iterations=None), "iterations: got None, allowed are whole numbers from 1"),
        (lambda: Train(iterations=9, lr="1e-3"), "lr: got '1e-3', allowed are numbers above 0"),
        (lambda: Train(iterations=9, lr=NAN), "lr: got nan, allowed are numbers above 0"),
        (lambda: Train(iterations=9, lr=(1e-3,)), r"lr: got \[0\.001\], allowed are numbers above 0"),
        (lambda: Train(iterations=9, lr=torch.tensor(1e-3)), r"lr: got tensor\(0\.0010\), allowed are numbers above 0"),
        (lambda: Train(iterations=9, betas=(0, 0.9, 0.9)), r"betas: got \[0, 0\.9, 0\.9\], allowed are a list of 2"),
        (lambda: Train(iterations=9, betas=0.9), r"betas: got 0\.9, allowed are a list of 2 numbers from 0"),
        (lambda: Train(iterations=9, betas="ab"), "betas: got 'ab', allowed are a list of 2 numbers from 0"),
        (lambda: Train(iterations=9, betas=(0, NAN)), r"betas: got \[0, nan\], allowed are numbers from 0"),
        (lambda: Train(iterations=9, seed=1.5), r"seed: got 1\.5, allowed are whole numbers"),
        (lambda: Train(iterations=9, seed=True), "seed: got True, allowed are whole numbers"),
        (lambda: Train(iterations=9, compile="no"), "compile: got 'no', allowed are true, false"),
        (lambda: Train(iterations=9, compile=1), "compile: got 1, allowed are true, false"),
        (lambda: Train(iterations=9, precision=None), "precision: got None, allowed are no, bf16"),
        (lambda: Train(iterations=9, precision=["no"]), "precision: got .*, allowed are no, bf16"),
        (lambda: Train(iterations=9, optimizer=[]), "optimizer: got .*, allowed are adamw"),
        (lambda: Train(iterations=10**400, batch=10**400), "batch: got 10.*, allowed are whole numbers from 1"),
        (lambda: Roles(lora="no"), "lora: got 'no', allowed are true, false"),
        (lambda: Roles(rank=2.0), r"rank: got 2\.0, allowed are whole numbers from 0"),
        (lambda: Roles(exclude="conv_in"), "exclude: got 'conv_in', allowed are a list of texts"),
        (lambda: Roles(exclude=(1,)), r"exclude: got \[1\], allowed are texts"),
        (lambda: Roles(targets=["all"]), "targets: got .*, allowed are all, linear"),
        (lambda: Roles(alpha=(1.0,)), "alpha: got .*, allowed are numbers above 0"),
        (lambda: Watch(every=2.5), r"every: got 2\.5, allowed are whole numbers from 1"),
        (lambda: Watch(count=1), "count: got 1, allowed are whole numbers from 2; watch=None watches"),
        (lambda: Watch(seed="x"), "seed: got 'x', allowed are whole numbers"),
        (lambda: Images("teacher", count=0), "count: got 0, allowed are whole numbers from 1"),
        (lambda: Images(3), "source: got 3, allowed are texts"),
        (lambda: fewstep.TrajectoryConfig(folder=""), "folder: got '', allowed is the path of a folder"),
        (lambda: TDM(steps=2.0), r"steps: got 2\.0, allowed are whole numbers"),
        (lambda: TDM(steps="4"), "steps: got '4', allowed are whole numbers"),
        (lambda: TDM(steps=True), "steps: got True, allowed are whole numbers"),
        (lambda: TDM(steps=()), r"steps: got .*, allowed are whole numbers"),
        (lambda: TDM(steps=None), "steps: got None, allowed are whole numbers"),
        (lambda: TDM(guidance=NAN), "guidance.scale: got nan, allowed are numbers from -1000 to 1000"),
        (lambda: TDM(guidance="3"), "guidance.scale: got '3', allowed are numbers from -1000 to 1000"),
        (lambda: TDM(guidance=True), "guidance.scale: got True, allowed are numbers"),
        (lambda: TDM(foo=1), "foo: method tdm has no such setting; it has"),
        (lambda: TDM(fake=3), "fake: got 3, allowed are a FakeScoreConfig"),
        (lambda: TDM(loss=None), "loss: got None, allowed are"),
        (lambda: fewstep.method(None), "name: got None, allowed are tdm"),  # type: ignore[arg-type]
        (lambda: fewstep.method(["tdm"]), "name: got .*, allowed are tdm"),  # type: ignore[arg-type]
        (lambda: Scaled(scale=[1.0]), r"guidance\.scale: got \[1\.0\], allowed are numbers"),
        (lambda: VP(torch.zeros(10)), "schedule: alpha_bar goes from 0 to 0, allowed are cumulative products"),
        (lambda: VP(torch.full((9,), 0.3)), r"schedule: alpha_bar goes from 0\.3 to 0\.3, allowed are"),
        (lambda: VP(TABLE.to(torch.complex64)), "schedule: alpha_bar must be a decreasing list of numbers"),
        (lambda: Flow(shift=NAN), r"schedule\.shift: got nan, allowed are numbers above 0"),
        (lambda: Flow(t_max=3), r"schedule\.t_max: got 3, allowed are numbers above 0 to 1"),
        (lambda: EDM(t_min=100.0), r"schedule\.t_min: got 100, allowed are numbers below t_max \(80\)"),
        (lambda: EDM(rho=0), r"schedule\.rho: got 0, allowed are numbers above 0"),
        (lambda: wrapped(Net(), name=None), "name: got None, allowed is a text"),
        (lambda: wrapped(Net(), name=" "), "name: got ' ', allowed is a text"),
        (lambda: wrapped(Net(), shape=(10**12,)), r"shape: got \(10+,\), allowed are .* 268,435,456 numbers at most"),
        (lambda: wrapped(Net(), shape=(True, 2)), r"shape: got \(True, 2\), allowed are the sizes"),
        (lambda: wrapped(Net(), shape="2"), "shape: got '2', allowed are the sizes"),
        (lambda: wrapped(Net(), shape=2), "shape: got 2, allowed are the sizes"),
        (lambda: wrapped(Net(), schedule=VP), "schedule: got the class VP, allowed are VP"),
        (lambda: wrapped(Net(), conditions=dict), "conditions: got the class dict, allowed is a function"),
        (lambda: wrapped(Net(), time_layer=None), "time_layer: got None, allowed is the name of a layer"),
        (lambda: wrapped(Net(), feature_layers=None), "feature_layers: got None, allowed is a tuple"),
        (lambda: wrapped(Net(), feature_layers="mid"), "feature_layers: got 'mid', allowed is a tuple"),
        (lambda: wrapped(Net(), prediction=["v"]), r"prediction: got \['v'\], allowed are x0"),
        (lambda: wrapped(Net(), prediction="edm", schedule=EDM(), sigma_data=NAN), "sigma_data: got nan, allowed"),
        (lambda: wrapped(Net, name="x"), "module: got a type, allowed is a torch.nn.Module"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_settings_of_odd_types_are_refused_when_they_are_made(wrong: Callable[[], object], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}") as error:
        wrong()
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_numbers_of_numpy_and_lists_are_taken_as_they_are() -> None:
    config = Train(
        iterations=np.int64(6), batch=np.int32(4), lr=np.float32(0.5), betas=[np.float64(0.0), 0.9], seed=np.int64(3)
    )
    assert config == Train(iterations=6, batch=4, lr=0.5, betas=(0.0, 0.9), seed=3)
    assert {type(config.iterations), type(config.batch), type(config.seed)} == {int} and type(config.lr) is float
    assert Roles(exclude=["a", "b"]).exclude == ("a", "b")
    assert TDM(steps=np.int64(2)) == TDM(steps=2)
    assert TDM(steps=[4, np.int64(2)]) == TDM(steps=(4, 2))
    assert TDM(guidance=np.float32(2.0)).guidance == Guidance(scale=2.0)
    distilled(train=Train(iterations=np.int64(2), batch=np.int64(2), seed=np.int64(1)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"teacher": None}, "teacher: got None, allowed is fewstep.load_teacher"),
        ({"teacher": Net()}, "teacher: got Net.*, allowed is fewstep.load_teacher"),
        ({"method": "tdm"}, r"method: got 'tdm', allowed is fewstep\.TDM"),
        ({"train": {"iterations": 3}}, r"train: got \{'iterations': 3\}, allowed is fewstep\.TrainConfig"),
        ({"roles": Roles}, r"roles: got the class RolesConfig, allowed is fewstep\.RolesConfig"),
        ({"watch": True}, r"watch: got True, allowed is fewstep\.Watch\(\.\.\.\), or None"),
        ({"trajectories": 3}, "trajectories: got 3, allowed is"),
        ({"prompts": None}, "prompts: got None, allowed is a list of texts"),
        ({"prompts": 3}, "prompts: got 3, allowed is a list of texts"),
        ({"prompts": b"ab"}, "prompts: got none"),
        ({"out": ""}, "out: got '', allowed is the path of a folder"),
        ({"out": b"run"}, "out: got b'run', allowed is the path of a folder"),
        ({"out": "a\0b"}, r"out: got 'a\\x00b', allowed is the path"),
        ({"out": "x" * 300}, "out: cannot write to x+ .*; its name is too long"),
        ({"init_from": ""}, "init_from: got '', allowed is the path of a folder"),
        ({"init_from": b"x"}, "init_from: got b'x', allowed is the path of a folder"),
    ],
)
def test_arguments_of_distill_are_refused_before_anything_is_made(
    settings: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^{said}"):
        distilled(**settings)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 2.9}, r"steps: got 2\.9, allowed are whole numbers from 1"),
        ({"steps": True}, "steps: got True, allowed are whole numbers from 1"),
        ({"guidance": NAN}, r"guidance\.scale: got nan, allowed are numbers from"),
        ({"guidance": None}, r"guidance\.scale: got None, allowed are numbers from"),
        ({"seeds": [0.5]}, r"seeds: got 0\.5, allowed are whole numbers"),
        ({"seeds": [True]}, "seeds: got True, allowed are whole numbers"),
        ({"seeds": 1.0}, r"seeds: got 1\.0, allowed is a list"),
        ({"solver": ["ddim"]}, r"solver: got \['ddim'\], allowed are"),
        ({"prompts": None}, "prompts: got None, allowed is a list of texts"),
        ({"prompts": [b"a"]}, "prompts: got b'a' among them"),
        ({"condition": 1.5}, r"condition: got 1\.5, allowed are whole numbers from 1"),
        ({"model": None}, "model: got None, allowed is a teacher, a student"),
        ({"model": Net()}, "model: got Net.*, allowed is a teacher, a student"),
    ],
)
def test_arguments_of_sample_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        fewstep.sample(**{"model": wrapped(started(Net())), "prompts": [""], **settings})


@pytest.mark.parametrize(
    ("real", "said"),
    [
        ("x", "real: got 'x', allowed is a tensor or an array"),
        (object, "real: got the class object, allowed is a tensor or an array"),
        (torch.full((64, 2), NAN), "real: its numbers are not finite"),
        (torch.ones(64, 2), "real: .*all samples are the same"),
        (torch.randn(64, 2, dtype=torch.complex64), "real: got complex64, allowed are real numbers"),
        (np.array([["a"]]), "real: got array"),
        (torch.tensor(1.0), r"real: got \[\], allowed are at least"),
        (torch.randn(64, 3), r"real: got \[64, 3\], allowed are at least"),
    ],
)
def test_real_data_that_are_none_are_refused_by_check_and_evaluate(
    real: Any, said: str, student: fewstep.Student
) -> None:
    for judge in (
        lambda: fewstep.check(wrapped(started(Net())), real),
        lambda: fewstep.evaluate(student, real=real, count=32),
    ):
        with pytest.raises(ValueError, match=f"^{said}"):
            judge()


@pytest.mark.parametrize("path", ["", " ", b"x", None, 3])
def test_paths_that_are_none_are_refused_by_name(path: Any, student: fewstep.Student) -> None:
    for use, option in (
        (lambda: fewstep.export_student(student, path), "folder"),
        (lambda: student.save(path), "folder"),
        (lambda: fewstep.load_student(path, base=wrapped(Net())), "student"),
        (lambda: fewstep.write_report(path), "run"),
    ):
        with pytest.raises(ValueError, match=f"^{option}: got .*, allowed is the path of a folder as text"):
            use()


def test_a_second_run_in_a_folder_is_refused_while_the_first_is_open(tmp_path: Path) -> None:
    first = fewstep.distill(
        wrapped(started(Net())),
        METHOD,
        train=Train(iterations=4, batch=2),
        roles=Roles(rank=2),
        out=tmp_path,
        watch=None,
    )
    next(first)
    assert (tmp_path / LOCK).is_file()
    with pytest.raises(
        ValueError, match=r"^out: .* is in use by another run of this process; wait for it or choose another out"
    ):
        distilled(out=tmp_path)
    first.close()
    assert not (tmp_path / LOCK).exists()
    again = distilled(out=tmp_path, train=Train(iterations=4, batch=2))
    assert again.iteration == 2  # it goes on from the first one's checkpoint


def test_a_file_system_without_locks_tells_two_runs_of_one_process_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fewstep.training import lock

    monkeypatch.setattr(lock, "_kernel_lock", lambda handle: None)
    with (
        lock.locked(tmp_path),
        pytest.raises(ValueError, match="in use by another run of this process"),
        lock.locked(tmp_path),
    ):
        pass
    with lock.locked(tmp_path):
        pass
