"""Charts show what there is, draw the values at their places, and are safe to put into a page."""

import sys
import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from fewstep.report.plots import (
    FEW,
    charts,
    coordinates,
    explained,
    gaps,
    losses,
    quality,
    quality_cost,
    smooth,
    space,
    thin,
    to_svg,
)
from fewstep.report.space import box_around

TRAINING = {"student_loss": 2.0, "student_grad": 1.0, "fake_grad": 0.5, "gap_1": 0.2}
QUALITY = {i: {"quality": {"fd_real": 150.0 - i, "retrieval_top1": 0.5 + i / 100}} for i in (10, 20, 30, 40)}
REGRESSION_LOSSES = [
    {"iteration": i, "fake_loss": 1.0 / i, "gap_0": 0.4 / i, **TRAINING, **QUALITY.get(i, {})} for i in range(1, 41)
]
ROWS = [
    {"model": "teacher", "steps": 50, "guidance": 3.5, "nfe": 100, "fd_real": 100.0, "retrieval_top1": 0.9},
    {"model": "teacher", "steps": 4, "guidance": 1.0, "nfe": 4, "fd_real": 170.0, "retrieval_top1": 0.4},
    {"model": "student", "steps": 4, "guidance": 1.0, "nfe": 4, "fd_real": 110.0, "retrieval_top1": 0.8},
]

WAY = np.linspace(0, 1, 9)
MEAN = np.stack([1 - WAY, 0.2 * np.sin(np.pi * WAY), 0.1 * np.sin(2 * np.pi * WAY)], 1)
SHAPE = {
    "s": WAY.tolist(),
    "mean": MEAN.tolist(),
    "fit": (MEAN * 1.01).tolist(),
    "samples": [(MEAN * (1, 1 + i / 40, 1 - i / 40)).tolist() for i in range(20)],
    "r2": [1.0, 0.9991, 0.75],
    "unexplained": [0.16, 0.067, 0.033],
    "errors": {"DDIM, 2": {"s": [0, 0.5, 1], "error": [0, 0.4, 0.3]}},
}


def tree(svg: str) -> ET.Element:
    return ET.fromstring(svg)  # noqa: S314 (our own drawing)


def texts(svg: str) -> list[str]:
    return [t.text or "" for t in tree(svg).iter("text")]


def test_all_charts_are_whole_svg_in_the_colours_of_the_page() -> None:
    drawn = charts(REGRESSION_LOSSES, ROWS, SHAPE)
    assert len(drawn) == 11
    for chart in drawn:
        tree(chart.svg)
        assert chart.caption
        assert "var(--" in chart.svg
        assert "http" not in chart.svg
        assert "DejaVu" not in chart.svg
        assert "<style" not in chart.svg


def test_nothing_to_show_is_no_chart() -> None:
    assert charts([], []) == []
    assert charts([{"iteration": 1}], [{"model": "teacher"}]) == []
    assert charts([{"iteration": 1, "fake_loss": 1.0}], ROWS[:1]) == []
    assert [c.title for c in charts(REGRESSION_LOSSES, [])] == [
        "Distance to real images while training",
        "Prompt match while training",
        "Matching gap by step",
        "Losses",
        "Gradient norms",
    ]


def test_drawing_is_deterministic_and_leaves_the_settings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it now fails
    before = dict(mpl.rcParams)
    first, second = charts(REGRESSION_LOSSES, ROWS), charts(REGRESSION_LOSSES, ROWS)
    assert first == second
    assert dict(mpl.rcParams) == before


def test_ids_do_not_clash_between_charts() -> None:
    ids = [e.get("id") for c in charts(REGRESSION_LOSSES, ROWS, SHAPE) for e in tree(c.svg).iter() if e.get("id")]
    assert len(ids) == len(set(ids))


def test_the_student_and_the_teachers_stand_at_their_values() -> None:
    figure = quality(REGRESSION_LOSSES, ROWS, "retrieval_top1", percent=True)
    assert figure is not None
    student, *levels = figure.axes[0].lines
    assert np.allclose(student.get_xydata(), [[10, 60], [20, 70], [30, 80], [40, 90]])
    assert sorted(line.get_ydata()[0] for line in levels) == [40, 90]
    assert {"teacher (4)", "teacher (100)", "student"} <= set(texts(to_svg(figure, "t")))


def test_the_curves_teacher_is_the_best_one_at_the_student_s_cost() -> None:
    """The curve shows the best teacher at the student's cost.

    It is not the teacher with the fewest calls, which a student of several step counts has too, nor the worse one of
    two that cost the same.
    """
    more = [
        {"model": "teacher", "steps": 2, "guidance": 3.5, "nfe": 4, "fd_real": 200.0, "retrieval_top1": 0.6},
        {"model": "teacher", "steps": 1, "guidance": 1.0, "nfe": 1, "fd_real": 300.0, "retrieval_top1": 0.1},
        {"model": "student", "steps": 1, "guidance": 1.0, "nfe": 1, "fd_real": 180.0, "retrieval_top1": 0.3},
    ]
    for key, percent, expected in (("fd_real", False, [100, 170]), ("retrieval_top1", True, [60, 90])):
        figure = quality(REGRESSION_LOSSES, [*ROWS, *more], key, percent=percent)
        assert figure is not None
        assert sorted(line.get_ydata()[0] for line in figure.axes[0].lines[1:]) == expected


def test_quality_against_cost_separates_guided_teachers() -> None:
    figure = quality_cost(ROWS)
    assert figure is not None
    assert {tuple(line.get_xydata()[0]) for line in figure.axes[0].lines} == {(100, 100), (4, 170), (4, 110)}
    assert {"teacher", "teacher, guided", "student"} <= set(texts(to_svg(figure, "t")))


def test_one_line_for_each_segment_in_order() -> None:
    figure = gaps([{"iteration": i, **{f"gap_{k}": 1.0 + k for k in range(12)}} for i in (1, 2, 3)])
    assert figure is not None
    assert len(figure.axes[0].lines) == 24  # raw and average
    assert [line.get_ydata()[0] for line in figure.axes[0].lines[::2]] == [1.0 + k for k in range(12)]


@pytest.mark.parametrize("crowd", [0.01, 1.0, 100.0])
def test_labels_do_not_overlap(crowd: float) -> None:
    ends = {"gap_0": 0.01, "gap_1": crowd, "gap_2": 1.001 * crowd, "gap_3": 1.002 * crowd, "gap_4": 100.0}
    figure = gaps([{"iteration": i, **ends} for i in (1, 2, 3)])
    assert figure is not None
    heights = sorted(t.get_position()[1] for t in figure.axes[0].texts)
    assert len(heights) == 5
    assert min(np.diff(heights)) > 0.08
    assert heights[0] >= 0
    assert heights[-1] <= 1


@pytest.mark.parametrize(
    "figure", [losses(REGRESSION_LOSSES), quality(REGRESSION_LOSSES, [], "fd_real"), quality_cost(ROWS[1:])]
)
def test_a_label_sits_at_the_end_of_its_line(figure: Figure) -> None:
    figure.canvas.draw()
    for axes in figure.axes:
        for label in axes.texts:
            ends = [axes.transData.transform((0, line.get_ydata()[-1])) for line in axes.lines]
            heights = [axes.transAxes.inverted().transform(end)[1] for end in ends]
            assert min(abs(label.get_position()[1] - height) for height in heights) < 1e-6, label.get_text()


def test_names_cannot_break_out_of_the_chart() -> None:
    hostile = '</text></svg><script>alert(1)</script> $\\frac$ & "'
    figure = quality_cost([*ROWS, {"model": hostile, "nfe": 2, "fd_real": 120.0}])
    assert figure is not None
    svg = to_svg(figure, hostile)
    assert "<script" not in svg
    assert hostile in texts(svg)
    assert tree(svg).get("aria-label") == hostile


def test_smoothing_keeps_constants_lines_and_length() -> None:
    assert np.allclose(smooth([3.0] * 50), 3.0)
    line = np.arange(100.0)
    assert np.allclose(smooth(list(line))[5:-5], line[5:-5])
    noise = np.random.default_rng(0).normal(size=400)
    assert smooth(list(noise)).std() < 0.3 * noise.std()
    assert len(smooth([1.0])) == 1


def test_thinning_keeps_every_spike() -> None:
    y = np.zeros(20_000)
    y[12_345], y[77] = 5.0, -5.0
    xs, ys = thin(list(range(len(y))), list(y))
    assert len(xs) <= 600
    assert (ys.max(), ys.min()) == (5.0, -5.0)
    assert xs[ys.argmax()] == 12_345
    assert (np.diff(xs) > 0).all()


def test_trajectories_stand_in_their_box_from_noise_at_the_left_to_data_at_the_right() -> None:
    figure = space(SHAPE)
    assert figure is not None
    lines = [line.get_xydata() for line in figure.axes[0].lines]
    assert len(lines) == 3 + 20 + 20 + 3  # walls, shadows, samples, mean, fit and ends
    upright = np.asarray([*SHAPE["samples"], SHAPE["mean"], SHAPE["fit"]])[..., [0, 2, 1]] * (-1, 1, 1)
    assert np.allclose(lines[-3], box_around(upright).on_page(upright[-2]))
    noise, data = lines[-1]
    assert noise[0] < data[0]
    assert lines[-3][4, 1] > lines[-3][[0, -1], 1].max() + 0.3  # the bend goes up
    words = texts(to_svg(figure, "t"))
    assert {"data", "noise", "first direction", "0.3"} <= set(words)


def test_trajectories_of_a_plane_have_a_box_too() -> None:
    flat = {k: (np.asarray(SHAPE[k]) * (1, 1, 0)).tolist() for k in ("mean", "fit", "samples")}
    figure = space(SHAPE | flat)
    assert figure is not None
    assert all(np.isfinite(line.get_xydata()).all() for line in figure.axes[0].lines)


def test_bars_are_as_long_as_what_is_explained() -> None:
    figure = explained(SHAPE)
    assert figure is not None
    assert [bar.get_width() for bar in figure.axes[0].patches] == pytest.approx([84, 93.3, 96.7])
    assert {"84.0 %", "93.3 %", "96.7 %", "1 direction", "3 directions"} <= set(texts(to_svg(figure, "t")))


def test_a_curve_is_not_hidden_by_its_samples_and_says_its_fit() -> None:
    figure = coordinates(SHAPE)
    assert figure is not None
    assert [len(axes.lines) for axes in figure.axes] == [FEW + 2] * 3
    assert {"R² 1.0000", "R² 0.9991", "R² 0.7500"} <= set(texts(to_svg(figure, "t")))
