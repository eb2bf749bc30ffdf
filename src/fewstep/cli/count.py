"""`fewstep study --count`: the votes of a study.

No model is loaded, and no package that loads one.
"""

from collections.abc import Sequence
from pathlib import Path

from ..atomic import require_replaceable, write_json, write_text
from ..names import expanded
from ..study.answers import read_ballots
from ..study.count import as_json, count, per_prompt, summary
from ..study.key import read_key
from .progress import console, put_result

RESULT, TABLES = "result.json", "result.md"


def run_count(given: Sequence[str], out: Path) -> None:
    """Count answers and write the result.

    The key is that of the study's folder, and the result goes beside it. Raises ValueError for files that
    hold no answers, or those of another study.
    """
    if not given:
        raise ValueError("--count: got no answers; name the files that the page saved, e.g. answers-*.json")
    for name in (RESULT, TABLES):
        require_replaceable(out / name, "--out")
    key = read_key(out)
    ballots = read_ballots([Path(expanded(text)) for text in given], key)
    result = count(key, ballots)
    lines = summary(result)
    write_json(out / RESULT, as_json(result))
    path = write_text(out / TABLES, "\n".join([f"# Study {key.study}", "", *lines, *per_prompt(result)]))
    for line in (*ballots.notes, *lines):
        console.print(line)
    console.print(f"by prompt: {path.resolve()}")
    put_result(as_json(result))
