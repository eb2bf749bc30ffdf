"""The page is whole HTML, loads nothing, holds exact pixels and exact numbers, and escapes what it is given."""

import base64
import io
import json
import re
import shlex
from dataclasses import asdict, dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.reading import ReadError
from fewstep.report.grids import write_grid
from fewstep.report.html import Report, render
from fewstep.report.images import Images, StepGrid, Trajectory, save_images, to_uint8
from fewstep.report.plots import VARIABLES
from fewstep.report.run import next_commands, read_run, render_run
from fewstep.report.summary import Cost, Headline
from tests.cli.common import COMMANDS
from tests.student.card import CARD

STUDENT = "student, 4 steps (4 evaluations)"
VOID = {"meta", "link", "img", "br", "input", "hr"}
HOSTILE = "<script>alert('x')</script> & \"quotes\" {{ 7 * 7 }} 🍎"


@dataclass
class Page(HTMLParser):
    """Every element with its attributes, the nesting checked while reading."""

    elements: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(convert_charrefs=True)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def parsed(html: str) -> Page:
    page = Page()
    page.feed(html)
    page.close()
    assert page.open == [], "an element is not closed"
    return page


def full_report() -> Report:
    rng = torch.Generator().manual_seed(0)
    prompts = ["red apple", HOSTILE, *(f"prompt {i}" for i in range(8))]
    labels = ("teacher, 50 guided steps (100 evaluations)", STUDENT)
    rows = {label: torch.rand(10, 3, 8, 12, generator=rng) for label in labels}
    paths = {
        "teacher": Trajectory((1000.0, 500.0), torch.rand(2, 2, 3, 8, 12, generator=rng)),
        "student": Trajectory((999.0, 499.0, 249.0), torch.rand(1, 3, 3, 8, 12, generator=rng)),
    }
    return Report(
        title=HOSTILE,
        summary=[Headline("93 %", "won back"), Headline("23×", HOSTILE)],
        rows=[
            {
                "model": "teacher",
                "steps": 50,
                "nfe": 100,
                "n": 1024,
                "fd_real": 136.94321,
                "fd_teacher": None,
                "retrieval_top1": 0.63125,
            },
            {
                "model": "student",
                "steps": 4,
                "nfe": 4,
                "n": 1024,
                "fd_real": 139.1,
                "fd_teacher": 12.25,
                "retrieval_top1": 0.6,
            },
            {
                "model": HOSTILE,
                "steps": 1,
                "nfe": 1,
                "n": 1024,
                "fd_real": float("nan"),
                "fd_teacher": 24.0,
                "retrieval_top1": 0.5,
            },
        ],
        protocol=HOSTILE,
        images=Images(prompts, rows, paths, StepGrid((1, 4), (1, 2, 4), torch.rand(1, 2, 3, 3, 8, 12, generator=rng))),
        metrics=[{"iteration": i, "fake_loss": 1.0 / i, "gap_0": 0.1} for i in range(1, 20)],
        cost=Cost(452.0, 400, HOSTILE),
        warnings=[HOSTILE],
        recipe={"name": HOSTILE, "train": {"lr": 1e-5}},
        next_commands=[("Draw", "fewstep sample 'a b' -p \"x\" <y>")],
        versions={"torch": HOSTILE},
    )


def decoded(source: str) -> np.ndarray:
    head, _, data = source.partition(",")
    assert head == "data:image/png;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data, validate=True))))


def test_the_page_is_whole_and_loads_nothing() -> None:
    html = render(full_report())
    page = parsed(html)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            if name in attributes and not (tag == "data" and name == "data"):
                assert attributes[name].startswith(("data:", "#")), (tag, attributes[name])
    assert not re.search(r"https?:", html)
    assert not re.search(r"@import|url\(\s*['\"]?(?!#)", html)
    assert "default-src 'none'" in html


def test_every_image_decodes_to_its_exact_pixels() -> None:
    report = full_report()
    images = {i["alt"]: i for i in parsed(render(report)).all("img")}
    expected = {
        f"{label}: {report.images.prompts[p]}": x
        for label, row in report.images.rows.items()
        for p, x in enumerate(row)
    }
    for label, path in report.images.trajectories.items():
        for p, row in enumerate(path.estimates):
            expected |= {
                f"{label}, time {t:g}: {report.images.prompts[p]}": x for t, x in zip(path.times, row, strict=True)
            }
    grid = report.images.grid
    assert grid is not None
    for condition, row in zip(grid.conditions, grid.images[0], strict=True):
        expected |= {
            f"condition {condition}, steps {n}: {report.images.prompts[0]}": x
            for n, x in zip(grid.steps, row, strict=True)
        }
    assert len(expected) == 2 * 10 + 2 * 2 + 3 + 6
    assert images.keys() == expected.keys()
    for alt, image in expected.items():
        assert (decoded(images[alt]["src"]) == to_uint8(image).permute(1, 2, 0).numpy()).all(), alt
        assert (images[alt]["width"], images[alt]["height"], images[alt]["class"]) == ("12", "8", "pixels")


def test_large_images_are_not_drawn_as_pixels() -> None:
    page = parsed(render(Report("t", images=Images(["p"], {"a": torch.zeros(1, 3, 512, 512)}))))
    assert "class" not in page.all("img")[0]


def test_the_table_holds_the_numbers_of_the_rows() -> None:
    report = full_report()
    page = parsed(render(report))
    assert len(page.all("tr")) == 1 + len(report.rows)
    numbers = [float(d["value"]) for d in page.all("data")]
    expected = [v for row in report.rows for v in row.values() if isinstance(v, int | float) and v == v]
    assert numbers == expected
    text = "".join(page.text)
    assert "136.9" in text
    assert "63.1\xa0%" in text
    assert text.count("(best)") == 3


def test_every_given_text_is_escaped_and_shown() -> None:
    html = render(full_report())
    page = parsed(html)
    assert len(page.all("script")) == 1
    assert "<script>alert" not in html
    text = "".join(page.text)
    # Title twice, headline, warning, prompt, trajectory, protocol, model, hardware, recipe, version.
    assert text.count("alert('x')") >= 11
    assert "49" not in re.findall(r"\b49\b", text)
    assert "fewstep sample 'a b' -p \"x\" <y>" in text


@pytest.mark.parametrize(
    ("part", "section"),
    [
        ("images", "images"),
        ("images", "steps"),
        ("rows", "quality"),
        ("metrics", "training"),
        ("next_commands", "next"),
        ("cost", "made"),
    ],
)
def test_an_empty_part_is_left_out(part: str, section: str) -> None:
    whole = {s["id"] for s in parsed(render(full_report())).all("section")}
    assert section in whole
    values = {name: getattr(full_report(), name) for name in full_report().__dataclass_fields__ if name != part}
    if part == "cost":
        values |= {"recipe": {}, "versions": {}}
    if part == "metrics":
        values |= {"rows": []}
    assert section not in {s["id"] for s in parsed(render(Report(**values))).all("section")}


def test_an_empty_report_is_a_page() -> None:
    page = parsed(render(Report("Nothing yet")))
    assert "Nothing yet" in page.text
    assert page.all("img") == page.all("section") == page.all("table") == []


def contrast(a: str, b: str) -> float:
    """WCAG 2.2: (lighter + 0.05) / (darker + 0.05) of relative luminances."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_every_colour_that_is_text_can_be_read_in_light_and_dark() -> None:
    """Charts name their lines in the lines' own colours; 4.5 is what WCAG AA asks for."""
    grounds = ("paper", "card", "tint", "warn-tint")
    schemes = [
        dict(re.findall(r"--([\w-]+): (#\w{6})", block))
        for block in re.findall(r":root \{(.*?)\}", render(Report("t")), re.DOTALL)
    ]
    assert len(schemes) == 2 and schemes[0].keys() == schemes[1].keys()
    for scheme in schemes:
        texts = scheme.keys() - {*grounds, "line"}
        assert len(texts) == 12
        for text in texts:
            assert min(contrast(scheme[text], scheme[ground]) for ground in grounds) >= 4.5, text
    assert {name: schemes[0][name] for name in VARIABLES.values()} == {
        name: colour for colour, name in VARIABLES.items()
    }


def stops(page: Page) -> list[str]:
    """The elements that the Tab key stops at, in order, and `table` where the table begins."""
    found = []
    for tag, attributes in page.elements:
        focusable = tag in ("button", "summary", "input", "select", "textarea") or (tag == "a" and "href" in attributes)
        if tag == "table" or (int(attributes.get("tabindex", 0 if focusable else -1)) >= 0):
            found.append(tag)
    return found


def test_the_images_are_not_a_hundred_stops_on_the_way_to_the_table() -> None:
    """The script makes one of each section's; without it they cannot be enlarged."""
    html = render(full_report())
    page = parsed(html)
    assert len([b for b in page.all("button") if b["class"] == "tile"]) > 30
    assert len(stops(page)[: stops(page).index("table")]) + html.count('class="tiles"') < 15
    assert "ArrowRight" in html


def test_many_warnings_unfold() -> None:
    page = parsed(render(Report("t", warnings=[f"warning {i}" for i in range(40)])))
    assert "37 more" in page.text and len(page.all("li")) == 40 and len(page.all("details")) == 1
    assert parsed(render(Report("t", warnings=["a", "b", "c"]))).all("details") == []


def test_everything_that_can_be_wide_scrolls_by_itself() -> None:
    """No part makes the page wider than a phone's screen. What is hidden from sight is placed within what scrolls."""
    report = full_report()
    html = render(
        Report(**{**{n: getattr(report, n) for n in report.__dataclass_fields__}, "samples": [(0, b"no image")]})
    )
    page = Scrolling()
    page.feed(html)
    assert page.outside == []
    assert page.inside >= {"table", "compare", "path-rows", "hidden"}
    assert re.search(r"\.scroll \{[^}]*position: relative;[^}]*overflow-x: auto;", html)


@dataclass
class Scrolling(Page):
    """Which wide elements stand inside and outside of one that scrolls."""

    within: list[bool] = field(default_factory=list)
    inside: set[str] = field(default_factory=set)
    outside: list[str] = field(default_factory=list)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = (dict(attrs).get("class") or "").split()
        for wide in {tag, *classes} & {"table", "compare", "path-rows", "hidden"}:
            if any(self.within):
                self.inside.add(wide)
            else:
                self.outside.append(wide)
        super().handle_starttag(tag, attrs)
        if tag not in VOID:
            self.within.append("scroll" in classes)

    def handle_endtag(self, tag: str) -> None:
        super().handle_endtag(tag)
        self.within.pop()


def test_grids_of_a_run_are_shown_in_the_page_s_own_colours(run: Path) -> None:
    """A grid is a white sheet with its words painted on it; the page has its images and its words."""
    images = torch.rand(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    for path in (run / "samples").iterdir():
        path.unlink()
    path = write_grid(run / "samples" / "step_000100.png", images, ["teacher", HOSTILE], ["p", "日本"])
    page = parsed(render_run(run).read_text(encoding="utf-8"))
    shown = {i["alt"]: i for i in page.all("img") if i["alt"].startswith("iteration 100")}
    assert len(shown) == 4
    for row, label in enumerate(("teacher", HOSTILE)):
        for column, prompt in enumerate(("p", "日本")):
            tile = shown[f"iteration 100, {label}: {prompt}"]
            assert (decoded(tile["src"]) == to_uint8(images[row, column]).permute(1, 2, 0).numpy()).all()
    Image.open(path).convert("RGB").save(path)  # the words are lost, as in files from before
    alts = [i["alt"] for i in parsed(render_run(run).read_text(encoding="utf-8")).all("img")]
    assert "Grid of images at iteration 100" in alts


def test_the_top_says_what_was_made(run: Path) -> None:
    about = json.loads((run / "run.json").read_text())
    recipe = {"teacher": "emoji", "method": {"name": "tdm-unify", "steps": [4, 2, 1]}, "train": {"iterations": 260}}
    (run / "run.json").write_text(json.dumps(about | {"recipe": recipe}))
    facts = dict(read_run(run).made)
    assert facts == {
        "Teacher": "emoji",
        "Method": "tdm-unify",
        "Steps": "4, 2 or 1",
        "State": "iteration 10 of 260; there is no student yet",
    }
    card = replace(CARD, base="emoji", method="trajp-l-tdm", rank=32, head="span")
    (run / "final" / "fewstep.json").write_text(json.dumps(asdict(card)))
    (run / "final" / "emoji-lora.safetensors").write_text("")
    (run / "best").mkdir()
    (run / "best" / "preview.json").write_text(
        json.dumps({"iteration": 5, "value": 12.3456, "measured": "quality.fd_real"})
    )
    facts = dict(read_run(run).made)
    assert facts["Method"] == "trajp-l-tdm" and facts["Steps"] == "4"
    assert facts["Trained"] == "LoRA of rank 32, for strength 1.0, and a span head"
    assert facts["File to use"] == f"{run / 'final'}, for other programs emoji-lora.safetensors in it"
    assert facts["Best preview"] == f"iteration 5, kept in {run / 'best'} (quality.fd_real 12.35)"
    text = "".join(parsed(render_run(run).read_text(encoding="utf-8")).text)
    assert text.index("LoRA of rank 32") < text.index("Side by side")


def test_diversity_is_what_the_note_says_it_is() -> None:
    rows = [
        {"model": "teacher", "steps": 50, "diversity": 0.385, "diversity_ratio": 1.0},
        {"model": "student", "steps": 4, "diversity": 0.455, "diversity_ratio": 1.18},
    ]
    page = parsed(render(Report("t", rows=rows)))
    text = "".join(page.text)
    assert "1.18" in text and "0.46" not in text and "as a multiple of what the teacher's do" in text
    alone = [{"model": "student", "steps": 4, "diversity": 0.455, "diversity_ratio": None}]
    assert "Diversity" not in "".join(
        parsed(render(Report("t", rows=alone))).text
    )  # there is nothing that it is a multiple of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "my run"
    (run / "final").mkdir(parents=True)
    report = full_report()
    about = {"title": "Emoji", "recipe": {"name": "demo"}, "hardware": "2 CPU cores", "versions": {"python": "3.11"}}
    (run / "run.json").write_text(json.dumps(about))
    (run / "final" / "eval.json").write_text(
        json.dumps({"protocol": "emoji", "versions": {"torch": "2.13"}, "rows": report.rows})
    )
    lines = [json.dumps({"iteration": i, "seconds": 2.0 * i, "fake_loss": 1.0}) for i in range(1, 11)]
    (run / "metrics.jsonl").write_text(
        "\n".join([*lines, '{"iteration": 10, "warnings": ["colours drift"]}', '{"iterat'])
    )
    save_images(run / "images.safetensors", report.images)
    for i in range(0, 600, 100):
        write_grid(run / "samples" / f"step_{i:06d}.png", torch.full((1, 1, 3, 8, 8), i / 600), ["teacher"], ["p"])
    return run


def test_a_run_folder_becomes_the_same_report_again(run: Path) -> None:
    report = read_run(run)
    assert (report.title, report.cost, report.protocol) == ("Emoji", Cost(20.0, 10, "2 CPU cores"), "emoji")
    assert report.warnings == ["Iteration 10: colours drift"]
    assert report.versions == {"python": "3.11", "torch": "2.13"}
    assert [i for i, _ in report.samples] == [0, 200, 500]
    assert report.samples[-1][1] == (run / "samples" / "step_000500.png").read_bytes()
    assert torch.equal(to_uint8(report.images.rows[STUDENT]), to_uint8(full_report().images.rows[STUDENT]))
    assert render_run(run) == run / "report.html"
    page = parsed((run / "report.html").read_text(encoding="utf-8"))
    assert {s["id"] for s in page.all("section")} == {
        "images",
        "furthest",
        "steps",
        "counts",
        "quality",
        "training",
        "progress",
        "next",
        "made",
    }


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no run\.json"):
        render_run(tmp_path)
    (tmp_path / "run.json").write_text('{"command": "fewstep distill demo --out \'a b\'"}')
    for empty in ("", '{"iteration": 1, "seconds"'):
        (tmp_path / "metrics.jsonl").write_text(empty)
        page = parsed(render_run(tmp_path).read_text(encoding="utf-8"))
        assert [s["id"] for s in page.all("section")] == ["next"]
        text = "".join(page.text)
        assert "fewstep distill demo --out 'a b'" in text
        assert "fewstep sample" not in text  # there is no student yet


def test_an_evaluation_without_rows_is_no_table(run: Path) -> None:
    (run / "final" / "eval.json").write_text('{"protocol": "emoji", "rows": []}')
    assert parsed(render_run(run).read_text(encoding="utf-8")).all("table") == []


@pytest.mark.parametrize("broken", ["{", "[]"])
def test_a_damaged_file_is_named(run: Path, broken: str) -> None:
    (run / "final" / "eval.json").write_text(broken)
    with pytest.raises(ValueError, match=r"eval\.json"):
        render_run(run)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("run.json", '{"title": 3}'),
        ("run.json", '{"recipe": []}'),
        ("run.json", '{"recipe": {"method": "tdm"}}'),
        ("run.json", '{"recipe": {"warm_start": 3}}'),
        ("run.json", '{"versions": {"torch": null}}'),
        ("run.json", '{"next": [["a"]]}'),
        ("run.json", "[" * 100_000),
        ("final/eval.json", '{"rows": {}}'),
        ("final/eval.json", '{"rows": [{"model": "student", "steps": "4"}]}'),
        ("final/eval.json", '{"rows": [null]}'),
        ("final/fewstep.json", '{"steps": "4"}'),
        ("best/preview.json", '{"iteration": "4", "value": 1, "measured": "x"}'),
        ("best/preview.json", "{}"),
        ("trajectories.json", '{"errors": {"a": [1]}}'),
        ("trajectories.json", '{"mean": [[1, 2, 3]]}'),
        ("metrics.jsonl", '{"iteration": 1, "seconds": "x"}\n'),
        ("metrics.jsonl", "root:x:0:0:root:/root:/bin/bash\n"),
        ("samples/step_000100.png", "no image"),
        ("images.safetensors", "no tensors"),
    ],
)
def test_a_file_that_holds_something_else_is_named(run: Path, name: str, text: str) -> None:
    for folder in ("best", "samples"):
        (run / folder).mkdir(exist_ok=True)
    for sample in list((run / "samples").iterdir())[1:]:
        sample.unlink()
    (run / name).write_text(text, encoding="utf-8")
    with pytest.raises(ReadError) as told:
        render_run(run)
    assert str(run / name if name != "trajectories.json" else run) in str(told.value) and "\n" not in str(told.value)
    assert len(str(told.value)) < 400 + len(str(run)) and not (run / "report.html").exists()


def test_commands_can_be_pasted_into_a_shell_and_are_commands() -> None:
    commands = [command for _, command in next_commands(Path("my runs/a, first"), ["it's red; rm -rf", "x"])]
    words = [shlex.split(command) for command in commands]
    assert all(name == "fewstep" and verb in COMMANDS for name, verb, *_ in words)
    assert words[0] == ["fewstep", "sample", "my runs/a, first", "-p", "it's red; rm -rf", "--compare"]
    assert all("my runs/a, first" in w for w in words[:-1])


def test_a_model_that_takes_no_prompt_is_asked_none() -> None:
    assert next_commands(Path("runs/a"), ["", ""])[0][1] == "fewstep sample runs/a --compare"
    assert next_commands(Path("runs/a"), [])[0][1] == "fewstep sample runs/a -p 'a prompt of your own' --compare"


def test_commands_are_those_of_the_folder_and_not_of_where_it_was(run: Path) -> None:
    """Also of a run whose record says others."""
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(
        json.dumps(about | {"next_commands": [["Draw", "fewstep sample runs/elsewhere, first"]]})
    )
    commands = [command for _, command in read_run(run).next_commands]
    assert shlex.split(commands[0])[:3] == ["fewstep", "sample", str(run)]
    assert not [c for c in commands if "elsewhere" in c]
