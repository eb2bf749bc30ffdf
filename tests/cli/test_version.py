"""`--version`, and the package run as a module."""

import subprocess
import sys

import pytest

import fewstep


@pytest.mark.parametrize("command", [[sys.executable, "-m", "fewstep"], ["fewstep"]], ids=["module", "script"])
def test_the_version_is_printed(command: list[str]) -> None:
    if command[0] == "fewstep":
        command = [sys.executable, "-c", "from fewstep.cli.main import run; run()"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == f"fewstep {fewstep.__version__}\n"
