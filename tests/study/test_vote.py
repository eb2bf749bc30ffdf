"""A study is voted through in a browser, with clicks and with keys, and counted right to the digit."""

import json
import random
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest

from fewstep.cli.count import RESULT, run_count
from fewstep.study.key import Key
from tests.browser import DESK, PHONE, Browser, browsing

from .studies import MODELS, PROMPTS, key_of, shown, write_study

KEYS = {"left": "Left", "tie": "Down", "right": "Right"}
LABELS = {"left": "← Left", "tie": "No difference", "right": "Right →"}
Wanted = dict[tuple[str, int, int, int], list[float]]  # (question, item, a, b) -> scores of a


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("browser")
    with browsing(folder) as found:
        yield found


class Voter:
    """A person who votes at random, by keys or by clicks, and notes what was seen and said."""

    def __init__(self, browser: Browser, key: Key, seed: int, keyboard: bool) -> None:
        self.browser, self.key, self.rng, self.keyboard = browser, key, random.Random(seed), keyboard
        self.of, self.said, self.lefts = shown(key), Wanted(), list[tuple[str, float]]()

    def see(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The (prompt, model) of the image on the left and of that on the right, once both are shown."""
        self.browser.until(lambda: bool(self.browser.run("return performance.now() >= deaf")))
        left, right = self.browser.run("return [...document.querySelectorAll('.pair img')].map(i => i.src)")
        return self.of[left], self.of[right]

    def answer(self, question: str) -> None:
        (item, left), (_, right) = self.see()
        assert self.browser.text("#prompt") == self.key.prompts[item]
        side = self.rng.choice(list(KEYS))
        self.give(side)
        score = {"left": 1.0, "tie": 0.5, "right": 0.0}[side]
        a, b = min(left, right), max(left, right)
        self.said.setdefault((question, item, a, b), []).append(score if left == a else 1 - score)
        self.lefts.append((question, score))

    def give(self, side: str) -> None:
        if self.keyboard:
            self.browser.press(KEYS[side])
        else:
            self.browser.click(".choices.now button", LABELS[side])

    def vote(self, pairs: int) -> None:
        for _ in range(pairs):
            for question in self.key.questions:
                self.answer(question)


def start(browser: Browser, page: Path, name: str = "") -> None:
    """Open the page as somebody who has never seen it."""
    browser.open(page)
    browser.run("localStorage.clear()")
    browser.open(page)
    if name:
        browser.type("#name", name)
    browser.click("button", "Start")


def counted(folder: Path, answers: list[Path]) -> dict[tuple[str, str, str], list[tuple[int, int, int]]]:
    """Wins, ties and losses of two models for every prompt, by the command line."""
    run_count([str(p) for p in answers], folder)
    questions = json.loads((folder / RESULT).read_text(encoding="utf-8"))["questions"]
    return {
        (name, pair["a"], pair["b"]): [(p["wins"], p["ties"], p["losses"]) for p in pair["prompts"]]
        for name, question in questions.items()
        for pair in question["pairs"]
    }


def wanted(key: Key, voters: list[Voter]) -> dict[tuple[str, str, str], list[tuple[int, int, int]]]:
    """The same, as the voters noted it."""
    found = {}
    for question in key.questions:
        for a, b in combinations(range(len(key.models)), 2):
            scores = [
                [s for voter in voters for s in voter.said.get((question, item, a, b), [])]
                for item in range(len(key.prompts))
            ]
            found[question, key.models[a], key.models[b]] = [(x.count(1.0), x.count(0.5), x.count(0.0)) for x in scores]
    return found


@pytest.mark.slow
def test_a_study_is_voted_through_by_keys_and_counted_to_the_digit(
    browser: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half of it before the page is loaded again, which then goes on where it was."""
    key = key_of()
    page = write_study(tmp_path / "study", key)
    browser.show(*DESK)
    start(browser, page, "Ada <i>")
    voter = Voter(browser, key, 1, keyboard=True)
    voter.vote(3)
    voter.answer("better")
    browser.open(page)
    assert browser.text("#count") == "Pair 4 of 6"
    voter.answer("follows")
    voter.vote(1)
    early = browser.download(".save", tmp_path / "early.json")
    voter.vote(1)
    browser.until(lambda: browser.text("#all") == "All 6 pairs are answered.")
    late = browser.download(".save", tmp_path / "late.json")
    assert json.loads(early.read_text())["rater"] == json.loads(late.read_text())["rater"]
    assert len(json.loads(early.read_text())["answers"]) == 5
    assert counted(tmp_path / "study", [late, early]) == wanted(key, [voter])
    printed = capsys.readouterr().out
    assert "note: Ada <i> is there twice; what was saved last counts" in printed
    better = [score for question, score in voter.lefts if question == "better"]
    assert f"| {100 * sum(better) / 6:.1f} % |" in printed
    assert browser.run("return document.title") != "broken" and browser.overflow == 0


def test_answers_can_be_changed_and_a_second_tap_is_none(browser: Browser, tmp_path: Path) -> None:
    """On a phone's screen: nothing is wider than it, and images are enlarged by a tap."""
    key = key_of()
    page = write_study(tmp_path / "study", key)
    browser.show(*PHONE)
    start(browser, page)
    assert browser.overflow == 0
    voter = Voter(browser, key, 2, keyboard=False)
    voter.see()
    assert browser.run("return document.documentElement.scrollHeight") <= PHONE[1]
    browser.run("document.querySelectorAll('.tile')[1].click()")
    right = browser.run("return document.querySelectorAll('.pair img')[1].src")
    assert browser.run("return document.querySelector('dialog img').src") == right
    browser.press("Left")
    assert browser.run("return document.querySelector('dialog img').src") != right
    browser.click("dialog button", "Close")
    browser.click(".choices.now button", LABELS["left"])
    # A double tap: the second one comes at once, however slow the machine is.
    tap = (
        "[...document.querySelectorAll('.choices.now button')].find(b => b.textContent.includes(arguments[0])).click();"
    )
    browser.run(tap + "document.querySelectorAll('.choices button')[0].click()", LABELS["left"])
    assert browser.text("#count") == "Pair 2 of 6"
    assert browser.run("return Object.keys(state.answers).length") == 1
    voter.see()
    browser.click("button", "Back")
    (item, left), (_, other) = voter.see()
    browser.click(".choices:first-child button", LABELS["right"])
    assert browser.text("#count") == "Pair 1 of 6"
    result = counted(tmp_path / "study", [browser.download(".save", tmp_path / "answers.json")])
    a, b = (key.models[i] for i in sorted((left, other)))
    win, loss = ((1, 0, 0), (0, 0, 1)) if left < other else ((0, 0, 1), (1, 0, 0))
    assert result["better", a, b][item] == loss and result["follows", a, b][item] == win
    assert sum(sum(sum(t) for t in tallies) for tallies in result.values()) == 2


@pytest.mark.slow
def test_several_people_vote_and_are_counted_together(browser: Browser, tmp_path: Path) -> None:
    """Twenty prompts, three models, three raters of one browser: order and sides differ from one to the other."""
    prompts = (*PROMPTS, *(f"prompt {i}" for i in range(18)))
    key = key_of(prompts)
    page = write_study(tmp_path / "study", key)
    voters, files, orders = list[Voter](), list[Path](), list[list[int]]()
    for i, (screen, keyboard) in enumerate(((DESK, True), (PHONE, False), (DESK, True))):
        browser.show(*screen, dark=bool(i % 2))
        if i:
            browser.click("button", "Start as another person")
            browser.click("button", "Start")
        else:
            start(browser, page)
        orders.append(browser.run("return state.order"))
        voters.append(Voter(browser, key, 10 + i, keyboard))
        voters[-1].vote(len(key.pairs))
        browser.until(lambda: browser.text("#all") == f"All {len(key.pairs)} pairs are answered.")
        files.append(browser.download(".save", tmp_path / f"{i}.json"))
    assert len({tuple(order) for order in orders}) == 3 and {len(set(order)) for order in orders} == {60}
    assert counted(tmp_path / "study", files) == wanted(key, voters)
    sheets = [json.loads(f.read_text()) for f in files]
    assert len({s["rater"] for s in sheets}) == 3
    turned = [{a["pair"]: a["left"] for a in s["answers"]} for s in sheets]
    assert len({tuple(sorted(t.items())) for t in turned}) == 3
    assert all(0 < a["seconds"] < 600 for s in sheets for a in s["answers"])
    assert (tmp_path / "study" / "result.md").read_text(encoding="utf-8").count(MODELS[0].split(",")[0]) > 4
