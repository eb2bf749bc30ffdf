"""docs/evaluation.md says of every number what it can and cannot tell, and how to get what it takes."""

import re
from fnmatch import fnmatch

from fewstep.evaluation.environments import CONVERSIONS, ENVIRONMENTS
from fewstep.evaluation.metrics import METRICS, OTHERS
from fewstep.evaluation.scorer import SETS
from fewstep.evaluation.scorers import SCORERS
from tests.project import ROOT

PAGE = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading, without its head."""
    lines = PAGE.split(f"## {heading}\n", 1)[1].lstrip().split("\n\n", 1)[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def patterns(text: str) -> list[str]:
    return re.findall(r"`([^` ]+)`", text)


def test_every_number_has_a_row_of_what_it_can_and_cannot_tell() -> None:
    table = rows("What each number can tell")
    assert all(len(row) == 4 and all(row) for row in table)
    named = [pattern for row in table for pattern in patterns(row[0])]
    for key in METRICS:
        of = [row for row in table if any(fnmatch(key, pattern) for pattern in patterns(row[0]))]
        assert len(of) == 1, (key, [row[0] for row in of])
    assert all(any(fnmatch(key, pattern) for key in METRICS) for pattern in named)


def test_every_metric_of_others_has_a_command_that_gets_it() -> None:
    """One command each, or none where weights are fetched at first use."""
    table = rows("Metrics of other packages")
    homes = {key: one.folder for key, one in ENVIRONMENTS.items()} | {
        "fid": "inception", "fid_torch": "inception", "kid": "inception", "lpips": "lpips",
    }  # fmt: skip
    for metric in OTHERS:
        sets = [name for name, keys in SETS.items() if metric.key in keys and name not in METRICS]
        asked = sets or [metric.key]
        of = [row for row in table if any(fnmatch(asked[0], p) for p in patterns(row[0]))]
        assert len(of) == 1, (metric.key, [row[0] for row in of])
        home = homes.get(metric.key)
        assert home is None or f"`fewstep evaluate --install {home}`" in of[0][1], metric.key
        assert home is not None or metric.key in SCORERS or metric.key.startswith("geneval"), metric.key
        assert metric.needs
    commands = set(re.findall(r"`fewstep evaluate --install (\w+)`", PAGE))
    assert commands == {one.folder for one in ENVIRONMENTS.values()} | set(CONVERSIONS)
