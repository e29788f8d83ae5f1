"""The house stays one to live in: short files, short functions, few of them side by side, a line for each room."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "lora_ensemble"
ROOMS = sorted(path.parent for path in PACKAGE.rglob("__init__.py") if path.parent != PACKAGE)
FILES = sorted(PACKAGE.rglob("*.py"))


def named(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def files_of(room: Path) -> list[Path]:
    return [p for p in room.iterdir() if p.is_file() and p.suffix != ".pyc"]


def test_the_root_has_few_files():
    assert len(files_of(PACKAGE)) <= 8


@pytest.mark.parametrize("room", ROOMS, ids=named)
def test_a_room_has_a_dozen_files_at_most_and_says_what_is_inside(room):
    assert len(files_of(room)) <= 12
    assert ast.get_docstring(ast.parse((room / "__init__.py").read_text(encoding="utf-8")))


@pytest.mark.parametrize("room", ROOMS, ids=named)
def test_contributing_has_a_line_for_each_room(room):
    page = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"| `{named(room)}/` |" in page


@pytest.mark.parametrize("path", FILES, ids=named)
def test_a_file_has_at_most_300_lines_and_a_function_60(path):
    source = path.read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 300
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert [f.name for f in functions if f.end_lineno - f.lineno >= 60] == []
