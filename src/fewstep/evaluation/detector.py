"""Objects in images, found by Mask2Former.

Swin-S of the authors, trained on COCO's instances, scaled and read as mmdetection does: 100 pairs of query and class,
whose score is the class's times the mean of the mask.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mask2FormerConfig, Mask2FormerModel, Mask2FormerPreTrainedModel

from ..reading import reading
from .geneval import NAMES, SURE, Box, Detection
from .scorers import device
from .weights import Weights, find_weights

WEIGHTS = Weights("facebook/mask2former-swin-small-coco-instance", ("config.json", "model.safetensors"))
SHORT, LONG, STEP = 800, 1333, 32  # pixels of the network's input: its sides, and what they are multiples of
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
PAIRS = 100  # of query and class, of an image
LEAST = 1e-6


class Segmenter(Mask2FormerPreTrainedModel):
    """Mask2Former with the logits of its classes, without a loss.

    It has the names of a checkpoint of transformers, whose loss needs scipy.
    """

    _keys_to_ignore_on_load_unexpected: ClassVar = ["criterion"]

    def __init__(self, config: Mask2FormerConfig) -> None:
        super().__init__(config)
        self.model = Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of each query's class and mask.

        pixels [B, 3, H, W]; returns [B, Q, C + 1], the last of no class, and [B, Q, h, w].
        """
        seen = self.model(pixel_values=pixels, output_hidden_states=True)
        states = seen.transformer_decoder_intermediate_states[-1].transpose(0, 1)
        return self.class_predictor(states), seen.masks_queries_logits[-1]


@dataclass(frozen=True)
class Detector:
    """A detector of COCO's classes."""

    network: Segmenter
    weights: Mapping[str, str] = field(default_factory=dict)

    def find(self, images: Tensor) -> list[list[Detection]]:
        """Return the objects of each image, the surest first.

        images [B, 3, H, W]; objects of a score below 0.3 are left out.
        """
        pixels, inner = detector_pixels(images)
        with torch.inference_mode():
            logits, masks = (x.float().cpu() for x in self.network(pixels.to(self.network.device)))
        full, inside = (pixels.shape[-2], pixels.shape[-1]), (images.shape[-2], images.shape[-1])
        return [
            detections(row, own, lambda mask: restored(mask, full, inner, inside))
            for row, own in zip(logits, masks, strict=True)
        ]


def detector_pixels(images: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return a detector's inputs of images [B, 3, H, W].

    The size is that of the images within their inputs. The shorter side becomes 800, but the longer at most 1,333,
    without antialiasing; zeros fill up to multiples of 32.
    """
    sides = images.shape[-2], images.shape[-1]
    scale = min(LONG / max(sides), SHORT / min(sides))
    height, width = (int(side * scale + 0.5) for side in sides)
    values = (images.detach().cpu().float().clamp(0, 1) * 255).round()
    scaled = F.interpolate(values, (height, width), mode="bilinear", align_corners=False).round()
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    return F.pad((scaled - mean) / std, (0, -width % STEP, 0, -height % STEP)), (height, width)


def restored(masks: Tensor, full: tuple[int, int], inner: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Return mask logits [M, h, w] in the size of the image.

    They are scaled to the input's `full` size, of which the image is the `inner` part.
    """
    whole = F.interpolate(masks[None], full, mode="bilinear", align_corners=False)
    return F.interpolate(whole[..., : inner[0], : inner[1]], size, mode="bilinear", align_corners=False)[0]


def detections(logits: Tensor, masks: Tensor, restore: Callable[[Tensor], Tensor]) -> list[Detection]:
    """Return the objects that queries found, the surest first.

    logits [Q, C + 1], masks [Q, h, w] are logits, which `restore` brings to the image's size. A pixel is an object's
    where its logit is positive; the score is the class's probability times the mean of the mask there. Pairs whose
    class is no surer than 0.3 are left out, as no product is larger.
    """
    sure = logits.softmax(1)[:, :-1].flatten()
    best, pairs = sure.topk(min(PAIRS, len(sure)))
    best, pairs = best[best > SURE], pairs[best > SURE]
    if not len(pairs):
        return []
    queries, of = (pairs // len(NAMES)).unique(return_inverse=True)
    seen = restore(masks[queries])
    inside = seen > 0
    means = (seen.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + LEAST)
    boxes = [_box(mask) for mask in inside]
    found = [
        Detection(NAMES[int(pair) % len(NAMES)], float(score * means[row]), boxes[row], inside[row])
        for score, pair, row in zip(best, pairs, of.tolist(), strict=True)
    ]
    return sorted(found, key=lambda one: -one.score)


def _box(mask: Tensor) -> Box:
    rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
    if not len(rows):
        return (0.0, 0.0, 0.0, 0.0)
    return (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))


def load_detector(option: str) -> Detector:
    """Load Mask2Former with its weights.

    Raises ValueError in one line where they cannot be had, or are others'.
    """
    found = find_weights(WEIGHTS, option)
    with reading(f"weights {found.folder}:", "fetch them again", "cannot be used"):
        network, about = Segmenter.from_pretrained(found.folder, local_files_only=True, output_loading_info=True)
        if lacking := sorted(map(str, [*about["missing_keys"], *about["mismatched_keys"]])):
            raise ValueError(f"they lack {lacking[0]}")
        if network.config.num_labels != len(NAMES):
            raise ValueError(f"they are of {network.config.num_labels} classes, expected {len(NAMES)}")
    return Detector(network.eval().to(device()), found.record())
