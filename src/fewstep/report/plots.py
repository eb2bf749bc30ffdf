"""Charts of a run as inline SVG.

Colours are CSS variables with the light colour as fallback, and text is text in the page's own font, so that
one drawing serves a light and a dark page. Figures are plain objects; pyplot is never imported, and
matplotlib's settings differ only while an SVG is written.
"""

import html
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ..evaluation.metrics import OTHERS
from .live import Metrics, series
from .space import box_around, walls
from .summary import at_equal_cost
from .table import Row
from .words import finite, plural

INK, MUTED, LINE = "#1d1d20", "#6a6a72", "#e5e2dc"
STUDENT, FAKE, TEACHER = "#2457c5", "#a94d08", "#6c6c75"
SEGMENTS = ("#4a3a8f", "#2f68b0", "#14757a", "#287a47", "#6a6e0c", "#8f5d0c")  # from noise to clean
VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line", STUDENT: "student", FAKE: "fake", TEACHER: "teacher"}
VARIABLES |= {colour: f"segment-{i}" for i, colour in enumerate(SEGMENTS)}

WIDTH, HEIGHT = 400, 230  # units of the SVG; one unit is about one pixel on a phone
FONT = 11
POINTS = 600  # of one line
FEW = 12  # samples behind a curve, which more would hide

CLEANING = (  # parts of matplotlib's SVG that a page does not need
    (r"^.*?<svg[^>]*>", ""),
    (r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", ""),
    (r'<g id="[^"]*"/>', ""),
    (r'<g id="[^"]*">', "<g>"),
    (r"font: ([\d.]+px) [^;\"]*", r"font-size: \1"),
    (r"font-family: [^;\"]*; ", ""),
    (r"xlink:href", "href"),
    (r"\s*\n\s*", "\n"),
)


@dataclass(frozen=True)
class Chart:
    """A drawing with a title and a caption.

    `caption` says what is shown and how to read the drawing.
    """

    title: str
    caption: str
    svg: str


WORDS = {
    "Quality against cost": (
        "Fréchet distance to real images, lower is better, against network evaluations per image. "
        "A guided step counts two."
    ),
    "Distance to real images while training": (
        "Fréchet distance of the student, lower is better. Dashed: the teacher, with its network evaluations per "
        "image, in most steps and at the student's cost."
    ),
    "Prompt match while training": (
        "Share of the student's images whose nearest real image is the one of their own prompt, higher is "
        "better. Dashed: the teacher, with its network evaluations per image, at its fullest and the best it "
        "draws at the student's cost."
    ),
    "Distance to the teacher while training": (
        "Fréchet distance of the student's images to the teacher's, lower is better. The band is the 95 % interval "
        "over prompts."
    ),
    "Drift while training": (
        "Saturation, contrast, sharpness and the deviation of latents, as multiples of the teacher's. A student that "
        "keeps its teacher's look stays near 1."
    ),
    "Matching gap by step": (
        "Root mean square difference between what the fake score and the teacher expect, for each step of the "
        "student. Falling means that the student's images look more and more like the teacher's; step 1 starts "
        "from noise."
    ),
    "Losses": (
        "Faint: every iteration. Strong: average over a twentieth of them. "
        "These need not fall: the student and the fake score chase each other, so judge by the images and the "
        "distances above."
    ),
    "Gradient norms": "Before clipping. A steady climb is the first sign that a learning rate is too high.",
    "Straying from the teacher": (
        "Distance to the teacher's state from the same noise, relative to the clean state, along the way from "
        "noise (0) to data (1), on trajectories that it was trained on. "
        "Lower is better."
    ),
    "Trajectories in three dimensions": (
        "From noise x_T to data x_0: each along its own straight line, and along the two principal directions of "
        "what bends away from it, in the line's length; every axis has a scale of its own. "
        "Faint: samples, with their shadows. Strong: their mean. Dashed: the fitted curve."
    ),
    "How few directions the bend takes": (
        "Share of a trajectory's departure from its straight line, in squared distance, that lies along its own "
        "first one, two and three principal directions; averaged over samples."
    ),
    "The shape that trajectories share": (
        "Coordinates of the teacher's trajectories along the path from noise (0) to data (1): along the straight "
        "line, then along the two principal directions of what is left. "
        "Faint: samples. Strong: their mean. Dashed: the fitted curve."
    ),
    "The bend, seen along the straight line": (
        "The two coordinates off the straight line, in its length. Faint: samples. Strong: their mean."
    ),
}
OF_TRAJECTORIES = 5  # the last charts, of the teacher's trajectories or of those of the student `sampled_from`


def charts(metrics: Sequence[Metrics], rows: Sequence[Row], shape: Mapping[str, Any] | None = None) -> list[Chart]:
    """Return every chart for which there is something to show.

    Empty without metrics, rows and `shape`. `shape` is the content of `trajectories.json`.
    """
    figures = (
        quality_cost(rows),
        quality(metrics, rows, "fd_real"),
        quality(metrics, rows, "retrieval_top1", percent=True),
        quality(metrics, rows, "fd_teacher"),
        drifting(metrics),
        gaps(metrics),
        losses(metrics),
        gradients(metrics),
        trajectory_errors(shape or {}),
        space(shape or {}),
        explained(shape or {}),
        coordinates(shape or {}),
        bend(shape or {}),
    )
    walker, found = (shape or {}).get("sampled_from"), list[Chart]()
    for i, ((title, caption), figure) in enumerate(zip(WORDS.items(), figures, strict=True)):
        if walker and i >= len(WORDS) - OF_TRAJECTORIES:
            title, caption = (w.replace("the teacher", f"the student in {walker}") for w in (title, caption))
        if figure is not None:
            found.append(Chart(title, caption, to_svg(figure, title)))
    return [*found, *of_packages(metrics, rows)]


def of_packages(metrics: Sequence[Metrics], rows: Sequence[Row]) -> Iterator[Chart]:
    """Yield a chart of each number of another package that was measured."""
    for metric in OTHERS:
        figure = quality(metrics, rows, metric.key, highest=metric.better == "high") if metric.curve else None
        if figure is not None:
            title = f"{metric.heading} along the training"
            which = {"high": "higher", "low": "lower"}.get(metric.better or "", "neither end")
            yield Chart(title, f"Of the student at every preview; {which} is better.", to_svg(figure, title))


def losses(metrics: Sequence[Metrics]) -> Figure | None:
    """Plot losses of the student and the fake score.

    The plots stand one above the other: their scales have nothing in common.
    """
    wanted = (("student", STUDENT, "student_loss"), ("fake score", FAKE, "fake_loss"))
    found = [f for f in ((name, colour, *series(metrics, key)) for name, colour, key in wanted) if len(f[2]) > 1]
    if not found:
        return None
    figure = _figure()
    for i, axes in enumerate(np.atleast_1d(figure.subplots(len(found), 1, sharex=True))):
        name, colour, x, y = found[i]
        _style(axes, "", "iteration" if i == len(found) - 1 else "")
        axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        _curve(axes, x, y, colour)
        _focus(axes, [y])
        _label_ends(axes, [(name, colour, float(smooth(y)[-1]))])
    return figure


def gaps(metrics: Sequence[Metrics]) -> Figure | None:
    """Plot the matching gap of each segment, logarithmic.

    The gap is `rms |f_fake - f_teacher|`, with keys `gap_0` (from noise) to `gap_{K-1}`. Of a student of
    several step counts the keys are `gap_K_0` ..., and the curves are those of the largest K.
    """
    found = {
        key: [int(n) for n in key[4:].split("_")] for m in metrics for key in m if re.fullmatch(r"gap_(\d+_)?\d+", key)
    }
    most = max((n[0] for n in found.values() if len(n) == 2), default=0)
    keys = sorted((key for key, n in found.items() if len(n) == 1 or n[0] == most), key=lambda key: found[key])
    colours = [SEGMENTS[round(i * (len(SEGMENTS) - 1) / max(len(keys) - 1, 1))] for i in range(len(keys))]
    return _logarithmic(
        metrics, [(f"step {found[key][-1] + 1}", colour, key) for key, colour in zip(keys, colours, strict=True)]
    )


def gradients(metrics: Sequence[Metrics]) -> Figure | None:
    """Plot gradient norms of both trained roles, logarithmic."""
    return _logarithmic(metrics, [("student", STUDENT, "student_grad"), ("fake score", FAKE, "fake_grad")])


def trajectory_errors(shape: Mapping[str, Any]) -> Figure | None:
    """Plot the cumulative error of few steps along the trajectory.

    `errors`: name -> {s, error}.
    """
    if not shape.get("errors"):
        return None
    axes = _axes("", "path from noise to data")
    ends = []
    for (name, walk), colour in zip(shape["errors"].items(), cycle((TEACHER, FAKE, STUDENT, *SEGMENTS))):
        axes.plot(walk["s"], walk["error"], color=colour, lw=1.6, marker="o", ms=4, mec="none")
        ends.append((name, colour, walk["error"][-1]))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(y=0.12)
    _label_ends(axes, ends)
    return axes.figure


def coordinates(shape: Mapping[str, Any]) -> Figure | None:
    """Plot the three coordinates along the trajectory.

    The curves are samples, mean and fit.
    """
    if not shape.get("mean"):
        return None
    figure = _figure()
    s, mean, fit, samples = (np.asarray(shape[k]) for k in ("s", "mean", "fit", "samples"))
    for i, axes in enumerate(figure.subplots(3, 1, sharex=True)):
        _style(axes, "", "path from noise to data" if i == 2 else "")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(3))
        for sample in samples[:FEW]:
            axes.plot(s, sample[:, i], color=TEACHER, lw=0.7, alpha=0.35)
        axes.plot(s, mean[:, i], color=STUDENT, lw=1.8)
        axes.plot(s, fit[:, i], color=FAKE, lw=1.4, dashes=(4, 3))
        _label_ends(axes, [(f"R² {shape['r2'][i]:.4f}", FAKE, float(fit[-1, i]))])
    return figure


def bend(shape: Mapping[str, Any]) -> Figure | None:
    """Plot the second and third coordinate against each other."""
    if not shape.get("mean"):
        return None
    axes = _axes("", "second coordinate")
    mean, samples = np.asarray(shape["mean"]), np.asarray(shape["samples"])
    for sample in samples[:FEW]:
        axes.plot(sample[:, 1], sample[:, 2], color=TEACHER, lw=0.8, alpha=0.4)
    axes.plot(mean[:, 1], mean[:, 2], color=STUDENT, lw=2)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    _label_ends(axes, [("mean", STUDENT, float(mean[-1, 2]))])
    return axes.figure


def space(shape: Mapping[str, Any]) -> Figure | None:
    """Plot all three coordinates in a box.

    Noise is at the box's left, data at its right. The curves are samples with shadows, mean and fit. The
    second coordinate, in which trajectories bend most, goes up, and the third to the back.
    """
    if not shape.get("mean"):
        return None
    samples, mean, fit = (np.asarray(shape[k])[..., [0, 2, 1]] * (-1, 1, 1) for k in ("samples", "mean", "fit"))
    box, axes = box_around(np.concatenate([samples, mean[None], fit[None]])), _figure().subplots()
    axes.set_axis_off()
    for wall in walls():
        axes.plot(*wall.T, color=LINE, lw=0.8)
    for sample in samples:
        axes.plot(*box.shadow(sample).T, color=LINE, lw=0.7)
    for sample in samples:
        axes.plot(*box.on_page(sample).T, color=TEACHER, lw=0.7, alpha=0.4)
    axes.plot(*box.on_page(mean).T, color=STUDENT, lw=2)
    axes.plot(*box.on_page(fit).T, color=FAKE, lw=1.4, dashes=(4, 3))
    axes.plot(*box.on_page(mean[[0, -1]]).T, color=STUDENT, ls="", marker="o", ms=5, mec="none")
    ends = box.on_page(mean[[0, -1]])
    low, high = ([f"{round(x, 2) + 0:g}" for x in side.tolist()] for side in (box.low, box.high))
    words = (  # position, text, colour, alignment
        (ends[0] - (0.04, 0), "noise", INK, "right"),
        (ends[1] + (0.04, 0), "data", INK, "left"),
        ((0.5, -0.14), "along the straight line", MUTED, "center"),
        ((-0.03, 0.02), low[2], MUTED, "right"),
        ((-0.03, 0.73), high[2], MUTED, "right"),
        ((0.12, 0.92), "first direction", MUTED, "right"),
        ((1.03, -0.13), low[1], MUTED, "left"),
        ((1.37, 0.14), high[1], MUTED, "left"),
        ((1.19, -0.06), "second direction", MUTED, "left"),
    )
    for place, text, colour, side in words:
        axes.text(*place, text, color=colour, fontsize=FONT, ha=side, va="center").set_in_layout(False)
    axes.set_xlim(-0.25, 1.66)
    axes.set_ylim(-0.19, 1.0)
    return axes.figure


def explained(shape: Mapping[str, Any]) -> Figure | None:
    """Plot what few principal directions explain, as bars.

    One, two and three directions explain a share of the part orthogonal to the straight line.
    """
    if not shape.get("unexplained"):
        return None
    shares = [100 * (1 - left) for left in shape["unexplained"]]
    axes = _axes("", "% explained")
    axes.grid(visible=False)
    axes.barh(range(len(shares)), shares, color=STUDENT, height=0.28)
    axes.set_xlim(0, 100)
    axes.set_yticks(range(len(shares)), [plural(i + 1, "direction") for i in range(len(shares))])
    axes.invert_yaxis()
    for i, share in enumerate(shares):
        axes.text(
            1.02, i, f"{share:.1f} %", color=STUDENT, fontsize=FONT, va="center", transform=axes.get_yaxis_transform()
        )
    return axes.figure


def quality(
    metrics: Sequence[Metrics], rows: Sequence[Row], key: str, percent: bool = False, highest: bool | None = None
) -> Figure | None:
    """Plot `key` of the student at every evaluation.

    Horizontal lines are the teacher's best row at the student's cost, and the teacher's row with the most
    evaluations. The student that is measured during the training is the default student, the first of
    `rows`. `percent` marks shares. `highest` says whether more is better; of shares it is.
    """
    x, y = series(metrics, f"quality.{key}")
    if len(x) < 2:
        return None
    factor = 100 if percent else 1
    axes = _axes("%" if percent else "", "iteration")
    values = [factor * v for v in y]
    axes.plot(x, values, color=STUDENT, lw=1.8, marker="o", ms=4, mec="none")
    ends = [series(metrics, f"quality.{key}_{end}") for end in ("low", "high")]
    if all(at == x for at, _ in ends):
        axes.fill_between(x, *([factor * v for v in end] for _, end in ends), color=STUDENT, alpha=0.15, lw=0)
    known = [r for r in rows if r.get("model") == "teacher" and finite(r.get(key)) and finite(r.get("nfe"))]
    student = next((r for r in rows if r.get("model") == "student"), {})
    same = at_equal_cost(known, student, key, highest=percent if highest is None else highest)
    full = max(known, key=lambda r: float(r["nfe"]), default=None)
    teachers = [r for r in (same, full) if r is not None]
    levels = [(f"teacher ({r['nfe']:g})", factor * r[key]) for r in (teachers[:1] if same is full else teachers)]
    for _, level in levels:
        axes.axhline(level, color=TEACHER, lw=1, dashes=(4, 3))
    axes.margins(y=0.12)
    _label_ends(axes, [("student", STUDENT, values[-1]), *((name, TEACHER, level) for name, level in levels)])
    return axes.figure


def drifting(metrics: Sequence[Metrics]) -> Figure | None:
    """Plot the drift of the student's images at every evaluation."""
    wanted = (
        ("saturation", "saturation"),
        ("contrast", "contrast"),
        ("sharpness", "sharpness"),
        ("latents", "state_std"),
    )
    lines = [(name, *series(metrics, f"quality.{key}_ratio")) for name, key in wanted]
    found = [line for line in lines if len(line[1]) > 1]
    if not found:
        return None
    axes, colours = _axes("", "iteration"), (STUDENT, FAKE, *SEGMENTS[:1], SEGMENTS[3])
    axes.axhline(1, color=TEACHER, lw=1, dashes=(4, 3))
    for (_, x, y), colour in zip(found, colours, strict=False):
        axes.plot(x, y, color=colour, lw=1.6, marker="o", ms=3.5, mec="none")
    axes.margins(y=0.12)
    _label_ends(axes, [(name, colour, y[-1]) for (name, _, y), colour in zip(found, colours, strict=False)])
    return axes.figure


def quality_cost(rows: Sequence[Row]) -> Figure | None:
    """Plot `fd_real` against network evaluations per image.

    Each model has one line, the teacher one with and one without guidance.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if finite(row.get("nfe")) and finite(row.get("fd_real")) and row["nfe"] > 0:
            guided = finite(row.get("guidance")) and row["guidance"] > 1 and row.get("model") == "teacher"
            name = f"{row['model']}, guided" if guided else str(row["model"])
            lines.setdefault(name, []).append((float(row["nfe"]), float(row["fd_real"])))
    if sum(map(len, lines.values())) < 2:
        return None
    axes = _axes("", "network evaluations per image")
    axes.set_xscale("log")
    ticks = sorted({x for points in lines.values() for x, _ in points})
    axes.set_xticks([x for i, x in enumerate(ticks) if i == 0 or x / ticks[i - 1] > 1.2 or i == len(ticks) - 1])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    others = cycle((FAKE, *SEGMENTS))
    ends = []
    for name, points in lines.items():
        colour = TEACHER if name.startswith("teacher") else STUDENT if name == "student" else next(others)
        x, y = zip(*sorted(points), strict=True)
        dash, marker = ("--", "s") if name == "teacher" else ("-", "o")
        axes.plot(x, y, color=colour, lw=1.6, ls=dash, marker=marker, ms=5.5, mec="none")
        ends.append((name, colour, y[-1]))
    axes.margins(x=0.08, y=0.12)
    _label_ends(axes, ends)
    return axes.figure


def smooth(values: Sequence[float]) -> np.ndarray:
    """Average over a window of about a twentieth of all values.

    The window is centred on each value, and shrinks at both ends.
    """
    y = np.asarray(values, float)
    total, here = np.concatenate(([0.0], y.cumsum())), np.arange(len(y))
    half = len(y) // 40
    low, high = np.maximum(here - half, 0), np.minimum(here + half + 1, len(y))
    return (total[high] - total[low]) / (high - low)


def thin(x: Sequence[float], y: Sequence[float], points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Reduce a line to at most `points` points.

    Of each stretch the lowest and the highest point are kept, so that no spike is lost.
    """
    xs, ys = np.asarray(x, float), np.asarray(y, float)
    if len(xs) <= points:
        return xs, ys
    stretches = np.array_split(np.arange(len(xs)), points // 2)
    kept = np.unique([i for s in stretches for i in (s[ys[s].argmin()], s[ys[s].argmax()])])
    return xs[kept], ys[kept]


def to_svg(figure: Figure, title: str) -> str:
    """Return the figure as one `<svg>` element for a page.

    `title` is read out to those who cannot see the figure.
    """
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a model's name may hold a dollar sign
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    svg = buffer.getvalue()
    for pattern, new in CLEANING:
        svg = re.sub(pattern, new, svg, flags=re.DOTALL)
    svg = re.sub("|".join(VARIABLES), lambda m: f"var(--{VARIABLES[m[0]]}, {m[0]})", svg)
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">{svg.strip()}'
    )


def _figure() -> Figure:
    return Figure(figsize=(WIDTH / 72, HEIGHT / 72), dpi=72, layout="constrained")


def _axes(unit: str, across: str) -> Axes:
    axes = _figure().subplots()
    _style(axes, unit, across)
    return axes


def _style(axes: Axes, unit: str, across: str) -> None:
    axes.patch.set_visible(False)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(LINE)
    axes.grid(axis="y", color=LINE, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=MUTED, labelsize=FONT, length=0, pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}{unit and ' ' + unit}"))
    if across:
        axes.set_xlabel(across, color=MUTED, fontsize=FONT, loc="left")


def _curve(axes: Axes, x: Sequence[int], y: Sequence[float], colour: str) -> None:
    """Draw every value faint, and the running average strong."""
    axes.plot(*thin(x, y), color=colour, lw=0.8, alpha=0.28)
    axes.plot(*thin(x, list(smooth(y))), color=colour, lw=1.8, solid_capstyle="round")


def _logarithmic(metrics: Sequence[Metrics], wanted: Sequence[tuple[str, str, str]]) -> Figure | None:
    found = []
    for name, colour, key in wanted:
        x, y = series(metrics, key)
        positive = [(i, v) for i, v in zip(x, y, strict=True) if v > 0]
        if len(positive) > 1:
            found.append((name, colour, [i for i, _ in positive], [v for _, v in positive]))
    if not found:
        return None
    axes = _axes("", "iteration")
    axes.set_yscale("log")
    for _, colour, x, y in found:
        _curve(axes, x, y, colour)
    _focus(axes, [y for *_, y in found])
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    _label_ends(axes, [(name, colour, float(smooth(y)[-1])) for name, colour, _, y in found])
    return axes.figure


def _focus(axes: Axes, values: Sequence[Sequence[float]]) -> None:
    """Keep a few wild values from flattening the rest.

    The view holds all averages and 98 % of the raw values.
    """
    averages = [smooth(v) for v in values]
    low = min([float(np.quantile(v, 0.01)) for v in values] + [float(a.min()) for a in averages])
    high = max([float(np.quantile(v, 0.99)) for v in values] + [float(a.max()) for a in averages])
    if axes.get_yscale() == "log":
        room = (high / low) ** 0.06 if high > low else 1.3
        axes.set_ylim(low / room, high * room)
    else:
        room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        axes.set_ylim(low - room, high + room)


def _label_ends(axes: Axes, ends: Sequence[tuple[str, str, float]]) -> None:
    """Write names at the right ends of their lines.

    Names that would overlap are moved apart. `ends` are (name, colour, last value).
    """
    axes.get_ylim()  # matplotlib computes the limits when they are read
    to_share = axes.transScale + axes.transLimits
    height = axes.get_subplotspec().get_gridspec().nrows * 0.085 if axes.get_subplotspec() is not None else 0.085
    places = [(float(to_share.transform((1, value))[1]), name, colour) for name, colour, value in ends]
    apart: list[float] = []
    for share, _, _ in sorted(places):
        apart.append(max(share, apart[-1] + height) if apart else max(share, 0.0))
    for i in reversed(range(len(apart))):
        apart[i] = min(apart[i], apart[i + 1] - height if i + 1 < len(apart) else 1.0)
    for y, (_, name, colour) in zip(apart, sorted(places), strict=True):
        axes.text(1.02, y, name, color=colour, fontsize=FONT, va="center", transform=axes.transAxes)
