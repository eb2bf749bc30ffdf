"""GenEval's judge: Mask2Former finds objects, CLIP names their colours.

The paper's detector is mmdetection's training of the same network (Swin-S, COCO's instances), which needs packages
of 2022; the one here was trained by Mask2Former's authors. So its numbers are near the paper's, and not the paper's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from .detector import load_detector
from .geneval import COLOURS, Detection, Rule, counted, fulfils, read_rules
from .scorers import CLIP_L, clip_of, clip_pixels, pil_images, read_by, seen_by, tokenizer_of
from .weights import find_weights

LIST = "geneval"  # of prompts
GREY = 0x99  # what lies around an object whose colour is asked for
TEMPLATES = ("a photo of a {} {}", "a photo of a {}-colored {}", "a photo of a {} object")


class Finder(Protocol):
    """Anything that finds objects in images."""

    @property
    def weights(self) -> Mapping[str, str]: ...

    def find(self, images: Tensor) -> list[list[Detection]]:
        """Return the objects of each of images [B, 3, H, W]."""


@dataclass(frozen=True)
class Judge:
    """The networks of GenEval, and its rules."""

    finder: Finder
    clip: CLIPModel
    tokenizer: CLIPTokenizer
    rules: Mapping[str, Rule]
    weights: Mapping[str, str]

    def right(self, image: Tensor, rule: Rule) -> bool:
        """Return whether an image [3, H, W] follows a rule."""
        (found,) = self.finder.find(image[None])
        return fulfils(counted(found, rule), rule, partial(self.colours, image))

    def colours(self, image: Tensor, objects: Sequence[Detection]) -> list[str]:
        """Return the colour of each of some objects of one class."""
        with torch.inference_mode():
            size = self.clip.config.vision_config.image_size
            pixels = torch.cat([clip_pixels(cut_out(image, one)[None], size) for one in objects])
            seen = F.normalize(seen_by(self.clip, pixels), dim=1)
            found = seen @ self._texts(objects[0].name).T
        return [COLOURS[int(i)] for i in found.argmax(1)]

    def _texts(self, name: str) -> Tensor:
        """Return the mean embedding [10, D] of each colour of a class."""
        texts = [template.format(colour, name) for colour in COLOURS for template in TEMPLATES]
        each = F.normalize(read_by(self.clip, self.tokenizer, texts), dim=1)
        return F.normalize(each.unflatten(0, (len(COLOURS), len(TEMPLATES))).mean(1), dim=1)


def cut_out(image: Tensor, one: Detection) -> Tensor:
    """Return an object's part of an image.

    [3, h, w] of [3, H, W], grey where a pixel is not the object's own.
    """
    (whole,) = pil_images(image[None])
    if one.mask is not None:
        blank = Image.new("RGB", whole.size, (GREY, GREY, GREY))
        whole = Image.composite(whole, blank, Image.fromarray(one.mask.numpy()))
    left, top, right, bottom = (round(side) for side in one.box)
    part = np.asarray(whole.crop((left, top, right, bottom))).copy()
    return torch.from_numpy(part).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class GenEvalScorer:
    """The score of one of GenEval's tasks.

    1 where an image is right, else 0; NaN of prompts of other tasks.
    """

    task: str
    judge: Judge
    clips: bool = False
    of: str = LIST

    @property
    def key(self) -> str:
        """Return the metric's key."""
        return f"{LIST}_{self.task}"

    @property
    def weights(self) -> Mapping[str, str]:
        """Return the hashes of both networks."""
        return self.judge.weights

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        asked = [self.judge.rules[prompt] for prompt in prompts]
        found = [
            float(self.judge.right(image, rule)) if rule.task == self.task else float("nan")
            for image, rule in zip(images, asked, strict=True)
        ]
        return torch.tensor(found)

    def close(self) -> None:
        """Do nothing: memory is all it holds."""


def load_judge() -> Judge:
    """Load GenEval's networks and rules.

    Raises ValueError in one line where weights are missing.
    """
    option = f"--metrics {LIST}"
    detector, found = load_detector(option), find_weights(CLIP_L, option)
    weights = {**detector.weights, **found.record()}
    return Judge(detector, clip_of(found), tokenizer_of(found), read_rules(), weights)
