"""What every method asks of a model: guidance by its formula, in one call, and any network behind the same protocol."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.backbones.base import Denoiser, denoiser, guided, nfe_per_step, rows
from fewstep.backbones.generate import in_parts
from fewstep.core.guidance import Guidance, project_guidance, rescale_guidance
from fewstep.core.prediction import ROWS, split
from fewstep.core.schedule import EDM, VP, Flow, Schedule, expand
from fewstep.core.solvers import Denoise

from .. import tiny


@contextmanager
def batch_sizes(module: nn.Module) -> Iterator[list[int]]:
    """The batch size of every call of `module`, as it happens."""
    seen: list[int] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        yield seen
    finally:
        handle.remove()


def state(n: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn((n, 2, 4, 4), generator=torch.Generator().manual_seed(0)), torch.tensor([999.0, 400, 19])[:n]


@pytest.mark.parametrize("scale", [1.0, 0.0, 3.5, -1.0])
def test_guidance_is_its_formula(scale: float) -> None:
    backbone = tiny.denoiser()
    x, t = state()
    cond, null = backbone.encode(["red cat", "blue", "a"]), backbone.encode([""])
    with torch.no_grad():
        got = guided(backbone, backbone.module, cond, null, Guidance(scale=scale))(x, t)
        yes = denoiser(backbone, backbone.module, cond)(x, t)
        no = denoiser(backbone, backbone.module, {"label": null["label"].expand(3, 3)})(x, t)
    torch.testing.assert_close(got.x0, no.x0 + scale * (yes.x0 - no.x0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.eps, no.eps + scale * (yes.eps - no.eps), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conditional", [True, False])
@pytest.mark.parametrize(
    "guidance", [Guidance(), Guidance(scale=2.0), Guidance(tilt=0.5)], ids=["none", "scale", "tilt"]
)
def test_calls_are_counted_as_the_network_sees_them(guidance: Guidance, conditional: bool) -> None:
    backbone = tiny.denoiser(conditional=conditional)
    x, t = state()
    cond, null = backbone.encode(["red cat", "blue", "a"]), backbone.encode([""])
    with torch.no_grad(), batch_sizes(backbone.module) as seen:
        guided(backbone, backbone.module, cond, null, guidance)(x, t)
    assert seen == [3 * nfe_per_step(cond, guidance)] == [6 if conditional and guidance != Guidance() else 3]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_rescaled_guidance_has_the_spread_it_would_have_without(share: float) -> None:
    backbone = tiny.denoiser()
    x, t = state()
    cond, null = backbone.encode(["red cat", "blue", "a"]), backbone.encode([""])
    with torch.no_grad():
        yes, no = (
            backbone.predict(backbone.module, x, t, {"label": c}) for c in (cond["label"], null["label"].expand(3, 3))
        )
        m = no + 5 * (yes - no)
        got = rescale_guidance(m, yes, share)
        drawn = guided(backbone, backbone.module, cond, null, Guidance(scale=5.0, rescale=share))(x, t)
    wide, right = m.flatten(1).std(1), yes.flatten(1).std(1)
    torch.testing.assert_close(got.flatten(1).std(1), share * right + (1 - share) * wide)
    torch.testing.assert_close(
        got / m, (got / m)[:, :1, :1, :1].expand_as(m), rtol=1e-4, atol=1e-4
    )  # one factor for an image
    alpha, sigma = (expand(f(t), x) for f in (backbone.schedule.alpha, backbone.schedule.sigma))
    torch.testing.assert_close(drawn.x0, split(got, x, alpha, sigma, backbone.row).x0)


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow"])
@pytest.mark.parametrize("share", [0.0, 0.4])
def test_projected_guidance_adds_its_share_along_the_clean_estimate_and_all_of_the_rest(
    prediction: str, share: float
) -> None:
    backbone = replace(tiny.denoiser(), prediction=prediction)
    x, t = state()
    t = t.clamp(max=900)  # at pure noise an eps network says nothing of x0
    cond, null = backbone.encode(["red cat", "blue", "a"]), backbone.encode([""])
    with torch.no_grad():
        got = guided(backbone, backbone.module, cond, null, Guidance(scale=5.0, apg_eta=share))(x, t)
        plain = guided(backbone, backbone.module, cond, null, Guidance(scale=5.0))(x, t)
        yes = denoiser(backbone, backbone.module, cond)(x, t)
    axis = yes.x0 / expand(yes.x0.flatten(1).norm(dim=1), x)
    added, whole = ((s.x0 - yes.x0) for s in (got, plain))
    along, along_whole = ((d * axis).flatten(1).sum(1) for d in (added, whole))
    torch.testing.assert_close(along, share * along_whole, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        added - expand(along, x) * axis, whole - expand(along_whole, x) * axis, rtol=1e-3, atol=1e-4
    )
    alpha, sigma = (expand(f(t), x) for f in (backbone.schedule.alpha, backbone.schedule.sigma))
    torch.testing.assert_close((alpha * got.x0 + sigma * got.eps).float(), x, rtol=1e-3, atol=1e-3)


def test_all_of_the_parallel_part_is_plain_guidance_and_nothing_has_none() -> None:
    backbone = tiny.denoiser()
    x, t = state()
    cond, null = backbone.encode(["red cat", "blue", "a"]), backbone.encode([""])
    with torch.no_grad():
        whole, plain = (
            guided(backbone, backbone.module, cond, null, guidance)(x, t)
            for guidance in (Guidance(scale=3.0, apg_eta=1.0), Guidance(scale=3.0))
        )
        assert torch.equal(whole.x0, plain.x0)
    torch.testing.assert_close(project_guidance(x, x, 1.0), x)
    assert not torch.allclose(project_guidance(x, x, 0.5), x)
    torch.testing.assert_close(project_guidance(x, x, 0.0), torch.zeros_like(x), atol=1e-6, rtol=0)
    assert torch.equal(project_guidance(x, torch.zeros_like(x), 0.0), x)  # an estimate of nothing has no direction


def test_guidance_is_one_batched_call_and_half_of_it_without() -> None:
    backbone = tiny.denoiser()
    x, t = state()
    cond, null = backbone.encode(["red cat", "blue", "a"]), backbone.encode([""])
    with batch_sizes(backbone.module) as seen, torch.no_grad():
        guided(backbone, backbone.module, cond, null, Guidance(scale=3.5))(x, t)
        got = guided(backbone, backbone.module, cond, null, Guidance(scale=1.0))(x, t)
        plain = denoiser(backbone, backbone.module, cond)(x, t)
    assert seen == [6, 3, 3]
    assert torch.equal(got.x0, plain.x0)


@pytest.mark.parametrize("prediction", ["x0", "eps", "v", "flow"])
def test_any_network_is_split_by_its_row(prediction: str) -> None:
    schedule = tiny.TABLE if prediction == "eps" else Flow()  # on flow's noisiest time eps says nothing of the data
    backbone = tiny.denoiser(schedule=schedule, prediction=prediction, conditional=False)
    x, t = state()[0], torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64) * (1000 if prediction == "eps" else 1)
    with torch.no_grad():
        got = denoiser(backbone, backbone.module, {})(x, t)
        raw = backbone.module(x, t.float())
    alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
    torch.testing.assert_close(got.x0, split(raw, x, alpha, sigma, ROWS[prediction]).x0)


@pytest.mark.parametrize(
    ("schedule", "why"),
    [(Flow(), "(1) the schedule leaves 0"), (VP(tiny.TABLE.alpha_bar - tiny.TABLE.alpha_bar[-1]), "(999)")],
)
def test_noise_is_not_predicted_where_there_is_nothing_else(schedule: Schedule, why: str) -> None:
    with pytest.raises(ValueError, match="a network of 'eps' predicts noise, and at its noisiest time") as error:
        tiny.denoiser(schedule=schedule, prediction="eps")
    assert why in str(error.value)
    for prediction in ("v", "x0"):
        tiny.denoiser(schedule=schedule, prediction=prediction)


@pytest.mark.parametrize("done", [True, False], ids=["preconditioned", "by itself"])
def test_edm_s_preconditioning_of_an_own_network(done: bool) -> None:
    """`D = c_skip x + c_out F(c_in x, log(sigma) / 4)`.

    It holds whether fewstep scales the network's input or the network does.
    """
    net, data = tiny.Net(), 0.7

    class ByItself(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return net(x / (t.square() + data**2).sqrt()[:, None, None, None], t.log() / 4)

    module: nn.Module = net if done else ByItself()
    backbone = Denoiser(module, EDM(), (2, 4, 4), "edm", sigma_data=data, precondition=done)
    x, t = state()[0], torch.tensor([70.0, 0.9, 0.02], dtype=torch.float64)
    with torch.no_grad():
        got = denoiser(backbone, module, {})(x, t)
        level = t.float()[:, None, None, None]
        raw = net(x / (level**2 + data**2).sqrt(), t.log().float() / 4)
    c_skip, c_out = data**2 / (level**2 + data**2), level * data / (level**2 + data**2).sqrt()
    torch.testing.assert_close(got.x0, c_skip * x + c_out * raw, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"precondition": True}, "precondition: is for prediction='edm' alone, got 'eps'"),
        ({"sigma_data": 0.7}, "sigma_data: is for prediction='edm' alone, got 'eps'"),
        (
            {"prediction": "edm", "schedule": Flow()},
            "prediction: 'edm' is for data that noise is added to, Flow scales them; pass",
        ),
        ({"prediction": "edm", "sigma_data": 0.0}, "sigma_data: got 0, allowed are positive numbers"),
    ],
)
def test_edm_s_options_go_with_edm_alone(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=f"^{expected}"):
        Denoiser(**{"module": nn.Linear(2, 2), "schedule": EDM(), "shape": (2,), **options})


def test_own_network_takes_its_own_dtype_and_gives_float32() -> None:
    net = tiny.Net().to(torch.bfloat16)
    backbone = Denoiser(net, tiny.TABLE, (2, 4, 4), "v")
    x, t = state()
    with torch.no_grad():
        assert backbone.predict(net, x, t, {}).dtype == torch.float32


def test_own_network_without_conditions_ignores_prompts() -> None:
    backbone = Denoiser(nn.Linear(2, 2), EDM(), (2,))
    assert backbone.encode(["anything"]) == {}
    assert backbone.scheduler_config == {}
    x = torch.rand(2, 2)
    assert backbone.decode(x) is x


def test_unknown_prediction_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="prediction: got 'epsilon', allowed are"):
        Denoiser(nn.Linear(2, 2), EDM(), (2,), "epsilon")


def test_rows_of_conditions() -> None:
    cond = {"text": torch.arange(6.0).reshape(3, 2), "ids": torch.arange(3)}
    got = rows(cond, slice(1, None))
    assert got["text"].tolist() == [[2, 3], [4, 5]]
    assert got["ids"].tolist() == [1, 2]


def test_each_sample_has_the_guidance_of_its_own_time() -> None:
    """`w (1 + b (2u - 1))` at the fraction u of the path."""
    backbone = tiny.denoiser()
    x, t = torch.randn(3, 2, 4, 4), torch.tensor([900.0, 500.0, 20.0])
    cond, null = backbone.encode(tiny.WORDS), backbone.encode([""])
    with torch.no_grad():
        together = guided(backbone, backbone.module, cond, null, Guidance(scale=4.0, tilt=-0.8))(x, t)
        for i, u in enumerate((901 / 1000, 501 / 1000, 21 / 1000)):
            own = Guidance(scale=4.0 * (1 - 0.8 * (2 * u - 1)))
            alone = guided(backbone, backbone.module, rows(cond, slice(i, i + 1)), null, own)(
                x[i : i + 1], t[i : i + 1]
            )
            torch.testing.assert_close(together.x0[i : i + 1], alone.x0, atol=1e-5, rtol=1e-5)


def test_in_parts_it_is_the_same_denoiser() -> None:
    backbone = tiny.denoiser()
    cond, sizes = backbone.encode(tiny.WORDS), []

    def of_rows(r: slice) -> Denoise:
        sizes.append(r)
        return denoiser(backbone, backbone.module, rows(cond, r))

    x, t = torch.randn(3, 2, 4, 4), torch.tensor([900.0, 500.0, 20.0])
    with torch.no_grad():
        whole, parts = denoiser(backbone, backbone.module, cond)(x, t), in_parts(of_rows, 2)(x, t)
    assert sizes == [slice(0, 2), slice(2, 3)]
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
