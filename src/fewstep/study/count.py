"""The count of a study.

Win rates, per prompt and per rater, and agreement.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from .. import __version__
from ..report.markdown import markdown_table
from ..report.words import plural
from .answers import Ballots, Vote
from .key import QUESTIONS, Key
from .statistics import effective_votes, krippendorff_alpha, wilson


@dataclass(frozen=True)
class Tally:
    """Votes between two models.

    `rate` is the share of wins of the first model, a tie counting half; None without votes.
    """

    wins: int
    ties: int
    losses: int

    @property
    def votes(self) -> int:
        """The number of votes."""
        return self.wins + self.ties + self.losses

    @property
    def rate(self) -> float | None:
        """The win rate of the first model."""
        return (self.wins + self.ties / 2) / self.votes if self.votes else None

    @property
    def text(self) -> str:
        """Wins, ties and losses as `12-3-5`."""
        return f"{self.wins}-{self.ties}-{self.losses}"


@dataclass(frozen=True)
class Match:
    """Two models and the votes between them, on one question.

    `low` and `high` are the ends of the 95 % interval of the win rate of `a` against `b`. `prompts` has a
    tally for every prompt, `raters` one for every rater.
    """

    a: str
    b: str
    tally: Tally
    low: float
    high: float
    prompts: tuple[Tally, ...]
    raters: dict[str, Tally]


@dataclass(frozen=True)
class Question:
    """The count of one question.

    `alpha` is the agreement between raters. `left` has, for every rater, the share of answers for the image
    on the left.
    """

    asked: str
    matches: tuple[Match, ...]
    alpha: float | None
    left: dict[str, float]


@dataclass(frozen=True)
class Count:
    """The count of a study."""

    key: Key
    raters: tuple[str, ...]
    questions: dict[str, Question]


def count(key: Key, ballots: Ballots) -> Count:
    """Count the votes of a study."""
    names = ballots.raters
    of = {q: [v for v in ballots.votes if v.question == q] for q in key.questions}
    return Count(key, tuple(names.values()), {q: _question(key, QUESTIONS[q], v, names) for q, v in of.items()})


def _question(key: Key, asked: str, votes: Sequence[Vote], names: dict[str, str]) -> Question:
    two = combinations(range(len(key.models)), 2)
    units = [[round(2 * v.score) for v in votes if v.pair == i] for i in range(len(key.pairs))]
    own = {name: [v.left for v in votes if v.rater == rater] for rater, name in names.items()}
    left = {name: sum(shares) / len(shares) for name, shares in own.items() if shares}
    return Question(asked, tuple(_match(key, a, b, votes, names) for a, b in two), krippendorff_alpha(units), left)


def _match(key: Key, a: int, b: int, votes: Sequence[Vote], names: dict[str, str]) -> Match:
    """Count the votes between models `a` and `b`."""
    between = [
        (v.rater, pair.item, v.score if pair.first == a else 1 - v.score)
        for v in votes
        if {(pair := key.pairs[v.pair]).first, pair.second} == {a, b}
    ]
    tally = _tally(score for *_, score in between)
    per_prompt = [[score for _, item, score in between if item == i] for i in range(len(key.prompts))]
    low, high = wilson(tally.rate or 0.0, effective_votes(per_prompt))
    raters = {name: _tally(score for one, _, score in between if one == rater) for rater, name in names.items()}
    return Match(key.models[a], key.models[b], tally, low, high, tuple(map(_tally, per_prompt)), raters)


def _tally(scores: Iterable[float]) -> Tally:
    found = list(scores)
    return Tally(found.count(1.0), found.count(0.5), found.count(0.0))


def as_json(result: Count) -> dict[str, Any]:
    """Return the count as JSON values."""

    def told(tally: Tally) -> dict[str, Any]:
        return {**asdict(tally), "rate": tally.rate}

    return {
        "study": result.key.study,
        "version": __version__,
        "models": list(result.key.models),
        "raters": list(result.raters),
        "questions": {
            name: {
                "asked": question.asked,
                "agreement": question.alpha,
                "left": question.left,
                "pairs": [
                    {
                        "a": match.a,
                        "b": match.b,
                        **told(match.tally),
                        "interval": [match.low, match.high],
                        "raters": {rater: told(tally) for rater, tally in match.raters.items()},
                        "prompts": [
                            {"prompt": prompt, **told(tally)}
                            for prompt, tally in zip(result.key.prompts, match.prompts, strict=True)
                        ],
                    }
                    for match in question.matches
                ],
            }
            for name, question in result.questions.items()
        },
    }


def summary(result: Count) -> list[str]:
    """Return win rates, raters and agreement as lines of Markdown."""
    key, lines = result.key, list[str]()
    for question in result.questions.values():
        answered, asked = sum(m.tally.votes for m in question.matches), len(key.pairs) * len(result.raters)
        rates = [
            (m.a, m.b, str(m.tally.wins), str(m.tally.ties), str(m.tally.losses), percent(m.tally.rate), _interval(m))
            for m in question.matches
        ]
        raters = [
            (
                rater,
                *(f"{m.raters[rater].text} ({percent(m.raters[rater].rate)})" for m in question.matches),
                percent(question.left.get(rater)),
            )
            for rater in result.raters
        ]
        lines += [
            f"## {question.asked}",
            "",
            f"{answered} of {asked} votes, {plural(len(result.raters), 'rater')}, "
            f"{plural(len(key.prompts), 'prompt')}. A tie is half a win.",
            "",
            *markdown_table(("A", "B", "A wins", "ties", "B wins", "win rate of A", "95 % interval"), rates),
            "",
            _agreement(question.alpha),
            "",
            *markdown_table(("rater", *map(_versus, question.matches), "for the left image"), raters),
            "",
        ]
    return lines


def per_prompt(result: Count) -> list[str]:
    """Return the votes on every prompt as lines of Markdown."""
    lines = list[str]()
    for question in result.questions.values():
        rows = [(prompt, *(m.prompts[i].text for m in question.matches)) for i, prompt in enumerate(result.key.prompts)]
        lines += [
            f"## {question.asked} By prompt: wins, ties and losses of the first",
            "",
            *markdown_table(("prompt", *map(_versus, question.matches)), rows),
            "",
        ]
    return lines


def _versus(match: Match) -> str:
    return f"{match.a} : {match.b}"


def _interval(match: Match) -> str:
    return f"{percent(match.low)} to {percent(match.high)}" if match.tally.votes else "–"


def _agreement(alpha: float | None) -> str:
    if alpha is None:
        return "Agreement between raters: not known; it takes two answers to one pair, and answers that differ."
    return f"Agreement between raters: Krippendorff's alpha {alpha:.2f} (1: all agree, 0: no more than by chance)."


def percent(share: float | None) -> str:
    """Format a share as `62.5 %`, a dash for none."""
    return "–" if share is None else f"{100 * share:.1f} %"
