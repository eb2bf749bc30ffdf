"""`benchmarks/finetunes.py`: its table, of made-up rows; and its recipes."""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fewstep.runs.recipe import DistillRecipe, FinetuneRecipe, validate

Load = Callable[[str], dict[str, Any]]


def test_students_of_several_seeds_are_one_line(load: Load) -> None:
    common = {"style": "fluent", "steps": 4, "guidance": 1.0, "nfe": 4, "retrieval_top1": 0.25, "diversity_ratio": None}
    named = {"tdm-4-0": 3.0, "tdm-4-1": 5.0, "lcm-0": 7.0, "lcm-full-0": 8.0, "own-0": 2.0}
    lines = load("finetunes")["lines_of"]([common | {"model": k, "fd_teacher": fd} for k, fd in named.items()])
    assert lines == [
        ["fluent", "tdm-4", 4, "1", 4, "4.00 ± 1.41", "25.00 ± 0.00", "-", 2],
        ["fluent", "lcm", 4, "1", 4, "7.00", "25.00", "-", 1],
        ["fluent", "lcm-full", 4, "1", 4, "8.00", "25.00", "-", 1],
        ["fluent", "own", 4, "1", 4, "2.00", "25.00", "-", 1],
    ]


def test_the_fine_tune_and_its_student_are_recipes(load: Load, tmp_path: Path) -> None:
    bench = load("finetunes")
    text = bench["RECIPE"].format(style="fluent", steps=600, decay=300, images=tmp_path)
    fine_tune = validate(yaml.safe_load(text), FinetuneRecipe, "fluent")
    assert (fine_tune.fit.steps, fine_tune.fit.decay, fine_tune.roles.lora) == (600, 300, False)
    a = Namespace(out=tmp_path, iterations=260, prompts=tmp_path / "prompts.txt")
    (tmp_path / "fluent" / "own-1" / "final").mkdir(parents=True)  # trained before
    run = bench["own_student"]("fluent", tmp_path / "teacher", 1, a)
    student = validate(yaml.safe_load(run.with_suffix(".yaml").read_text()), DistillRecipe, "own-1")
    assert (student.teacher, student.train.seed) == (str(tmp_path / "teacher"), 1)
