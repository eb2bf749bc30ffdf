"""The images of a report that are least like the teacher's."""

import torch

from ..evaluation.features import feature_network, features
from .images import Images

SHOWN = 4
FEWEST = 3  # prompts; of fewer all are seen at a glance


def furthest(images: Images) -> list[tuple[int, str, str]]:
    """Return the prompts whose images are furthest from the teacher's.

    The furthest is the first. As (index of the prompt, label of the teacher, label of the student): the first rows
    of each. Both sampled from the same noise, and the distance is that of EfficientNet-lite0 features. Empty where
    there is nothing to compare.
    """
    labels = [next((label for label in images.rows if label.startswith(who)), "") for who in ("teacher", "student")]
    if not all(labels) or len(images.prompts) < FEWEST:
        return []
    network = feature_network()
    goal, own = (features(network, images.rows[label]) for label in labels)
    distance = torch.linalg.vector_norm(own - goal, dim=1)
    chosen = distance.argsort(descending=True)[: min(SHOWN, len(distance) // 2)].tolist()
    return [(i, labels[0], labels[1]) for i in chosen]
