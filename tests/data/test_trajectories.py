"""The teacher's trajectories: the states it walks through, in shards, once, and only its own."""

import hashlib
import json
import shutil
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fewstep.backbones.base import Backbone, denoiser, guided
from fewstep.backbones.generate import trajectory
from fewstep.core import timegrid
from fewstep.core.guidance import Guidance
from fewstep.core.schedule import EDM, VP, Flow, Schedule
from fewstep.core.solvers import sample
from fewstep.data.prompts import embed
from fewstep.data.trajectories import (
    Trajectories,
    TrajectoryConfig,
    generate_trajectories,
    guided_teacher,
    refine,
    trajectory_nfe,
    union,
)

from .. import tiny

PLAIN = Guidance(scale=2.0)
ENDED = Guidance(scale=2.0, stop=0.4)
CONFIG = TrajectoryConfig(count=7, steps=9, solver="ddim", seed=3)


def finish(generator: Generator[int, None, Trajectories]) -> tuple[list[int], Trajectories]:
    """What it yields, and what it returns."""
    seen = []
    while True:
        try:
            seen.append(next(generator))
        except StopIteration as end:
            return seen, end.value


def make(
    folder: Path | None,
    backbone: Backbone,
    config: TrajectoryConfig = CONFIG,
    identity: str = "teacher",
    guidance: Guidance = PLAIN,
) -> Generator[int, None, Trajectories]:
    data = embed(backbone, tiny.WORDS, None, "x")
    times = union(backbone.schedule, [timegrid.uniform(backbone.schedule, k) for k in (4, 3)])
    source = guided_teacher(backbone, data.null, config, times, guidance)
    return generate_trajectories(backbone, data, config, times, source, folder, identity, 3)


@pytest.mark.parametrize("schedule", [tiny.TABLE, Flow(), EDM()])
@pytest.mark.parametrize("steps", [1, 10, 50])
def test_the_teachers_grid_stops_at_all_of_the_students_times(schedule: Schedule, steps: int) -> None:
    times = union(schedule, [timegrid.uniform(schedule, k) for k in (4, 2, 3)])
    assert len(times) == 7
    grid, places = refine(schedule, times, steps)
    assert torch.equal(grid[places], times)
    assert bool((grid.diff() < 0).all())
    assert max(6, steps - 6) <= len(grid) - 1 <= max(6, steps + 6)


def test_states_are_the_guided_teachers_own_from_the_same_noise() -> None:
    backbone = tiny.stable_diffusion()
    _, paths = finish(make(None, backbone))
    assert paths.states.shape == (7, 7, *backbone.shape)
    assert paths.whole.shape[:2] == (7, len(paths.grid))
    cond = {k: v[4:5] for k, v in paths.embeddings.cond.items()}
    denoise = guided(backbone, backbone.module, cond, backbone.encode([""]), PLAIN)
    states = trajectory(backbone, denoise, [CONFIG.seed + 4], paths.grid)
    for j, t in enumerate(paths.times):
        (there,) = [s.x[0] for s in states if s.t[0] == t]
        torch.testing.assert_close(paths.states[4, j], there, atol=1e-4, rtol=1e-4)


def test_guidance_can_end_before_the_way_does() -> None:
    """Above the fraction the guided teacher's own states, below it those of the bare network from there on."""
    backbone = tiny.stable_diffusion()
    _, paths = finish(make(None, backbone, replace(CONFIG, guidance=ENDED)))
    _, all_the_way = finish(make(None, backbone))
    cond = {k: v[4:5] for k, v in paths.embeddings.cond.items()}
    whole, grid = paths.whole[4:5], paths.grid
    last = int((backbone.schedule.fraction(grid) > 0.4).sum())  # the first time without guidance
    assert 1 < last < len(grid) - 1
    assert torch.equal(whole[:, : last + 1], all_the_way.whole[4:5, : last + 1])
    bare = list(sample(denoiser(backbone, backbone.module, cond), backbone.schedule, whole[:, last], grid[last:]))
    torch.testing.assert_close(whole[:, -1], bare[-1].x, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(whole[:, -1], all_the_way.whole[4:5, -1], atol=1e-3)


@pytest.mark.parametrize("solver", ["auto", "heun", "dpmpp"])
@pytest.mark.parametrize("guidance", [Guidance(), PLAIN, ENDED])
def test_what_a_trajectory_costs_is_what_the_network_is_asked(
    solver: Literal["auto", "heun", "dpmpp"], guidance: Guidance
) -> None:
    backbone, asked = tiny.denoiser(schedule=EDM(t_max=5.0), prediction="x0"), []
    backbone.module.register_forward_pre_hook(lambda _, args: asked.append(len(args[0])))
    config = TrajectoryConfig(count=1, steps=9, solver=solver)
    times = union(backbone.schedule, [timegrid.uniform(backbone.schedule, k) for k in (4, 3)])
    finish(make(None, backbone, config, guidance=guidance))
    assert trajectory_nfe(backbone, backbone.encode(["red cat"]), config, times, guidance) == sum(asked)


def test_a_folder_without_an_end_of_guidance_is_another_ones(tmp_path: Path) -> None:
    backbone, ended = tiny.stable_diffusion(), replace(CONFIG, guidance=ENDED)
    finish(make(tmp_path / "plain", backbone))
    finish(make(tmp_path / "ended", backbone, ended))
    for folder, config in (("plain", ended), ("ended", CONFIG)):
        with pytest.raises(ValueError, match=r"data\.folder: .* made with another guidance;"):
            finish(make(tmp_path / folder, backbone, config))


@pytest.mark.parametrize("value", [-0.1, 1.0])
def test_no_other_end_of_guidance_is_taken(value: float) -> None:
    with pytest.raises(ValueError, match=r"^guidance\.stop: got"):
        Guidance(stop=value)


def test_a_stopped_walk_goes_on_and_a_damaged_shard_is_walked_again(tmp_path: Path) -> None:
    backbone = tiny.stable_diffusion()
    _, straight = finish(make(None, backbone))
    walking = make(tmp_path, backbone)
    assert [next(walking), next(walking)] == [3, 6]
    walking.close()
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) == 2
    shards[0].write_bytes(shards[0].read_bytes()[:100])
    kept = shards[1].stat().st_mtime_ns
    seen, paths = finish(make(tmp_path, backbone))
    assert seen == [3, 6, 7]
    assert shards[1].stat().st_mtime_ns == kept
    assert torch.equal(paths.states, straight.states)
    assert torch.equal(paths.whole, straight.whole)
    assert paths.key == straight.key


def test_a_folder_grows_and_fewer_are_its_first(tmp_path: Path) -> None:
    backbone = tiny.stable_diffusion()
    _, straight = finish(make(None, backbone))
    _, few = finish(make(tmp_path, backbone, replace(CONFIG, count=4)))
    kept = (tmp_path / "trajectories-00000.safetensors").stat().st_mtime_ns
    _, more = finish(make(tmp_path, backbone))
    torch.testing.assert_close(few.states, straight.states[:4], rtol=1e-4, atol=1e-5)  # its last one was walked alone
    assert torch.equal(more.states, straight.states)
    assert torch.equal(more.whole, straight.whole)
    for paths in (few, more):
        for name, own in paths.embeddings.cond.items():
            assert torch.equal(own[:], straight.embeddings.cond[name][: len(own)])
    assert len(few.states) == 4
    assert more.key == straight.key != few.key
    assert (tmp_path / "trajectories-00000.safetensors").stat().st_mtime_ns == kept
    backbone.module.forward = None  # type: ignore[assignment]
    _, again = finish(make(tmp_path, backbone, replace(CONFIG, count=5)))
    assert torch.equal(again.states, straight.states[:5])


def test_processes_walk_a_share_each_and_read_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process generates a share of the trajectories and reads the others.

    The second of two has generated the second of three shards when it waits for the first, and has all of them after
    that.
    """
    backbone, walked = tiny.denoiser(), list[str]()

    def as_process(index: int, wait: Callable[[], None]) -> tuple[list[int], Trajectories]:
        monkeypatch.setattr(
            "fewstep.data.trajectories.this_process", lambda: SimpleNamespace(process_index=index, num_processes=2)
        )
        monkeypatch.setattr("fewstep.data.trajectories.barrier", wait)
        return finish(make(tmp_path, backbone))

    def first_walks() -> None:
        walked.extend(p.name for p in tmp_path.glob("*.safetensors"))
        as_process(0, lambda: None)

    seen, paths = as_process(1, first_walks)
    assert (seen, walked) == ([6], ["trajectories-00001.safetensors"])
    _, alone = finish(make(None, backbone))
    assert torch.equal(paths.states, alone.states)
    assert torch.equal(paths.whole, alone.whole)


def test_another_teachers_trajectories_are_refused(tmp_path: Path) -> None:
    backbone = tiny.stable_diffusion()
    finish(make(tmp_path, backbone))
    with pytest.raises(
        ValueError,
        match=r"data.folder: the trajectories in .* are those of teacher teacher, this is other; choose another folder",
    ):
        next(make(tmp_path, backbone, identity="other"))
    with pytest.raises(ValueError, match="were made with another guidance; choose another folder, or delete it"):
        next(make(tmp_path, backbone, guidance=Guidance()))
    for other in (replace(PLAIN, rescale=0.5), replace(PLAIN, apg_eta=0.0), replace(PLAIN, tilt=0.1)):
        with pytest.raises(ValueError, match="were made with another guidance; choose another folder, or delete it"):
            next(make(tmp_path, backbone, guidance=other))
    (tmp_path / "trajectories.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        next(make(tmp_path, backbone))
    (tmp_path / "trajectories.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match="those of teacher None"):
        next(make(tmp_path, backbone))


def test_shards_say_themselves_whose_they_are(tmp_path: Path) -> None:
    """A shard says by itself whose it is.

    It does so without a record, and in another folder. Every other teacher is refused, and its own teacher reads it.
    """
    backbone = tiny.denoiser()
    _, walked = finish(make(tmp_path / "a", backbone))
    record = tmp_path / "a" / "trajectories.json"
    record.unlink()
    with pytest.raises(
        ValueError, match=r"\.safetensors are those of teacher teacher, this is other; choose another folder"
    ):
        next(make(tmp_path / "a", backbone, identity="other"))
    assert not record.exists()  # a record would speak for them the next time
    finish(make(tmp_path / "b", backbone, guidance=Guidance()))
    shutil.copy(tmp_path / "b" / "trajectories-00001.safetensors", tmp_path / "a")
    with pytest.raises(ValueError, match=r"trajectories-00001\.safetensors were made with another guidance"):
        next(make(tmp_path / "a", backbone))
    shutil.copy(tmp_path / "a" / "trajectories-00000.safetensors", tmp_path / "b")
    with pytest.raises(ValueError, match=r"trajectories-00000\.safetensors were made with another guidance"):
        next(make(tmp_path / "b", backbone, guidance=Guidance()))
    (tmp_path / "a" / "trajectories-00001.safetensors").unlink()
    _, again = finish(make(tmp_path / "a", backbone))
    assert torch.equal(again.states, walked.states)
    assert record.exists()


def test_weights_read_in_another_way_are_another_teacher(tmp_path: Path) -> None:
    """`FILE@v` and `FILE@eps` have the same weights; so have two schedules."""
    finish(make(tmp_path, tiny.denoiser(prediction="v")))
    with pytest.raises(ValueError, match="were made with another prediction; choose another folder, or delete it"):
        next(make(tmp_path, tiny.denoiser(prediction="eps")))
    with pytest.raises(ValueError, match="were made with another schedule"):
        next(make(tmp_path, tiny.denoiser(schedule=VP(tiny.TABLE.alpha_bar**1.1))))


def test_a_folder_of_before_is_read_as_long_as_its_record_speaks_for_it(tmp_path: Path) -> None:
    """Its shards have no headers and its record says nothing of the process; it grows, and is called as ever."""
    backbone, record = tiny.denoiser(), tmp_path / "trajectories.json"
    _, few = finish(make(tmp_path, backbone, replace(CONFIG, count=6)))
    new = json.loads(record.read_text())
    old = {k: v for k, v in new.items() if k not in ("prediction", "schedule")}
    record.write_text(json.dumps(old))
    for shard in tmp_path.glob("*.safetensors"):
        save_file(load_file(shard), shard)
    _, more = finish(make(tmp_path, backbone))
    assert torch.equal(more.states[:6], few.states)
    assert more.key == hashlib.sha256(json.dumps(old | {"count": 7}, sort_keys=True).encode()).hexdigest()[:24]
    assert json.loads(record.read_text()) == old
    for name, there in (("none", None), ("of today", json.dumps(new))):
        record.unlink() if there is None else record.write_text(there)
        with pytest.raises(
            ValueError,
            match=r"safetensors does not say whose trajectories it holds, and no trajectories\.json speaks for it",
        ):
            next(make(tmp_path, backbone))
        assert record.exists() == (there is not None), name


def test_a_batch_keeps_trajectories_with_their_conditions() -> None:
    backbone = tiny.stable_diffusion()
    _, paths = finish(make(None, backbone))
    walk = paths.draw(5, torch.Generator().manual_seed(0), torch.device("cpu"))
    for states, text in zip(walk.states, walk.cond["text"], strict=True):
        (i,) = [i for i in range(7) if torch.equal(paths.states[i], states)]
        assert torch.equal(paths.embeddings.cond["text"][i], text)


@pytest.mark.parametrize("schedule", [EDM(t_max=5.0), Flow()])
def test_heun_where_pure_noise_holds_signal(schedule: Schedule) -> None:
    """Two network calls a step but for the last; elsewhere DPM-Solver++ with one."""
    backbone, calls = tiny.denoiser(schedule=schedule, prediction="x0"), []
    backbone.module.register_forward_pre_hook(lambda *_: calls.append(1))
    _, paths = finish(make(None, backbone, TrajectoryConfig(count=2, steps=9), guidance=Guidance()))
    steps = len(paths.grid) - 1
    assert len(calls) == (2 * steps - 1 if isinstance(schedule, EDM) else steps)


def test_heun_where_pure_noise_holds_none() -> None:
    """Chosen by its name it walks there too, where `auto` takes DPM-Solver++, and near where that does."""
    backbone = tiny.flow_denoiser()
    ways = {
        s: finish(make(None, backbone, TrajectoryConfig(count=2, steps=60, solver=s)))[1]
        for s in ("heun", "auto", "ddim")
    }
    ends = {s: way.states[:, -1] for s, way in ways.items()}
    assert bool(ends["heun"].isfinite().all())
    assert (ends["heun"] - ends["auto"]).norm() < 0.5 * (ends["ddim"] - ends["auto"]).norm()


def test_what_is_not_finite_is_not_kept(tmp_path: Path) -> None:
    """Refused when it is walked; walked again where it has been kept."""
    backbone = tiny.denoiser()
    _, paths = finish(make(tmp_path, backbone))
    shard = tmp_path / "trajectories-00001.safetensors"
    tensors = load_file(shard)
    tensors["states"][1] = torch.nan
    with safe_open(shard, "pt") as file:
        about = file.metadata()
    save_file(tensors, shard, about)
    _, again = finish(make(tmp_path, backbone))
    assert torch.equal(again.states, paths.states)
    with torch.no_grad():
        next(backbone.module.parameters()).fill_(torch.inf)
    with pytest.raises(
        ValueError,
        match=r"^data\.solver: ddim led the teacher's trajectories 0 to 2 to numbers that are not finite; choose dpmpp",
    ):
        next(make(tmp_path / "other", backbone))
    assert not list((tmp_path / "other").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("settings", "expected"), [({"count": 0}, "count: got 0"), ({"solver": "euler"}, "solver: got 'euler'")]
)
def test_settings_that_cannot_be(settings: dict, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        TrajectoryConfig(**settings)
