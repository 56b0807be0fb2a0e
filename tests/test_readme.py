"""README says what is so: its snippets run, its table follows the results, its names exist."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from test_bench import result_file

import flashmla

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture
def readme_table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import readme_table as module

    return module


def test_every_snippet_runs_as_it_stands():
    snippets = blocks("python")
    assert len(snippets) >= 3
    scope: dict[str, object] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"README snippet {number}", "exec"), scope)


def test_every_make_target_and_command_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:`|\$ )make ([a-z]+)", README))
    assert {"test", "notebooks", "lab", "book", "bench"} <= named <= targets
    commands = set(re.findall(r"(?:`|\$ )flashmla ([a-z]+)", README))
    assert {"build", "doctor", "bench"} == commands


def test_every_path_of_the_map_exists():
    lines = blocks("text")[0].splitlines()
    parent = ""
    for line in lines:
        name = line.split()[0]
        parent = "" if not line.startswith(" ") else parent
        assert (ROOT / parent / name).exists(), f"the map names {parent}{name}"
        if not line.startswith(" "):
            parent = name


def test_operations_of_the_support_table_are_public():
    rows = README.split("| operation | CUDA")[1].split("\n\n")[0]
    for name in set(re.findall(r"`([a-z_]+(?:\.[a-z]+)?)[`(]", rows)) - {"h_kv", "h_q"}:
        owner: object = flashmla
        for part in name.split("."):
            assert hasattr(owner, part), f"flashmla.{name} is in README's table and nowhere else"
            owner = getattr(owner, part)


def test_python_versions_are_those_of_pyproject():
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.findall(r"Python :: (3\.\d+)", text)
    assert f"Python {', '.join(listed[:-1])} or {listed[-1]}" in README
    assert f"| Python | {', '.join(listed)} |" in README


def test_table_is_in_step_with_the_results(readme_table):
    text = readme_table.generated(ROOT / "benchmarks" / "results")
    assert readme_table.filled(README, text) == README, "run python tools/readme_table.py"


def test_table_shows_ours_beside_the_peer(readme_table):
    lines = readme_table.section(
        {**result_file(), "provenance": {"gpu": "Card", "driver": "1", "cuda": "13.0",
         "torch": "2.11", "commit": "0123456789abcdef", "date": "2026-01-02T03:04:05"}}
    )  # fmt: skip
    assert lines[0] == "**Card**, beside other-1.0"
    assert lines[4].startswith("| dense_decode b=128 h_q=128 s_q=1 s_k=4096 | 200 | 730 |")
    assert lines[4].endswith("| 1.0e-03 | 250 | 1.25 |")
    assert lines[-1] == "driver 1, CUDA 13.0, torch 2.11, commit 0123456789ab, 2026-01-02."


def result_of_a_card():
    said = ("gpu", "driver", "cuda", "torch", "commit", "date")
    return result_file() | {"provenance": dict.fromkeys(said, "x")}


def test_rows_of_an_earlier_run_are_marked(readme_table):
    result = result_of_a_card()
    case = result["rows"][0]["case"]
    result["rows"][0]["commit"] = "fedcba9876543210"
    lines = readme_table.section(result)
    assert [line for line in lines if f"{case}¹ |" in line]
    assert "¹ Measured with commit fedcba987654." in lines


def test_rows_without_a_graph_are_marked(readme_table):
    result = result_of_a_card()
    assert not [line for line in readme_table.section(result) if "†" in line]
    result["rows"][0].update(us=None, eager_us=300.0)
    marked = [line for line in readme_table.section(result) if "†" in line]
    assert len(marked) == 2 and "† | 300 |" in marked[0]


def test_table_without_a_peer_has_no_ratio(readme_table):
    result = result_file()
    result["rows"] = [row for row in result["rows"] if row["impl"] == "flashmla-cuda"]
    assert all(line.endswith("| – | – |") for line in readme_table.table(result)[2:])


def test_results_of_a_cpu_are_not_shown(readme_table, tmp_path: Path):
    assert readme_table.generated(tmp_path) == "No card's results are recorded yet."
