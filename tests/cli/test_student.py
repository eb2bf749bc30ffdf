"""A finished student in its user's hands: sample, inspect, the model card's snippet, `fewstep.load`."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoPipelineForText2Image
from PIL import Image
from torch import Tensor

import fewstep
from fewstep.backbones.generate import sample_images
from fewstep.methods.distribution_matching import DistributionMatching
from fewstep.roles.roles import RolesConfig, make_roles
from fewstep.runs.init import require_same_lora, roles_for
from fewstep.student.formats import FORMATS
from fewstep.student.student import Origin, Student
from tests import pipelines
from tests.snippets import snippet_of

from .common import as_tensor, error_of
from .common import fewstep as command


@pytest.mark.parametrize("share", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_model_cards_snippet_draws_what_sample_draws(
    recipe: Path, share: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        command(monkeypatch, "distill", recipe, "--set", "train.lr=0.02", "--set", f"roles.lora={str(share).lower()}")
        == 0
    )
    final = Path("runs/tiny/final")
    code = snippet_of(final)
    monkeypatch.chdir(final.parent)
    names: dict[str, Image.Image] = {}
    exec(code.replace("a prompt", "red cat"), names)
    own = fewstep.sample(fewstep.load_student("final"), ["red cat"], [0])
    base = fewstep.sample(fewstep.load_student("final").backbone, ["red cat"], [0], steps=4)
    assert (own - base).abs().max() > 0.02  # the student is not the teacher
    assert (as_tensor([names["image"]]) - own).abs().max() <= 0.5 / 255 + 1e-4


@pytest.mark.slow
def test_load_is_right_without_a_word(final: Path, teacher: Path) -> None:
    pipe = fewstep.load(teacher, final)
    assert pipe.scheduler.timesteps is not None
    images = pipe(
        ["red cat", "blue dog"], generator=[torch.Generator().manual_seed(s) for s in (3, 4)], output_type="pt"
    ).images
    own = fewstep.sample(fewstep.load_student(final), ["red cat", "blue dog"], [3, 4])
    assert (images - own).abs().max() <= 1e-4
    assert pipe.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    with pytest.warns(UserWarning, match="num_inference_steps: got 7"):
        pipe("red cat", num_inference_steps=7)
    with pytest.warns(UserWarning, match="guidance is baked"):
        pipe("red cat", guidance_scale=5.0)


# One student of several step counts

UNIFIED = ("--set", "train.lr=0.02", "--set", "method.name=tdm-unify", "--set", "method.steps=[4, 2, 1]")


def plain_diffusers(teacher: Path, folder: Path, share: bool, steps: int) -> Tensor:
    """The folder's files in a stock pipeline, without fewstep."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(teacher)
    if share:
        pipe.load_lora_weights(str(folder))
    else:
        pipe.unet = type(pipe.unet).from_pretrained(folder, subfolder="unet")
    pipe.scheduler = DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    generator = torch.Generator().manual_seed(0)
    return pipe("red cat", num_inference_steps=steps, guidance_scale=1.0, generator=generator, output_type="pt").images


@pytest.mark.parametrize("share", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_student_of_several_step_counts(
    recipe: Path, teacher: Path, share: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every step count and every way of loading gives the same images.

    They are those of the student that was told this count.
    """
    assert command(monkeypatch, "distill", recipe, *UNIFIED, "--set", f"roles.lora={str(share).lower()}") == 0
    final = Path("runs/tiny/final")
    student = fewstep.load_student(final)
    assert student.card.steps == (4, 2, 1)
    pipe = fewstep.load(teacher, final)
    own = {k: fewstep.sample(student, ["red cat"], [0], steps=k) for k in (4, 2, 1)}
    made_from_it = AutoPipelineForText2Image.from_pipe(pipe)  # which tells the student nothing
    images = made_from_it(
        "red cat",
        num_inference_steps=4,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).images
    assert (images - own[4]).abs().max() <= 1e-4
    for k, wanted in own.items():
        for _ in range(2):  # also after another count
            images = pipe(
                "red cat", num_inference_steps=k, generator=torch.Generator().manual_seed(0), output_type="pt"
            ).images
            assert (images - wanted).abs().max() <= 1e-4
        assert command(monkeypatch, "export", final, f"single-{k}", "--steps", str(k)) == 0
        assert (plain_diffusers(teacher, Path(f"single-{k}"), share, k) - wanted).abs().max() <= 1e-4
        again = fewstep.load_student(f"single-{k}")
        assert again.card.steps == (k,)
        assert not (Path(f"single-{k}") / "step_condition.safetensors").exists()
        assert (fewstep.sample(again, ["red cat"], [0]) - wanted).abs().max() <= 1e-4
    assert (plain_diffusers(teacher, final, share, 4) - own[4]).abs().max() <= 1e-4
    other = fewstep.sample(student, ["red cat"], [0], steps=2, condition=1)
    assert (other - own[2]).abs().max() > 1e-3  # the condition says something
    capsys.readouterr()
    assert command(monkeypatch, "export", final, "single-4") == 2
    assert "DIR: single-4 is there already" in error_of(capsys)
    assert command(monkeypatch, "export", final, "single-3", "--steps", "3") == 2
    assert "--steps: got 3, this student serves 4, 2, 1" in error_of(capsys)
    assert not Path("single-3").exists()


def test_the_fake_score_beside_a_student_that_begins_as_another_is_the_teacher(trained: Path, teacher: Path) -> None:
    roles = roles_for(
        fewstep.load_teacher(teacher), DistributionMatching(steps=2), RolesConfig(rank=2), init_from=trained / "final"
    )
    cond, t = roles.backbone.encode(["red cat"]), torch.tensor([999.0]).double()
    x = torch.randn((1, *roles.backbone.shape), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, own, fake = (roles.denoise(role, cond)(x, t).x0 for role in ("teacher", "student", "fake"))
    assert torch.equal(fake, theirs)
    assert (own - theirs).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("share", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_run_may_begin_as_a_finished_student(
    recipe: Path, share: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    how = ("--set", f"roles.lora={str(share).lower()}")
    assert command(monkeypatch, "distill", recipe, *how, "--set", "train.lr=0.02") == 0
    first = fewstep.sample(fewstep.load_student("runs/tiny/final"), ["red cat"], [0])
    still = ("--set", "train.lr=1e-12", "--set", "init_from=runs/tiny", "--out", "runs/second")
    assert command(monkeypatch, "distill", recipe, *how, *still) == 0
    second = fewstep.sample(fewstep.load_student("runs/second/final"), ["red cat"], [0])
    assert (
        first - second
    ).abs().max() <= 1e-4  # nothing was trained since: the start, average included, is what came out
    capsys.readouterr()
    from_teacher = still[:2] + still[4:]
    assert command(monkeypatch, "distill", recipe, *how, *from_teacher, "--set", "train.iterations=20") == 2
    assert "was made with other settings: init_from, the student to initialize from (weights " in error_of(
        capsys
    )  # it does not go on as a student of another beginning
    for options, expected in (
        (("--set", "init_from=nowhere"), "init_from: nowhere is no student folder"),
        (("--set", f"roles.lora={str(not share).lower()}"), f"set roles.lora={str(share).lower()}"),
        *(
            [(("--set", "roles.rank=3"), "init_from: runs/tiny/final has a LoRA of rank 2, got 3; set roles.rank=2")]
            if share
            else []
        ),
    ):
        capsys.readouterr()
        assert command(monkeypatch, "distill", recipe, *how, *still, "--out", "runs/third", *options) == 2
        assert expected in error_of(capsys)
        assert not Path("runs/third/embeddings").exists()  # it is said before


def test_a_start_of_another_rank_or_family_is_refused_before_the_run(
    trained: Path, teacher: Path, tmp_path: Path
) -> None:
    final, own = trained / "final", fewstep.load_teacher(teacher)
    require_same_lora(own, final, RolesConfig(rank=2), 2)
    with pytest.raises(ValueError, match=r"^init_from: .* has a LoRA of rank 2, got 4; set roles\.rank=2$"):
        require_same_lora(own, final, RolesConfig(rank=4), 2)
    other = pipelines.load(pipelines.save("pixart", tmp_path / "pixart"))
    with pytest.raises(ValueError, match=r"^init_from: .* has no layer .* are missing\); start from a student of this"):
        require_same_lora(other, final, RolesConfig(rank=2), 2)


def test_an_untrained_step_count_is_said_once(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """With the option's name, and not by Python's warning as well."""
    out = str(tmp_path / "x.png")
    assert command(monkeypatch, "sample", str(trained), "-p", "red cat", "--steps", "3", "-o", out) == 0
    assert not [w for w in recwarn if "was trained for" in str(w.message)]


@pytest.mark.slow
def test_a_stochastic_student_is_the_same_in_diffusers(
    recipe: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DMD2's student takes diffusers' LCM scheduler, with the same fresh noise."""
    assert (
        command(
            monkeypatch,
            "distill",
            recipe,
            "--set",
            "train.lr=0.02",
            "--set",
            "method.name=dmd2",
            "--set",
            "method.fake.updates=1",
        )
        == 0
    )
    student = fewstep.load_student("runs/tiny/final")
    assert student.card.solver == {"4": "renoise"}
    pipe = fewstep.load(teacher, "runs/tiny/final")
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    images = pipe(["red cat", "blue dog"], generator=generators, output_type="pt").images
    assert (images - fewstep.sample(student, ["red cat", "blue dog"], [3, 4])).abs().max() <= 1e-4


def test_the_saved_student_is_the_trained_one(teacher: Path, tmp_path: Path) -> None:
    """In-memory images of the averaged student equal those of the student read back."""
    backbone = fewstep.load_teacher(teacher)
    roles = make_roles(backbone, RolesConfig(rank=4, alpha=2.0))
    for p in roles.trained["student"].values():
        p.data.normal_(0, 0.05)
    method = DistributionMatching(steps=2)
    memory = sample_images(
        backbone, roles.denoise("student", backbone.encode(["red cat"])), [0], method.times(backbone.schedule)
    )
    Student.of(roles, method, Origin(str(teacher), "", 0, 0.0, "tdm")).write(tmp_path / "final")
    assert torch.allclose(fewstep.sample(fewstep.load_student(tmp_path / "final"), ["red cat"], [0]), memory, atol=1e-5)
    pipe = fewstep.load(teacher, tmp_path / "final")
    image = pipe("red cat", generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert (image - memory).abs().max() <= 1e-4  # trained with another alpha: the scale is in the weights


def test_sample_writes_a_image_and_says_what_it_costs(
    final: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert (
        command(monkeypatch, "sample", "runs/tiny", "-p", "red cat", "-p", "blue dog", "--compare", "-o", "out.png")
        == 0
    )
    assert Image.open("out.png").size[0] > 2 * 96
    said = capsys.readouterr().out
    assert "student: 4 steps, 4 NFE and " in said
    assert "teacher: 50 steps, 100 NFE and " in said
    assert command(monkeypatch, "sample", teacher, "-p", "red cat", "--steps", "1", "-o", "out.png") == 0
    assert "teacher: 1 step, 1 NFE and " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["sample", "runs/tiny", "-p", "x", "--steps", "0"], "--steps: got 0"),
        (["sample", "runs/tiny", "-p", " "], "--prompt: got an empty prompt"),
        (["sample", "runs/tiny"], "--prompt: got none; name one"),
        (["sample", "runs/tiny", "-p", "x", "--guidance", "7"], "guidance baked in"),
        (["sample", "runs/tiny", "-p", "x", "--guidance-rescale", "0.5"], "needs no guidance"),
        (["sample", "emoji", "-p", "x", "--guidance-rescale", "2"], "--guidance-rescale: got 2"),
        (["sample", "nothing", "-p", "x"], "teacher: got 'nothing'"),
        (["inspect", "nothing"], "inspect: there is no nothing"),
        (
            ["report", "nothing"],
            "run nothing: there is no such folder, allowed are folders that `fewstep distill RECIPE` made",
        ),
        (["report", "runs"], "run runs: there is no run.json, allowed are folders that `fewstep distill RECIPE` made"),
        (["report", "runs/tiny/final"], "run runs/tiny/final: there is no run.json"),
        (["sample", "runs/tiny", "-p", "x", "--solver", "euler"], "solver: got 'euler', allowed are ddim, dpmpp"),
        (["evaluate", "runs"], "runs is no student folder"),
    ],
)
def test_mistakes_are_one_line(
    final: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    capsys.readouterr()
    assert command(monkeypatch, *arguments) == 2
    assert expected in error_of(capsys)


def test_a_truncated_student_is_one_line(
    final: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = final / "pytorch_lora_weights.safetensors"
    data = file.read_bytes()
    file.unlink()  # it shares its bytes with the file of the long name
    file.write_bytes(data[:500])
    capsys.readouterr()
    assert command(monkeypatch, "sample", final, "-p", "x") == 2
    assert "is damaged or was changed" in error_of(capsys)
    assert command(monkeypatch, "inspect", file) == 2
    assert "missing or damaged" in error_of(capsys)


def test_a_report_is_written_again(final: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From wherever the run lies now."""
    run = shutil.move(final.parent, "elsewhere")
    page = Path(run) / "report.html"
    before = page.read_text()
    page.unlink()
    assert command(monkeypatch, "report", run) == 0
    assert page.read_text() == before.replace("runs/tiny", "elsewhere").replace(
        "<title>tiny", "<title>elsewhere"
    ).replace("<h1>tiny", "<h1>elsewhere")


def test_inspect_and_doctor(
    final: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert command(monkeypatch, "inspect", final) == 0
    text = capsys.readouterr().out
    assert "tdm" in text
    assert "999.0, 749.0" in text
    assert re.search(r"NFE +4 in 4 steps", text)
    assert command(monkeypatch, "inspect", final / "pytorch_lora_weights.safetensors") == 0
    assert re.search(r"rank +2", capsys.readouterr().out)
    assert command(monkeypatch, "inspect", teacher) == 0
    assert "UNet2DConditionModel" in capsys.readouterr().out
    assert command(monkeypatch, "inspect", "runs/tiny") == 0
    text = capsys.readouterr().out
    assert "checkpoint-000005" in text
    assert re.search(r"NFE +4 in 4 steps", text)
    assert command(monkeypatch, "doctor") == 0
    assert "torch" in capsys.readouterr().out


def test_a_base_that_predicts_something_else_is_refused(final: Path, teacher: Path, tmp_path: Path) -> None:
    """fewstep and a pipeline refuse a base that predicts something else.

    A pipeline with a student in it is not saved, because nothing could load the folder.
    """
    other = shutil.copytree(teacher, tmp_path / "other")
    scheduler = other / "scheduler" / "scheduler_config.json"
    told = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "beta_schedule": "scaled_linear"}
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | told))
    for load in (lambda: fewstep.load_student(final, other), lambda: fewstep.load(other, final)):
        with pytest.raises(
            ValueError,
            match=r"^student: \S+ was made on a base that predicts v_prediction, this one predicts epsilon; load it on",
        ):
            load()
    with pytest.raises(ValueError, match=r"^save_pretrained: .*; run: fewstep export STUDENT \S+ --format pipeline$"):
        fewstep.load(teacher, final).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_an_export_that_draws_nothing_is_not_close(
    final: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = replace(FORMATS["student"], write=lambda *_: torch.full((2, 3, 16, 16), float("nan")))
    monkeypatch.setitem(FORMATS, "student", nothing)
    assert command(monkeypatch, "export", str(final), str(tmp_path / "out")) == 2
    assert "the files differ from the student by nan in an element" in error_of(capsys)
