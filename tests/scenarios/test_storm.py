"""A stormy run of two stages ends as if nothing had been.

It is killed at random moments, its writes fail, and the same command is given again.
"""

import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fewstep.training.lock import LOCK

from .storm import PHASES, Server, assert_same, fresh, half_written, left, place, serving

KILLS, MOST = 30, 8  # at least, and of how many runs
ALL = ["loading", *PHASES]
ONCE = ("loading", "trajectories", "evaluation", "report")  # phases that a command may enter once only
LONG = 0.01  # of an undisturbed run's time: the mean between the beginning of a phase and a kill


@dataclass(frozen=True)
class World:
    """A server, the folder that every run has in its turn, and what an undisturbed run leaves there."""

    server: Server
    folder: Path
    expected: dict[str, Any]
    seconds: float


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = place(tmp_path_factory.mktemp("storm") / "run")
    with serving() as server:
        ended = server.run(folder)
        assert ended.code == 0, ended.said
        yield World(server, folder, left(folder), ended.seconds)


def assert_ends_well(world: World) -> None:
    """The same command goes on from whatever is there, and ends as if nothing had been."""
    ended, run = world.server.run(world.folder), world.folder / "runs" / "storm"
    assert ended.code == 0, ended.said
    assert_same(left(world.folder), world.expected)
    assert half_written(run) == [] and not (run / LOCK).exists()


@pytest.mark.slow
def test_kills_at_random_moments_leave_no_trace(world: World) -> None:
    """Kills at random moments leave no trace.

    Each is followed by the same command, which is killed in its turn; the last one of a life ends. Every phase is
    killed.
    """
    rng, fell = random.Random(0), Counter[str]()
    for life in range(MOST):
        fresh(world.folder)
        for phase in [*ALL, rng.choice(ALL)]:  # in the order in which a run comes to them
            nth = 1 if phase in ONCE else rng.randint(1, 2)
            after = (
                rng.expovariate(1 / (LONG * world.seconds)) if life else 0.0
            )  # short phases are hit at their beginning
            ended = world.server.run(world.folder, {"phase": phase, "nth": nth, "after": after})
            assert ended.code in (0, -9), ended.said
            fell[ended.phase] += ended.code == -9
        assert_ends_well(world)
        if fell.total() >= KILLS and all(fell[phase] for phase in ALL):
            break
    print(dict(fell))
    assert fell.total() >= KILLS and all(fell[phase] for phase in ALL), fell


@pytest.mark.slow
def test_every_write_may_fail_and_the_same_command_goes_on(world: World, tmp_path: Path) -> None:
    """Every failing write ends in one line and leaves nothing half-written.

    The disk is full, or may not be written to, from each place of writing in its turn; the exit code is 2. After one
    place of each phase, chosen at random, the same command is run again.
    """
    ended = world.server.run(fresh(world.folder), fault={"out": str(tmp_path)})
    assert ended.code == 0, ended.said
    assert_same(left(world.folder), world.expected)  # which the children have not disturbed
    places = json.loads((tmp_path / "places.json").read_text(encoding="utf-8"))
    assert {row["phase"] for row in places} == {*ALL} and len({row["number"] for row in places}) > 200
    for row in places:
        lines = [line for line in row["said"].splitlines() if line.startswith("error: ")]
        assert row["code"] == 2 and lines == row["said"].splitlines()[-1:], row
        assert not re.search("Traceback|Exception ignored|please report", row["said"]), row
        assert re.search(
            {"full": "no space left on device", "read-only": "read-only file system"}[row["kind"]],
            lines[0],
            re.IGNORECASE,
        ), row
        assert re.search(r"error: (--out: )?(cannot write |runs/storm)", lines[0]), (
            row
        )  # it names the file or the folder
        assert len(re.findall("run the same command again|may not be written to|check the path", lines[0])) == 1, row
        temporary = row["kind"] == "read-only"  # where nothing can be removed; the next run does
        assert [name for name in row["odd"] if not (temporary and name.endswith(".tmp"))] == [], row
    kept = [row["kept"] for row in places if row["kept"]]
    assert len(kept) == len(ALL)
    for folder in kept:
        shutil.move(folder, fresh(world.folder) / "runs")
        assert_ends_well(world)
