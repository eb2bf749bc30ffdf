"""Whatever escapes a command ends in one line.

A user's mistake exits with code 2, a fault of fewstep with code 1 and a log.
"""

import errno
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from fewstep.cli import distill, faults, plan
from fewstep.cli import report as report_command
from fewstep.cli.evaluate import real_of
from fewstep.cli.faults import FaultError, fault_of, said_by_us
from fewstep.reading import PACKAGE, ReadError, reading

from .common import fewstep


def raiser(error: BaseException) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def of(source: str) -> Exception:
    """What a line raises that stands in a file of the package."""
    try:
        exec(compile(source, str(PACKAGE / "training" / "made_up.py"), "exec"), {"Path": Path})
    except (ValueError, AttributeError) as error:
        return error
    raise AssertionError(source)


OTHERS = [
    AttributeError("'NoneType' object has no attribute 'x'"),
    KeyError("x"),
    TypeError("[/x] [bold]y[/bold]"),
    IndexError(),
    RuntimeError("a\nb\x1b[31mc"),
    RecursionError("maximum recursion depth exceeded"),
    AssertionError(),
    zipfile.BadZipFile("File is not a zip file"),
    SafetensorError("Error while deserializing header"),
    ValueError("a word of another library"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
]


@pytest.mark.parametrize("error", OTHERS, ids=lambda e: type(e).__name__)
def test_what_nobody_foresaw_is_one_line_and_a_log(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan, "read_recipe", raiser(error))
    assert fewstep(monkeypatch, "plan", "[red] one") == 1
    (line,) = capsys.readouterr().err.splitlines()
    log = tmp_path / "fewstep-error.log"
    assert line.startswith(f"error: {type(error).__name__}") and line.endswith(
        f"this is a fault of fewstep: please report it with {log}"
    )
    assert "while in cli.plan.run_plan, line " in line
    text = log.read_text(encoding="utf-8")
    assert (
        "fewstep plan '[red] one'" in text
        and "Traceback (most recent call last)" in text
        and f"torch {torch.__version__}".split("+")[0] in text
    )


def test_the_log_of_a_run_is_in_its_folder(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distill, "run_stages", raiser(KeyError("x")))
    assert fewstep(monkeypatch, "distill", recipe, "--out", "mine") == 1
    assert f"please report it with {tmp_path / 'mine' / 'error.log'}" in capsys.readouterr().err
    assert "KeyError" in (tmp_path / "mine" / "error.log").read_text(encoding="utf-8")
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(report_command, "render_run", raiser(KeyError("x")))
    assert fewstep(monkeypatch, "report", "run") == 1
    assert (tmp_path / "run" / "error.log").is_file() and not (tmp_path / "fewstep-error.log").exists()


def test_the_log_goes_elsewhere_where_it_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fewstep-error.log").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    said = fault_of(KeyError("x"), tmp_path / "no such run").line
    (log,) = (tmp_path / "temporary").iterdir()
    assert said.endswith(f"please report it with {log}") and "KeyError" in log.read_text(encoding="utf-8")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert fault_of(KeyError("x")).status == 1


def test_only_what_fewstep_says_itself_is_told_as_it_is() -> None:
    assert said_by_us(of("raise ValueError('lr: got 0; choose another')"))
    assert fault_of(of("raise ValueError('lr: got 0; choose another')")).line == "error: lr: got 0; choose another"
    for source in ("int('x')", "import json; json.loads('{')", "[].index(3)", "Path('a\\0b').stat()"):
        error = of(source)
        assert isinstance(error, ValueError) and not said_by_us(error), source


def test_what_went_wrong_while_a_file_was_read_is_its_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def read(error: Exception) -> FaultError:
        try:
            with reading("data: x.bin", "copy it again"):
                raise error
        except ValueError as told:
            return fault_of(told)

    fault = read(TypeError("what a parser says"))
    assert (fault.line, fault.status) == ("error: data: x.bin is damaged (what a parser says); copy it again", 2)
    assert not list(tmp_path.iterdir())
    own = read(of("None.x"))  # a mistake in fewstep, or a file that nobody thought of
    assert own.status == 2 and own.line.endswith(f"(its traceback is in {tmp_path / 'fewstep-error.log'})")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: "
            "you tried to allocate 4 bytes."
        ),
    ],
    ids=["device", "python", "torch"],
)
def test_out_of_memory_says_what_to_do(
    error: Exception, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distill, "run_stages", raiser(error))
    assert fewstep(monkeypatch, "distill", recipe) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory while in cli.distill.run_distill, line ")
    assert "lower train.batch and raise train.accumulate as much, or set roles.checkpointing=true" in line


def test_what_the_system_says_names_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = fault_of(PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "[a]\x1b")))
    assert fault.line == f"error: {tmp_path}/[a]\\x1b: permission denied; check the path, its permissions and the disk"
    assert fault.status == 2
    assert fault_of(ModuleNotFoundError("No module named 'peft'")).line.endswith("; run: fewstep doctor")


def test_a_line_is_never_a_page() -> None:
    assert len(FaultError("error: got " + "[" * 100_000, 2).line) < 300
    assert faults.USERS != faults.OURS


@pytest.mark.parametrize(
    "record",
    [
        '{"recipe": []}',
        '{"recipe": {"data": {"real": 3}}}',
        '{"recipe": {"warm_start": [1]}}',
        '{"recipe": {"prompts": "x"}}',
        "[]",
    ],
)
def test_what_a_run_says_of_itself_is_looked_at_before_it_is_measured(record: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(record, encoding="utf-8")
    with pytest.raises(ReadError, match=r"run\.json is damaged \(.+\); delete .*run\.json$"):
        real_of(tmp_path)
    (tmp_path / "run.json").write_text(
        '{"recipe": {"warm_start": {"data": {"real": "x.npz"}}, "teacher": {"weights": "a"}}}', encoding="utf-8"
    )
    assert real_of(tmp_path) == "x.npz"
