"""The configurations of published models: the networks have the sizes that their owners name, and text goes in."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.backbones.meta import meta_teacher
from fewstep.roles.quantized import weight_count

Load = Callable[[str], dict[str, Any]]
BILLIONS = {  # of the denoisers' weights, as their owners give them; 3.5-M: 2.5 with its table of positions
    "sd15": 0.86, "sdxl": 2.6, "pixart": 0.6, "cogvideox": 1.7, "sd35m": 2.24, "sd35l": 8.1, "flux": 12.0,
    "flux2-klein-4b": 4.0, "flux2-klein-9b": 9.0, "flux2-dev": 32.0, "qwenimage": 20.0, "zimage": 6.0, "krea2": 12.9,
    "qwenimage21": 7.1, "wan21": 1.4, "wan21-14b": 14.0, "wan22-5b": 5.0, "wan22-a14b": 28.0,
}  # fmt: skip


def test_every_model_has_a_size(load: Load) -> None:
    assert set(load("configurations")["PIPELINES"]) == set(BILLIONS)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "wan21" else pytest.mark.slow) for n in BILLIONS])
def test_a_network_has_the_size_that_its_owners_name(name: str, load: Load, tmp_path: Path) -> None:
    backbone = meta_teacher(load("configurations")["write"](name, tmp_path), torch.bfloat16)
    assert weight_count(backbone.module) / 1e9 == pytest.approx(BILLIONS[name], rel=0.1)
    assert len(next(iter(backbone.encode(["a red fox"] * 2).values()))) == 2
