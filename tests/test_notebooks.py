"""The notebooks as files: small cells, no outputs, ids that stay, copies that match."""

from __future__ import annotations

import ast
import re
import statistics
from pathlib import Path

import nbformat
import pytest

from flashmla.lab.source import show

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
EXECUTED = ROOT / "book" / "executed"

NAMES = [path.name for path in NOTEBOOKS]
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=NAMES)


def read(path: Path) -> nbformat.NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(path).cells if cell.cell_type == "code"]


def words(cell: nbformat.NotebookNode) -> int:
    return len(cell.source.split())


def test_the_stages_are_there():
    assert {"00_roofline.ipynb", "01_mha.ipynb", "02_mla.ipynb"} <= set(NAMES)
    assert {"03_paged_kv.ipynb", "04_split_kv.ipynb"} <= set(NAMES)
    assert {"05_fp8.ipynb", "06_dsa.ipynb"} <= set(NAMES)


@every_notebook
def test_format_is_valid_and_ids_are_unique_names(path: Path):
    notebook = read(path)
    nbformat.validate(notebook)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    # Words somebody chose, which stay when a cell is edited; an editor's random ids would not.
    unchosen = [name for name in ids if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name)]
    assert not unchosen
    assert not [name for name in ids if re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f-]+)?", name)]


@every_notebook
def test_stripped_of_outputs(path: Path):
    for cell in code_cells(path):
        assert cell.outputs == [] and cell.execution_count is None, cell.id
        assert set(cell.metadata) <= {"nbmake", "tags"}, cell.id


@every_notebook
def test_cells_are_small(path: Path):
    notebook = read(path)
    assert 40 <= len(notebook.cells) <= 60
    lengths = [len(cell.source.splitlines()) for cell in code_cells(path)]
    assert statistics.median(lengths) <= 8 and max(lengths) <= 30
    prose = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    told = [cell for cell in prose if not cell.source.startswith("<details>")]
    assert not [(cell.id, words(cell)) for cell in told if words(cell) > 80]


@every_notebook
def test_begins_with_a_title_and_ends_with_the_provenance(path: Path):
    cells = read(path).cells
    assert cells[0].source.startswith(f"# {path.name[:2]} · ")
    last = cells[-1]
    assert last.cell_type == "code" and "provenance()" in last.source
    assert any("## Prediction" in cell.source for cell in cells[:8])


@every_notebook
def test_nothing_can_pass_by_being_skipped_or_by_raising(path: Path):
    for cell in code_cells(path):
        assert "raises-exception" not in cell.metadata.get("tags", []), cell.id
        assert "pytest.skip" not in cell.source and "sys.exit" not in cell.source, cell.id


@every_notebook
def test_every_listing_is_of_a_region_that_exists(path: Path):
    shown = 0
    for cell in code_cells(path):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "show":
                shown += 1
                if all(isinstance(argument, ast.Constant) for argument in node.args):
                    assert str(show(*(argument.value for argument in node.args)))  # type: ignore[attr-defined]
    assert shown >= 2


@every_notebook
def test_exercises_have_a_checker_and_a_folded_solution(path: Path):
    cells = read(path).cells
    exercises = [at for at, cell in enumerate(cells) if "nbmake" in cell.metadata]
    assert 2 <= len(exercises) <= 3
    for at in exercises:
        assert "exercises.check_" in cells[at + 1].source
        assert cells[at + 2].source.startswith("<details><summary>")


@every_notebook
def test_the_stages_demand_the_cards_kernels(path: Path):
    if path.name[:2] in ("01", "02", "03", "04", "05", "06"):
        source = "\n".join(cell.source for cell in code_cells(path))
        assert re.search(r"assert .*environment\.sizes\(\"torch\", \"cuda\"\)", source)


@every_notebook
def test_the_executed_copy_is_of_this_source(path: Path):
    copies = sorted(EXECUTED.glob("*.ipynb"))
    if not copies:
        return  # none was made yet; once one is, every notebook needs one
    copy = EXECUTED / path.name
    assert copy.exists(), f"{path.name} has no executed copy beside {copies[0].name}"
    source, executed = code_cells(path), code_cells(copy)
    assert [cell.source for cell in executed] == [cell.source for cell in source], (
        f"the executed copy of {path.name} is of another source: execute it again"
    )
    assert all(cell.execution_count for cell in executed if cell.source)
    assert any("date" in str(output) for output in executed[-1].outputs)
