"""The recipe of a run on a miniature of any family."""

from pathlib import Path

import yaml


def recipe(folder: Path, **changes: object) -> Path:
    """Two iterations on a tiny teacher."""
    train = {"iterations": 2, "batch": 2, "lr": 1e-3, "fake_lr": 1e-3, "checkpoint_every": 1}
    value = {
        "kind": "distill",
        "name": "tiny",
        "teacher": str(folder),
        "prompts": {"source": "prompts.txt"},
        "method": {"steps": [2, 1], "name": "tdm-unify", "warmup": 0},
        "roles": {"rank": 2},
        "train": train,
        "preview": {"every": 2, "teacher_steps": 2, "prompts": ["red cat", "blue dog"]},
    } | changes
    Path("prompts.txt").write_text("red cat\nblue dog\n")
    Path("tiny.yaml").write_text(yaml.safe_dump(value))
    return Path("tiny.yaml")
