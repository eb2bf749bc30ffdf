"""A student's weights in files: the network it was, and one clear line where it is not there."""

from pathlib import Path

import pytest
import torch
from torch import nn

from fewstep.backbones.files import load_network, network_places, save_network

from .. import tiny


def changed() -> nn.Module:
    """A tiny U-Net that is not the teacher's."""
    network = tiny.stable_diffusion().module
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(torch.randn(p.shape, generator=rng) / 20)
    return network


@pytest.mark.parametrize("keep", [None, 0, 50])
def test_missing_or_damaged_files_are_one_clear_error(tmp_path: Path, keep: int | None) -> None:
    if keep is not None:
        save_network(tmp_path, changed())
        (path,) = network_places(tmp_path, tiny.stable_diffusion().module)[0].glob("*.safetensors")
        path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"^student: .*unet is missing or damaged \(.*\); export the run again$"):
        load_network(tmp_path, tiny.stable_diffusion().module)


def test_a_whole_network_comes_back(tmp_path: Path) -> None:
    own, teacher = changed(), tiny.stable_diffusion().module
    save_network(tmp_path, own)
    network = load_network(tmp_path, teacher)
    assert any(not torch.equal(a, b) for a, b in zip(own.parameters(), teacher.parameters(), strict=True))
    for name, tensor in own.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor)
    assert not network.training
