"""Scores in virtual environments of their own, spoken to by files.

Their packages pin old versions of others.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..hashes import sha256_of
from ..reading import reading
from .scorers import pil_images

PLACE = "FEWSTEP_ENVIRONMENTS"  # environment variable: a folder of virtual environments
PACKAGES = "packages.txt"  # what an environment holds, written when it is made

# What runs in an environment: it loads the model once, then answers requests, whose files it is told line by line.
LOOP = """
import json, os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
exec(sys.argv[1])
print("ready", file=answers, flush=True)
for line in sys.stdin:
    with open(line.strip(), encoding="utf-8") as file:
        asked = json.load(file)
    found = [float(x) for x in score(asked["images"], asked["prompts"])]
    with open(asked["answer"], "w", encoding="utf-8") as file:
        json.dump(found, file)
    print("done", file=answers, flush=True)
"""


@dataclass(frozen=True)
class Environment:
    """A score in an environment of its own.

    `code` runs there and defines `score(paths, prompts)`, a list of numbers.
    """

    key: str
    requirements: tuple[str, ...]
    code: str


ENVIRONMENTS = {
    e.key: e
    for e in (
        Environment(
            "imagereward",
            ("torch", "torchvision", "image-reward==1.5", "clip-anytorch", "transformers<4.42", "numpy<2"),
            "import ImageReward\n"
            "model = ImageReward.load('ImageReward-v1.0')\n"
            "def score(paths, prompts):\n"
            "    return [model.score(prompt, path) for path, prompt in zip(paths, prompts)]\n",
        ),
        Environment(
            "hpsv3",
            ("hpsv3==1.0.0",),
            "import torch\n"
            "from hpsv3 import HPSv3RewardInferencer\n"
            "model = HPSv3RewardInferencer(device='cuda' if torch.cuda.is_available() else 'cpu')\n"
            "def score(paths, prompts):\n"
            "    return [r[0].item() for r in model.reward(prompts=prompts, image_paths=paths)]\n",
        ),
        Environment(
            "vqascore",
            ("t2v-metrics==3.0",),
            "import t2v_metrics\n"
            "model = t2v_metrics.VQAScore(model='clip-flant5-xxl')\n"
            "def score(paths, prompts):\n"
            "    return [model(images=[a], texts=[b])[0][0].item() for a, b in zip(paths, prompts)]\n",
        ),
    )
}


def place() -> Path:
    """Return the folder of all environments."""
    return Path(os.environ.get(PLACE) or Path.home() / ".cache" / "fewstep" / "environments")


def python_of(key: str) -> Path:
    """Return the interpreter of an environment, there or not."""
    return place() / key / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install(key: str) -> Path:
    """Make the environment of a score, and return its folder.

    Raises ValueError in one line where it cannot be made.
    """
    if key not in ENVIRONMENTS:
        raise ValueError(f"--install: got {key}; choose one of {', '.join(ENVIRONMENTS)}")
    folder, python = place() / key, str(python_of(key))
    _run([sys.executable, "-m", "venv", "--clear", str(folder)], key)
    _run([python, "-m", "pip", "install", "--quiet", *ENVIRONMENTS[key].requirements], key)
    (folder / PACKAGES).write_text(_run([python, "-m", "pip", "freeze"], key), encoding="utf-8")
    return folder


def _run(command: Sequence[str], key: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise ValueError(f"--install {key}: {Path(command[0]).name} {command[2]} failed ({said}); look at the network")
    return done.stdout


@dataclass
class EnvironmentScorer:
    """A score that another process computes.

    The process starts with the first images and ends with `close`.
    """

    key: str
    python: Path
    code: str
    weights: Mapping[str, str] = field(default_factory=dict)
    process: "subprocess.Popen[str] | None" = None

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images.

        Returns [B] of images [B, 3, H, W] in [0, 1]. Raises ValueError where the process ends without an answer.
        """
        with tempfile.TemporaryDirectory(prefix="fewstep-scores-") as name:
            folder = Path(name)
            paths = [folder / f"{i:04d}.png" for i in range(len(images))]
            for path, image in zip(paths, pil_images(images), strict=True):
                image.save(path)
            answer, request = folder / "answer.json", folder / "request.json"
            asked = {"images": [str(p) for p in paths], "prompts": list(prompts), "answer": str(answer)}
            request.write_text(json.dumps(asked), encoding="utf-8")
            self._ask(str(request))
            with reading(f"--metrics {self.key}: its answer", f"run: fewstep evaluate --install {self.key}"):
                return torch.tensor(json.loads(answer.read_text(encoding="utf-8")), dtype=torch.float32)

    def _ask(self, request: str) -> None:
        if self.process is None:
            self.process = subprocess.Popen(
                [str(self.python), "-c", LOOP, self.code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            self._expect("ready")
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(request + "\n")
            self.process.stdin.flush()
        self._expect("done")

    def _expect(self, word: str) -> None:
        assert self.process is not None and self.process.stdout is not None
        if self.process.stdout.readline().strip() != word:
            self.close()
            raise ValueError(
                f"--metrics {self.key}: its process ended without an answer, its last words are above; "
                f"run: fewstep evaluate --install {self.key}"
            )

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            for stream in (self.process.stdin, self.process.stdout):
                if stream is not None:
                    stream.close()
            self.process.wait()
            self.process = None


def environment_scorer(key: str) -> EnvironmentScorer:
    """Return the score of an environment that is there.

    Raises ValueError in one line where it is not.
    """
    python, packages = python_of(key), place() / key / PACKAGES
    if not python.exists() or not packages.is_file():
        raise ValueError(
            f"--metrics {key}: it needs an environment of its own, for its old versions; "
            f"run: fewstep evaluate --install {key}"
        )
    digest = sha256_of(packages)
    return EnvironmentScorer(key, python, ENVIRONMENTS[key].code, {f"environments/{key}/{PACKAGES}": digest})
