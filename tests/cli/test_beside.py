"""A job beside this process gives what it gives here."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial

import pytest

from fewstep.cli.beside import beside, has_room

pytestmark = pytest.mark.skipif(not has_room(), reason="needs a second core, and Linux")


@pytest.mark.parametrize("room", [True, False])
def test_a_job_gives_its_result(room: bool) -> None:
    with beside(lambda: {"numbers": [1, 2], "process": os.getpid()}, lambda: room) as found:
        made = found()
    assert made["numbers"] == [1, 2] and (made["process"] == os.getpid()) != room


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("failing", [partial(os._exit, 3), killed, lambda: 1 / 0, object])
def test_a_job_that_fails_there_is_done_here(failing: Callable[[], object]) -> None:
    here = os.getpid()

    def job() -> object:
        return "done here" if os.getpid() == here else failing()

    with beside(job) as found:
        assert found() == "done here"


def test_what_fails_here_too_is_raised() -> None:
    with pytest.raises(ZeroDivisionError), beside(lambda: 1 / 0) as found:
        found()


def said() -> None:
    print("said there", flush=True)
    time.sleep(60)


def test_what_nobody_asks_for_ends_with_the_block(capfd: pytest.CaptureFixture[str]) -> None:
    before = time.monotonic()
    with beside(said):
        time.sleep(0.2)
    assert time.monotonic() - before < 30
    assert not capfd.readouterr().out
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_an_error_here_ends_it_too() -> None:
    before = time.monotonic()
    with pytest.raises(KeyError), beside(lambda: time.sleep(60)):
        raise KeyError("here")
    assert time.monotonic() - before < 30
