"""What the studio knows without a page: states of runs, commands, the queue, settings, images, escaping."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fewstep.report.grids import write_grid
from fewstep.report.images import png
from fewstep.runs.recipe import DistillRecipe, read_recipe
from fewstep.studio import words
from fewstep.studio.commands import Output, resumed, run_apart, stop, stream, without_out
from fewstep.studio.folders import (
    Facts,
    error_of,
    facts_of,
    find_runs,
    find_students,
    left_of,
    stamp,
    state_of,
    summary,
)
from fewstep.studio.images import Settings, previews, settings_in, strips, student_rows, wipe, with_settings
from fewstep.studio.images import grid_of as preview_of
from fewstep.studio.queue import Job, Line, added, read_jobs, removed
from fewstep.studio.settings import (
    MAIN,
    Order,
    Wish,
    changes,
    fitting,
    main_settings,
    order_of,
    prompts_file,
    recipes,
    settings_of,
    verdict,
)
from fewstep.training.lock import Holder, holder_in, holder_of, lives

BAD = "<img src=x onerror=alert(1)> **bold** `code`"
HOLDER = Holder(1, "elsewhere", "", "2026-11-30T00:00:00Z")
TRAINED = Facts(asked=100, done=40, seconds=80.0, pace=2.0, held=HOLDER, alive=True)


@pytest.mark.parametrize(
    ("facts", "word"),
    [
        (Facts(held=HOLDER, alive=True), "preparing"),
        (TRAINED, "training"),
        (replace(TRAINED, done=100), "finishing"),
        (replace(TRAINED, done=100, warm=True), "training"),
        (replace(TRAINED, alive=False), "died"),
        (replace(TRAINED, alive=False, held=None), "stopped"),
        (replace(TRAINED, alive=False, held=None, error="error: no room"), "failed"),
        (replace(TRAINED, alive=False, held=None, done=100, student=True, reported=True), "finished"),
        (replace(TRAINED, alive=False, held=None, done=100, student=True), "stopped"),
        (replace(TRAINED, alive=False, held=None, student=True, reported=True), "stopped"),
        (replace(TRAINED, alive=False, held=None, student=True, reported=True, early=True), "finished"),
        (Facts(), "stopped"),
    ],
)
def test_every_state_has_its_word(facts: Facts, word: str) -> None:
    assert state_of(facts).word == word
    assert state_of(facts).said.endswith((".", "room"))


def test_a_run_is_told_in_two_lines() -> None:
    assert summary("mine\x1b", TRAINED) == ("mine\\x1b\ntraining · 40 % of 100 · 2 min left · 1 min 20 s of training")
    assert left_of(replace(TRAINED, alive=False)) is None


def record(run: Path, iterations: int = 10, **more: object) -> None:
    run.mkdir(parents=True, exist_ok=True)
    recipe = {"kind": "distill", "train": {"iterations": iterations}, "preview": {"patience": None}, **more}
    (run / "run.json").write_text(json.dumps({"recipe": recipe, "command": "fewstep distill demo"}))


def log(run: Path, *lines: Mapping[str, object]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield child
    child.kill()
    child.wait()


def test_facts_come_from_the_folder_while_it_trains_and_after(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    run = tmp_path / "group" / "one"
    record(run)
    log(run, *({"iteration": i, "seconds": 2.0 * i, "student_loss": 1.0} for i in range(1, 5)))
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 5, "sec')  # is being written
    before = stamp(run)
    holder, end = holder_of(sleeper.pid), time.monotonic() + 60
    (run / "run.lock").write_text(json.dumps(asdict(holder)))
    facts = facts_of(run)
    assert (facts.asked, facts.done, facts.seconds, facts.pace, facts.alive) == (10, 4, 8.0, 2.0, True)
    assert stamp(run) != before
    assert find_runs(tmp_path) == [run]
    sleeper.send_signal(signal.SIGKILL)
    while lives(holder):  # until it is a zombie
        assert time.monotonic() < end
        time.sleep(0.01)
    assert state_of(facts_of(run)).word == "died"
    (run / "run.lock").unlink()
    assert state_of(facts_of(run)).word == "stopped"


def test_times_that_are_no_numbers_are_passed_over(tmp_path: Path) -> None:
    record(tmp_path)
    log(tmp_path, {"iteration": 1, "seconds": 2.0}, {"iteration": 2, "seconds": float("nan")}, {"iteration": 3})
    facts = facts_of(tmp_path)
    assert (facts.done, facts.seconds, facts.pace) == (3, 2.0, 0.0)
    assert "30 % of 10 · 2 s of training" in summary("mine", facts)


def test_an_ended_child_that_nobody_waited_for_holds_nothing(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    own = holder_of(child.pid)
    (tmp_path / "run.lock").write_text(json.dumps(asdict(own)))
    assert own.began
    end = time.monotonic() + 30
    while holder_in(tmp_path)[1]:
        assert time.monotonic() < end
        time.sleep(0.02)
    assert holder_in(tmp_path)[0] == own
    child.wait()


def test_a_holder_on_another_machine_is_judged_by_its_silence(tmp_path: Path) -> None:
    assert holder_in(tmp_path) == (None, False)
    lock = tmp_path / "run.lock"
    lock.write_text(json.dumps(asdict(HOLDER)))
    assert holder_in(tmp_path) == (HOLDER, True)
    os.utime(lock, (time.time() - 700, time.time() - 700))
    assert holder_in(tmp_path) == (HOLDER, False)
    lock.write_text("")
    assert holder_in(tmp_path) == (None, True)


def test_the_warm_start_is_the_run_while_it_trains(tmp_path: Path) -> None:
    run = tmp_path / "two"
    record(run / "warm_start", 6)
    log(run / "warm_start", {"iteration": 3, "seconds": 1.0})
    facts = facts_of(run)
    assert (facts.warm, facts.asked, facts.done) == (True, 6, 3)
    assert find_runs(tmp_path) == [run]
    assert "Warm start" not in state_of(facts).said
    assert "warm start" in state_of(facts).said


def test_what_is_no_distillation_is_no_run(tmp_path: Path) -> None:
    record(tmp_path / "teacher", kind="finetune")
    (tmp_path / "plain").mkdir()
    record(tmp_path / "damaged")
    (tmp_path / "damaged" / "run.json").write_text("{")
    assert find_runs(tmp_path) == [tmp_path / "damaged"]
    assert state_of(facts_of(tmp_path / "damaged")).word == "stopped"
    assert find_runs(tmp_path / "nowhere") == []
    assert find_students(tmp_path) == []


def test_an_error_counts_until_the_run_goes_on(tmp_path: Path) -> None:
    record(tmp_path)
    past = time.time() - 100
    os.utime(tmp_path / "run.json", (past, past))
    (tmp_path / "studio.log").write_text("$ fewstep distill demo\nerror: train.lr: got 0\n")
    assert error_of(tmp_path) == "error: train.lr: got 0"
    assert state_of(facts_of(tmp_path)).word == "failed"
    log(tmp_path, {"iteration": 1, "seconds": 1.0})
    os.utime(tmp_path / "metrics.jsonl", (time.time() + 100,) * 2)
    assert error_of(tmp_path) == ""
    (tmp_path / "error.log").write_text("Traceback\nRuntimeError: oh\n")
    os.utime(tmp_path / "error.log", (time.time() + 200,) * 2)
    assert "RuntimeError: oh" in error_of(tmp_path)


@pytest.mark.parametrize(
    "made",
    [
        words.note(BAD),
        words.lines(BAD),
        words.facts([(BAD, BAD)]),
        words.table([BAD], [[BAD, BAD]]),
        words.bar(0.5, BAD),
        words.frame(BAD, BAD),
        words.image("data:,", BAD, True),
        words.strip(BAD, []),
    ],
)
def test_texts_show_as_texts(made: str) -> None:
    assert "<img src=x" not in made
    assert "&lt;img src=x onerror=alert(1)&gt;" in made
    assert "**bold** `code`" in made


def test_a_quote_does_not_leave_its_attribute() -> None:
    assert words.image("data:,", '" onload="x', False).count('"') == words.image("data:,", "plain", False).count('"')


def settings(**more: object) -> Settings:
    plain: dict[str, object] = {
        "student": "runs/a/final", "prompt": BAD + " 猫", "seed": 7, "count": 2, "steps": 4, "solver": "",
        "guidance": None, "version": "0.1.0",
    }  # fmt: skip
    return Settings(**(plain | more))  # type: ignore[arg-type]


def test_settings_travel_in_the_picture(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8), (1, 2, 3))
    for told in (settings(), settings(guidance=2.5, solver="dpmpp")):
        (tmp_path / "a.png").write_bytes(with_settings(image, told))
        assert settings_in(tmp_path / "a.png") == told
    assert not image.info, "the image itself stays as it was"


@pytest.mark.parametrize("told", [None, "{", "{}", '{"student": 1}', json.dumps(asdict(settings()) | {"seed": "7"})])
def test_a_picture_without_settings_says_so(told: str | None, tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    if told is not None:
        image.info["fewstep.sample"] = told
        (tmp_path / "a.png").write_bytes(png(image))
    else:
        image.save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="is no such image"):
        settings_in(tmp_path / "a.png")
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(ValueError, match="is no such image"):
        settings_in(tmp_path / "a.png")


def test_a_preview_is_taken_apart(tmp_path: Path) -> None:
    images = torch.rand(3, 2, 3, 8, 8)
    labels = ["teacher, 50 steps", "student, 2 steps", "estimate of the fake score"]
    for n in (100, 20):
        write_grid(tmp_path / "samples" / f"step_{n:06d}.png", images, labels, [BAD, "sea"])
    (tmp_path / "samples" / "step_x.png").write_text("")
    assert [n for n, _ in previews(tmp_path)] == [20, 100]
    grid = preview_of(previews(tmp_path)[0][1])
    assert grid is not None
    assert student_rows(grid) == labels[1:]
    pair = wipe(grid, 1, labels[1])
    assert pair is not None
    assert [p.size for p in pair] == [(384, 384)] * 2
    assert pair[0].getpixel((0, 0)) == tuple((images[0, 1, :, 0, 0] * 255).round().int().tolist())
    assert pair[1].getpixel((0, 0)) == tuple((images[1, 1, :, 0, 0] * 255).round().int().tolist())
    assert "<img src=x" not in strips(grid)
    assert preview_of(tmp_path / "samples" / "step_x.png") is None


def test_a_command_goes_on_in_its_own_folder() -> None:
    run = Path("/runs/a b")
    plain = resumed("fewstep distill demo --set 'method.steps=[4, 2]' --out elsewhere --log-to wandb", run)
    assert plain[1:3] == ["-m", "fewstep.cli.main"]
    assert plain[3:] == ["distill", "demo", "--set", "method.steps=[4, 2]", "--log-to", "wandb", "--out", "/runs/a b"]
    several = resumed("torchrun --nproc_per_node 2 -m fewstep.cli.main distill demo --out=x", run)
    assert several[1:5] == ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    assert several[5:] == ["-m", "fewstep.cli.main", "distill", "demo", "--out", "/runs/a b"]
    for odd in ("", "python train.py", "fewstep sample x", "fewstep distill 'x", "torchrun x.py distill"):
        with pytest.raises(ValueError, match=r"command in run\.json"):
            resumed(odd, run)
    assert without_out(["distill", "--out", "--out", "x"]) == ["distill", "x"]


def test_a_failed_command_has_its_line() -> None:
    assert Output("$ x\nerror: a: b\n", 2).error == "error: a: b"
    assert Output("$ x\nTraceback\nboom\n", 1).error == "boom"
    assert Output("", 1).error == "it failed"
    assert Output("error: before\n", 0).error == Output("error: x", None).error == ""


def test_a_mistake_of_the_user_comes_back_as_a_line() -> None:
    *_, last = stream(["distill", "nowhere", "--out", "x"])
    assert last.code == 2
    assert last.error.startswith("error: recipe: no shipped recipe is called nowhere")
    assert last.said.startswith("$ fewstep distill nowhere --out x\n")


def test_nothing_is_stopped_where_nothing_trains(tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    record(tmp_path)
    with pytest.raises(ValueError, match="nothing to stop"):
        stop(tmp_path)
    (tmp_path / "run.lock").write_text(json.dumps(asdict(HOLDER)))
    with pytest.raises(ValueError, match="it trains on elsewhere"):
        stop(tmp_path)
    (tmp_path / "run.lock").write_text(json.dumps(asdict(holder_of(sleeper.pid))))
    assert "checkpoint" in stop(tmp_path)
    assert sleeper.wait(timeout=10) == -signal.SIGTERM


def waits(seconds: float, run: Path) -> Job:
    return Job(str(run), (sys.executable, "-c", f"print('hello')\nimport time; time.sleep({seconds})", "distill"))


def until(holds: object, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not holds():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.05)


def test_one_run_trains_at_a_time(tmp_path: Path) -> None:
    line, first, second, third = Line(tmp_path), tmp_path / "a", tmp_path / "b", tmp_path / "c"
    assert line.put(waits(30, first)) is None
    assert line.busy() == first
    assert facts_of(first).alive
    assert line.put(waits(0, second)) == first
    assert line.put(waits(0, third)) == first
    line.step()
    assert [Path(job.run) for job in line.jobs()] == [second, third]
    line.take_out(str(third))
    stop(first)
    until(lambda: line.busy() is None)
    line.step()
    until(lambda: (second / "studio.log").is_file() and "hello" in (second / "studio.log").read_text())
    assert line.jobs() == []
    assert not third.exists()


def test_a_run_apart_tells_who_it_is_and_what_it_says(tmp_path: Path) -> None:
    run_apart(waits(0, tmp_path).argv, tmp_path)
    until(lambda: not facts_of(tmp_path).alive)
    assert (tmp_path / "studio.log").read_text() == "$ distill\nhello\n"
    assert find_runs(tmp_path) == [tmp_path]


def test_the_queue_keeps_its_order_and_survives_damage(tmp_path: Path) -> None:
    a, b = Job("a", ("x",)), Job("b", ("y",))
    assert added(added([], a), b) == [a, b]
    assert added([a, b], replace(a, argv=("z",))) == [b, Job("a", ("z",))]
    assert removed([a, b], "a") == [b]
    for text in ("", "{", "[1]", "{}"):
        (tmp_path / "studio-queue.json").write_text(text)
        assert read_jobs(tmp_path) == []


def test_every_setting_of_a_recipe_is_listed_with_its_text() -> None:
    found = {s.key: s for s in settings_of(read_recipe("demo", [], DistillRecipe))}
    assert found["train.iterations"].value == "260"
    assert found["method.steps"].value == "[4, 2, 1]"
    assert found["train.iterations"].text
    assert found["train.iterations"].allowed.startswith("whole numbers")
    assert {"method.guidance.scale", "roles.rank", "preview.every", "prompts.held_out", "evaluate"} <= set(found)
    assert not {"teacher", "name", "kind"} & set(found)
    lacking = [key for key, s in found.items() if not s.text]
    assert not [k for k in lacking if k in MAIN]
    changed = [f"{s.key}={s.value}" for s in found.values() if s.value != "null"]
    assert read_recipe("demo", changed, DistillRecipe) == read_recipe("demo", [], DistillRecipe)


def test_what_differs_from_the_recipe_is_set() -> None:
    base = {"train.lr": "0.0001", "train.batch": "16", "roles.rank": "32"}
    asked = {"train.lr": "0.0001", "train.batch": " 8 ", "roles.rank": "", "train.other": "1"}
    assert changes(base, asked, "\ntrain.ema=0.9\n") == ["train.batch=8", "train.ema=0.9"]
    assert changes(base, asked, "train.batch=4") == ["train.batch=4"]
    for odd in ("train.lr", "=4"):
        with pytest.raises(ValueError, match="allowed are lines such as"):
            changes(base, asked, odd)


def test_an_order_becomes_a_command_that_a_terminal_takes(tmp_path: Path) -> None:
    asked = main_settings("demo") | {"train.iterations": "90", "train.decay": "0"}
    order = order_of(tmp_path, Wish("demo", "emoji", "mine", lines="train.ema=0.9", main=asked), "p.txt")
    sets = ["--set", "train.iterations=90", "--set", "train.decay=0", "--set", "train.ema=0.9", "--teacher", "emoji"]
    assert order.distill() == ["distill", "demo", *sets, "--prompts", "p.txt", "--out", str(tmp_path / "mine")]
    assert order.distill(dry=True) == [*order.distill(), "--dry-run"]
    assert order.plan("24GiB") == ["plan", "demo", *sets, "--memory", "24GiB"]
    assert Order("demo", tmp_path).plan("") == ["plan", "demo"]
    with pytest.raises(ValueError, match=r"name: got '\.\./x'"):
        order_of(tmp_path, Wish("demo", name="../x"), "")
    with pytest.raises(ValueError, match=r"train\.bacth"):
        order_of(tmp_path, Wish("demo", name="x", lines="train.bacth=1"), "")
    assert "demo" in recipes()
    assert "emoji-teacher" not in recipes()


def test_the_pages_fields_become_a_wish(tmp_path: Path) -> None:
    fields = ["demo", None, " mine ", "a\nb\n", None, str(tmp_path / "own.csv"), "", *["1"] * (len(MAIN) - 1), None]
    wish = Wish.of(fields)
    assert (wish.recipe, wish.teacher, wish.name, wish.own_teacher) == ("demo", "", "mine", "emoji")
    assert list(wish.main) == list(MAIN)
    assert wish.main[MAIN[-1]] == ""
    (tmp_path / "own.csv").write_text("prompt\nx\n")
    kept = tmp_path / "runs" / "mine"
    assert Path(prompts_file(wish, kept)).read_text() == "a\nb\n"
    assert Path(prompts_file(replace(wish, pasted=""), kept)) == (tmp_path / "runs" / "mine-prompts.csv").resolve()
    assert prompts_file(replace(wish, pasted="", dropped="", source="owner/name"), kept) == "owner/name"
    assert prompts_file(replace(wish, pasted="", dropped=""), kept) == ""
    with pytest.raises(ValueError, match="recipe: got none"):
        Wish.of([None, *fields[1:]])


def test_a_plan_is_told_in_plain_words() -> None:
    fits = "24GiB: 22 GiB are usable\ndemo: 1.00 GiB, as it is\n"
    cures = f"{fits}  fewstep distill demo --set 'method.steps=[4]' --set train.batch=4 --set train.accumulate=4\n"
    assert verdict(fits, 0, "24GiB") == "It fits 24GiB as it is."
    assert "with the settings" in verdict(cures, 0, "24GiB")
    assert fitting(cures) == ["method.steps=[4]", "train.batch=4", "train.accumulate=4"]
    assert fitting(fits) == []
    assert verdict("$ x\nerror: --memory: demo needs more\n", 2, "1GiB") == "--memory: demo needs more"
    assert "Name the memory" in verdict(fits, 0, "")
