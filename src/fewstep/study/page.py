"""The page of a study.

Nothing in it says whose the images are.
"""

from collections.abc import Callable

from torch import Tensor

from ..report.page import PIXELATED, page, small_url
from .key import QUESTIONS, Key, image_order


def study_page(key: Key, image: Callable[[int, int], Tensor]) -> str:
    """Render the page of a study.

    `image(item, model)` is an image `[3, H, W]` or a clip `[F, 3, H, W]` in [0, 1]; all are of one size. The
    page knows images by their place in a random order.
    """
    order = image_order(key)
    place = {of: i for i, of in enumerate(order)}
    height, width = image(*order[0]).shape[-2:]
    return page(
        "study.html.j2",
        {
            "title": QUESTIONS["better"],
            "images": (small_url(image(*of)) for of in order),
            "width": width,
            "height": height,
            "pixels": max(height, width) <= PIXELATED,
            "study": {
                "study": key.study,
                "questions": [[name, QUESTIONS[name]] for name in key.questions],
                "pairs": [[key.prompts[p.item], place[p.item, p.first], place[p.item, p.second]] for p in key.pairs],
            },
        },
    )
