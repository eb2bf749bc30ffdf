"""The pipelines of random weights that benchmarks time: fewstep takes them, small and at true size."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fewstep.backbones.load import around, at_size

Load = Callable[[str], dict[str, Any]]


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("name", ["sd15", "sdxl", "pixart", "cogvideox", "flux2", "wan"])
def test_fewstep_takes_a_family_of_the_benchmark(name: str, small: bool, load: Load) -> None:
    family = load("backbones")["FAMILIES"][name]
    with torch.device("meta"):
        pipe = family.build(small)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)  # its table is needed as numbers
    backbone = at_size(around(pipe, name), family.small_size if small else None)
    tokens = {k: shape[0] for k, shape in family.cond(pipe).items()}
    assert len(backbone.shape) == (4 if name in ("cogvideox", "wan") else 3)
    assert name not in ("flux2", "wan") or tokens["text"] == (16 if small else 512)
