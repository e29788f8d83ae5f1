"""``make demo`` and ``make test`` on machines that have another Python than ours."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY

MAKE = shutil.which("make")
pytestmark = pytest.mark.skipif(MAKE is None, reason="there is no make here")


def make(folder: Path, **versions: str) -> subprocess.CompletedProcess[str]:
    """``make setup``, only told and not done, where Pythons of these versions are on the path."""
    shutil.copy(REPOSITORY / "Makefile", folder)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).touch()
    commands = folder / "bin"
    commands.mkdir()
    for name in ("sh", "test", "echo"):
        found = shutil.which(name)
        assert found is not None
        (commands / name).symlink_to(found)
    for name, version in versions.items():
        stand_in = commands / name.replace("_", ".")
        # What is asked for is whether sys.version_info is below (3, 11).
        code = 1 if tuple(map(int, version.split("."))) < (3, 11) else 0
        stand_in.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit {code}\necho ran $0 "$@"\nexit 9\n')
        stand_in.chmod(0o755)
    environment = {"PATH": str(commands)}
    return subprocess.run([str(MAKE), "setup"], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        ({"python3_11": "3.11", "python3": "3.13"}, "python3.11"),
        ({"python3": "3.12"}, "python3"),
        ({"python3": "3.9", "python3_13": "3.13"}, "python3.13"),
        ({"python3": "3.10", "python": "3.14"}, "python"),
    ],
)
def test_the_first_python_that_will_do(tmp_path: Path, there: dict[str, str], taken: str) -> None:
    done = make(tmp_path, **there)
    assert f"{taken} -m venv .venv" in done.stdout.splitlines()[0]
    assert f"/bin/{taken} -m venv" in done.stdout  # and it was begun


@pytest.mark.parametrize("there", [{}, {"python3": "3.9"}])
def test_none_is_said_in_one_line(tmp_path: Path, there: dict[str, str]) -> None:
    done = make(tmp_path, **there)
    assert done.returncode != 0
    assert done.stdout.strip() == ("no Python of at least version 3.11 found; install one, or say make PYTHON=...")
