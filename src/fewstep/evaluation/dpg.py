"""DPG-Bench's score: the share of questions that are answered with yes.

The questions are those of its authors (Hu et al., arXiv:2403.05135), in `dpg_bench.csv`; mPLUG answers them in an
environment of its own.
"""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..reading import reading, text_in

LIST = "dpg"  # of prompts
FILE = Path("dpg", "dpg_bench.csv")
URL = "https://raw.githubusercontent.com/TencentQQGYLab/ELLA/main/dpg_bench/dpg_bench.csv"

# What runs in its environment: mPLUG as ModelScope's pipeline calls it, whose own module imports fairseq and more.
CODE = """
import functools
import torch
from PIL import Image
from torchvision import transforms
from modelscope import snapshot_download
from modelscope.models.multi_modal.mplug import MPlug
folder = snapshot_download("damo/mplug_visual-question-answering_coco_large_en")
device = "cuda" if torch.cuda.is_available() else "cpu"
model = MPlug.from_pretrained(folder, task="visual-question-answering").eval().to(device)
size = (model.config.image_res, model.config.image_res)
scaled = transforms.Compose([
    transforms.Resize(size, interpolation=transforms.InterpolationMode.BICUBIC),
    transforms.ToTensor(),
    transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
])
@functools.lru_cache(1)
def seen(path):
    return scaled(Image.open(path).convert("RGB"))[None].to(device)
def answer(path, question):
    words = model.tokenizer(
        question.lower(), padding="max_length", truncation=True, max_length=25, return_tensors="pt"
    ).to(device)
    with torch.no_grad():
        found, _ = model(seen(path), words, train=False)
    return model.tokenizer.decode(found[0][0], skip_special_tokens=True)
def score(paths, prompts):
    return [answer(path, question) == "yes" for path, question in zip(paths, prompts)]
"""


@dataclass(frozen=True)
class Question:
    """A question to an image.

    It counts where all its `parents` do.
    """

    number: int
    text: str
    parents: tuple[int, ...] = ()


class Answerer(Protocol):
    """Anything that answers questions about images."""

    @property
    def weights(self) -> Mapping[str, str]: ...

    def ask(self, images: Tensor, of: Sequence[int], texts: Sequence[str]) -> Tensor:
        """Return the answers [Q] to texts, 1 for yes.

        Each is about image `of` it.
        """

    def close(self) -> None:
        """Give back what it holds."""


def share_right(questions: Sequence[Question], answers: Sequence[float]) -> float:
    """Return the share of the questions that count with yes.

    In their order: a question without its parents counts as no, also for those that build on it.
    """
    found: dict[int, float] = {}
    for question, answer in zip(questions, answers, strict=True):
        found[question.number] = answer if all(found[parent] for parent in question.parents) else 0.0
    return sum(found.values()) / len(found)


def read_questions(file: Path) -> dict[str, tuple[Question, ...]]:
    """Read the questions of each prompt.

    Raises ReadError where the file is missing or another one.
    """
    found: dict[str, list[Question]] = {}
    with reading(f"questions {file}:", f"put {URL} there", "cannot be used"):
        for row in csv.DictReader(text_in(file).splitlines(keepends=True)):
            parents = tuple(n for text in row["dependency"].split(",") if (n := int(text)))
            question = Question(int(row["proposition_id"]), row["question_natural_language"].strip(), parents)
            of = found.setdefault(one_line(row["text"]), [])
            if unknown := set(parents) - {known.number for known in of}:
                raise ValueError(f"question {question.number} builds on {min(unknown)}, which is not before it")
            of.append(question)
        if not found:
            raise ValueError("it has no questions")
    return {prompt: tuple(questions) for prompt, questions in found.items()}


def one_line(prompt: str) -> str:
    """Return a prompt without line breaks and double spaces."""
    return " ".join(prompt.split())


@dataclass(frozen=True)
class DpgScorer:
    """The score of images by the questions of their prompts."""

    questions: Mapping[str, Sequence[Question]]
    judge: Answerer
    own: Mapping[str, str] = field(default_factory=dict)
    key: str = "dpg"
    clips: bool = False
    of: str = LIST

    @property
    def weights(self) -> Mapping[str, str]:
        """Return the hashes of the questions and of the environment."""
        return {**self.own, **self.judge.weights}

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        asked = [self.questions.get(one_line(prompt), ()) for prompt in prompts]
        if lacking := [prompt for prompt, questions in zip(prompts, asked, strict=True) if not questions]:
            raise ValueError(f"--metrics dpg: its questions have none of {lacking[0]!r}; put {URL} in their place")
        of = [i for i, questions in enumerate(asked) for _ in questions]
        texts = [question.text for questions in asked for question in questions]
        answers = iter(self.judge.ask(images, of, texts).tolist())
        return torch.tensor([share_right(questions, [next(answers) for _ in questions]) for questions in asked])

    def close(self) -> None:
        self.judge.close()
