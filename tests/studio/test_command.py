"""`fewstep studio` refuses what is not safe or not there, in one line."""

import sys
from pathlib import Path

import pytest

from fewstep.cli.studio import loopback
from tests.cli.common import error_of, fewstep


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.8.8.8"])
def test_this_machine_needs_no_password(host: str) -> None:
    assert loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "example.org", "127.0.0.1.example.org", ""])
def test_beyond_it_needs_one(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not loopback(host)
    assert fewstep(monkeypatch, "studio", tmp_path, "--no-browser", "--host", host) == 2
    assert error_of(capsys).startswith(f"error: --host: {host} is reached from other machines")


def test_without_gradio_one_line_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert fewstep(monkeypatch, "studio", tmp_path, "--no-browser") == 2
    assert error_of(capsys) == "error: fewstep studio needs gradio; run: pip install 'fewstep[studio]'"


def test_a_file_is_no_folder_of_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("x")
    assert fewstep(monkeypatch, "studio", tmp_path / "file", "--no-browser") == 2
    assert "is no folder" in error_of(capsys)


def test_the_doctor_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert fewstep(monkeypatch, "doctor") == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["gradio"])
    assert "pip install 'fewstep[studio]'" in line or line.split()[1][0].isdigit()
