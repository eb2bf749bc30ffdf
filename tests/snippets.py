"""The Python in a model card, ready to run.

The card says a base on this machine by its name alone; here it has its path.
"""

import re
from pathlib import Path

from fewstep.backbones.load import called
from fewstep.student.folder import read_card


def snippet_of(final: Path) -> str:
    """The code of a student's model card with the path of its base."""
    found = re.search(r"```python\n(.*?)```", (final / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None
    base = read_card(final).base
    places = [
        part.rpartition("@")[0] if part.rpartition("@")[2].replace(".", "").isdigit() else part
        for part in base.split(" + ")
    ]
    code = found[1].replace(f'"{called(base)}"', f'"{base}"')
    for place in places:
        code = code.replace(f'"{called(place)}"', f'"{place}"')
    return code
