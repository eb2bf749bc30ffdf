"""`fewstep doctor`: installed packages, devices, and checks of a teacher.

For a missing package the command that installs the package is printed.
"""

import platform
from importlib.metadata import PackageNotFoundError, version

from ..findings import require
from .progress import console, put_result, show_checks, working

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
    "matplotlib",
    "jinja2",
)
OPTIONAL = {
    "datasets": "pip install datasets   # prompts from a hub data set",
    "bitsandbytes": "pip install 'fewstep[train8bit]'",
    "gradio": "pip install 'fewstep[studio]'   # fewstep studio",
}


def run_doctor(teacher: str | None = None, dtype: str = "float32", size: str | None = None) -> None:
    """Print packages and devices, or check a teacher.

    Raises ValueError where a core package is missing, or where a check of the teacher does not hold.
    """
    import torch

    if teacher is not None:
        check_teacher(teacher, dtype, size)
        return

    from .. import __version__
    from ..backbones.load import bundled

    console.print(f"fewstep {__version__}, Python {platform.python_version()}, {platform.platform()}")
    missing, versions = [], {name: _version(name) for name in (*CORE, *OPTIONAL)}
    for name in CORE:
        found = versions[name]
        console.print(f"  {name:<16} {found or 'missing'}")
        missing += [] if found else [name]
    for name, command in OPTIONAL.items():
        console.print(f"  {name:<16} {versions[name] or f'not installed (optional): {command}'}", markup=False)
    console.print(f"teachers that ship with the package: {', '.join(bundled()) or 'none'}")
    put_result({"fewstep": __version__, "python": platform.python_version(), "packages": versions, "missing": missing})
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            console.print(
                f"GPU {i}: {torch.cuda.get_device_name(i)}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
            )
    else:
        console.print(f"no GPU; CPU with {torch.get_num_threads()} threads")
    if missing:
        raise ValueError(f"missing: {', '.join(missing)}; run: pip install fewstep")


def check_teacher(teacher: str, dtype: str, size: str | None) -> None:
    """Check a teacher as before a training, and print the result.

    Raises ValueError with one line where a check does not hold.
    """
    import torch

    from ..backbones.conformance import conformance
    from ..backbones.load import quiet
    from ..backbones.sizes import from_text
    from ..training.loop import default_device
    from .loading import loaded

    quiet()
    types = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in types:
        raise ValueError(f"--dtype: got {dtype!r}, allowed are {', '.join(types)}")
    loaded_here = loaded(teacher, types[dtype], default_device(), from_text(size))
    with working("calling each of its networks"):
        checks = conformance(loaded_here)
    show_checks(checks)
    put_result({"teacher": teacher, "checks": [{"name": c.name, "holds": c.holds, "said": c.said} for c in checks]})
    require(checks, f"teacher: {teacher}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
