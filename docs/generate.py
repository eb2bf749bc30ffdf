"""Write the generated parts of README.md and docs again.

`python docs/generate.py` writes them, and `--check` says whether they are up to date. A part stands between `<!--
begin NAME -->` and `<!-- end NAME -->`. Tables of results come from benchmarks/*.json, the recipe reference from the
docstrings below the settings' fields, the tree from the docstrings of the packages.
"""

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from pydantic import BaseModel

from fewstep.backbones.rivals import RIVALS, Rival
from fewstep.config_fields import allowed_text, field_texts
from fewstep.core.guidance import Guidance
from fewstep.evaluation.metrics import METRICS
from fewstep.methods.matching_settings import FakeScoreConfig, FirstStepConfig, GanConfig, MatchConfig, RewardConfig
from fewstep.methods.presets import METHODS, PRESETS
from fewstep.roles.roles import RolesConfig
from fewstep.runs.recipe import DataConfig, DistillRecipe, PreviewConfig, PromptsConfig, StageConfig
from fewstep.training.loop import TrainConfig

ROOT = Path(__file__).resolve().parent.parent
PART = re.compile(r"(<!-- begin (?P<name>[\w-]+) -->\n)(?P<text>.*?)(<!-- end (?P=name) -->)", re.DOTALL)
Rows = Iterable[Sequence[object]]


def stored(name: str) -> list[dict[str, Any]]:
    """Return the rows of one benchmark's record."""
    record = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))
    rows: list[dict[str, Any]] = record["rows"]
    return rows


def runs(name: str, key: str) -> list[dict[str, Any]]:
    """Return the rows of one variant of a benchmark, seed by seed."""
    return sorted((r for r in stored(name) if r["key"] == key), key=lambda r: int(r["seed"]))


def table(head: Sequence[str], rows: Rows) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def percent(share: float) -> str:
    """Return `62.5 %` of 0.625."""
    return f"{100 * share:.1f} %"


# Results.


def headline() -> str:
    """Six rows of the demo: the teacher at its best, the best it does in as many calls, and the student."""
    rows = stored("demo")
    teachers = [r for r in rows if r["model"] == "teacher"]

    def line(name: str, row: dict[str, Any], bold: bool = False) -> list[str]:
        mark = "**" if bold else ""
        return [
            f"{mark}{name}{mark}",
            f"{mark}{row['nfe']}{mark}",
            f"{mark}{row['fd_real']:.1f}{mark}",
            percent(row["retrieval_top1"]),
        ]

    def best(nfe: int) -> dict[str, Any]:
        return min((r for r in teachers if r["nfe"] == nfe), key=lambda r: float(r["fd_real"]))

    students = {r["steps"]: r for r in rows if r["model"] == "student"}
    return table(
        ("model", "network calls", "FD", "prompt match"),
        [
            line("teacher, 50 guided steps", max(teachers, key=lambda r: int(r["nfe"]))),
            line("teacher, best in 4 calls", best(4)),
            line("teacher, best in 1 call", best(1)),
            line("student, 4 steps", students[4], True),
            line("the same student, 2 steps", students[2], True),
            line("the same student, 1 step", students[1], True),
        ],
    )


def demo() -> str:
    """Every row of the demo."""
    return table(
        ("model", "steps", "guidance", "NFE", "FD to real", "prompt match, top 1", "top 5", "diversity"),
        [
            (
                r["model"],
                r["steps"],
                f"{r['guidance']:g}" if r["guidance"] > 1 else "none",
                r["nfe"],
                f"{r['fd_real']:.1f}",
                percent(r["retrieval_top1"]),
                percent(r["retrieval_top5"]),
                f"{r['diversity_ratio']:.2f}",
            )
            for r in stored("demo")
        ],
    )


WAYS = {
    "tdm": ("TDM alone", "`fewstep distill tdm4`"),
    "tdm-520": ("TDM alone, shorter", "`fewstep distill tdm4 --set train.iterations=520 --set train.decay=260`"),
    "stages-half": (
        "imitation, then TDM, shorter",
        "`python benchmarks/stages.py --only stages-half --to runs/stages`",
    ),
    "stages": ("imitation, then TDM", "`fewstep distill stages`"),
    "imitation-equal": ("imitation alone", "`python benchmarks/stages.py --only imitation-equal --to runs/stages`"),
    "trajpl-equal": (
        "TrajP-L alone, with a head",
        "`python benchmarks/stages.py --only trajpl-equal --to runs/stages`",
    ),
}


def stages() -> str:
    """Ways to a student in 4 steps at equal cost."""
    rows = stored("stages")
    teacher = rows[0]["teacher"]
    lines: list[Sequence[object]] = [
        (
            "the teacher, 50 guided steps",
            "",
            100,
            f"{teacher['fd_real']:.2f}",
            percent(teacher["retrieval_top1"]),
            "",
            "",
        )
    ]
    for key, (what, command) in WAYS.items():
        own = [r for r in rows if r["key"] == key]
        means = {k: mean(r["row"][k] for r in own) for k in ("fd_real", "retrieval_top1")}
        minutes = mean(r["seconds"] for r in own) / 60
        lines.append(
            (what, f"{minutes:.0f}", 4, f"{means['fd_real']:.2f}", percent(means["retrieval_top1"]), len(own), command)
        )
    return table(("method", "minutes", "NFE", "FD to real", "prompt match", "seeds", "command"), lines)


def _fd(key: str, draw: str) -> list[float]:
    """Return the FD of one variant sampled in one way, seed by seed."""
    return [r["fd_real"] for run in runs("tdm", key) for r in run["rows"] if r["draw"] == draw]


def ablations() -> str:
    """What each part of TDM is worth: one setting changed, differences seed by seed."""
    four, clean = "4 steps", "4 steps, tested with ddim"

    def change(key: str, other: str, *draws: str) -> str:
        own, theirs = _fd(key, draws[0]), _fd(other, draws[-1])
        return f"{mean(a - b for a, b in zip(own, theirs, strict=True)):+.2f}"

    counts = ("1 step", "2 steps", four)
    return table(
        ("change", "next to", "change in FD"),
        [
            (
                "tau beyond its segment: one fake score for all segments",
                "TDM, 4 steps",
                change("no-segments", "tdm-4", four),
            ),
            ("no importance sampling for the fake score", "TDM, 4 steps", change("no-importance", "tdm-4", four)),
            ("clean samples matched", "TDM, 4 steps", change("clean-segment", "tdm-4", four)),
            ("clean samples matched, tau over all times", "TDM, 4 steps", change("clean", "tdm-4", clean, four)),
            ("all weights instead of a LoRA, at their own rates", "TDM, 4 steps", change("full", "tdm-4", four)),
            *(
                (f"no step-count condition, sampled in {count}", "TDM-unify", change("no-condition", "unify", count))
                for count in counts
            ),
        ],
    )


def rivals() -> str:
    """Students of every method after as many iterations."""
    known = {
        "tdm-4": "TDM",
        "fisher": "TDM, Fisher divergence",
        "dmd2": "DMD2, 10 fake updates",
        "dmd2-5": "DMD2, 5 fake updates",
        "sid": "SiD",
        "lcm": "LCM",
        "progressive": "progressive distillation",
    }
    lines = []
    for key, name in known.items():
        own = runs("tdm", key)
        far = [float(r["fd_real"]) for result in own for r in result["rows"] if r["draw"] == "4 steps"]
        lines.append((name, f"{mean(r['seconds'] for r in own) / 60:.1f}", f"{mean(far):.2f}", len(own)))
    return table(("method", "minutes", "FD in 4 steps", "seeds"), lines)


def race() -> str:
    """How soon TDM is where DMD2 is at its best."""
    tdm, dmd2 = runs("race/tdm", "tdm-4"), runs("race/tdm", "dmd2")
    pairs = [(own["curve"], rival["curve"]) for own, rival in zip(tdm, dmd2, strict=True)]
    best = [min(rival, key=lambda p: float(p["fd_real"])) for _, rival in pairs]

    def when(curve: list[dict[str, float]], level: float) -> float:
        return next(p["seconds"] for p in curve if p["fd_real"] <= level)

    took = [when(own, b["fd_real"]) for (own, _), b in zip(pairs, best, strict=True)]
    return table(
        ("method", "FD", "minutes to it"),
        [
            (
                "DMD2 with ten fake updates, at its best",
                f"{mean(p['fd_real'] for p in best):.1f}",
                f"{mean(p['seconds'] for p in best) / 60:.0f}",
            ),
            ("TDM, as good as that", "", f"{mean(took) / 60:.1f}"),
        ],
    )


def common(name: str) -> dict[str, Any]:
    """Return what all rows of a record have in common."""
    read: dict[str, Any] = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))["common"]
    return read


def of_arena(key: str, count: int = 4, longer: bool = False) -> list[dict[str, Any]]:
    """Return the rows of a method in the arena that was trained for a step count, or for several."""
    stages = ("longer",) if longer else ("race", "counts", "settings", "rewards")
    raced = [r for r in stored("arena") if r["stage"] in stages]
    kinds = [r for r in raced if r["key"] == key and r["count"] in (0, count)]
    rate = common("arena").get("longer_rate", {}).get(f"{key}-{count}") if longer else None
    return [r for r in kinds if str(count) in r["measured"] and rate in (None, r["rate"])]


def arena_fd(key: str, count: int = 4, longer: bool = False) -> list[float]:
    """Return the FD of a method in the arena, seed by seed."""
    return [r["measured"][str(count)]["fd"] for r in of_arena(key, count, longer)]


def arena_teacher(steps: int) -> list[float]:
    """Return the FD of the arena's guided teacher, seed by seed."""
    own = [r for r in stored("arena") if r["stage"] == "teacher" and (r["steps"], r["solver"]) == (steps, "ddim")]
    return [r["measured"]["fd"] for r in own if r["guidance"] != 1]


def tuned_fd(way: str) -> list[float]:
    """Return the FD of a way to use a good set of images, at its best number, seed by seed."""
    own = [r for r in stored("arena_tuned") if r["way"] == way]
    best = min((r for r in own if r["seed"] == 0), key=lambda r: r["measured"]["fd"])["number"]
    return [r["measured"]["fd"] for r in own if r["number"] == best]


def heads_gaps(method: str, other: str, steps: Sequence[int]) -> list[float]:
    """Return how much larger a head's error over some step counts is than another's, in percent of the end.

    From the same trajectories and seed each.
    """

    def errors(name: str) -> dict[tuple[int, int], float]:
        own = [r for r in stored("arena_heads") if r["method"] == name]
        return {(r["trajectories"], r["seed"]): 100 * mean(r["error"][str(k)] for k in steps) for r in own}

    mine, theirs = errors(method), errors(other)
    return [mine[at] - theirs[at] for at in mine if at in theirs]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return mean and deviation, a dash for nothing."""
    if not values:
        return "-"
    return f"{mean(values):.{digits}f}" + (f" ± {stdev(values):.{digits}f}" if len(values) > 1 else "")


def arena() -> str:
    """FD of the teacher and of all students that trained for as long, the nearest in 4 steps first."""
    record = json.loads((ROOT / "benchmarks" / "arena.json").read_text(encoding="utf-8"))
    raced = list(dict.fromkeys(r["key"] for r in record["rows"] if r["stage"] in ("race", "counts")))
    raced = sorted((key for key in raced if arena_fd(key, 1)), key=lambda key: mean(arena_fd(key)))
    return table(
        ("model", "4 steps", "2 steps", "1 step", "seeds"),
        [
            (
                f"teacher, guided (50 steps: {spread(arena_teacher(50))})",
                *(spread(arena_teacher(k)) for k in (4, 2, 1)),
                "",
            ),
            *(
                (
                    record["common"]["label"][key],
                    *(spread(arena_fd(key, k)) for k in (4, 2, 1)),
                    ", ".join(dict.fromkeys(str(len(arena_fd(key, k))) for k in (4, 2, 1))),
                )
                for key in raced
            ),
        ],
    )


def arena_longer() -> str:
    """FD of the nearest students, trained for four times as long."""
    record = json.loads((ROOT / "benchmarks" / "arena.json").read_text(encoding="utf-8"))
    counts = {(r["key"], r["count"]): r["seed"] for r in record["rows"] if r["stage"] == "longer"}
    lines = [
        (record["common"]["label"][key], k, spread(arena_fd(key, k)), spread(arena_fd(key, k, True)),
         spread([r["measured"][str(k)]["diversity"] for r in of_arena(key, k, True)]), len(arena_fd(key, k, True)))
        for key, k in sorted(counts, key=lambda one: (-one[1], mean(arena_fd(one[0], one[1], True))))
    ]  # fmt: skip
    return table(("model", "steps", "30 CPU seconds", "120 CPU seconds", "diversity", "seeds"), lines)


def arena_settings() -> str:
    """What a setting that others ship changes of TDM's FD in 4 steps, seed by seed, the best first."""
    plain = {r["seed"]: r["measured"]["4"]["fd"] for r in of_arena("tdm")}
    own = dict.fromkeys(r["key"] for r in stored("arena") if r["stage"] == "settings" and r["count"] == 4)

    def gaps(key: str) -> list[float]:
        return [r["measured"]["4"]["fd"] - plain[r["seed"]] for r in of_arena(key) if r["seed"] in plain]

    labels = common("arena")["label"]
    lines = [
        (
            labels[key].removeprefix("TDM "),
            spread(gaps(key)),
            spread([r["measured"]["4"]["diversity"] for r in of_arena(key)]),
            len(gaps(key)),
        )
        for key in sorted(own, key=lambda key: mean(gaps(key)))
    ]
    return table(("TDM with", "change in FD", "diversity", "seeds"), lines)


def arena_tuned() -> str:
    """FD of three ways to use a good set of images with a poor teacher."""
    names = ("fine-tune, then TDM", "TDM with an adversarial term", "TDM alone")
    return table(("way", "FD in 4 steps", "seeds"), [(n, spread(tuned_fd(n)), len(tuned_fd(n))) for n in names])


def arena_heads() -> str:
    """Error of heads in percent in trained and untrained steps, from 500 trajectories."""
    names = {
        "DDIM": "DDIM",
        "rows alone, the same for all samples (PAS)": "rows alone (PAS)",
        "rows and coordinates (span head)": "span head",
        "coordinates, no rows (curve head)": "curve head",
        "LoRA alone": "LoRA",
        "LoRA and rows and coordinates (span head)": "LoRA and span head",
        "LoRA and coordinates, no rows (curve head)": "LoRA and curve head",
        "LoRA and neither": "LoRA and a head without rows and coordinates",
    }

    def cells(method: str) -> list[str]:
        own = [r["error"] for r in stored("arena_heads") if r["method"] == method and r["trajectories"] in (None, 500)]
        return [spread([100 * error[str(k)] for error in own], 1) for k in (2, 4, 1, 3, 5, 6)]

    head = ("head", "2 steps, trained", "4 steps, trained", "1 step", "3 steps", "5 steps", "6 steps")
    return table(head, [(name, *cells(method)) for method, name in names.items()])


def rewards() -> str:
    """What rewards raise next to matching, and at which distance."""
    record = json.loads((ROOT / "benchmarks" / "arena.json").read_text(encoding="utf-8"))
    keys = ["tdm", *dict.fromkeys(r["key"] for r in record["rows"] if r["stage"] == "rewards")]

    def line(key: str) -> list[object]:
        found = [r["measured"]["4"] for r in of_arena(key) if "confidence" in r["measured"]["4"]]
        cells = [spread([m[k] for m in found], d) for k, d in (("confidence", 3), ("saturation", 3), ("fd", 2))]
        label = "TDM without a reward" if key == "tdm" else record["common"]["label"][key]
        return [label, *cells, spread([m["diversity"] for m in found]), len(found)]

    return table(("reward", "confidence", "saturation", "FD", "diversity", "seeds"), [line(key) for key in keys])


# Claims of the papers.


def verdict(own: Sequence[float], other: Sequence[float], least: float, level: bool = False) -> str:
    """Return whether `own` is below `other` by more than noise; with `level`, whether it is not above it.

    Noise is two standard errors of the difference of means, `least` at least.
    """
    if not own or not other:
        return "not measured"
    errors = [stdev(v) ** 2 / len(v) if len(v) > 1 else 0.0 for v in (own, other)]
    gap, noise = mean(other) - mean(own), max(least, 2 * sum(errors) ** 0.5)
    if level:
        return "holds" if gap > -noise else "does not hold"
    return "holds" if gap > noise else "does not hold: the reverse" if gap < -noise else "does not hold: level"


def compared(
    claim: str, source: str, own: Sequence[float], other: Sequence[float], least: float, where: str, of: str = "FD "
) -> list[str]:
    """Return the row of a claim that one model has a lower FD than another."""
    return [claim, source, verdict(own, other, least), f"{of}{spread(own)} next to {spread(other)}", where]


EMOJI_NOISE, ARENA_NOISE, PAIRED_NOISE = 0.15, 0.2, 0.2  # of FD; paired: TDM with and without a setting, seed by seed
HEADS_NOISE = 0.2  # of a head's error in percent


def claims() -> str:
    """Every claim of both papers: whether it holds here, with its number."""
    four = "4 steps"
    tdm, arena_tdm = _fd("tdm-4", four), arena_fd("tdm")
    emoji, ring = "`tdm.md`", "`arena.md`"
    record = json.loads((ROOT / "benchmarks" / "tdm.json").read_text(encoding="utf-8"))
    teacher = [record["common"]["teacher"][0]["fd_real"]]

    def here(claim: str, source: str, other: str, draw: str = four, own: str = "tdm-4", mine: str = four) -> list[str]:
        return compared(claim, source, _fd(own, mine), _fd(other, draw), EMOJI_NOISE, emoji)

    def raced(claim: str, source: str, other: str, count: int = 4, own: str = "tdm") -> list[str]:
        return compared(claim, source, arena_fd(own, count), arena_fd(other, count), ARENA_NOISE, ring)

    def paired(claim: str, source: str, key: str, better: bool = True) -> list[str]:
        plain = {r["seed"]: r["measured"]["4"]["fd"] for r in of_arena("tdm")}
        gaps = [r["measured"]["4"]["fd"] - plain[r["seed"]] for r in of_arena(key) if r["seed"] in plain]
        gaps = gaps if better else [-g for g in gaps]
        return [claim, source, verdict(gaps, [0.0] * len(gaps), PAIRED_NOISE), f"change of FD {spread(gaps)}", ring]

    def unmeasured(claim: str, source: str, why: str) -> list[str]:
        return [claim, source, "cannot be measured here", why, ""]

    def style(name: str) -> tuple[list[float], list[float], list[float]]:
        def far(model: str) -> list[float]:
            own = [r for r in stored("finetunes") if r["style"] == name and re.fullmatch(model, r["model"])]
            return [r["fd_teacher"] for r in own]

        return far("tdm-4-."), far("lcm-."), far("dmd2-5-.")

    def taken(key: str, what: str, part: str = "pixel") -> float:
        return mean(_shares_taken(part, key, what))

    def share(part: str, key: str) -> float:
        return next(100 * r["share"] for r in stored("trajpl") if (r["part"], r["key"]) == (part, key))

    def abstract(claim: str, part: str, key: str, what: str, on: str) -> list[str]:
        gone = taken(key, what, part)
        told = f"{gone:.1f} of 100 on {on}, with {share(part, key):.1f} % of its weights"
        return [claim, "TrajP-L abstract", "holds" if gone >= 97 else "does not hold", told, "`trajpl.md`"]

    def minutes(key: str) -> float:
        return mean(r["seconds"] for r in runs("tdm", key)) / 60

    rows: list[list[str]] = [
        here("TDM is better than DMD2 after as many iterations", "TDM tab. 1, fig. 9", "dmd2"),
        [
            "TDM is as good as DMD2 in a fraction of its time",
            "TDM fig. 9",
            "holds" if minutes("tdm-4") < minutes("dmd2") else "does not hold",
            f"{minutes('tdm-4'):.1f} minutes next to {minutes('dmd2'):.1f}, ten fake updates",
            emoji,
        ],
        raced("TDM is better than DMD2 in equal time, one fake update", "TDM tab. 1", "dmd2-1"),
        raced("the same, five fake updates", "TDM tab. 1", "dmd2-5"),
        raced("the same, five fake updates at the student's rate", "TDM tab. 1", "dmd2-even"),
        raced("the same, five fake updates and DMD2's own discriminator on real images", "TDM tab. 1", "dmd2-gan-own"),
        here("TDM is better than LCM", "TDM tab. 1", "lcm"),
        raced("the same in equal time; LCM has real images there", "TDM tab. 1", "lcm"),
        here("LCM is poor under a deterministic solver", "TDM fig. 8", "lcm", "4 steps, tested with ddim"),
        here(
            "100 iterations of TDM restore it",
            "TDM fig. 8",
            "lcm",
            "4 steps, tested with ddim",
            "rescued",
            "4 steps, tested with ddim",
        ),
        here("TDM is better than SiD", "TDM tab. 1", "sid"),
        raced("the same in equal time", "TDM tab. 1", "sid"),
        raced("TDM is better than Diff-Instruct in 4 steps, in equal time", "TDM tab. 1", "diff-instruct"),
        raced(
            "the same, five fake updates at the student's rate for both",
            "TDM tab. 1",
            "diff-instruct-even",
            own="tdm-even",
        ),
        raced("the same in 1 step, where both match one state", "TDM tab. 1", "diff-instruct", 1),
        raced("TDM is better than progressive distillation in equal time", "TDM sec. 2", "progressive"),
        compared("the student is better than its teacher", "TDM tab. 1", tdm, teacher, EMOJI_NOISE, emoji),
        compared("the same in the arena", "TDM tab. 1", arena_tdm, arena_teacher(50), ARENA_NOISE, ring),
        compared(
            "the same in the arena after progressive distillation, half of the time each",
            "TDM tab. 1",
            arena_fd("after-progressive"),
            arena_teacher(50),
            ARENA_NOISE,
            ring,
        ),
        compared(
            "the same with tau up to pure noise and five fake updates at the student's rate, from prompts alone",
            "TDM tab. 1",
            arena_fd("tdm-wide"),
            arena_teacher(50),
            ARENA_NOISE,
            ring,
        ),
        here("segments that do not overlap help", "TDM eq. 5", "no-segments"),
        paired("the same in the arena", "TDM eq. 5", "to-noise", better=False),
        raced("the same with five fake updates at the student's rate", "TDM eq. 5", "tdm-wide", own="tdm-even"),
        here("importance sampling helps", "TDM tab. 5", "no-importance"),
        *(
            here(f"the step-count condition helps in {draw}", "TDM tab. 5", "no-condition", draw, "unify", draw)
            for draw in ("1 step", "2 steps", four)
        ),
        here("the Huber surrogate is better than the normalised square", "TDM tab. 5", "no-surrogate", four, "unify"),
        paired("the same in the arena", "TDM tab. 5", "l2", better=False),
        compared(
            "DPM-Solver++ samples better than DDIM",
            "TDM tab. 6",
            _fd("tdm-4", "4 steps, tested with dpmpp"),
            tdm,
            EMOJI_NOISE,
            emoji,
        ),
        paired("the same in the arena", "TDM tab. 6", "sample-dpmpp"),
        here("matching noisy samples is better than clean ones, all else equal", "TDM tab. 7", "clean-segment"),
        here("the same with tau over all times", "TDM tab. 7", "clean", "4 steps, tested with ddim"),
        paired("the same in the arena", "TDM tab. 7", "clean", better=False),
        here("the Fisher divergence is better than reverse KL", "TDM tab. 8", "tdm-4", four, "fisher"),
        raced("the same in the arena", "TDM tab. 8", "tdm", 4, "tdm-fisher"),
        [
            "one student for 1, 2 and 4 steps serves 4 as well as its own",
            "TDM tab. 5",
            verdict(_fd("unify", four), tdm, EMOJI_NOISE, level=True),
            f"FD {spread(_fd('unify', four))} next to {spread(tdm)}",
            emoji,
        ],
        raced("TDM after half the time of LCM is better than LCM", "TDM fig. 8", "lcm", 4, "after-lcm"),
        paired("an adversarial term on real images helps", "TDM eq. 16", "gan-real"),
        *(
            compared(
                f"in {name} TDM's LoRA keeps more of the style than {rival}'s",
                "TDM tab. 2",
                style(name)[0],
                theirs,
                EMOJI_NOISE,
                "`finetunes.md`",
            )
            for name in ("twemoji", "fluent")
            for rival, theirs in (("LCM", style(name)[1]), ("DMD2", style(name)[2]))
        ),
        unmeasured("HPS, aesthetic and CLIP scores of SD 1.5, SDXL, PixArt", "TDM tab. 1", "no GPU, no weights"),
        unmeasured("users prefer the student to its teacher", "TDM abstract", "no users; `fewstep compare` asks them"),
        unmeasured("500 iterations and two A800 hours are enough", "TDM abstract", "no GPU"),
        compared(
            "fine-tuning first is better than an adversarial term on the same images",
            "TDM tab. 1, 3",
            tuned_fd("fine-tune, then TDM"),
            tuned_fd("TDM with an adversarial term"),
            ARENA_NOISE,
            "`arena_tuned.md`",
        ),
        unmeasured("VBench rises from 80.91 to 81.65", "TDM tab. 4", "no CogVideoX weights; a tiny one in `video.md`"),
        abstract(
            "most of DDIM's excess at 2 calls goes, 97 of 100 parts, by a student for 1 to 6 calls",
            "network",
            "trajp-l-2",
            "fd_data",
            "a small network's mixture",
        ),
        abstract("the same in images", "pixel", "trajp-l", "fd_classes", "the pixel teacher"),
        [
            "head and LoRA together are better than each alone",
            "TrajP-L (reviews)",
            *trajpl_together(),
        ],
        [
            "head and LoRA are better than LoRA alone on the pixel teacher",
            "TrajP-L (reviews)",
            "holds in one of two"
            if (taken("trajp-l", "fd_classes") > taken("lora", "fd_classes"))
            != (taken("trajp-l", "fd") > taken("lora", "fd"))
            else "see the numbers",
            f"{taken('trajp-l', 'fd_classes'):.1f} next to {taken('lora', 'fd_classes'):.1f} of 100 in a classifier's "
            f"features, {taken('trajp-l', 'fd'):.1f} next to {taken('lora', 'fd'):.1f} in EfficientNet-lite0's",
            "`trajpl.md`",
        ],
        *(
            [
                f"trajectories share a shape that serves {which} steps, for a head {beside}",
                "TrajP-L (reviews)",
                verdict(gaps := heads_gaps(with_it, without, steps), [0.0] * len(gaps), HEADS_NOISE),
                f"change of the error {spread(gaps)} in percent of the end",
                "`arena_heads.md`",
            ]
            for beside, with_it, without in (
                ("without weights per step", "coordinates, no rows (curve head)", "neither"),
                ("with weights per step", "rows and coordinates (span head)", "rows, no coordinates"),
            )
            for which, steps in (("trained", (2, 4)), ("untrained", (1, 3, 5, 6)))
        ),
        unmeasured("FID 5.02 on CIFAR-10 at 2 calls in 10 minutes of an RTX 3090", "TrajP-L abstract", "no GPU"),
    ]
    return table(("claim", "source", "here", "number", "`benchmarks/`"), rows)


def trajpl_together() -> list[str]:
    """Return verdict, number and place of TrajP-L next to its parts, at 2 calls of the small network."""
    whole, lora, head = (100 * mean(_measured("network", key, "error", 2)) for key in ("trajp-l", "lora", "head"))
    said = "holds" if whole < min(lora, head) else "does not hold"
    return [said, f"error {whole:.1f} next to {lora:.0f} and {head:.0f} of 100 at 2 calls", "`trajpl.md`"]


def transfer() -> str:
    """LoRA of the bundled teacher in fine-tunes that they have never seen."""
    rows = stored("finetunes")

    def far(model: str, **how: float) -> list[str]:
        own = [
            [
                r["fd_teacher"]
                for r in rows
                if r["style"] == style and re.fullmatch(model, r["model"]) and how.items() <= r.items()
            ]
            for style in ("twemoji", "fluent")
        ]
        return [f"{mean(values):.2f}" for values in own]

    return table(
        ("sampled by", "NFE", "Twemoji", "Fluent"),
        [
            ("TDM's LoRA in the fine-tune", 4, *far("tdm-4-.")),
            ("LCM's LoRA in the fine-tune", 4, *far("lcm-.")),
            ("DMD2's LoRA in the fine-tune", 4, *far("dmd2-5-.")),
            ("a student distilled from the fine-tune itself", 4, *far("own.*")),
            ("the fine-tune without guidance", 4, *far("teacher", nfe=4)),
            ("the fine-tune with guidance", 8, *far("teacher", nfe=8)),
            ("the bundled teacher, not fine-tuned", 24, *far("plain")),
        ],
    )


def _measured(part: str, key: str, what: str, calls: int) -> list[float]:
    return [r["measured"][what][str(calls)] for r in stored("trajpl") if (r["part"], r["key"]) == (part, key)]


def trajpl_network() -> str:
    """Distance to the teacher's result where the truth is known, in percent."""
    known = {
        "TrajP-L": ("trajp-l",),
        "LoRA with PAS's shared weights": ("lora-pas",),
        "LoRA alone": ("lora",),
        "head alone": ("head",),
        "best other solver": ("ipndm", "dpmpp"),
        "DDIM": ("ddim",),
    }

    def end(keys: tuple[str, ...], calls: int) -> str:
        value = 100 * min(mean(_measured("network", key, "error", calls)) for key in keys)
        return f"{value:.0f}" if value >= 10 else f"{value:.1f}"

    return table(
        ("method", "2 calls", "4 calls", "6 calls"),
        [(name, *(end(keys, n) for n in (2, 4, 6))) for name, keys in known.items()],
    )


def shape() -> str:
    """Distance to the exact teacher's result without training, in percent, from the shape that trajectories share."""
    known = ("DDIM", "iPNDM", "DPM-Solver++(2M)", "50 trajectories, all moments", "500 trajectories, 6 coordinates",
             "500 trajectories, 3 coordinates")  # fmt: skip

    def end(method: str, calls: int) -> str:
        return f"{100 * mean(r['error'][str(calls)] for r in stored('shape') if r['method'] == method):.1f}"

    def trained(key: str, calls: int) -> str:
        return f"{100 * mean(_measured('exact', key, 'error', calls)):.1f}"

    calls = (1, 2, 3, 4, 5, 6)
    lines = [(method, *(end(method, k) for k in calls)) for method in known]
    lines += [
        (label, *(trained(key, k) for k in calls))
        for key, label in (("pas", "trained: weights per step (PAS)"), ("head", "trained: span head"))
    ]
    return table(("method", *(f"{k} call{'s' if k > 1 else ''}" for k in calls)), lines)


def trajpl_emoji() -> str:
    """FD of one student for 1 to 6 calls of the bundled teacher."""
    known = {
        "TrajP-L": ("trajp-l",),
        "LoRA alone": ("lora",),
        "head alone": ("head",),
        "all weights, no head (SFD)": ("sfd",),
        "the teacher's best unguided solver": ("ddim", "dpmpp", "ipndm"),
    }

    def fd(keys: tuple[str, ...], calls: int) -> str:
        return f"{min(mean(_measured('emoji', key, 'fd', calls)) for key in keys):.1f}"

    head = ("method", "1 call", "2 calls", "4 calls", "6 calls")
    return table(head, [(name, *(fd(keys, n) for n in (1, 2, 4, 6))) for name, keys in known.items()])


def trajpl_pixel() -> str:
    """What TrajP-L and its parts take away of DDIM's excess in two steps."""
    return _taken({"trajp-l": "TrajP-L", "lora": "LoRA alone", "head": "head alone"})


def trajpl_matched() -> str:
    """What another method takes away of it, which is not TrajP-L."""
    return _taken({"two-matched": "LoRA for two steps alone, then TDM with a regression term"})


def _taken(known: Mapping[str, str]) -> str:
    """Return a table of how much of what DDIM adds in two steps students take away."""

    def taken(key: str, what: str) -> str:
        values = _shares_taken("pixel", key, what)
        return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")

    return table(
        ("method", "classifier's features", "EfficientNet-lite0's features"),
        [(name, taken(key, "fd_classes"), taken(key, "fd")) for key, name in known.items()],
    )


def _shares_taken(part: str, key: str, what: str) -> list[float]:
    """Return how much of what DDIM adds in two steps a student takes away, in percent, seed by seed."""
    floor = next(r["teacher"] for r in stored("trajpl") if r["part"] == part)[what]
    start = mean(_measured(part, "ddim", what, 2))
    return [100 * (start - x) / (start - floor) for x in _measured(part, key, what, 2)]


def video() -> str:
    """A video student next to its teacher."""
    names = {"teacher": "teacher, at its best", "student": "student, 4 steps", "teacher-4": "teacher, 4 unguided steps"}
    rows = {r["model"]: r for r in stored("video")}
    return table(
        ("model", "share of the teacher's motion", "FD to real clips"),
        [(name, percent(rows[key]["of_teacher"]), f"{rows[key]['fd_looks']:.1f}") for key, name in names.items()],
    )


def cost() -> str:
    """An iteration of the loop next to its bare network calls, of the newest commit that was measured."""
    newest = {r["roles"]: r for r in stored("step_cost") if "ratio" in r}
    return table(
        ("roles", "CPU time, bare calls = 1", "numbers a GPU is asked for", "copies a GPU is waited for"),
        [(roles, f"{r['ratio']:.2f}", r["reads"], r["copies"]) for roles, r in newest.items()],
    )


# Families, and the cards that they fit.

CLIP_T5, QWEN_4B = "2 CLIP, T5", "Qwen 3 4B"
COMFYUI, ORIGINAL = "diffusers, ComfyUI", "diffusers, ComfyUI (original names)"
TWO, TOLD = "2 NFE", "1 NFE, told its guidance"
MODELS = {  # name in memory.json: model, pipeline, network, a teacher's step, text encoders, a LoRA's programs
    "sd15": ("Stable Diffusion 1, 2", "StableDiffusionPipeline", "0.9 B", TWO, "CLIP", "all, by kohya's names"),
    "sdxl": ("Stable Diffusion XL", "StableDiffusionXLPipeline", "2.6 B", TWO, "2 CLIP", "all, by kohya's names"),
    "pixart": ("PixArt-alpha, -Sigma", "PixArtAlphaPipeline, PixArtSigmaPipeline", "0.6 B", TWO, "T5", "PEFT"),
    "sd35m": ("Stable Diffusion 3, 3.5-M", "StableDiffusion3Pipeline", "2.0, 2.5 B", TWO, CLIP_T5, COMFYUI),
    "sd35l": ("Stable Diffusion 3.5-L", "StableDiffusion3Pipeline", "8.1 B", TWO, CLIP_T5, COMFYUI),
    "flux2-klein-4b": ("FLUX.2-klein-base 4B", "Flux2KleinPipeline", "3.9 B", TWO, QWEN_4B, ORIGINAL),
    "flux2-klein-9b": ("FLUX.2-klein-base 9B", "Flux2KleinPipeline", "9.1 B", TWO, "Qwen 3 8B", ORIGINAL),
    "flux2-dev": ("FLUX.2-dev", "Flux2Pipeline", "32.2 B", TOLD, "Mistral 3 24B", ORIGINAL),
    "flux": ("FLUX.1-dev", "FluxPipeline", "11.9 B", TOLD, "CLIP, T5", COMFYUI),
    "qwenimage": ("Qwen-Image, -2512", "QwenImagePipeline", "20.4 B", f"{TWO}, norms kept", "Qwen 2.5 VL 7B", COMFYUI),
    "qwenimage21": ("Qwen-Image-2.1", "QwenImage21Pipeline", "7.1 B", "1 NFE, unguided", "Qwen 3 VL 8B", COMFYUI),
    "zimage": ("Z-Image", "ZImagePipeline", "6.2 B", TWO, QWEN_4B, COMFYUI),
    "krea2": ("Krea 2", "Krea2Pipeline", "12.8 B", TWO, "Qwen 3 VL 4B", COMFYUI),
    "cogvideox": ("CogVideoX", "CogVideoXPipeline", "1.7, 5.6 B", TWO, "T5", "diffusers"),
    "wan21": ("Wan 2.1-1.3B", "WanPipeline", "1.4 B", TWO, "UMT5", ORIGINAL),
    "wan21-14b": ("Wan 2.1-14B", "WanPipeline", "14.3 B", TWO, "UMT5", ORIGINAL),
    "wan22-5b": ("Wan 2.2-5B", "WanPipeline", "5.0 B", TWO, "UMT5", ORIGINAL),
    "wan22-a14b": ("Wan 2.2-A14B, two networks", "WanPipeline", "2 x 14.3 B", TWO, "UMT5", ORIGINAL),
}


def planned() -> dict[tuple[str, str, int], dict[str, Any]]:
    """Return what the plan finds for each LoRA recipe, by family, card and number of cards."""
    return {(r["family"], r["memory"], r["cards"]): r for r in stored("memory") if "memory" in r}


def needs(row: dict[str, Any] | None, words: Callable[[Sequence[str]], str]) -> str:
    """Say what a recipe needs on a card."""
    if row is None:
        return "not counted"
    gib = f"{row['needed'] / 2**30:.1f} GiB"
    return f"{gib}, {words(row['sets'])}" if row["fits"] else f"does not fit, needs {gib}"


def families() -> str:
    """Every model, and its LoRA's memory on one card of 24 GB and on 8 of 80 GB."""

    def short(sets: Sequence[str]) -> str:
        values = dict(s.split("=") for s in sets)
        said = [values.get("roles.quantize", ""), values.get("train.optimizer", "")]
        said += [f"batch {values['train.batch']}"] if "train.batch" in values else []
        said += ["sharded"] if values.get("train.shard") == "true" else []
        return ", ".join(s for s in said if s not in ("", "null")) or "as it is"

    found = planned()
    return table(
        ("model", "pipeline", "network", "a teacher's step", "text", "student's LoRA for", "24 GB", "8 x 80 GB"),
        [
            (
                model,
                ", ".join(f"`{p}`" for p in pipeline.split(", ")),
                *rest,
                needs(found.get((name, "24GiB", 1)), short),
                needs(found.get((name, "80GiB", 8)), short),
            )
            for name, (model, pipeline, *rest) in MODELS.items()
        ],
    )


def cards() -> str:
    """The overrides that the plan prints for every LoRA recipe."""

    def full(sets: Sequence[str]) -> str:
        return "<br>".join(f"`{s}`" for s in sets) or "as it is"

    found = planned()
    sizes = ("16GiB", "24GiB", "80GiB")
    return table(
        ("recipe", *(s.replace("GiB", " GB") for s in sizes)),
        [(f"`{name}-tdm4-lora`", *(needs(found.get((name, size, 1)), full) for size in sizes)) for name in MODELS],
    )


# Settings.


def _default(value: Any) -> str:
    if is_dataclass(value):
        return "a block, see below"
    return f"`{json.dumps(value)}`" if not isinstance(value, tuple) else f"`{json.dumps(list(value))}`"


def settings_of(kind: Any, prefix: str, but: Sequence[str] = ()) -> str:
    """Return the settings of a dataclass as a table: key, default, allowed, meaning."""
    texts, lines = field_texts(kind), []
    for field in fields(kind):
        if field.name in but:
            continue
        default = (
            "required" if field.default is MISSING and field.default_factory is MISSING else _default(field.default)
        )
        meaning = " ".join(texts.get(field.name, "").split()).replace("|", "\\|")
        lines.append((f"`{prefix}{field.name}`", default, allowed_text(kind, field.name).replace("|", "\\|"), meaning))
    return table(("key", "default", "allowed", "meaning"), lines)


def model_settings(kind: type[BaseModel], prefix: str, but: Sequence[str] = ()) -> str:
    """Return the settings of a recipe's block as a table."""
    texts, lines = field_texts(kind), []
    for name, field in kind.model_fields.items():
        if name in but:
            continue
        default = (
            "required"
            if field.is_required()
            else "a block, see below"
            if isinstance(field.default, BaseModel)
            else _default(field.get_default(call_default_factory=True))
        )
        lines.append((f"`{prefix}{name}`", default, " ".join(texts.get(name, "").split()).replace("|", "\\|")))
    return table(("key", "default", "meaning"), lines)


def recipe_settings() -> str:
    """Every key of a distillation recipe."""
    common = [f.name for f in fields(next(iter(METHODS.values())).__mro__[1])]
    parts = ["## The recipe\n\n", model_settings(DistillRecipe, "")]
    parts += ["\n## `prompts`\n\n", model_settings(PromptsConfig, "prompts.")]
    parts += ["\n## `method`, all methods\n\n", settings_of(next(iter(METHODS.values())).__mro__[1], "method.")]
    parts += ["\n## `method.guidance`\n\nA number alone is the scale.\n\n", settings_of(Guidance, "method.guidance.")]
    for kind in METHODS.values():
        names = ", ".join(f"`{name}`" for name, known in PRESETS.items() if type(known) is kind)
        own = [name for name in common if name != "name"]
        parts += [f"\n## `method` of {names}\n\n", settings_of(kind, "method.", own)]
    blocks = {
        "match": MatchConfig,
        "fake": FakeScoreConfig,
        "gan": GanConfig,
        "first_step": FirstStepConfig,
        "reward": RewardConfig,
    }
    for block, part in blocks.items():
        parts += [f"\n## `method.{block}`\n\n", settings_of(part, f"method.{block}.")]
    parts += [
        "\n## `train`\n\n",
        settings_of(TrainConfig, "train."),
        "\n## `roles`\n\n",
        settings_of(RolesConfig, "roles."),
    ]
    parts += [
        "\n## `data`\n\n",
        model_settings(DataConfig, "data."),
        "\n## `warm_start`\n\n",
        model_settings(StageConfig, "warm_start."),
    ]
    parts += ["\n## `preview`\n\n", model_settings(PreviewConfig, "preview.")]
    return "".join(parts)


def presets() -> str:
    """What a method's name changes in the defaults of its class."""
    lines = []
    for name, known in PRESETS.items():
        plain = type(known)()
        lines.append((f"`{name}`", f"`{type(known).__name__}`", ", ".join(_changed(known, plain)) or "the defaults"))
    return table(("name", "class", "settings"), lines)


def _changed(own: Any, plain: Any, prefix: str = "") -> list[str]:
    found = []
    for field in fields(own):
        a, b = getattr(own, field.name), getattr(plain, field.name)
        if a == b or field.name == "name":
            continue
        found += _changed(a, b, f"{field.name}.") if is_dataclass(a) else [f"`{prefix}{field.name}={a}`"]
    return found


# Evaluation.


def metrics() -> str:
    """Every metric that an evaluation may have."""
    better = {"low": "lower", "high": "higher", None: "neither"}
    return table(
        ("key", "number", "better", "unit", "needs"),
        [(f"`{m.key}`", m.heading, better[m.better], m.unit or "1", m.needs) for m in METRICS.values()],
    )


def public_students() -> str:
    """The public students that an evaluation can run, with their settings."""

    def settings(rival: Rival) -> str:
        made = [] if rival.scheduler is None else [rival.scheduler.__name__]
        made += [f"{k}={v}" for k, v in {**rival.options, **rival.call}.items()]
        return ", ".join(made) or "its own"

    kinds = {"network": "all weights", "pipeline": "a whole pipeline"}
    return table(
        (
            "name",
            "base",
            "repository",
            "steps",
            "times",
            "guidance",
            "strength",
            "scheduler and options",
            "settings from",
        ),
        [
            (
                f"`{r.name}`",
                r.base.removesuffix("Pipeline") + (f" ({r.of})" if r.of else ""),
                r.repo,
                r.steps,
                ", ".join(map(str, r.times)) or "the scheduler's",
                f"{r.guidance:g}",
                kinds.get(r.kind, f"{r.strength:g}"),
                (f"not run: {r.missing}" if r.missing else settings(r)) + (f"; {r.size} pixels" if r.size else ""),
                f"<{r.source}>" + (f"; not checked: {r.unchecked}" if r.unchecked else ""),
            )
            for r in RIVALS
        ],
    )


# The tree.


def tree() -> str:
    """Every package and what it holds, in the order of its imports."""
    order = (
        "core", "objectives", "backbones", "roles", "heads", "methods", "student", "data", "training", "evaluation",
        "report", "study", "runs", "studio", "cli", "zoo",
    )  # fmt: skip
    package = ROOT / "src" / "fewstep"
    found = {p.parent.name for p in package.glob("*/__init__.py")}
    assert found == set(order), found ^ set(order)

    def text(name: str) -> str:
        return ast.get_docstring(ast.parse((package / name / "__init__.py").read_text(encoding="utf-8"))) or ""

    return table(("`src/fewstep/`", "holds"), [(f"`{name}/`", text(name).split("\n")[0].rstrip(".")) for name in order])


PARTS: dict[str, Callable[[], str]] = {
    "headline": headline,
    "demo": demo,
    "stages": stages,
    "ablations": ablations,
    "rivals": rivals,
    "race": race,
    "arena": arena,
    "arena-longer": arena_longer,
    "arena-settings": arena_settings,
    "arena-tuned": arena_tuned,
    "arena-heads": arena_heads,
    "rewards": rewards,
    "claims": claims,
    "transfer": transfer,
    "trajpl-network": trajpl_network,
    "shape": shape,
    "trajpl-emoji": trajpl_emoji,
    "trajpl-pixel": trajpl_pixel,
    "trajpl-matched": trajpl_matched,
    "video": video,
    "cost": cost,
    "families": families,
    "cards": cards,
    "recipe-settings": recipe_settings,
    "presets": presets,
    "metrics": metrics,
    "public-students": public_students,
    "tree": tree,
}


def made(text: str) -> str:
    """Return a page with its generated parts as they are now."""
    return PART.sub(lambda found: f"{found[1]}{PARTS[found['name']]()}{found[4]}", text)


def main() -> int:
    """Write all pages, or say which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a page is out of date")
    check = parser.parse_args().check
    old = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        before = page.read_text(encoding="utf-8")
        if (now := made(before)) != before:
            old.append(page.relative_to(ROOT).as_posix())
            if not check:
                page.write_text(now, encoding="utf-8")
    for name in old:
        print(f"{'out of date' if check else 'written'}: {name}")
    return int(check and bool(old))


if __name__ == "__main__":
    sys.exit(main())
