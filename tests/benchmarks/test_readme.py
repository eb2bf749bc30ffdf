"""README's numbers are those of the benchmarks: every percentage is worked out again from what they wrote."""

import json
import re
from statistics import mean, stdev
from typing import Any

from tests.project import ROOT

NUMBERS = re.compile(r"\d[\d.,]*\s*%")


def stored(name: str) -> dict[str, Any]:
    value = json.loads((ROOT / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))
    assert isinstance(value, dict)
    return value


def words(text: str) -> str:
    """Without line breaks and bold face."""
    return " ".join(text.replace("**", "").split())


def retrieval(r: dict[str, Any]) -> str:
    return f"{100 * r['retrieval_top1']:.1f} % / {100 * r['retrieval_top5']:.1f} %"


def of_demo() -> list[str]:
    """Every row of `make demo`."""
    said = []
    for r in stored("demo")["rows"]:
        guidance = f"{r['guidance']:g}" if r["guidance"] > 1 else "none"
        cells = [str(r["steps"]), guidance, str(r["nfe"]), f"{r['fd_real']:.1f}", retrieval(r), f"{r['diversity_ratio']:.2f}"]
        said.append(f"| {' | '.join(cells)} |")
    best = [f"{min(r['fd_real'] for r in stored('demo')['rows'] if r['model'] == 'teacher' and r['nfe'] == n):.1f}" for n in (4, 2, 1)]
    floor = f"as many real emoji score {stored('demo')['fd_floor']:.1f}"
    return [*said, floor, f"the best that the teacher draws in as many calls: here its unguided steps, {' / '.join(best)} in 4 / 2 / 1,"]


def of_stages() -> list[str]:
    rows = stored("stages")["rows"]
    teacher = rows[0]["teacher"]
    said = [f"| 100 | {teacher['fd_real']:.2f} | {retrieval(teacher)} |"]
    for key, minutes in (
        ("tdm", "30"),
        ("tdm-520", "12"),
        ("stages-half", "5.5"),
        ("stages", "15"),
        ("imitation-equal", "15"),
        ("trajpl-equal", "15"),
    ):
        own = [r for r in rows if r["key"] == key]
        assert abs(mean(r["seconds"] for r in own) / 60 - float(minutes)) < 0.5
        means = {k: mean(r["row"][k] for r in own) for k in ("fd_real", "retrieval_top1", "retrieval_top5")}
        several = " (2)" if len(own) > 1 else ""
        said.append(f"| {minutes} | 4 | {means['fd_real']:.2f}{several} | {retrieval(means)} |")
    return said


def of_long_runs() -> list[str]:
    """Trainings of an hour, which are told in the log and in their recipes' headers."""
    log, said = words((ROOT / "docs" / "log.md").read_text(encoding="utf-8")), []
    for logged, shown in (
        ("then matching | 8.95 | 64.1 % / 84.6 %", "8.95 | 64.1 % / 84.6 %"),
        ("imitation | 9.03 | 62.3 % / 85.2 %", "9.03 | 62.3 % / 85.2 %"),
        ("9.38, 62.3 % / 84.8 %", "9.38 | 62.3 % / 84.8 %"),
        ("9.18, 58.8 %", "9.18 | 58.8 % / 84.2 %"),
        ("10.03, 57.2 %", "10.03 | 57.2 % / 83.4 %"),
        ("12.65, 52.1 %", "12.65 | 52.1 % / 78.5 %"),
        ("`parallel` 0 | 8.47 | 65.2 %", "has 8.5 and 65.2 % in 23 calls"),
    ):  # fmt: skip
        assert logged in log
        said.append(shown)
    return said


def fd(results: dict[str, Any], key: str, draw: str) -> list[float]:
    """FD of one variant called in one way, seed by seed."""
    return [r["fd_real"] for seed in range(3) for r in results[f"{key}-{seed}"]["rows"] if r["draw"] == draw]


def of_parts() -> list[str]:
    results, four, clean = stored("tdm")["results"], "4 steps", "4 steps, tested with ddim"

    def beside(key: str, other: str, *draws: str) -> str:
        own, theirs = fd(results, key, draws[0]), fd(results, other, draws[-1])
        return f"{mean(a - b for a, b in zip(own, theirs, strict=True)):+.2f}"

    counts = ("1 step", "2 steps", four)
    diversity = [
        mean(r["diversity_ratio"] for s in range(3) for r in results[f"{key}-{s}"]["rows"] if r["draw"] == four)
        for key in ("no-importance", "tdm-4")
    ]
    unify = " / ".join(f"{mean(fd(results, 'unify', c)):.2f}" for c in counts)
    lcm = [mean(fd(results, key, draw)) for key, draw in (("lcm", clean), ("rescued", clean), ("lcm", four))]
    ends = {
        key: (mean(fd(results, key, four)), mean(results[f"{key}-{s}"]["seconds"] for s in range(3)) / 60) for key in ("dmd2-5", "tdm-4")
    }
    return [
        f"Beside TDM in 4 steps, {mean(fd(results, 'tdm-4', four)):.2f}: tau beyond its segment, so one fake score for all of them, {beside('no-segments', 'tdm-4', four)};",
        f"the importance draw left out {beside('no-importance', 'tdm-4', four)} and diversity {diversity[0]:.2f} instead of {diversity[1]:.2f}",
        f"clean samples matched in the place of noisy ones {beside('clean-segment', 'tdm-4', four)}, which is level",
        f"two changes, {beside('clean', 'tdm-4', clean, four)})",
        f"Beside TDM-unify in 1 / 2 / 4 steps, {unify}: the step count not told {' / '.join(beside('no-condition', 'unify', c) for c in counts)}.",
        f"at rates of their own, two changes: {beside('full', 'tdm-4', four)}.",
        f"DMD2 with five ends at {ends['dmd2-5'][0]:.2f} after {ends['dmd2-5'][1]:.0f} minutes, TDM at {ends['tdm-4'][0]:.2f} after {ends['tdm-4'][1]:.1f}.",
        f"{lcm[0]:.1f} to {lcm[1]:.1f} under DDIM, where the LCM re-noising has {lcm[2]:.1f}.",
    ]  # fmt: skip


def share(own: list[dict[str, float]], rival: list[dict[str, float]], slack: float) -> float:
    """Percent of the rival's time to its best that the other takes to it."""
    level = min(p["fd_real"] for p in rival) + slack
    took, needed = (next(p["seconds"] for p in curve if p["fd_real"] <= level) for curve in (own, rival))
    return 100 * took / needed


def of_race() -> list[str]:
    results = stored("race/tdm")["results"]
    pairs = [(results[f"tdm-4-{s}"]["curve"], results[f"dmd2-{s}"]["curve"]) for s in range(3)]
    best = [min(rival, key=lambda p: p["fd_real"]) for _, rival in pairs]
    minutes = mean(p["seconds"] for p in best) / 60
    letter, about = (mean(share(own, rival, slack) for own, rival in pairs) for slack in (0.0, 0.15))
    took = mean(share(own, rival, 0.0) / 100 * b["seconds"] / 60 for (own, rival), b in zip(pairs, best, strict=True))
    return [
        f"DMD2 with ten fake updates ({mean(p['fd_real'] for p in best):.1f} after {minutes:.0f} minutes) after {took:.1f}, {letter:.0f} % of its time "
        f"({about:.0f} % where both are granted 0.15, the noise)"
    ]


def of_finetunes() -> list[str]:
    rows = stored("finetunes")["rows"]

    def far(model: str, **how: float) -> str:
        own = [
            [r["fd_teacher"] for r in rows if r["style"] == style and re.fullmatch(model, r["model"]) and how.items() <= r.items()]
            for style in ("twemoji", "fluent")
        ]
        return " and ".join(f"{mean(values):.2f}" for values in own)  # fmt: skip

    return [
        f"is {far('tdm-4-.')} of FD from their own 24-call samples in 4 calls",
        f"in 4 unguided calls {far('teacher', nfe=4)}, in 4 guided steps, 8 calls, {far('teacher', nfe=8)};",
        f"the teacher without the style {far('plain')}; LCM's LoRA {far('lcm-.')}, DMD2's {far('dmd2-5-.')};",
        f"distilled from the fine-tune itself {far('own.*')};",
    ]


def measured(part: str, key: str, what: str, calls: int) -> list[float]:
    return [r["measured"][what][str(calls)] for r in stored("trajpl")["rows"] if (r["part"], r["key"]) == (part, key)]


def percent(value: float) -> str:
    """Two digits, as the README has them."""
    return f"{100 * value:.0f}" if value >= 0.1 else f"{100 * value:.1f}"


def of_trajpl() -> list[str]:
    def ends(*keys: str) -> str:
        return " / ".join(percent(min(mean(measured("network", key, "error", n)) for key in keys)) for n in (2, 4, 6)) + " %"

    def draws(*keys: str) -> str:
        return " / ".join(f"{min(mean(measured('emoji', key, 'fd', n)) for key in keys):.1f}" for n in (1, 2, 4, 6))

    floors = next(r["teacher"] for r in stored("trajpl")["rows"] if r["part"] == "pixel")

    def taken(key: str, what: str) -> list[float]:
        start = mean(measured("pixel", "ddim", what, 2))
        return [100 * (start - x) / (start - floors[what]) for x in measured("pixel", key, what, 2)]

    classes = {key: taken(key, "fd_classes") for key in ("trajp-l", "lora", "head", "two-matched")}
    lite = [mean(taken(key, "fd")) for key in classes]
    assert [len(v) for v in classes.values()] == [1, 1, 1, 3]
    matched = classes["two-matched"]
    return [
        f"2 / 4 / 6 calls end {ends('trajp-l')} from where the teacher does, LoRA with PAS's shared weights in the place of the head {ends('lora-pas')}, "
        f"LoRA alone {ends('lora')}, the head alone {ends('head')}, DDIM {ends('ddim')}, the best other solver {ends('ipndm', 'dpmpp')}",
        f"TrajP-L {draws('trajp-l')}, LoRA alone {draws('lora')}, the head alone {draws('head')}, all weights without a head {draws('sfd')}, "
        f"the teacher's best unguided solver {draws('ddim', 'dpmpp', 'ipndm')}",
        f"TrajP-L takes away {classes['trajp-l'][0]:.1f} %, LoRA alone {classes['lora'][0]:.1f} %, the head alone {classes['head'][0]:.1f} %",
        f"and then TDM anchored to the trajectories {mean(matched):.1f} ± {stdev(matched):.1f} %",
        f"these are {', '.join(f'{x:.1f}' for x in lite[:-1])} and {lite[-1]:.1f} %",
        f"with {100 * next(r['share'] for r in stored('trajpl')['rows'] if (r['part'], r['key']) == ('emoji', 'trajp-l')):.0f} % of the weights trained",
    ]


def of_video() -> list[str]:
    rows = {r["model"]: r for r in stored("video")["rows"]}
    student, few, full = rows["student"], rows["teacher-4"], rows["teacher"]
    return [
        f"has {100 * student['of_teacher']:.0f} % of the teacher's motion (the teacher in 4 unguided steps, 4 calls: {100 * few['of_teacher']:.0f} %)",
        f"(FD {student['fd_looks']:.1f}; teacher {full['fd_looks']:.1f}, in 4 unguided steps {few['fd_looks']:.1f};",
    ]


def of_cost() -> list[str]:
    ratio = {r["roles"]: r["ratio"] for r in stored("step_cost")["rows"]}
    return [f"costs {ratio['shared LoRA']:.2f} times its bare network calls with a shared LoRA, {ratio['copies']:.2f} with copies"]


CLAIMS = (of_demo, of_stages, of_long_runs, of_parts, of_race, of_finetunes, of_trajpl, of_video, of_cost)


def test_every_percentage_of_the_readme_is_worked_out_again_from_the_benchmarks() -> None:
    """Every claim stands there as it is worked out, and no percentage stands there that is in no claim."""
    text = words((ROOT / "README.md").read_text(encoding="utf-8"))
    rest = text
    for claims in CLAIMS:
        for said in claims():
            assert words(said) in text, f"{claims.__name__}: README does not say: {said}"
            rest = rest.replace(words(said), "")
    assert NUMBERS.findall(rest) == []


def test_the_demo_s_best_teacher_at_equal_cost_stands_beside_its_student() -> None:
    """README's rows have all that the teacher draws at the student's cost."""
    rows = stored("demo")["rows"]
    for student in (r for r in rows if r["model"] == "student"):
        assert [r for r in rows if r["model"] == "teacher" and r["nfe"] == student["nfe"]]
    text = words((ROOT / "README.md").read_text(encoding="utf-8"))
    assert text.count("| teacher | ") == sum(r["model"] == "teacher" for r in rows)
