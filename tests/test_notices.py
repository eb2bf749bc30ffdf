"""Other libraries' notices stay off the screen, our own and the rest of theirs do not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import pipelines
from tests.project import ROOT

CODE = """
import logging, sys, warnings
import fewstep
fewstep.load_teacher
from fewstep.backbones.meta import meta_teacher
import torch
meta_teacher(sys.argv[1], torch.float32)
logging.getLogger("transformers.utils.import_utils").warning(\
"`CLIPImageProcessor` requires torchvision (not installed); falling back")
logging.getLogger("diffusers.loaders.lora_base").warning("No LoRA keys associated to CLIPTextModel found")
from peft import LoraConfig, inject_adapter_in_model
net = torch.nn.Sequential(torch.nn.Linear(2, 2))
for step in ("step_1", "step_2"):
    inject_adapter_in_model(LoraConfig(target_modules=["0"]), net, step)
print("---", file=sys.stderr)
warnings.warn("ours", stacklevel=1)
logging.getLogger("transformers.utils.import_utils").warning("theirs")
"""


@pytest.mark.slow
def test_what_is_not_for_users_is_not_shown(tmp_path: Path) -> None:
    """A scheduler's configuration of years ago, of which diffusers prints all."""
    folder = pipelines.save("sd", tmp_path / "sd")
    config = folder / "scheduler" / "scheduler_config.json"
    old = json.loads(config.read_text(encoding="utf-8")) | {
        "steps_offset": 0,
        "clip_sample": True,
        "_diffusers_version": "0.2.0",
    }
    config.write_text(json.dumps(old), encoding="utf-8")
    env = {k: v for k, v in os.environ.items() if k not in ("TRANSFORMERS_VERBOSITY", "PYTHONWARNINGS")} | {
        "PYTHONPATH": str(ROOT / "src")
    }
    done = subprocess.run([sys.executable, "-c", CODE, str(folder)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = done.stderr.split("---\n")
    assert before == "" and "UserWarning: ours" in after and "theirs" in after
