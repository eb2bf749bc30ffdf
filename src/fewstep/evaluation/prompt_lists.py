"""Lists of prompts that others publish, each with its hash and licence.

Lists that may be shipped lie in `zoo/prompts/`; the others are fetched, or passed as a file, and compared by hash.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..reading import reading, text_in
from .plan import digest

FOLDER = Path(__file__).parents[1] / "zoo" / "prompts"


@dataclass(frozen=True)
class PromptList:
    """A published list of `count` prompts.

    Its protocol samples `seeds` images of each prompt. `sha256` is the hash of the sorted prompts; empty where it is
    not known, and what was found is recorded alone. `shipped` lists lie in the package. The others are at `hub`, a
    data set id, or in a file that `source` describes.
    """

    name: str
    count: int
    seeds: int
    sha256: str
    licence: str
    source: str
    shipped: bool = True
    hub: str = ""


LISTS = (
    PromptList(
        "parti",
        1632,
        2,
        "2c2078ad59a17734e91f1093ecc37aeecf8b6aeb5ef3f94af0283034901944c7",
        "Apache-2.0",
        "google-research/parti",
    ),
    PromptList(
        "drawbench",
        200,
        4,
        "f72659132fd639ce1a061655c7a44e1a6250d13b93c95f194f1d1a6971649d58",
        "not stated",
        "the sheet of Imagen's authors, one prompt a line",
        shipped=False,
        hub="sayakpaul/drawbench",
    ),
    PromptList(
        "geneval",
        553,
        4,
        "7bac2a5bb142453ffe678b6f2b9c4a8877f469ade20e0105cf180c76ddf611ac",
        "MIT",
        "djghosh13/geneval",
    ),
    PromptList(
        "hpsv2",
        3200,
        1,
        "",
        "Apache-2.0",
        "the four styles of tgxs002/HPSv2 (anime, concept-art, paintings, photo), 800 prompts each, one a line",
        shipped=False,
        hub="zhwang/HPDv2",
    ),
    PromptList(
        "pickscore-test",
        1024,
        2,
        "954198baa1f556f020d95ff41300fb2be304108a0d435ae6d7498f7d3e9eeab9",
        "Apache-2.0",
        "X-GenGroup/Flow-Factory",
    ),
    PromptList(
        "coco2014-10k",
        10_000,
        1,
        "",
        "CC BY 4.0",
        "captions_val2014.json of COCO: of each image the first caption, images in the order of hashes",
        shipped=False,
    ),
    PromptList(
        "coco2014-30k",
        30_000,
        1,
        "",
        "CC BY 4.0",
        "captions_val2014.json of COCO: of each image the first caption, images in the order of hashes",
        shipped=False,
    ),
    PromptList(
        "vbench",
        944,
        5,
        "00b27e411a34f94bee95b8f21fbbbf0badad4610e06b5aa61b71f06a15ede1fb",
        "Apache-2.0",
        "Vchitect/VBench",
    ),
)


def shipped_prompts(known: PromptList) -> tuple[str, ...]:
    """Read a list that ships with the package.

    Raises ReadError where the file is missing or damaged, and ValueError where it is another one.
    """
    file = FOLDER / f"{known.name}.txt"
    with reading(f"prompts {file}:", "install fewstep again", "cannot be used"):
        found = tuple(line for line in text_in(file).split("\n") if line)
    return checked(known, found)


def checked(known: PromptList, prompts: Sequence[str]) -> tuple[str, ...]:
    """Return the prompts of a list in the order of their hashes.

    Raises ValueError where they are of another list: numbers under a protocol's name are of one list alone.
    """
    found = sorted(set(prompts), key=digest)
    if not known.sha256 and not known.shipped and len(found) >= known.count:
        return tuple(found[: known.count])
    got = digest(sorted(found))
    if len(found) != known.count or got != known.sha256:
        raise ValueError(
            f"prompts: got {len(found)} with SHA-256 {got[:12]}, protocol {known.name} is of {known.count} "
            f"with {known.sha256[:12] or 'any'} ({known.source}); pass that list, or choose protocol own"
        )
    return tuple(found)
