"""Scores in virtual environments of their own, spoken to by files.

Their packages pin old versions of others.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..hashes import sha256_of
from ..reading import reading
from . import dpg, inception, lpips, vbench, weights
from .scorer import ACTIONS, DIMENSIONS, OBJECTS, Scorer
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

    `code` runs there and defines `score(paths, prompts)`, a list of numbers of images, or of `clips`, in which NaN says
    that a prompt is not asked for. Scores of one package share the environment `home`; by default it has the score's
    name. `built` are installed after the others, from sources that need them. The score is `of` one list of prompts, or
    of any. `file` is fetched from `url` into the folder of weights.
    """

    key: str
    requirements: tuple[str, ...]
    code: str
    home: str = ""
    clips: bool = False
    built: tuple[str, ...] = ()
    of: str = ""
    file: Path | None = None
    url: str = ""

    @property
    def folder(self) -> str:
        """Return the name of the environment, which `--install` takes."""
        return self.home or self.key


# What fetches a file, in an environment: it is told the place, and has the address.
FETCH = "import sys, urllib.request\nurllib.request.urlretrieve({url!r}, sys.argv[1])\n"
DETECTRON = "detectron2 @ git+https://github.com/facebookresearch/detectron2.git"


def _vbench(dimension: str) -> Environment:
    built = (DETECTRON,) if dimension in OBJECTS else ()
    return Environment(
        f"vbench_{dimension}",
        ("torch", "torchvision", "vbench==0.1.5", "setuptools<70"),  # openai-clip imports pkg_resources
        vbench.code_of(dimension),
        "vbench_objects" if built else "vbench",
        clips=True,
        built=built,
        of=vbench.LIST if dimension in ACTIONS + OBJECTS else "",
    )


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
        Environment(
            "dpg",
            ("torch", "torchvision", "modelscope[framework]==1.40.2", "transformers<4.47", "timm", "numpy<2"),
            dpg.CODE,
            of=dpg.LIST,
            file=dpg.FILE,
            url=dpg.URL,
        ),
        *map(_vbench, (*DIMENSIONS, *ACTIONS, *OBJECTS)),
    )
}


@dataclass(frozen=True)
class Conversion:
    """A file of weights, fetched, or made once from a package's.

    `code` runs in an environment that is deleted afterwards, and writes the file that it is told. `file` is its place
    in the folder of weights.
    """

    key: str
    requirements: tuple[str, ...]
    file: Path
    code: str


CONVERSIONS = {
    c.key: c
    for c in (
        Conversion(
            "lpips",
            ("torch", "torchvision", "lpips==0.1.4", "safetensors"),
            lpips.FILE,
            "import sys\n"
            "import lpips\n"
            "from safetensors.torch import save_file\n"
            "tensors = lpips.LPIPS(net='alex', verbose=False).state_dict()\n"
            "save_file({k: v.contiguous() for k, v in tensors.items() if not k.startswith('lins.')}, sys.argv[1])\n",
        ),
        Conversion("inception", (), inception.FILE, FETCH.format(url=inception.URL)),
    )
}


def place() -> Path:
    """Return the folder of all environments."""
    return Path(os.environ.get(PLACE) or Path.home() / ".cache" / "fewstep" / "environments")


def python_of(folder: str) -> Path:
    """Return the interpreter of an environment, there or not."""
    return place() / folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def install(key: str) -> Path:
    """Make the environment of a score, or a file of weights.

    Returns where it is. Raises ValueError in one line where it cannot be made.
    """
    known: dict[str, Environment | Conversion] = {**{e.folder: e for e in ENVIRONMENTS.values()}, **CONVERSIONS}
    if key not in known:
        raise ValueError(f"--install: got {key}; choose one of {', '.join(known)}")
    folder, python = place() / key, str(python_of(key))
    _run([sys.executable, "-m", "venv", "--clear", str(folder)], key)
    pip, wanted = [python, "-m", "pip", "install", "--quiet"], known[key]
    if wanted.requirements:
        _run([*pip, *wanted.requirements], key)
    if isinstance(wanted, Conversion):
        _run([python, "-c", wanted.code, str(file := _placed(wanted.file))], key)
        shutil.rmtree(folder)
        return file
    if wanted.built:
        _run([*pip, "--no-build-isolation", *wanted.built], key)
    if wanted.file is not None:
        _run([python, "-c", FETCH.format(url=wanted.url), str(_placed(wanted.file))], key)
    (folder / PACKAGES).write_text(_run([python, "-m", "pip", "freeze"], key), encoding="utf-8")
    return folder


def _placed(file: Path) -> Path:
    """Return the place of a file of weights, and make its folder."""
    placed = weights.place() / file
    placed.parent.mkdir(parents=True, exist_ok=True)
    return placed


def _run(command: Sequence[str], key: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        step = "weights" if command[1] == "-c" else command[2]
        raise ValueError(f"--install {key}: {Path(command[0]).name} {step} failed ({said}); look at the network")
    return done.stdout


@dataclass
class EnvironmentScorer:
    """A score that another process computes.

    The process starts with the first images and ends with `close`. With `write_clip`, which writes one clip
    [F, 3, H, W] as mp4, it scores clips.
    """

    key: str
    python: Path
    code: str
    weights: Mapping[str, str] = field(default_factory=dict)
    write_clip: Callable[[Path, Tensor], object] | None = None
    of: str = ""
    process: "subprocess.Popen[str] | None" = None

    @property
    def clips(self) -> bool:
        """Whether it scores clips, and no images."""
        return self.write_clip is not None

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Score images or clips.

        Returns [B] of images [B, 3, H, W], or of clips [B, F, 3, H, W], in [0, 1]. Raises ValueError where the process
        ends without an answer.
        """
        return self.ask(images, range(len(images)), prompts)

    def ask(self, images: Tensor, of: Sequence[int], texts: Sequence[str]) -> Tensor:
        """Score each text [Q] with the image or clip `of` it."""
        with tempfile.TemporaryDirectory(prefix="fewstep-scores-") as name:
            folder, ending = Path(name), "png" if self.write_clip is None else "mp4"
            (folder / "seen").mkdir()
            paths = [folder / "seen" / f"{i:04d}.{ending}" for i in range(len(images))]
            if self.write_clip is None:
                for path, image in zip(paths, pil_images(images), strict=True):
                    image.save(path)
            else:
                for path, clip in zip(paths, images, strict=True):
                    self.write_clip(path, clip)
            answer, request = folder / "answer.json", folder / "request.json"
            asked = {"images": [str(paths[i]) for i in of], "prompts": list(texts), "answer": str(answer)}
            request.write_text(json.dumps(asked), encoding="utf-8")
            self._ask(str(request))
            with reading(f"--metrics {self.key}: its answer", f"run: fewstep evaluate --install {self._environment()}"):
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
                f"run: fewstep evaluate --install {self._environment()}"
            )

    def _environment(self) -> str:
        return ENVIRONMENTS[self.key].folder

    def close(self) -> None:
        """End the process."""
        if self.process is not None:
            for stream in (self.process.stdin, self.process.stdout):
                if stream is not None:
                    stream.close()
            self.process.wait()
            self.process = None


def environment_scorer(key: str, write_clip: Callable[[Path, Tensor], object]) -> Scorer:
    """Return the score of an environment that is there.

    `write_clip` writes one clip as mp4. Raises ValueError in one line where the environment is not there.
    """
    known = ENVIRONMENTS[key]
    python, packages = python_of(known.folder), place() / known.folder / PACKAGES
    if not python.exists() or not packages.is_file():
        raise ValueError(
            f"--metrics {key}: it needs an environment of its own, for its old versions; "
            f"run: fewstep evaluate --install {known.folder}"
        )
    record = {f"environments/{known.folder}/{PACKAGES}": sha256_of(packages)}
    found = EnvironmentScorer(key, python, known.code, record, write_clip if known.clips else None, known.of)
    if key != dpg.LIST:
        return found
    questions = weights.place() / dpg.FILE
    return dpg.DpgScorer(dpg.read_questions(questions), found, {str(dpg.FILE): sha256_of(questions)})
