"""`docs/own-network.md`, followed to the letter: from a wrapped network to its student in a fresh process."""

import copy
import json
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fewstep
from fewstep.backbones.base import Denoiser
from fewstep.core.schedule import Flow

from .project import ROOT

Page = tuple[Path, dict[str, Any]]


def blocks() -> list[str]:
    found = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "own-network.md").read_text(encoding="utf-8"), re.DOTALL
    )
    assert len(found) == 5
    return [
        b.replace("iterations=600", "iterations=40")
        .replace("== 300", "== 30")
        .replace('"runs/ring-300"', '"runs/ring-30"')
        for b in found
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Where the page's run lies, and the names that it made. Run once."""
    folder, names = tmp_path_factory.mktemp("page"), dict[str, Any]()
    before = Path.cwd()
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore", fewstep.DistillationWarning)
        patch.chdir(folder)
        for block in blocks()[:3]:
            exec(block, names)
    assert Path.cwd() == before
    return folder, names


@pytest.mark.slow
def test_the_student_is_the_same_in_a_fresh_process(page: Page) -> None:
    folder, names = page
    (folder / "fresh.py").write_text(
        "\n".join(
            [
                blocks()[0],
                "real = Mixture.ring().draw(512, torch.Generator().manual_seed(0))",
                blocks()[3],
                "print(samples.tolist())",
            ]
        )
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "fresh.py"], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # no other library has a word
    rows, drawn = done.stdout.splitlines()[:-1], torch.tensor(json.loads(done.stdout.splitlines()[-1]))
    assert torch.equal(drawn, names["samples"])
    assert [line.split()[:3] for line in rows] == [
        ["teacher", "50", "50"],
        ["teacher", "2", "2"],
        ["student", "2", "2"],
    ]
    merged = names["RingNet"]()
    merged.load_state_dict(load_file(folder / "runs/ring-merged/network.safetensors"))
    plain = fewstep.sample(Denoiser(merged, Flow(), (2,), "flow"), [""] * 8, steps=2)
    torch.testing.assert_close(plain, names["samples"], rtol=1e-4, atol=1e-5)


def test_its_card_says_how_its_base_is_read(page: Page) -> None:
    card = json.loads((page[0] / "runs/ring/final/fewstep.json").read_text())
    assert (card["base"], card["own_network"], card["prediction"], card["shape"]) == ("ring", "RingNet", "flow", [2])
    assert card["schedule"] == {"kind": "Flow", "t_max": 1.0, "t_clean": 0.0, "resolution": 0.0, "shift": 1.0}
    assert card["timesteps"] == {"2": [1.0, 0.5, 0.0]} and len(card["base_hash"]) == 16


def test_a_run_leaves_a_report_and_the_command_line_says_what_it_cannot(
    page: Page, capsys: pytest.CaptureFixture[str]
) -> None:
    from fewstep.cli.inspect import run_inspect
    from fewstep.cli.report import run_report
    from fewstep.cli.sample import run_sample

    folder = page[0]
    run_report(str(folder / "runs/ring"))
    assert "fewstep.load_student" in (folder / "runs/ring/report.html").read_text()
    run_inspect(str(folder / "runs/ring/final"))
    assert "RingNet" in capsys.readouterr().out
    with pytest.raises(
        ValueError, match=r"was made from ring, a network of one's own \(RingNet\), which Python code has to bring"
    ):
        run_sample(str(folder / "runs/ring"), [], None, None, None, 0, 1, False, None, None, folder / "x.png")


def test_a_network_with_conditions_is_measured_under_its_prompts(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = dict(page[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fewstep.DistillationWarning)
        exec(blocks()[4], names)
    assert [(row["model"], row["steps"], row["guidance"], row["nfe"]) for row in names["rows"]] == [
        ("teacher", 50, 2.0, 100),
        ("teacher", 2, 2.0, 4),
        ("teacher", 2, 1.0, 2),
        ("student", 2, 1.0, 2),
    ]
    with pytest.raises(ValueError, match=r"^prompts: got none, two-classes has conditions"):
        fewstep.evaluate(names["last"])


def test_a_step_count_that_was_not_trained_warns(page: Page) -> None:
    with pytest.warns(UserWarning, match="steps: got 3, this student was trained for 2"):
        fewstep.sample(page[1]["step"], [""], steps=3)


def test_other_settings_are_refused_with_both_values(page: Page) -> None:
    folder, names = page
    train = replace(names["train"], lr=1e-3)
    with pytest.raises(ValueError, match=r"was made with other settings: lr 0\.0003 -> 0\.001"):
        next(fewstep.distill(names["teacher"], names["method"], train=train, out=folder / "runs/ring"))


def test_a_snapshot_stays_what_it_was(page: Page) -> None:
    folder, names = page
    saved = fewstep.load_student(folder / "runs/ring-30", base=names["wrapped"]())
    kept, last = (fewstep.sample(s, [""] * 8) for s in (names["best"], names["step"]))
    assert torch.equal(kept, fewstep.sample(saved, [""] * 8))
    assert not torch.equal(kept, last)
    assert saved.card.iterations == 30


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"schedule": Flow(shift=3.0)}, r"schedule\.shift 1 -> 3"),
        ({"prediction": "v"}, "prediction flow -> v"),
        ({"conditions": lambda prompts: {"c": torch.zeros(len(prompts), 2)}}, r"conditions\.c none|conditions\.c None"),
    ],
)
def test_another_base_is_refused_with_both_values(page: Page, changed: dict[str, Any], said: str) -> None:
    folder, names = page
    with pytest.raises(ValueError, match=rf"^base: .*was made with another base: .*({said})"):
        fewstep.load_student(folder / "runs/ring/final", base=replace(names["teacher"], **changed))
    with pytest.raises(ValueError, match="was made with another base"):
        fewstep.distill(
            replace(names["teacher"], **changed),
            names["method"],
            train=fewstep.TrainConfig(iterations=30),
            init_from=folder / "runs/ring",
        )


def test_other_weights_are_refused_and_allowed_where_asked_for(page: Page) -> None:
    folder, names = page
    other = Denoiser(names["RingNet"](), Flow(), (2,), "flow")
    with pytest.raises(ValueError, match=r"trained on other weights \(hash [0-9a-f]{16}, here [0-9a-f]{16}\)"):
        fewstep.load_student(folder / "runs/ring/final", base=other)
    assert fewstep.load_student(folder / "runs/ring/final", base=other, other_weights=True).card.base == "ring"
    with pytest.raises(ValueError, match="is a student of ring, a network of one's own, got the pipeline"):
        fewstep.load_student(folder / "runs/ring/final", base=fewstep.load_teacher("fashion"))


def test_formats_that_make_no_sense_and_folders_of_others_are_refused(page: Page) -> None:
    folder, names = page
    for form in ("kohya", "pipeline", "onnx"):
        with pytest.raises(ValueError, match=f"^form: got '?{form}"):
            fewstep.export_student(names["step"], folder / "out", form)
    (folder / "project").mkdir()
    (folder / "project" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="is there already and holds no student"):
        names["step"].save(folder / "project")
    assert (folder / "project" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(("lora", "steps"), [(False, 2), (True, (2, 1)), (False, (2, 1))])
def test_full_networks_and_students_of_several_counts_come_back(
    page: Page, tmp_path: Path, lora: bool, steps: int | tuple[int, ...]
) -> None:
    teacher, method = page[1]["teacher"], fewstep.TDM(steps=steps, warmup=2, guidance=1.0)
    *_, step = fewstep.distill(
        teacher,
        method,
        train=fewstep.TrainConfig(iterations=6, batch=16, lr=1e-2),
        roles=fewstep.RolesConfig(rank=2, lora=lora),
        out=tmp_path,
        watch=None,
    )
    student = fewstep.load_student(tmp_path / "final", base=teacher)
    for count in method.counts:
        assert torch.allclose(
            fewstep.sample(student, [""] * 4, steps=count), fewstep.sample(step, [""] * 4, steps=count), atol=1e-5
        )
    begun = next(
        fewstep.distill(
            teacher,
            method,
            train=fewstep.TrainConfig(iterations=3, batch=16, lr=1e-2),
            roles=fewstep.RolesConfig(rank=2, lora=lora),
            init_from=tmp_path,
            watch=None,
        )
    )
    assert torch.allclose(
        fewstep.sample(begun, [""] * 4), fewstep.sample(step, [""] * 4), atol=1e-6
    )  # the warm-up moves the fake score alone
    for count in method.counts:
        folder = fewstep.export_student(student, tmp_path / f"merged-{count}", "merged", steps=count)
        network = copy.deepcopy(teacher.module)
        network.load_state_dict(load_file(folder / "network.safetensors"))  # the file alone is the student
        alone = fewstep.sample(replace(teacher, module=network), [""] * 4, steps=count)
        assert torch.allclose(alone, fewstep.sample(step, [""] * 4, steps=count), atol=1e-5)
    default = fewstep.load_student(fewstep.export_student(student, tmp_path / "merged", "merged"), base=teacher)
    assert default.card.steps == method.counts[:1]
