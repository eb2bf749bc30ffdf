"""What nobody foresaw becomes one line of text over the page."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

gr = pytest.importorskip("gradio")

from fewstep.studio.faults import guard, guarded  # noqa: E402


def told(error: Exception) -> str:
    return f"<b>{type(error).__name__}</b>, logged in x.log"


def breaks(value: int) -> int:
    return 1 // value


def breaks_later(value: int) -> Iterator[int]:
    yield 7
    yield 1 // value


@pytest.mark.parametrize("run", [lambda: guarded(breaks, told)(0), lambda: list(guarded(breaks_later, told)(0))])
def test_a_fault_is_told_as_text(run: Callable[[], Any]) -> None:
    with pytest.raises(gr.Error) as found:
        run()
    assert found.value.message == "&lt;b&gt;ZeroDivisionError&lt;/b&gt;, logged in x.log"


def test_what_works_is_left_alone() -> None:
    assert guarded(breaks, told)(1) == 1
    assert list(guarded(breaks_later, told)(1)) == [7, 1]


def test_every_handler_of_a_page_is_guarded() -> None:
    with gr.Blocks(analytics_enabled=False) as page:
        number = gr.Number()
        number.change(breaks, number, number)
        number.change(None, number, number, js="x => x")
    guard(page, told)
    first, second = page.fns.values()
    assert second.fn is None
    with pytest.raises(gr.Error):
        first.fn(0)
