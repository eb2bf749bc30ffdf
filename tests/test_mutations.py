"""Mistakes that would train something else, each made on purpose in a copy of the source: a fast test has to fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from .project import ROOT


class Mutation(NamedTuple):
    """A text in a file, what stands there instead, and the tests that should see it."""

    file: str
    old: str
    new: str
    tests: str


MATCHING, LOOP = "src/fewstep/methods/distribution_matching.py", "src/fewstep/training/loop.py"
MUTATIONS = {
    "the same prompts every iteration": Mutation(
        LOOP,
        'seeded(config.seed, i, "prompts", stream)',
        'seeded(config.seed, 0, "prompts", stream)',
        "tests/training/test_loop.py",
    ),
    "the same noise every iteration": Mutation(
        LOOP,
        'seeded(config.seed, i, "draw", stream, device)',
        'seeded(config.seed, 0, "draw", stream, device)',
        "tests/training/test_loop.py",
    ),
    "all ranks draw the same": Mutation(
        LOOP, "stream = rank * config.accumulate + part", "stream = part", "tests/training/test_loop.py"
    ),
    "the discriminator told another step count": Mutation(
        MATCHING,
        "discriminator.logits(fake_tokens, d.tau, d.steps)",
        "discriminator.logits(fake_tokens, d.tau, method.counts[0])",
        "tests/methods/test_adversary.py",
    ),
    "the student's side told another step count": Mutation(
        MATCHING,
        "discriminator.logits(tokens, d.tau, d.steps)",
        "discriminator.logits(tokens, d.tau, method.counts[0])",
        "tests/methods/test_adversary.py",
    ),
    "the second stage's fake score begun as the student": Mutation(
        "src/fewstep/roles/roles.py",
        """        for name, p in self.trained["student"].items():
            self.average[name].copy_(p.detach())
""",
        """        for name, p in self.trained["student"].items():
            self.average[name].copy_(p.detach())
        adapters.assign(self.trained["fake"], dict(zip("""
        """self.trained["fake"], self.trained["student"].values(), strict=True)))
""",
        "tests/cli/test_student.py",
    ),
    "SiD's alpha halved": Mutation(
        "src/fewstep/methods/presets.py",
        "fisher_correction=1.0",
        "fisher_correction=0.5",
        "tests/methods/test_presets.py",
    ),
    "the student's betas": Mutation(
        LOOP,
        "            config.betas,\n",
        "            (0.9, 0.999) if role == 'student' else config.betas,\n",
        "tests/training/test_loop.py",
    ),
    "all betas": Mutation(LOOP, " = (0.0, 0.999)\n", " = (0.9, 0.999)\n", "tests/training/test_loop.py"),
    "SDXL's guidance": Mutation(
        "recipes/sdxl-tdm4.yaml", "guidance: 8,", "guidance: 1.5,", "tests/cli/test_recipes.py"
    ),
    "SDXL's fake rate": Mutation(
        "recipes/sdxl-tdm4.yaml", "fake_lr: 5.0e-6", "fake_lr: 5.0e-4", "tests/cli/test_recipes.py"
    ),
    "the LoRA recipe's guidance": Mutation(
        "recipes/sdxl-tdm4-lora.yaml", "guidance: 8,", "guidance: 1.5,", "tests/cli/test_recipes.py"
    ),
    "the LoRA recipe's fake rate": Mutation(
        "recipes/sdxl-tdm4-lora.yaml", "fake_lr: 2.0e-4", "fake_lr: 2.0e-2", "tests/cli/test_recipes.py"
    ),
    "TrajP's coordinates zero": Mutation(
        "src/fewstep/heads/head.py",
        "return (curve.at(1 - self.schedule.fraction(t)) / self.curve_size.to(t.device)).float()",
        "return 0 * (curve.at(1 - self.schedule.fraction(t)) / self.curve_size.to(t.device)).float()",
        "tests/heads/test_head.py",
    ),
    "sharded ranks one call short": Mutation(
        MATCHING,
        "calls = steps - 1 if roles.sharded else 0",
        "calls = steps - 2 if roles.sharded else 0",
        "tests/methods/test_draw.py",
    ),
    "LCM's average at cached casts": Mutation(
        "src/fewstep/roles/adapters.py", "    torch.clear_autocast_cache()\n", "", "tests/training/test_bf16.py"
    ),
    "the v-loss for every network": Mutation(
        "src/fewstep/methods/matching_settings.py",
        'weight: Annotated[str, OneOf(WEIGHTINGS)] = "own"',
        'weight: Annotated[str, OneOf(WEIGHTINGS)] = "v"',
        "tests/methods/test_distribution_matching.py",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_what_is_changed_is_there(name: str) -> None:
    file, old, _, tests = MUTATIONS[name]
    assert (ROOT / file).read_text(encoding="utf-8").count(old) >= 1, f"{file} no longer says {old!r}"
    assert (ROOT / tests).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_is_caught(name: str, tmp_path: Path) -> None:
    file, old, new, tests = MUTATIONS[name]
    for part in ("src", "tests", "recipes", "pyproject.toml"):
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, tmp_path / part)
    text = (tmp_path / file).read_text(encoding="utf-8")
    assert text.count(old) >= 1, f"{file} no longer says {old!r}"
    (tmp_path / file).write_text(text.replace(old, new), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout[-2000:]
    assert "1 failed" in done.stdout
