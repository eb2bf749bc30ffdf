"""The feature network is the published one."""

import pytest
import torch

from fewstep.evaluation.features import BATCH, SIZE, WIDTH, SameConv, feature_network, features

# The six largest features of two images, computed by `efficientnet-lite-pytorch` 0.1.0 in float32 at 128 x 128.
PUBLISHED = (
    {113: 5.8776, 1157: 5.352, 897: 5.3209, 835: 4.7551, 285: 4.5737, 814: 4.5439},
    {707: 5.4564, 400: 3.9899, 1243: 3.9731, 1240: 3.7789, 701: 3.645, 829: 3.089},
)
NORMS = (24.5707, 16.6594)
ZEROS = (1016, 1059)


def images() -> torch.Tensor:
    """A ramp with a disc in blue, and a disc of two colours, [2, 3, 64, 64]."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    disc = ((x**2 + y**2).sqrt() < 0.7).float()
    ramp = torch.stack([(x + 1) / 2, (y + 1) / 2, 1 - disc])
    return torch.stack([ramp, torch.stack([1 - disc, 1 - 0.3 * disc, disc * (x > 0)])])


def test_features_are_those_of_the_published_implementation() -> None:
    found = features(feature_network(), images())
    assert found.shape == (2, WIDTH)
    for row, published, norm, zeros in zip(found, PUBLISHED, NORMS, ZEROS, strict=True):
        assert row[list(published)].tolist() == pytest.approx(list(published.values()), rel=5e-3)  # weights are float16
        assert row.norm().item() == pytest.approx(norm, rel=5e-3)
        assert (row == 0).sum().item() == pytest.approx(zeros, abs=30)


def test_batches_do_not_change_features() -> None:
    images = torch.rand((BATCH + 3, 3, 64, 64), generator=torch.Generator().manual_seed(0))
    network = feature_network()
    torch.testing.assert_close(features(network, images)[-3:], features(network, images[-3:]), rtol=1e-3, atol=1e-4)


def test_any_size_of_image_is_taken() -> None:
    large = torch.nn.functional.interpolate(images(), (96, 160), mode="bicubic").clamp(0, 1)
    network = feature_network()
    assert features(network, large).shape == (2, WIDTH)
    assert not any(p.requires_grad for p in network.parameters())
    assert network.size == SIZE


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "out"), [(8, 3, 2, 4), (7, 3, 2, 4), (8, 5, 2, 4), (9, 5, 1, 9), (8, 3, 1, 8)]
)
def test_same_padding_is_tensorflows(size: int, kernel: int, stride: int, out: int) -> None:
    """The odd zero of the padding is on the right.

    There are ceil(size / stride) outputs. The first output sees floor(total / 2) zeros on its left.
    """
    convolution = SameConv(1, 1, kernel, stride, bias=False)
    torch.nn.init.ones_(convolution.weight)
    with torch.no_grad():
        y = convolution(torch.ones((1, 1, size, size)))
    total = (out - 1) * stride + kernel - size
    assert y.shape[2:] == (out, out)
    assert y[0, 0, 0, 0].item() == (kernel - total // 2) ** 2
    assert y[0, 0, -1, -1].item() == (kernel - (total - total // 2)) ** 2


def test_images_that_are_not_finite_are_not_measured() -> None:
    images = torch.rand(2, 3, 8, 8)
    images[1, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="the images to be measured are not finite"):
        features(feature_network(), images)
