"""`fewstep doctor`: what is installed, which devices are there, what is missing and the command that installs it."""

import platform
from importlib.metadata import PackageNotFoundError, version

from .progress import console

CORE = (
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "pydantic",
    "typer",
    "rich",
    "torchmetrics",
    "matplotlib",
    "jinja2",
)
OPTIONAL = {
    "datasets": "pip install datasets   # prompts from a hub data set",
    "gradio": "pip install 'fewstep[studio]'",
    "bitsandbytes": "pip install 'fewstep[train8bit]'",
}


def run_doctor() -> None:
    """Print it. Raises ValueError when a core package is missing."""
    import torch

    from .. import __version__
    from ..backbones.load import bundled

    console.print(f"fewstep {__version__}, Python {platform.python_version()}, {platform.platform()}")
    missing = []
    for name in CORE:
        found = _version(name)
        console.print(f"  {name:<16} {found or 'missing'}")
        missing += [] if found else [name]
    for name, command in OPTIONAL.items():
        console.print(f"  {name:<16} {_version(name) or f'not installed (optional): {command}'}", markup=False)
    console.print(f"teachers that ship with the package: {', '.join(bundled()) or 'none'}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            console.print(f"GPU {i}: {torch.cuda.get_device_name(i)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    else:
        console.print(f"no GPU; CPU with {torch.get_num_threads()} threads")
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}; run: pip install fewstep")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
