"""Lists of prompts that others publish, each with its hash and licence.

Lists that may be shipped lie in `zoo/prompts/`; the others are fetched, or passed as a file, and compared by hash.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ..reading import reading, text_in
from .plan import digest

FEWER = 0.95  # share of a list without a hash that has to be there: some repeat prompts, which are asked once
FOLDER = Path(__file__).parents[1] / "zoo" / "prompts"


@dataclass(frozen=True)
class PromptList:
    """A published list of `count` prompts.

    Its protocol samples `seeds` images of each prompt. `sha256` is the hash of the sorted prompts; empty where it is
    not known, and the number of prompts is checked alone. `shipped` lists lie in the package. The others are at `hub`,
    a data set id, in its `files` of `count` prompts together where there are some, or in a file that `source`
    describes. Of a `longer` list `count` prompts are chosen.
    """

    name: str
    count: int
    seeds: int
    sha256: str
    licence: str
    source: str
    shipped: bool = True
    hub: str = ""
    files: tuple[str, ...] = ()
    longer: bool = False


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
        files=tuple(f"benchmark/{style}.json" for style in ("anime", "concept-art", "paintings", "photo")),
    ),
    PromptList(
        "dpg",
        1065,
        4,
        "7d431260e2173f46657a6df7f5b5fb86d77672426ceb43a469104be4db2985a5",
        "Apache-2.0",
        "dpg_bench/prompts/*.txt of TencentQQGYLab/ELLA, one a line",
        shipped=False,
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
        longer=True,
    ),
    PromptList(
        "coco2014-30k",
        30_000,
        1,
        "",
        "CC BY 4.0",
        "captions_val2014.json of COCO: of each image the first caption, images in the order of hashes",
        shipped=False,
        longer=True,
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


def fetched_prompts(known: PromptList) -> tuple[str, ...]:
    """Fetch the files of a list from its data set.

    Each is a JSON list of texts. Raises ValueError where they cannot be had, or are of another number.
    """
    found: list[str] = []
    for name in known.files:
        try:
            file = Path(hf_hub_download(known.hub, name, repo_type="dataset"))
        except (OSError, ValueError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            raise ValueError(f"{name} of {known.hub} cannot be had here") from error
        with reading(f"prompts {file}:", "fetch it again"):
            found += [str(prompt).strip() for prompt in json.loads(text_in(file))]
    if len(found) != known.count:
        raise ValueError(f"{known.hub} has {len(found)} prompts, expected {known.count}")
    return checked(known, found)


def checked(known: PromptList, prompts: Sequence[str]) -> tuple[str, ...]:
    """Return the prompts of a list in the order of their hashes.

    Raises ValueError where they are of another list: numbers under a protocol's name are of one list alone.
    """
    found = sorted(set(prompts), key=digest)
    if not known.sha256 and (
        len(found) >= known.count if known.longer else FEWER * known.count <= len(found) <= known.count
    ):
        return tuple(found[: known.count])
    got = digest(sorted(found))
    if len(found) != known.count or got != known.sha256:
        raise ValueError(
            f"prompts: got {len(found)} with SHA-256 {got[:12]}, protocol {known.name} is of {known.count} "
            f"with {known.sha256[:12] or 'any'} ({known.source}); pass that list, or choose protocol own"
        )
    return tuple(found)
