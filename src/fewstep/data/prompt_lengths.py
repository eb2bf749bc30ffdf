"""Notes on prompts that are cut or misread.

Encoders cut long prompts, and other programs give some signs a meaning that fewstep does not.
"""

import re
from collections.abc import Sequence

from ..backbones.base import Backbone
from ..backbones.reading import readings

MOST = 100_000  # checked prompts
SIGNS = {  # signs that A1111, ComfyUI and others interpret, and fewstep does not
    "<lora:NAME:1>": re.compile(r"<(?:lora|lyco|hypernet):[^>]*>", re.IGNORECASE),
    "(words:1.2)": re.compile(r"\([^()]*:\s*-?\d+(?:\.\d+)?\s*\)"),
    "[words]": re.compile(r"\[[^\[\]]+\]"),
    "((words))": re.compile(r"\(\([^()]+\)\)"),
    "BREAK": re.compile(r"(?<!\w)BREAK(?!\w)"),
    "embedding:NAME": re.compile(r"(?<!\w)embedding:\S+", re.IGNORECASE),
    "{one|other}": re.compile(r"\{[^{}]*\|[^{}]*\}"),
    "__wildcard__": re.compile(r"(?<!\w)__[\w/-]+__(?!\w)"),
}


def said_of_prompts(backbone: Backbone, prompts: Sequence[str]) -> list[str]:
    """Return one line for each problem of the prompts.

    There is one line for every encoder that cuts prompts, one for prompts that become the same condition when
    cut, and one for each sign of another program.
    """
    seen = list(prompts[:MOST])
    of, lines = _of(len(seen), len(prompts)), []
    found = readings(backbone, seen)
    for reading in found:
        cut = sum(n > reading.most for n in reading.lengths)
        if cut:
            lines.append(
                f"prompts: {cut} {of} are longer than the {reading.most} tokens of {reading.encoder} (the longest "
                f"has {max(reading.lengths)}); what is beyond is cut"
            )
    if lines:
        taken = list(zip(*(r.taken for r in found), strict=True))
        if same := len(set(seen)) - len(set(taken)):
            lines.append(
                f"prompts: of {len(set(seen))} different ones {same} become the condition of another when they are cut"
            )
    for sign, pattern in SIGNS.items():
        if count := sum(bool(pattern.search(p)) for p in seen):
            lines.append(
                f"prompts: {count} {of} have {sign}, a sign of other programs, which is read as plain letters here"
            )
    return lines


def _of(seen: int, count: int) -> str:
    return f"of {count}" if seen == count else f"of the first {seen} of {count}"
