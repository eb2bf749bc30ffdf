"""What a notebook shows of steps, students and a distillation, without a network run for it."""

import html
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import fewstep
from fewstep import notebook
from fewstep.notebook import Board, as_html, in_notebook
from fewstep.report.images import png, to_pil

from . import tiny

PNG = b"\x89PNG"


class Handle:
    """What IPython returns of an output that changes."""

    def __init__(self, first: str) -> None:
        self.pages = [first]

    def update(self, page: str) -> None:
        self.pages.append(page)


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> list[Handle]:
    """The outputs of a notebook's cell, with IPython's three functions in place of IPython."""
    outputs: list[Handle] = []

    def display(page: str, display_id: bool) -> Handle:
        assert display_id
        outputs.append(Handle(page))
        return outputs[-1]

    module, shown = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    shell = types.SimpleNamespace(config={"IPKernelApp": {}})
    vars(module).update(get_ipython=lambda: shell, display=shown)
    vars(shown).update(HTML=str, display=display)
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    return outputs


def test_a_script_is_no_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert not in_notebook()


def test_a_terminals_ipython_is_no_notebook(cell: list[Handle]) -> None:
    assert in_notebook()
    vars(sys.modules["IPython"])["get_ipython"] = lambda: types.SimpleNamespace(config={"TerminalIPythonApp": {}})
    assert not in_notebook()
    vars(sys.modules["IPython"])["get_ipython"] = lambda: None
    assert not in_notebook()


def test_a_board_changes_one_output(cell: list[Handle], monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    board = Board("tdm <b>", 10)
    for done in range(1, 11):
        now[0] += 0.2
        board.show(done, "loss 0.5", 2.0)
    (output,) = cell
    assert 3 <= len(output.pages) <= 6, "not every call draws"
    assert "tdm &lt;b&gt;: 10 of 10, 0:02 left  loss 0.5" in output.pages[-1] and "width:100.0%" in output.pages[-1]


def test_a_text_is_shown_as_it_is_and_a_wide_image_is_made_narrower() -> None:
    wide = png(to_pil(torch.rand(3, 4, 2 * notebook.WIDEST)))
    shown = as_html("<script>alert(1)</script> \"'&", wide)
    assert "<script>" not in shown and html.unescape(shown).count("<script>alert(1)</script> \"'&") == 2
    assert len(as_html("x", wide)) < len(as_html("x", png(to_pil(torch.rand(3, 600, notebook.WIDEST)))))


def distilled(folder: Path | None) -> list[fewstep.Step]:
    train = fewstep.TrainConfig(iterations=4, batch=2)
    watch = fewstep.Watch(every=2, count=2, teacher_steps=2)
    method = fewstep.TDM(steps=2, guidance=2.0, warmup=0)
    return list(fewstep.distill(tiny.stable_diffusion(), method, ["red cat"], train=train, out=folder, watch=watch))


def test_a_distillation_shows_a_bar_and_its_preview(cell: list[Handle]) -> None:
    steps = distilled(None)
    output = cell[-1]
    assert "tdm: 4 of 4, 0:00 left" in output.pages[-1] and "student_loss" in output.pages[-1]
    assert "data:image/png;base64," in output.pages[-1]
    assert "<img" in shown_of(steps[-1]) and "Step(4: " in shown_of(steps[-1])


def shown_of(thing: Any) -> str:
    shown = thing._repr_html_()
    assert isinstance(shown, str)
    return shown


def test_a_student_shows_the_preview_of_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = distilled(tmp_path / "run")
    assert steps[-1].image == tmp_path / "run" / "samples" / "step_000004.png"
    assert "<img" in shown_of(steps[-1])
    student = fewstep.load_student(tmp_path / "run", tiny.stable_diffusion())
    monkeypatch.setattr("fewstep.student.student.trajectory", lambda *_: pytest.fail("a network is run"))
    assert "<img" in shown_of(student) and html.escape(repr(student)) in shown_of(student)
    (tmp_path / "run" / "samples" / "step_000004.png").unlink()
    assert "<img" not in shown_of(student) and "<img" not in shown_of(steps[-1])
    assert "<img" not in shown_of(student.single(2))


def test_ipython_shows_them() -> None:
    core = pytest.importorskip("IPython.core.formatters")
    step = distilled(None)[-1]
    data, _ = core.DisplayFormatter().format(step)
    assert data["text/html"] == shown_of(step) and data["text/plain"] == repr(step)
