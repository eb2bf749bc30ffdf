"""A storm on a run of two stages: killed at random moments, writes that fail, and the same command again ends as if nothing had been."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .storm import PHASES, Server, assert_same, fresh, half_written, left, place, serving

KILLS = 30
LIVES = 3  # runs that the kills are spread over
ALL = ["loading", *PHASES]


@dataclass(frozen=True)
class World:
    """A server, the folder that every run has in its turn, what an undisturbed run leaves there, and its seconds."""

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


@pytest.mark.slow
def test_kills_at_random_moments_leave_no_trace(world: World) -> None:
    """Each is followed by the same command, which is killed a phase later, and in the end by none; all phases have their share."""
    rng, fell = random.Random(0), Counter[str]()
    for life in range(LIVES):
        folder = fresh(world.folder)
        for phase in [*ALL, "loading"][: KILLS // LIVES]:
            kill = {"phase": phase, "nth": rng.randint(1, 1 + life), "after": rng.expovariate(1 / 0.1)}
            ended = world.server.run(folder, kill=kill)
            print(life, kill, ended.code, ended.phase, ended.seconds)
            assert ended.code in (0, -9), ended.said
            fell[ended.phase] += ended.code == -9
        ended = world.server.run(folder)
        assert ended.code == 0, ended.said
        assert_same(left(folder), world.expected)
        assert half_written(folder) == [] and not (folder / "runs" / "storm" / "run.lock").exists()
    print(fell)
    assert fell.total() == KILLS and all(fell[phase] for phase in ALL), fell
