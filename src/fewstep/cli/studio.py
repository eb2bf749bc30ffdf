"""`fewstep studio`: the web page."""

import ipaddress
import os
import time
from pathlib import Path

from .faults import fault_of
from .preflight import require_parent
from .progress import console
from .signals import Interrupted

LOCAL = ("localhost", "127.0.0.1", "::1")


def run_studio(folder: Path, host: str, port: int | None, password: str | None, browser: bool) -> None:
    """Serve the page until it is interrupted.

    Raises ValueError for an address beyond this machine without a password, and where gradio is missing.
    """
    if not loopback(host) and not password:
        raise ValueError(
            f"--host: {host} is reached from other machines, whose people could start and stop trainings; "
            "pass --password TEXT too, or leave --host out"
        )
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"FOLDER: {folder} is no folder; pass the folder of your runs, e.g. runs")
    require_parent(folder / "run", "FOLDER")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # gradio asks its makers' server otherwise
    try:
        import gradio  # noqa: F401
    except ImportError as error:
        raise ValueError("fewstep studio needs gradio; run: pip install 'fewstep[studio]'") from error
    from ..studio.app import serve

    try:
        _, address = serve(folder.resolve(), host, port, password or None, browser, line_of)
    except OSError as error:
        raise ValueError(f"--port: {port or 'none'} is free at {host}; pass another --port") from error
    console.print(address)
    said = "asks for the password" if password else "is reached from this machine alone"
    console.print(f"the studio of {folder} {said}; Ctrl-C closes it, and trainings go on")
    try:
        while True:
            time.sleep(3600)
    except Interrupted:
        console.print("the studio is closed; trainings that it started go on")


def line_of(error: Exception) -> str:
    """Return the line for an error on the page.

    One that nobody foresaw is logged in the working folder.
    """
    return fault_of(error).line.removeprefix("error: ")


def loopback(host: str) -> bool:
    """Return whether an address is reached from this machine alone."""
    if host in LOCAL:
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
