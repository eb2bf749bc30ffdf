"""metrics.jsonl is read while it is written, and after a crash."""

import json
from pathlib import Path

import pytest

from fewstep.report.live import read_metrics, series


def written(path: Path, *lines: str, end: str = "\n") -> Path:
    path.write_text("\n".join(lines) + end, encoding="utf-8")
    return path


def test_a_half_written_last_line_is_passed_over(tmp_path: Path) -> None:
    whole = json.dumps({"iteration": 2, "seconds": 2.5, "student_loss": 0.125})
    for cut in range(len(whole)):
        path = written(tmp_path / "metrics.jsonl", '{"iteration": 1, "seconds": 1.0}', whole[:cut], end="")
        assert read_metrics(path) == [{"iteration": 1, "seconds": 1.0}], whole[:cut]
    path = written(tmp_path / "metrics.jsonl", '{"iteration": 1, "seconds": 1.0}', whole, end="")
    assert read_metrics(path)[1]["student_loss"] == 0.125


def test_a_letter_cut_in_two_bytes_is_no_error(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes('{"iteration": 1}\n{"iteration": 2, "warnings": ["dé'.encode()[:-1])
    assert read_metrics(path) == [{"iteration": 1}]


def test_a_resumed_run_replaces_what_it_repeats(tmp_path: Path) -> None:
    lines = [f'{{"iteration": {i}, "fake_loss": {i}}}' for i in (1, 2, 3)]
    again = [f'{{"iteration": {i}, "fake_loss": {10 * i}}}' for i in (2, 4)]
    path = written(tmp_path / "m.jsonl", *lines, '{"iterat{"iteration": 2}', *again)
    assert series(read_metrics(path), "fake_loss") == ([1, 2, 3, 4], [1.0, 20.0, 3.0, 40.0])


def test_quality_and_training_of_one_iteration_are_one_record(tmp_path: Path) -> None:
    path = written(
        tmp_path / "m.jsonl", '{"iteration": 5, "fake_loss": 1.0}', '{"iteration": 5, "quality": {"fd_real": 140.5}}'
    )
    metrics = read_metrics(path)
    assert metrics == [{"iteration": 5, "fake_loss": 1.0, "quality": {"fd_real": 140.5}}]
    assert series(metrics, "quality.fd_real") == ([5], [140.5])


def test_only_finite_numbers_are_drawn(tmp_path: Path) -> None:
    path = written(
        tmp_path / "m.jsonl",
        '{"iteration": 1, "a": NaN}',
        '{"iteration": 2, "a": Infinity}',
        '{"iteration": 3, "a": null}',
        '{"iteration": 4, "a": 1}',
    )
    assert series(read_metrics(path), "a") == ([4], [1.0])


def test_no_file_yet_is_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert read_metrics(written(tmp_path / "empty.jsonl", "", '{"iteration": 1, "lo')) == []


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "3",
        '{"other": 1}',
        '{"iteration": 2.0}',
        '{"iteration": 2, "loss": "low"}',
        '{"iteration": 2, "quality": []}',
    ],
)
def test_a_whole_line_that_holds_something_else_is_named(line: str, tmp_path: Path) -> None:
    path = written(tmp_path / "metrics.jsonl", '{"iteration": 1}', line)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2, is damaged \(.+\); delete that line"):
        read_metrics(path)
