"""What holds for the oracle's sources: independent of every tier, and short enough to be shown."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import flashmla.reference

SOURCES = sorted(Path(flashmla.reference.__file__).parent.glob("*.py"))
ALLOWED = {"__future__", "dataclasses", "functools", "ml_dtypes", "numpy"}
LONGEST = 30  # lines, docstring included: notebooks show whole functions


def test_there_is_a_file_for_each_stage():
    names = {path.stem for path in SOURCES}
    assert names == {"__init__", "mha", "mla", "paged_kv", "split_kv", "fp8", "dsa"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_the_oracle_imports_no_tier(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported = [node.module]
        else:
            continue
        for name in imported:
            assert name in ALLOWED or name.startswith("flashmla.reference."), name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_functions_are_short_and_say_what_they_do(path):
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            lines = inspect.cleandoc(ast.get_source_segment(source, node)).count("\n") + 1
            assert lines <= LONGEST, f"{node.name} has {lines} lines"
            assert ast.get_docstring(node), node.name
