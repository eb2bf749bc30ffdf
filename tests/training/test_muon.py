import torch
from torch import nn

from fewstep.training.muon import Muon, is_matrix, orthogonalise


def matrices(rows: int, columns: int) -> torch.Tensor:
    return torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(0))


def test_singular_values_become_about_one_and_the_singular_vectors_stay() -> None:
    for rows, columns in ((16, 48), (48, 16), (32, 32)):
        m = matrices(rows, columns)
        u, _, v = torch.linalg.svd(m, full_matrices=False)
        y = orthogonalise(m).float()
        values = torch.linalg.svdvals(y)
        if rows != columns:  # a square Gaussian matrix has singular values near 0, which five iterations do not lift
            assert values.min() > 0.6
        assert values.max() < 1.3
        inner = u.mT @ y @ v.mT
        off = inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))
        assert off.abs().max() < 0.06  # bfloat16 iterations


def test_matrices_of_other_scales_in_one_batch_do_not_touch_each_other() -> None:
    m = matrices(16, 48)
    scaled = orthogonalise(m * torch.tensor([1.0, 1e-3, 1e3])[:, None, None])
    torch.testing.assert_close(scaled, orthogonalise(m), atol=0.05, rtol=0)
    assert torch.isfinite(orthogonalise(torch.zeros(1, 4, 4))).all()


def test_equals_torchs_muon_on_plain_matrices_step_for_step() -> None:
    ours = [nn.Parameter(m.clone()) for m in matrices(24, 40)]
    theirs = [nn.Parameter(m.clone()) for m in matrices(24, 40)]
    a = Muon(ours, lr=1e-2, weight_decay=0.1)
    b = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        g = torch.randn(3, 24, 40, generator=torch.Generator().manual_seed(step))
        for p, q, gradient in zip(ours, theirs, g, strict=True):
            p.grad, q.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, atol=5e-4, rtol=0)  # one step moves an entry by 1e-2 * 0.2 or so


def test_a_convolution_is_trained_as_the_matrix_of_its_unrolled_kernel() -> None:
    weight = torch.randn(32, 8, 3, 3, generator=torch.Generator().manual_seed(1))
    conv, matrix = nn.Parameter(weight.clone()), nn.Parameter(weight.flatten(1).clone())
    conv.grad, matrix.grad = weight.square(), weight.square().flatten(1)
    Muon([conv], lr=0.1).step()
    Muon([matrix], lr=0.1).step()
    assert torch.equal(conv.flatten(1), matrix)
    assert not torch.equal(conv, weight)


def test_which_parameters_are_matrices() -> None:
    net = nn.ModuleDict(
        {
            "embed": nn.Embedding(64, 64),
            "conv": nn.Conv2d(64, 64, 3),
            "video": nn.Conv3d(64, 64, 3),
            "out": nn.Conv2d(64, 3, 3),
            "norm": nn.GroupNorm(4, 64),
            "fc": nn.Linear(64, 64),
        }
    )
    assert {n for n, p in net.named_parameters() if is_matrix(net, n, p)} == {
        "conv.weight",
        "video.weight",
        "fc.weight",
    }
