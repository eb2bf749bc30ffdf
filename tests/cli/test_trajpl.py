"""TrajP-L from the command line: trajectories, training, and a student with a head in its user's hands."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import fewstep
from fewstep.cli.distill import spec_of, spent_before
from fewstep.data.prompts import Embeddings
from fewstep.data.trajectories import Trajectories
from fewstep.runs.recipe import DistillRecipe, read_recipe
from fewstep.student.card import card_nfe
from fewstep.student.folder import read_card
from fewstep.training import loop
from tests.snippets import snippet_of

from .common import RECIPE, as_tensor, error_of, read_report
from .common import fewstep as command


@pytest.fixture
def trajpl(recipe: Path) -> Path:
    """A recipe file of a five-iteration run of TrajP-L; 40 trajectories of the random teacher."""
    value = yaml.safe_load(recipe.read_text())
    value["method"] = {"name": "trajp-l", "steps": [4, 2], "guidance": 2.0}
    value["data"] = {"source": "trajectories", "count": 40, "steps": 8}
    value["train"]["lr"] = 0.02
    recipe.write_text(yaml.safe_dump(value))
    assert RECIPE["method"] != value["method"]
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [{}, *(pytest.param(other, marks=pytest.mark.slow) for other in ({"rank": 0}, {"lora": False}))]
)
def test_a_student_with_a_head_is_the_same_everywhere(
    trajpl: Path,
    how: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
    teacher: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A student with a head draws one image everywhere.

    It is sampled, loaded as a pipeline, run from its card's snippet, and exported for one step count. More steps than
    its head serves are refused.
    """
    options = [part for k, v in how.items() for part in ("--set", f"roles.{k}={str(v).lower()}")]
    if how.get("rank") == 0:
        options += ["--set", "method.analytic_first_step=true", "--set", "method.solver=ipndm"]
    assert command(monkeypatch, "distill", trajpl, *options) == 0
    final = Path("runs/tiny/final")
    costs = (
        "3 in 4 steps, 1 in 2 steps (the first step is free)" if how.get("rank") == 0 else "4 in 4 steps, 2 in 2 steps"
    )
    said = capsys.readouterr().out
    assert f"calls    {costs}; the teacher takes 6 in 3" in said
    assert re.search(
        r"generating 40 trajectories of the teacher \(16 NFE each, 640 in total\); [\d.]+ [KMGi]+B; "
        r"existing ones in runs/tiny/trajectories are reused",
        said,
    )
    page = Path("runs/tiny/report.html").read_text()
    assert "Straying from the teacher" in page
    assert "Trajectories in three dimensions" in page and "How few directions the bend takes" in page
    shape = json.loads(Path("runs/tiny/trajectories.json").read_text())
    assert (
        f"curve of the trajectories: R² {', '.join(f'{r:.4f}' for r in shape['r2'])}; 1, 2, 3 directions explain "
        in said
    )
    assert "The shape that trajectories share" in page
    card = json.loads((final / "fewstep.json").read_text())
    assert card["head"] == "span"
    assert card["weights"] == {"rank": "none", "lora": "full"}.get(next(iter(how), ""), "lora")
    student = fewstep.load_student(final)
    wanted = {k: fewstep.sample(student, ["red cat", "blue dog"], [3, 4], steps=k) for k in (4, 2)}
    base = fewstep.sample(student.backbone, ["red cat", "blue dog"], [3, 4], steps=4)
    assert (wanted[4] - base).abs().max() > 0.02
    pipe, calls = fewstep.load(teacher, final), list[int]()
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(1))
    for k, images in wanted.items():
        seeds = [torch.Generator().manual_seed(s) for s in (3, 4)]
        calls.clear()
        shown = pipe(["red cat", "blue dog"], num_inference_steps=k, generator=seeds, output_type="pt").images
        assert (shown - images).abs().max() <= 1e-4
        assert len(calls) == card_nfe(read_card(final), k) == k - card["analytic_first_step"]
    assert card["analytic_first_step"] == (how.get("rank") == 0)
    with (
        pytest.raises(ValueError, match="num_inference_steps: got 3, this student serves 4, 2"),
        pytest.warns(match="num_inference_steps: got 3"),
    ):
        pipe("red cat", num_inference_steps=3)
    assert command(monkeypatch, "export", final, "two", "--steps", "2") == 0
    assert (
        fewstep.sample(fewstep.load_student("two"), ["red cat", "blue dog"], [3, 4]) - wanted[2]
    ).abs().max() <= 1e-4
    assert command(monkeypatch, "export", final, "merged", "--format", "merged") == 0
    assert "its head stays beside the network, in a file of its own" in " ".join(capsys.readouterr().out.split())
    assert (Path("merged") / "trajp.safetensors").is_file()
    for form in ("pipeline", "kohya"):
        assert command(monkeypatch, "export", final, "stock", "--format", form) == 2
        assert (
            "--format: this student is sampled with a head, which no stock pipeline has; choose student or merged"
            in error_of(capsys)
        )
    assert command(monkeypatch, "sample", final, "-p", "red cat", "--steps", "8", "--compare") == 2
    printed = capsys.readouterr()
    assert "--steps: got 8, the student's span head serves up to 4 steps; take as many or fewer" in printed.err
    assert printed.out == ""  # neither a warning nor the teacher's images before it
    code = snippet_of(final)
    monkeypatch.chdir(final.parent)
    names: dict[str, Image.Image] = {}
    exec(code.replace("a prompt", "red cat").replace("manual_seed(0)", "manual_seed(3)"), names)
    assert (as_tensor([names["image"]]) - wanted[4][:1]).abs().max() <= 0.5 / 255 + 1e-4


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit(trajpl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(monkeypatch, "distill", trajpl) == 0
    assert command(monkeypatch, "distill", trajpl, "--out", "runs/parts", "--set", "train.iterations=2") == 0
    walked = {p: p.stat().st_mtime_ns for p in Path("runs/parts/trajectories").glob("*.safetensors")}
    assert walked
    assert command(monkeypatch, "distill", trajpl, "--out", "runs/parts") == 0
    assert all(p.stat().st_mtime_ns == at for p, at in walked.items())
    for name in ("pytorch_lora_weights.safetensors", "trajp.safetensors"):
        straight, parts = (
            load_file(Path(run) / "final" / name) for run in ("runs/tiny", "runs/parts")
        )  # headers have no fixed order
        assert straight.keys() == parts.keys()
        assert all(torch.equal(straight[k], parts[k]) for k in straight)


@pytest.mark.slow
def test_a_run_that_was_stopped_shows_what_it_learns_from(trajpl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_update", stop)
    assert command(monkeypatch, "distill", trajpl) == 130
    assert command(monkeypatch, "report", "runs/tiny") == 0
    page = Path("runs/tiny/report.html").read_text()
    assert "Trajectories in three dimensions" in page
    assert "Straying from the teacher" not in page  # there is no student yet


@pytest.mark.slow
def test_imitate_then_match(trajpl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Distribution matching begins as the student of trajectories.

    Its head is kept and trained, absorbed, or dropped. Its first direction stays as free as it was.
    """
    assert (
        command(
            monkeypatch,
            "distill",
            trajpl,
            "--set",
            "method.steps=4",
            "--set",
            "method.analytic_first_step=true",
            "--out",
            "runs/first",
        )
        == 0
    )
    value = yaml.safe_load(trajpl.read_text()) | {
        "method": RECIPE["method"] | {"analytic_first_step": True},
        "init_from": "runs/first",
    }
    del value["data"]
    Path("match.yaml").write_text(yaml.safe_dump(value))
    still = ("--set", "train.lr=1e-12")
    first = fewstep.sample(fewstep.load_student("runs/first/final"), ["red cat"], [0])
    assert command(monkeypatch, "distill", "match.yaml", *still, "--out", "runs/kept") == 0
    assert (fewstep.sample(fewstep.load_student("runs/kept/final"), ["red cat"], [0]) - first).abs().max() <= 1e-4
    assert (
        command(monkeypatch, "distill", "match.yaml", *still, "--set", "method.init_head=drop", "--out", "runs/dropped")
        == 0
    )
    assert not (Path("runs/dropped/final") / "trajp.safetensors").exists()
    assert (fewstep.sample(fewstep.load_student("runs/dropped/final"), ["red cat"], [0]) - first).abs().max() > 1e-4
    assert (
        command(monkeypatch, "distill", "match.yaml", "--set", "method.init_head=absorb", "--out", "runs/folded") == 0
    )
    assert read_card(Path("runs/folded/final")).head == ""
    assert not (Path("runs/folded/final") / "trajp.safetensors").exists()
    lines = [json.loads(line) for line in Path("runs/folded/metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if line.get("absorb_loss", 0) > 0] == [1]
    capsys.readouterr()
    assert (
        command(
            monkeypatch,
            "distill",
            "match.yaml",
            "--set",
            "init_from=runs/dropped",
            "--set",
            "method.init_head=absorb",
            "--out",
            "runs/more",
        )
        == 2
    )
    assert (
        "method.init_head: got absorb, the student in runs/dropped/final has no head; "
        "set method.init_head=drop, or initialize" in error_of(capsys)
    )
    assert (
        command(
            monkeypatch,
            "distill",
            "match.yaml",
            "--set",
            "init_from=null",
            "--set",
            "method.init_head=absorb",
            "--out",
            "runs/more",
        )
        == 2
    )
    assert "method.init_head: got absorb, the teacher has no head" in error_of(capsys)
    assert command(monkeypatch, "distill", "match.yaml", "--set", "method.steps=8", "--out", "runs/more") == 2
    assert (
        "method.steps: got 8, the student's span head serves up to 4 steps; that of runs/first/final was made"
        in error_of(capsys)
    )
    assert (
        command(monkeypatch, "distill", "match.yaml", "--set", "method.analytic_first_step=false", "--out", "runs/more")
        == 2
    )
    assert (
        "method.analytic_first_step: got false, the student in runs/first/final takes an analytic first step; set"
        in error_of(capsys)
    )
    assert not Path("runs/more").exists()
    assert read_card(Path("runs/kept/final")).analytic_first_step


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ("--set", "data.source=teacher", "--set", "data.count=2"),
            "data.source: method trajp-l needs trajectories of the teacher; set it to trajectories",
        ),
        (
            ("--set", "method={name: tdm, steps: 4, warmup: 1}"),
            "data.source: method tdm takes no trajectories of the teacher; leave data out",
        ),
        (("--set", "method.head=mlp"), "method.head: got 'mlp', allowed are none, span, curve, shared"),
        (("--set", "roles.rank=0", "--set", "method.head=none"), "roles.rank: got 0, which trains a head alone"),
        (("--set", "data.solver=rk4"), "data.solver"),
        (("--set", "method.name=pas"), "roles.rank: got 2, method pas stands for 0; set roles.rank=0"),
        (("--set", "method.name=sfd"), "roles.lora: got true, method sfd stands for false; set roles.lora=false"),
    ],
)
def test_mistakes_are_one_line(
    trajpl: Path,
    options: tuple[str, ...],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, "distill", trajpl, *options) == 2
    assert expected in error_of(capsys)


@pytest.mark.usefixtures("uncounted")
def test_a_dry_run_walks_nothing(trajpl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command(monkeypatch, "distill", trajpl, "--dry-run") == 0
    assert not Path("runs").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("uncounted")
def test_a_recipe_of_two_stages(
    trajpl: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Imitate, then match: one command, one folder, the first stage's student inside, what both cost together."""
    value = yaml.safe_load(trajpl.read_text())
    first = {k: value.pop(k) for k in ("method", "data")} | {"train": dict(value["train"])}
    Path("both.yaml").write_text(
        yaml.safe_dump(
            value | {"method": RECIPE["method"] | {"name": "tdm-unify", "steps": [4, 2]}, "warm_start": first}
        )
    )
    assert command(monkeypatch, "distill", "both.yaml", "--dry-run") == 0
    assert command(monkeypatch, "distill", "both.yaml", "--set", "train.lr=1e-12") == 0
    for run in ("runs/tiny/warm_start", "runs/tiny"):  # each stage's page leads to its own student
        assert f"fewstep sample {run} -p " in read_report(run)
    cards = [json.loads((Path("runs/tiny") / p / "fewstep.json").read_text()) for p in ("warm_start/final", "final")]
    assert [c["method"] for c in cards] == ["trajp-l", "trajp-l-tdm-unify"]
    assert cards[1]["train_seconds"] > cards[0]["train_seconds"]
    a, b = (
        fewstep.sample(fewstep.load_student(f"runs/tiny/{p}"), ["red cat"], [0], steps=2)
        for p in ("warm_start/final", "final")
    )
    assert (a - b).abs().max() <= 1e-4  # the step counts' vectors came along
    kept = (Path("runs/tiny/warm_start/final/fewstep.json")).stat().st_mtime_ns
    assert command(monkeypatch, "distill", "both.yaml", "--set", "train.lr=1e-12", "--set", "train.iterations=6") == 0
    assert (Path("runs/tiny/warm_start/final/fewstep.json")).stat().st_mtime_ns == kept
    capsys.readouterr()
    assert command(monkeypatch, "distill", "both.yaml", "--set", "warm_start.train.seed=3") == 2
    assert "made with another seed" in error_of(capsys)
    assert command(monkeypatch, "distill", "both.yaml", "--set", "method.steps=[8, 4]", "--out", "runs/more") == 2
    assert (
        "method.steps: got 8, the student's span head serves up to 4 steps; set warm_start.method.steps to as many"
        in error_of(capsys)
    )
    assert (
        command(
            monkeypatch,
            "distill",
            "both.yaml",
            "--set",
            "warm_start.method.analytic_first_step=true",
            "--out",
            "runs/more",
        )
        == 2
    )
    assert "method.analytic_first_step: got false, the first stage's student takes an analytic first step" in error_of(
        capsys
    )
    assert command(monkeypatch, "distill", "both.yaml", "--set", "init_from=runs/tiny") == 2


@pytest.mark.slow
def test_stages_share_trajectories_and_matching_is_anchored_to_them(
    trajpl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two stages share one set of trajectories, generated and counted once.

    The second stage's student starts as the first stage's and stays near the trajectories.
    """
    value = yaml.safe_load(trajpl.read_text())
    data = value["data"] | {"guidance": {"scale": 2.0, "apg_eta": 0.5, "stop": 0.3}}
    imitate = {
        "method": value["method"] | {"steps": 4, "head": "none", "guidance": {"scale": 2.0, "apg_eta": 0.5}},
        "train": dict(value["train"]),
        "data": data,
    }
    Path("both.yaml").write_text(
        yaml.safe_dump(
            value
            | {
                "method": RECIPE["method"]
                | {"steps": 4, "regression_weight": 2.0, "guidance": {"scale": 2.0, "apg_eta": 0.5}},
                "data": data,
                "warm_start": imitate,
            }
        )
    )
    assert command(monkeypatch, "distill", "both.yaml") == 0
    run = Path("runs/tiny")
    assert [f.parent for f in run.rglob("trajectories-00000.safetensors")] == [run / "trajectories"]
    record = json.loads((run / "trajectories" / "trajectories.json").read_text())
    assert (record["guidance"]["stop"], record["guidance"]["apg_eta"]) == (0.3, 0.5)
    assert "apg_eta 0.5" in (run / "final" / "README.md").read_text()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("regression_loss", 0) > 0 for line in lines)
    both, first = read_recipe("both.yaml", [], DistillRecipe), read_card(run / "warm_start" / "final")
    walked = Trajectories(*(torch.empty(0),) * 2, Embeddings({}, {}, [], 0, ""), *(torch.empty(0),) * 2, "", 100.0)
    assert spent_before(both, run, walked) == first.train_seconds
    assert (
        spent_before(read_recipe("both.yaml", ["data.count=41"], DistillRecipe), run, walked)
        == first.train_seconds + 100
    )
    assert not (run / "final" / "trajp.safetensors").exists()
    for sets, seed in (([], 0), (["train.seed=3"], 3), (["train.seed=3", "data.seed=0"], 0)):
        drawn = spec_of(read_recipe("both.yaml", sets, DistillRecipe), []).trajectories
        assert drawn is not None and drawn.seed == seed
