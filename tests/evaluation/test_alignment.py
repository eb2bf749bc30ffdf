"""Retrieval, colours and diversity on hand-made cases."""

import pytest
import torch

from fewstep.evaluation.alignment import colour_histogram, diversity, name_ranks, nearest_colours, top


def test_ranks_count_labels_and_not_images() -> None:
    angle = torch.tensor([0.0, 0.1, 0.2, 0.5, 1.0])
    gallery = (
        torch.stack([angle.cos(), angle.sin()], 1) * torch.tensor([1.0, 2.0, 3.0, 0.1, 5.0])[:, None]
    )  # lengths do not matter
    labels = torch.tensor([0, 1, 1, 2, 0])
    queries = gallery[[0, 0, 0, 4]] * 7
    ranks = name_ranks(queries, gallery, labels, torch.tensor([0, 1, 2, 0]))
    assert ranks.tolist() == [0, 1, 2, 0]
    assert (top(ranks, 1), top(ranks, 2), top(ranks, 3)) == (0.5, 0.75, 1.0)


def test_a_tie_is_no_loss() -> None:
    gallery = torch.eye(3)
    assert name_ranks(torch.ones(1, 3), gallery, torch.arange(3), torch.tensor([2])).tolist() == [0]


def test_colour_histogram_splits_between_neighbours() -> None:
    image = torch.tensor([0.5, 0.25, 0.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4).clone()
    image[:, 2, :2] = 0.0625  # a quarter of the way to the next blue
    found = colour_histogram(image).view(5, 5, 5)
    assert found.sum().item() == pytest.approx(1)
    assert found[2, 1, 0].item() == pytest.approx(0.5 + 0.5 * 0.75)
    assert found[2, 1, 1].item() == pytest.approx(0.5 * 0.25)


def test_colour_histogram_ignores_places() -> None:
    images = torch.rand((3, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(colour_histogram(images), colour_histogram(images.flip(3).roll(3, 2)))
    torch.testing.assert_close(colour_histogram(images).sum(1), torch.ones(3))


def test_nearest_colours() -> None:
    candidates = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.9, 0.1]]])
    assert nearest_colours(torch.tensor([[0.6, 0.4], [0.6, 0.4]]), candidates).tolist() == [1, 1]
    assert nearest_colours(torch.tensor([[0.9, 0.1], [0.2, 0.8]]), candidates).tolist() == [0, 0]


def test_diversity_is_the_mean_distance_of_different_images() -> None:
    x = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]], [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]])
    assert diversity(x).tolist() == pytest.approx([10 / 3, 0])
