"""The exercises as the notebooks pose them: open to the reader, solved by what is folded below."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch

from flashmla import PagedKVCache
from flashmla.lab.exercises import dsa, fp8, mha, mla, paged_kv, roofline, split_kv

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def exercises(stage: str):
    """(name, exercise cell, checker's source, folded solution) of a stage's notebook."""
    cells = nbformat.read(NOTEBOOKS / f"{stage}.ipynb", as_version=4).cells
    for at, cell in enumerate(cells):
        if "nbmake" in cell.metadata:
            name = re.search(r"def (\w+)\(", cell.source)
            assert name, cell.source
            yield name[1], cell, cells[at + 1].source, cells[at + 2].source


STAGES = {
    "00_roofline": roofline,
    "01_mha": mha,
    "02_mla": mla,
    "03_paged_kv": paged_kv,
    "04_split_kv": split_kv,
    "05_fp8": fp8,
    "06_dsa": dsa,
}
FOUND = [(stage, *found) for stage in STAGES for found in exercises(stage)]


@pytest.mark.parametrize("stage", STAGES)
def test_every_checker_is_used_by_its_notebook(stage):
    used = {f"check_{name}" for where, name, *_ in FOUND if where == stage}
    assert used == {name for name in dir(STAGES[stage]) if name.startswith("check_")}


@pytest.mark.parametrize(
    "stage, name, cell, check, folded", FOUND, ids=[f"{stage}-{name}" for stage, name, *_ in FOUND]
)
def test_an_exercise_is_open_and_its_solution_right(stage, name, cell, check, folded, capsys):
    checker = getattr(STAGES[stage], f"check_{name}")
    assert f"check_{name}({name})" in check
    with pytest.raises(AssertionError):
        checker(defined(cell.source, name))
    # What CI injects is what the reader can unfold.
    solution = "\n".join(cell.metadata["nbmake"]["post_cell_execute"])
    assert f"```python\n{solution}\n```" in folded and folded.startswith("<details>")
    checker(defined(solution, name))
    assert capsys.readouterr().out.startswith("passed")


def defined(source: str, name: str):
    """The function of that name after running a cell that needs no more than NumPy."""
    scope: dict = {"np": np}
    exec(source, scope)
    return scope[name]


@pytest.mark.parametrize(
    "length, children, appended", [(100, 3, 1), (128, 3, 1), (100, 3, 0), (100, 2, 29), (0, 2, 1)]
)
def test_pages_after_fork_is_what_the_cache_does(length, children, appended):
    cache = PagedKVCache(num_pages=64, head_dim=4)
    parent = cache.allocate(torch.zeros(length, 4).bfloat16())
    family = [cache.fork(parent) for _ in range(children)]
    for child in family:
        cache.append(child, torch.ones(appended, 4).bfloat16())
    solution = next(found for found in FOUND if found[1] == "pages_after_fork")[2]
    count = defined("\n".join(solution.metadata["nbmake"]["post_cell_execute"]), "pages_after_fork")
    assert cache.num_pages - cache.free_pages == count(length, 64, children, appended)
