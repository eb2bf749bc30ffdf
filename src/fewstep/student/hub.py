"""Students on the Hugging Face hub: found, downloaded and uploaded.

A student on the hub is a repository with a student's folder at its top. An upload is one commit, so that a repository
has all files of a student or none of them.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils.tqdm import disable_progress_bars, enable_progress_bars

from ..backbones.experts import PARTS
from ..backbones.load import trouble
from ..hashes import LISTING, UNLISTED
from ..reading import reason

ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
SECONDS = 10.0  # to wait for the hub's first answer
# Files of a student's folder that fewstep reads. The rest of a whole pipeline is the base's.
READ = ("*.json", "*.safetensors", "README.md", "scheduler/*", "peft/*", *(f"{p}/*" for p in ("unet", *PARTS)))
WITHOUT = ("text_encoder*/*", "image_encoder/*", "tokenizer*/*", "processor/*", "vae/*", "images/*")
NOT_READ = (*WITHOUT, *(f"*{end}" for end in UNLISTED))
LOGIN = "run: hf auth login (with a token that may write), or set HF_TOKEN"
# What an upload replaces in a repository that holds a student. Other files there are left alone.
OURS = (".safetensors", ".json", ".png", "README.md")
EMPTY = frozenset({".gitattributes", "README.md"})  # in a repository that nobody has put a model in


@dataclass(frozen=True)
class Licence:
    """A licence as the hub's cards name it.

    `name` and `link` are for licences that the hub has no `id` for, which is then `other`.
    """

    id: str
    name: str = ""
    link: str = ""

    def __str__(self) -> str:
        return f"{self.id} ({self.name})" if self.name else self.id


def is_hub_id(text: str) -> bool:
    """Return whether a text can be a repository's name."""
    return ID.fullmatch(text) is not None and not text.endswith((".git", ".", "-")) and ".." not in text


def find_on_hub(name: str, weights: bool = True) -> Path | None:
    """Return the folder of a student on the hub.

    It is downloaded to the cache. Without `weights` there is its card alone. None where the repository is no student.
    What is in the cache serves where the hub cannot be asked. Raises ValueError with the cause in one line, which
    names no option.
    """
    with _asking(name):
        try:
            card = Path(hf_hub_download(name, LISTING, etag_timeout=SECONDS))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None
        if not weights:
            return card.parent
        kept, commit = [*READ], card.parent.name
        return Path(
            snapshot_download(name, revision=commit, allow_patterns=kept, ignore_patterns=[*NOT_READ],
                              etag_timeout=SECONDS)
        )  # fmt: skip


@dataclass(frozen=True)
class Base:
    """What the hub says of a base."""

    licence: Licence | None
    gated: bool


def base_on_hub(name: str) -> Base:
    """Return what the hub says of a base model.

    Raises ValueError with the cause in one line, which names no option.
    """
    with _asking(name):
        info = HfApi().model_info(name, timeout=SECONDS)
    told = None if info.card_data is None else info.card_data.get("license")
    if not isinstance(told, str) or not told.strip():
        return Base(None, bool(info.gated))
    more = {key: info.card_data.get(f"license_{key}") for key in ("name", "link")} if info.card_data else {}
    texts = {key: value for key, value in more.items() if isinstance(value, str)}
    link = texts.get("link", "")
    if link and "://" not in link:  # a file of the base's repository
        link = f"{HfApi().endpoint}/{name}/blob/main/{link.lstrip('/')}"
    return Base(Licence(told, texts.get("name", ""), link), bool(info.gated))


def require_token() -> None:
    """Check that there is a token for the hub.

    Raises ValueError.
    """
    if not get_token():
        raise ValueError(f"push: there is no token for the hub; {LOGIN}")


def upload(name: str, files: Mapping[str, Path | bytes], public: bool, said: str) -> str:
    """Upload a student in one commit, and return its address.

    `files` are paths or contents by their place in the repository. A new repository is private until the commit is
    there; `public` then makes it public. Files of an older student that are not in `files` are deleted in the same
    commit. What an interrupted upload had sent is not sent again. Raises ValueError.
    """
    api = HfApi()
    with _writing(name):
        api.create_repo(name, private=True, exist_ok=True)
        info = api.model_info(name, timeout=SECONDS)
    there = {s.rfilename for s in info.siblings or ()}
    if LISTING not in there and not there <= EMPTY:
        raise ValueError(
            f"push: {name} on the hub is there already and holds no student ({sorted(there - EMPTY)[0]} and "
            f"{len(there - EMPTY) - 1} more); choose another name"
        )
    with _writing(name):
        old = sorted(f for f in there - files.keys() if f.endswith(OURS)) if LISTING in there else []
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(place, content if isinstance(content, bytes) else str(content))
            for place, content in files.items()
        ]
        operations += [CommitOperationDelete(place) for place in old]
        api.create_commit(name, operations, commit_message=said)
        if public and info.private:
            api.update_repo_settings(name, private=False)
    return f"{api.endpoint}/{name} ({'public' if public or not info.private else 'private'})"


@contextmanager
def without_bars() -> Iterator[None]:
    """Show no bars of the hub's client while the block runs."""
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


@contextmanager
def _asking(name: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into a ValueError."""
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise ValueError(f"HF_HUB_OFFLINE forbids asking the hub for {name}") from error
    except GatedRepoError as error:
        raise ValueError(
            f"{name} on the hub is gated: accept its terms on its page, then run: hf auth login"
        ) from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"the hub has no {name}, or it is private: run: hf auth login") from error
    except Exception as error:  # the network raises a different type for each kind of trouble
        raise ValueError(f"{name} is not to be had from the hub ({trouble(error)})") from error


@contextmanager
def _writing(name: str) -> Iterator[None]:
    """Turn whatever the hub's client raises during an upload into a ValueError."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise ValueError(f"push: there is no token for the hub; {LOGIN}") from error
    except OfflineModeIsEnabled as error:
        raise ValueError("push: HF_HUB_OFFLINE forbids using the hub; unset it") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise ValueError(f"push: the hub does not let this token write to {name}; {LOGIN}") from error
        if status == 400:
            raise ValueError(f"push: the hub refused it ({reason(error)})") from error
        raise interrupted(name, error) from error
    except ValueError as error:  # of the hub's client, which looks at what is sent
        raise ValueError(f"push: the hub refused it ({reason(error)})") from error
    except Exception as error:  # the network raises a different type for each kind of trouble
        raise interrupted(name, error) from error


def interrupted(name: str, error: Exception) -> ValueError:
    """Return the error of an upload that broke off."""
    return ValueError(
        f"push: the upload to {name} broke off ({trouble(error)}), and nothing of it is shown there; "
        "the same command goes on"
    )
