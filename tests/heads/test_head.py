"""Heads: nothing at first, the same state always, and each with its own idea of what a correction may be."""

from functools import partial

import pytest
import torch
from torch import Tensor

from fewstep.core import timegrid
from fewstep.core.prediction import Split
from fewstep.core.schedule import EDM, Flow, Schedule, expand
from fewstep.core.solvers import SOLVERS, SolverHistory, SolverStep, sample
from fewstep.heads.curve import Curve
from fewstep.heads.head import KINDS, SERVE_ANY, Facts, Head, facts_of, make_head, require_steps
from fewstep.student.folder import read_head, write_head

from .. import tiny

CURVE = Curve(
    torch.randn((3, 5), generator=torch.Generator().manual_seed(0)).double(),
    torch.rand((3, 3)).double() + 0.5,
    torch.ones(3),
)
SHAPE = (2, 4, 4)


def head_of(
    kind: str, schedule: Schedule, moved: bool = True, shape: tuple[int, ...] = SHAPE, curve: Curve = CURVE
) -> Head:
    facts = Facts(curve, torch.full(shape, 0.3), 0.7, (timegrid.uniform(schedule, 4), timegrid.uniform(schedule, 2)))
    head = make_head(kind, schedule, facts)
    if moved:
        with torch.no_grad():
            for p in head.parameters():
                p.add_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    return head


def denoise(schedule: Schedule, x: Tensor, t: Tensor) -> Split:
    x0 = torch.tanh(0.3 * x + x.roll(1, 1) / 5)
    return Split(x0, (x - expand(schedule.alpha(t), x) * x0) / expand(schedule.sigma(t), x))


def noise(schedule: Schedule, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return schedule.start_std * torch.randn((3, *shape), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("solver", [s.name for s in SOLVERS.values() if not s.stochastic])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_changes_no_bit(kind: str, solver: str) -> None:
    for schedule in (EDM(), tiny.TABLE):
        times, head = timegrid.uniform(schedule, 4), head_of(kind, schedule, moved=False)
        network = partial(denoise, schedule)
        plain, with_head = (
            list(sample(network, schedule, noise(schedule), times, SOLVERS[solver], c)) for c in (None, head)
        )
        assert all(torch.equal(a.x, b.x) for a, b in zip(plain, with_head, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_correction_splits_the_same_state(kind: str) -> None:
    schedule = tiny.TABLE
    head, x = head_of(kind, schedule), noise(schedule)
    t, t_next = torch.full((3,), 749.0).double(), torch.full((3,), 499.0).double()
    way = denoise(schedule, x, t)
    other = head(way, t, t_next, SolverHistory(x))
    assert (other.x0 - way.x0).abs().max() > 1e-3
    torch.testing.assert_close(expand(schedule.alpha(t), x) * other.x0 + expand(schedule.sigma(t), x) * other.eps, x)


@pytest.mark.parametrize("kind", KINDS)
def test_a_visit_of_somebody_else_is_not_seen(kind: str) -> None:
    """Samples of a batch may have come differently far: a visit at no noisier time is none of theirs."""
    schedule = tiny.TABLE
    head, x = head_of(kind, schedule), noise(schedule)
    t, t_next = torch.full((3,), 749.0).double(), torch.full((3,), 499.0).double()
    way = denoise(schedule, x, t)
    strange = SolverStep(torch.full((3,), -1.0).double(), Split(x * 5, x), Split(x * 7, x))
    torch.testing.assert_close(
        head(way, t, t_next, SolverHistory(x, (strange,))), head(way, t, t_next, SolverHistory(x))
    )
    own = SolverStep(torch.full((3,), 999.0).double(), Split(x * 5, x), Split(x * 7, x))
    assert (
        head(way, t, t_next, SolverHistory(x, (own,))).x0 - head(way, t, t_next, SolverHistory(x)).x0
    ).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_span_moves_and_turns_with_the_data(kind: str) -> None:
    """A rotated trajectory is corrected to the rotated correction.

    It is rotated around its centre, and it may have another size with the same weights.
    """
    schedule, shape = EDM(), (32,)
    head = head_of(kind, schedule, shape=shape)
    turn = torch.linalg.qr(torch.randn((32, 32), generator=torch.Generator().manual_seed(0)))[0]
    x, t, t_next = noise(schedule, shape), *(torch.full((3,), v).double() for v in (5.0, 1.0))
    past = SolverHistory(
        x / 80, (SolverStep(torch.full((3,), 80.0).double(), Split(x / 90, x / 80), Split(x / 95, x / 80)),)
    )

    def corrected(r: Tensor) -> Tensor:
        def move(a: Tensor, centre: float = 0.0) -> Tensor:
            return (a - centre) @ r + centre

        visit = SolverStep(past.steps[0].t, Split(x, x), Split(move(x / 95, 0.3), x))
        return head(Split(move(x / 100, 0.3), move(x / 80)), t, t_next, SolverHistory(move(x / 80), (visit,))).x0

    plain, turned = corrected(torch.eye(32)), corrected(turn)
    torch.testing.assert_close(turned, (plain - 0.3) @ turn + 0.3, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_span_stays_in_the_span(kind: str) -> None:
    schedule, shape = EDM(), (32,)
    head, x = head_of(kind, schedule, shape=shape), noise(schedule, (32,))
    t, t_next = (torch.full((3,), v).double() for v in (5.0, 1.0))
    way = denoise(schedule, x, t)
    delta = head(way, t, t_next, SolverHistory(x / 80)).x0 - way.x0
    tokens = torch.stack([way.x0 - 0.3, x / 80], 2)
    rest = tokens @ torch.linalg.lstsq(tokens, delta[..., None]).solution - delta[..., None]
    assert rest.norm() < 1e-4 * delta.norm()


def test_shared_weights_are_a_few_numbers_a_step() -> None:
    head = head_of("shared", tiny.TABLE)
    assert [tuple(p.shape) for p in head.parameters()] == [(4 + 2, 5)]
    rows = []
    for t, t_next in ((999, 749), (749, 499), (499, 249), (249, -1), (999, 499), (499, -1)):
        head.zero_grad()
        way = denoise(tiny.TABLE, noise(tiny.TABLE), torch.full((3,), float(t)))
        head(
            way, *(torch.full((3,), float(v)).double() for v in (t, t_next)), SolverHistory(noise(tiny.TABLE))
        ).x0.sum().backward()
        (grad,) = [p.grad for p in head.parameters()]
        assert grad is not None
        rows.append(int(grad.abs().sum(1).argmax()))
    assert rows == list(range(6))


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in SERVE_ANY])
def test_a_head_serves_as_many_steps_as_it_has_weights_for(kind: str) -> None:
    """And for fewer."""
    head, x = head_of(kind, tiny.TABLE), noise(tiny.TABLE)
    assert head.counts == (4, 2)
    for steps in (3, 4):
        require_steps(kind, head.counts, steps, "steps", "")
        *_, last = sample(
            lambda x, t: denoise(tiny.TABLE, x, t), tiny.TABLE, x, timegrid.uniform(tiny.TABLE, steps), correct=head
        )
        assert bool(last.x.isfinite().all())
    with pytest.raises(
        ValueError, match=f"^--steps: got 5, the student's {kind} head serves up to 4 steps; take fewer$"
    ):
        require_steps(kind, head.counts, 5, "--steps", "take fewer")


@pytest.mark.parametrize("kind", SERVE_ANY)
def test_a_head_without_weights_of_steps_serves_any_number(kind: str) -> None:
    head, x = head_of(kind, tiny.TABLE), noise(tiny.TABLE)
    assert not [n for n, _ in head.named_parameters() if n.startswith("rows")]
    for steps in (1, 3, 9):
        require_steps(kind, head.counts, steps, "steps", "")
        *_, last = sample(
            lambda x, t: denoise(tiny.TABLE, x, t), tiny.TABLE, x, timegrid.uniform(tiny.TABLE, steps), correct=head
        )
        assert bool(last.x.isfinite().all())


@pytest.mark.parametrize("kind", ["span", "curve"])
def test_a_head_sees_where_its_step_is_on_the_curve(kind: str) -> None:
    """With another curve, all else equal, the correction is another one."""
    schedule, x = tiny.TABLE, noise(tiny.TABLE)
    t, t_next = torch.full((3,), 749.0).double(), torch.full((3,), 499.0).double()
    head = head_of(kind, schedule)
    other = head_of(kind, schedule, curve=Curve(CURVE.weights.flip(0), CURVE.shape.flip(0), CURVE.r2))
    assert (head.place(t) - other.place(t)).abs().max() > 0.1
    apart = (
        head(denoise(schedule, x, t), t, t_next, SolverHistory(x)).x0
        - other(denoise(schedule, x, t), t, t_next, SolverHistory(x)).x0
    )
    assert apart.abs().max() > 1e-2
    places = head.places(t, t_next)
    torch.testing.assert_close(places, torch.cat([head.place(t), head.place(t_next)], 1))
    assert (places[:, :3] - places[:, 3:]).abs().min() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_a_file(kind: str, tmp_path: object) -> None:
    from pathlib import Path

    folder, head = Path(str(tmp_path)), head_of(kind, tiny.TABLE)
    write_head(folder, head)
    again = read_head(folder, tiny.TABLE)
    x, t, t_next = noise(tiny.TABLE), torch.full((3,), 749.0).double(), torch.full((3,), 499.0).double()
    way = denoise(tiny.TABLE, x, t)
    assert torch.equal(head(way, t, t_next, SolverHistory(x)).x0, again(way, t, t_next, SolverHistory(x)).x0)
    (folder / "trajp.safetensors").write_bytes((folder / "trajp.safetensors").read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"student: .*trajp.safetensors is missing or damaged"):
        read_head(folder, tiny.TABLE)


def test_facts_are_those_of_the_clean_states() -> None:
    rng = torch.Generator().manual_seed(0)
    clean = 0.5 + 0.1 * torch.randn((400, *SHAPE), generator=rng)
    whole = torch.randn((8, 21, *SHAPE), generator=rng)
    facts = facts_of(tiny.TABLE, whole, timegrid.uniform(tiny.TABLE, 20), clean, [timegrid.uniform(tiny.TABLE, 4)])
    torch.testing.assert_close(facts.centre, clean.mean(0))
    assert facts.spread == pytest.approx(0.1, rel=0.05)


def test_unknown_kinds_list_the_known() -> None:
    with pytest.raises(ValueError, match=r"method.head: got 'mlp', allowed are none, span, curve, shared"):
        head_of("mlp", Flow())
