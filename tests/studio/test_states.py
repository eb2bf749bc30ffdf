"""The studio's page where things are odd: other processes, ended ones, a queue, mistakes, HTML, a password."""

import html
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from fewstep.cli.studio import line_of
from fewstep.studio.settings import main_settings
from fewstep.training.lock import holder_of
from tests.browser import DESK, Browser, browsing
from tests.studio.walker import CLASS, Walker, recipe

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio: pip install 'fewstep[studio]'"),
]
HTML = "<img src=x onerror=alert(2)>"  # a folder's name
DRIFT = f"drift: {HTML} is 0.2 brighter than the teacher's"


@dataclass(frozen=True)
class Scene:
    """A studio's folder with a run that another process trains, and a person at its page."""

    walker: Walker
    folder: Path
    recipe: Path
    trainer: subprocess.Popen[bytes]
    patch: pytest.MonkeyPatch

    @property
    def live(self) -> Path:
        return self.folder / "live"


def a_run(run: Path, source: Path, **more: Any) -> None:
    """A run's folder as `fewstep distill` leaves it."""
    run.mkdir(parents=True)
    made = {"kind": "distill", "teacher": "pixels", "train": {"iterations": 10}, "method": {"name": "tdm"}}
    given = {"recipe": made, "recipe_source": str(source), "overrides": ["train.ema=0.9"], **more}
    (run / "run.json").write_text(json.dumps({"command": f"fewstep distill {source}", **given}))


def trained(run: Path, iteration: int, **more: Any) -> None:
    """A line in a run's log."""
    loss = {"seconds": 2.0 * iteration, "student_loss": 1.0 / iteration, "fake_loss": 0.5, **more}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": iteration, **loss}) + "\n")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browsing(tmp_path_factory.mktemp("browser")) as found:
        found.show(*DESK)
        yield found


@pytest.fixture(scope="module")
def scene(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    from fewstep.studio.app import serve

    place = tmp_path_factory.mktemp("states")
    folder, source = place / "runs", recipe(place, 4)
    trainer = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(900)"])
    a_run(folder / HTML, source)
    a_run(folder / "live", source)
    (folder / "live" / "run.lock").write_text(json.dumps(asdict(holder_of(trainer.pid))))
    for iteration in (1, 2, 3):
        trained(folder / "live", iteration)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        page, address = serve(folder, "127.0.0.1", None, None, False, line_of)
        try:
            browser.visit(address)
            yield Scene(Walker(browser), folder, source, trainer, patch)
        finally:
            page.close()
            trainer.kill()
            trainer.wait()


@dataclass(frozen=True)
class Buttons:
    """What the page's buttons run, by name; nothing is started."""

    folder: Path
    runs: Mapping[str, Callable[..., Any]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Buttons:
    from fewstep.studio.app import page
    from fewstep.studio.place import Place
    from fewstep.studio.queue import Line

    folder = tmp_path_factory.mktemp("buttons") / "runs"
    (folder / "old").mkdir(parents=True)
    made = page(Place(folder, Line(folder), line_of))
    return Buttons(folder, {own.fn.__name__: own.fn for own in made.fns.values() if own.fn is not None})


@pytest.fixture
def buttons(built: Buttons, monkeypatch: pytest.MonkeyPatch) -> Buttons:
    def never(argv: Sequence[str], run: Path) -> None:
        raise AssertionError(f"{run} was started")

    monkeypatch.setattr("fewstep.studio.queue.run_apart", never)
    monkeypatch.chdir(built.folder.parent)
    return built


def said_by(handler: Callable[..., Any], *fields: Any) -> str:
    """All that a handler puts on the page at last, as text."""
    made = handler(*fields)
    last = list(made)[-1] if isinstance(made, Iterator) else made
    return html.unescape(str(last if isinstance(last, str) else last[0]))


def wished(**changed: str | None) -> list[str | None]:
    """The fields of a new training, some of them changed; `lr` is the third of the main settings."""
    plain = {"recipe": "demo", "teacher": "", "name": "odd", "pasted": "", "source": "", "dropped": None, "lines": ""}
    boxes = list(main_settings("demo").values())
    return [*(plain | {k: v for k, v in changed.items() if k in plain}).values(), *boxes[:2],
            changed.get("lr", boxes[2]), *boxes[3:]]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"name": ""}, "nothing but dots and spaces"),
        ({"name": "../x"}, "choose another"),
        ({"name": "con"}, "is a device on Windows"),
        ({"name": "x" * 300}, "more than 100"),
        ({"name": HTML}, "choose another"),
        ({"name": "old"}, "old is there already"),
        ({"recipe": None}, "recipe: got none"),
        ({"recipe": "nowhere"}, "no shipped recipe is called nowhere"),
        ({"recipe": "/etc/passwd"}, "recipe"),
        ({"recipe": "/proc"}, "recipe"),
        ({"lr": "-1"}, "train.lr"),
        ({"lr": "nan"}, "train.lr"),
        ({"lr": HTML}, "train.lr"),
        ({"lines": "train.lr"}, "more settings"),
        ({"lines": "=3"}, "more settings"),
        ({"lines": "train.nope=1"}, "train.nope"),
        ({"lines": "train.lr=[1"}, "train.lr"),
        ({"lines": "name=../x"}, "name"),
        ({"dropped": "/proc/gone"}, "gone"),
    ],
)
def test_an_odd_wish_is_refused_in_one_line(changed: dict[str, str | None], word: str, buttons: Buttons) -> None:
    said = said_by(buttons.runs["begin"], *wished(**changed))
    assert word in said
    assert "fault of fewstep" not in said
    assert [p.name for p in buttons.folder.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("handler", "fields", "word"),
    [
        ("tell_teacher", wished(teacher="/etc"), "/etc"),
        ("tell_teacher", wished(teacher=HTML), HTML),
        ("tell_prompts", wished(pasted=" \n\t"), "No prompts are given"),
        ("tell_prompts", wished(source="/etc"), "/etc"),
        ("draw", ["", "cat", 0, 1, 4, "", None, True], "student: got none"),
        ("draw", ["nowhere", "cat", None, 1, 4, "", None, True], "allowed are whole numbers"),
        ("draw", ["nowhere", "cat", 0, 1, 4, "", None, True], "nowhere"),
        ("draw_steps", ["/etc", "cat", 0, 1, 4, "", None, True], "/etc"),
        ("put_side_by_side", [[], "6", True, ""], "choose one or more"),
        ("make_blind", [[], "6", True, "../x"], "choose one or more"),
        ("tell", [None, ""], "Choose a blind vote first"),
        ("tell", ["/etc", "{"], "the answers"),
        ("tell", ["/etc", '{"rater": 1, "answers": []}'], "no vote yet"),
        ("open_study", ["/etc"], "study.html"),
        ("write", ["", "x", "student", "", None, "float32"], "student: got none"),
        ("write", ["/etc", " ", "student", "", None, "float32"], "folder: got none"),
        ("end", ["/etc"], "nothing to stop"),
        ("resume", ["/etc"], "run.json"),
        ("write_report", ["/etc"], "/etc"),
    ],
)
def test_an_odd_press_is_answered_in_one_line(handler: str, fields: list[Any], word: str, buttons: Buttons) -> None:
    said = said_by(buttons.runs[handler], *fields)
    assert word in said
    assert "fault of fewstep" not in said


@pytest.mark.parametrize("content", [b"", b"no image", bytes(range(256))])
def test_a_file_that_is_no_image_of_the_studio_says_so(content: bytes, buttons: Buttons, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(content)
    assert "is no such image" in said_by(buttons.runs["take"], str(tmp_path / "a.png"))


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "studio.log", "studio.json", "run.lock", "error.log",
                                  "report.html", "samples/step_000001.png"])  # fmt: skip
@pytest.mark.parametrize("content", [b"", b"{", b"[]", bytes(range(256)), b'{"iteration": 1, "seconds": NaN}\n'])
def test_a_damaged_run_is_shown_for_all_that(name: str, content: bytes, buttons: Buttons, tmp_path: Path) -> None:
    from fewstep.studio.runs import NOTHING

    run = buttons.folder / "damaged"
    a_run(run, tmp_path / "r.yaml")
    try:
        trained(run, 1)
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(content)
        buttons.runs["look"](str(run), [])
        buttons.runs["look_slowly"](str(run), NOTHING, 1, None, None)
        buttons.runs["turn"](str(run), 1, None, None)
    finally:
        shutil.rmtree(run)


def test_a_run_of_another_process_is_live(scene: Scene) -> None:
    scene.walker.choose("live")
    scene.walker.reads("#about", "Iteration 3 of 10.")
    scene.walker.tab("Log")
    scene.walker.reads("#log", "in the terminal that did")
    trained(scene.live, 4, warnings=[DRIFT])
    scene.walker.reads("#about", "Iteration 4 of 10.")
    scene.walker.reads("#runs", "40 % of 10")
    scene.walker.tab("Warnings")
    scene.walker.reads("#warnings", DRIFT)
    scene.walker.tab("Images")


def test_names_with_html_show_as_text(scene: Scene) -> None:
    scene.walker.reads("#runs", HTML)
    scene.walker.choose(HTML)
    scene.walker.reads("#about h2", HTML)
    scene.walker.reads("#about", "Stopped")
    assert scene.walker.browser.run("return document.querySelectorAll('img[src=x]').length") == 0


def test_the_page_stays_live_while_a_network_runs(scene: Scene) -> None:
    """A sample that takes long: runs are seen meanwhile; and its fault is told where the log is."""
    asked, goes_on = threading.Event(), threading.Event()

    def samples(*fields: object) -> None:
        asked.set()
        goes_on.wait(120)
        raise KeyError(HTML)

    scene.patch.setattr("fewstep.studio.sample.settings_for", samples)
    scene.walker.tab("Sample")
    scene.walker.reads("#about-student", "No student yet")
    scene.walker.press("#go")
    scene.walker.browser.until(asked.is_set)
    scene.walker.tab("Runs")
    scene.walker.choose("live")
    trained(scene.live, 5)
    scene.walker.reads("#about", "Iteration 5 of 10.")
    goes_on.set()
    scene.walker.tab("Sample")
    scene.walker.reads("#sample-said", "fewstep-error.log")
    assert HTML in scene.walker.text("#sample-said")
    assert "KeyError" in Path("fewstep-error.log").read_text()


def test_a_fault_that_nobody_foresaw_is_one_line(scene: Scene) -> None:
    def breaks(run: Path) -> Path:
        raise LookupError(HTML)

    scene.patch.setattr("fewstep.studio.runs.render_run", breaks)
    scene.walker.tab("Runs")
    scene.walker.press("#report")
    scene.walker.reads(".toast-body", "fewstep-error.log")
    assert HTML in scene.walker.text(".toast-body")
    assert "LookupError" in Path("fewstep-error.log").read_text()
    assert scene.walker.browser.run("return document.querySelectorAll('img[src=x]').length") == 0
    scene.walker.browser.run("document.querySelector('.toast-close').click()")


def test_a_run_is_duplicated_with_changes(scene: Scene) -> None:
    scene.walker.press("#duplicate")
    scene.walker.holds("#name", "live-2")
    scene.walker.holds("#recipe", str(scene.recipe))
    scene.walker.holds("#more", "train.ema=0.9")
    scene.walker.holds("#set-train-iterations", "4")


def test_teacher_and_prompts_are_told(scene: Scene) -> None:
    scene.walker.press("#what-teacher")
    scene.walker.reads("#about-teacher", "UNet2DModel")
    scene.walker.open("Prompts")
    scene.walker.fill("#pasted", "sea lion, sea lion", "Tab")
    scene.walker.press("#look-prompts")
    scene.walker.reads("#about-prompts", "first: sea lion, sea lion")


def test_what_it_takes_is_counted_and_rehearsed(scene: Scene) -> None:
    scene.walker.open("Memory")
    scene.walker.fill("#memory", "lots", "Tab")
    scene.walker.press("#plan")
    scene.walker.reads("#fits", "lots")
    scene.walker.fill("#memory", "24GiB", "Tab")
    scene.walker.press("#plan")
    scene.walker.reads("#fits", "It fits 24GiB as it is.")
    scene.walker.fill("#pasted", CLASS, "Tab")
    scene.walker.press("#dry")
    scene.walker.reads("#said", "Everything holds")
    assert not (scene.folder / "live-2").exists()


def test_the_queue_of_one_card(scene: Scene) -> None:
    scene.walker.press("#start")
    scene.walker.reads("#about", "It waits in the queue")
    scene.walker.reads("#runs", "waiting · number 1")
    scene.walker.open("Queue")
    scene.walker.press("#take-out")
    scene.walker.gone("#runs", "waiting")
    assert not (scene.folder / "live-2" / "studio.log").exists()
    scene.walker.tab("New")
    scene.walker.fill("#name", "next", "Tab")
    scene.walker.press("#start")
    scene.walker.reads("#about", "It waits in the queue")


def test_a_run_that_died_says_so_and_the_next_begins(scene: Scene) -> None:
    scene.walker.choose("live")
    scene.walker.reads("#about", "Iteration 5 of 10.")
    scene.trainer.kill()
    scene.walker.reads("#about", "has ended without a word at iteration 5 of 10")
    scene.walker.reads("#runs", "died")
    scene.walker.choose("next")
    scene.walker.reads("#about", "finished")


def test_students_and_their_teacher_are_compared(scene: Scene) -> None:
    """One small student beside its teacher: which is where, the line between them, and each image."""
    scene.walker.tab("Compare and vote")
    scene.walker.press("#compare-go")
    scene.walker.reads("#compare-said", "choose one or more")
    scene.walker.pick("#students", "next, 2")
    scene.walker.pick("#students", "next, 1")
    scene.walker.browser.press("Escape")
    scene.walker.fill("#compare-prompts", CLASS, "Tab")
    scene.walker.press("#compare-go")
    scene.walker.has("#compared iframe")
    inside = "const d = document.querySelector('#compared iframe').contentDocument;"
    names = f"{inside} return [...(d?.querySelectorAll('#left option') ?? [])].map(e => e.textContent)"
    scene.walker.browser.until(lambda: len(scene.walker.browser.run(names)) == 3)
    found = scene.walker.browser.run(names)
    assert sum("teacher" in name for name in found) == 1, found
    assert scene.walker.browser.run(f"{inside} return d.querySelector('#prompt').textContent").endswith(CLASS)
    wiped = f"{inside} return d.querySelector('.stage').getAttribute('style')"
    before = scene.walker.browser.run(wiped)
    moved = "line.value = 10; line.dispatchEvent(new Event('input'))"
    scene.walker.browser.run(f"{inside} const line = d.querySelector('.stage input'); {moved}")
    assert scene.walker.browser.run(wiped) != before
    assert scene.walker.browser.run(f"{inside} return d.querySelectorAll('img[src=x]').length") == 0


def test_beyond_this_machine_a_password_is_asked_for(browser: Browser, tmp_path: Path) -> None:
    from fewstep.studio.app import serve

    page, address = serve(tmp_path, "0.0.0.0", None, "open sesame", False, line_of)
    walker = Walker(browser)
    try:
        browser.visit(address.replace("0.0.0.0", "127.0.0.1"))
        walker.reads("body", "the password that the studio was started with")
        assert not browser.run("return !!document.querySelector('#runs, #queue')")
        for word in ("open barley", "open sesame"):
            browser.until(lambda: bool(browser.run("return !!document.querySelector('input[type=password]')")))
            for field, text in ((":is(input:not([type=password]), textarea)", "anna"), ("[type=password]", word)):
                browser.run("document.querySelector(arguments[0]).focus()", field)
                browser.chord("Control", "a")
                browser.press(*text)
            browser.press("Enter")
            if word == "open barley":
                walker.reads("body", "Incorrect")
        walker.reads("#queue", "No run yet")
    finally:
        page.close()
