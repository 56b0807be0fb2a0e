"""README and the book's page on serving say what is so: snippets run, tables follow the results and
the code, names exist."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
from test_bench import result_file

import flashmla

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SERVING = (ROOT / "book" / "serving.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def readme_table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import readme_table as module

    return module


@pytest.mark.parametrize(("text", "number"), [(README, 5), (SERVING, 2)], ids=["README", "serving"])
def test_every_snippet_runs_as_it_stands(text: str, number: int):
    snippets = blocks("python", text)
    assert len(snippets) == number
    scope: dict[str, object] = {}
    for place, snippet in enumerate(snippets):
        exec(compile(snippet, f"snippet {place}", "exec"), scope)


def test_every_environment_variable_is_listed():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "flashmla").rglob("*.py")]
    read = set(re.findall(r"FLASHMLA_[A-Z_]+", "".join(sources)))
    rows = [line.split("|")[1] for line in SERVING.splitlines() if line.startswith("| `")]
    listed = set(re.findall(r"`(\w+)`", "".join(rows)))
    assert "FLASHMLA_LIBRARY" in read
    assert {name for name in listed if name.startswith("FLASHMLA_")} == read


def test_partial_results_take_what_the_page_on_serving_says():
    """Its formula for dense decode is the plan's, its bound for sparse decode the splits'."""
    from flashmla import schedule
    from flashmla.cuda import sparse

    assert schedule.max_slots((66, 8), 5, 4096) == 5 + 66
    assert schedule.max_slots((66, 16), 5, 4097) == 5 * 5
    assert "(b + parts) · s_q · h_q" in SERVING and "at most 128 for each multi" in SERVING
    for queries in (1, 3, 40, 132, 264, 265, 500):
        for h_q in (1, 16, 64, 65, 128):
            for topk in (64, 2048, 1 << 15):
                splits = sparse.splits_for(queries, h_q, topk, 132)
                rows = queries * -(-h_q // sparse.ROWS) * splits * sparse.ROWS
                assert splits == 1 or rows <= 128 * 132


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
    ops = dict.fromkeys(row["op"] for row in result_file()["rows"])
    assert lines[0] == f"**Card**, beside other-1.0 ({', '.join(ops)})"
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


def test_what_the_shortest_decode_takes_from_python(readme_table):
    result = result_of_a_card()
    for row in result["rows"]:
        row["eager_us"] = None if row["op"] == "sparse_decode" else row["us"] + 30.0
    case = next(r for r in result["rows"] if r["op"] == "dense_decode")
    case["us"] -= 1.0
    said = [line for line in readme_table.section(result) if line.startswith("Called from")]
    assert said == [
        f"Called from Python, without a graph: dense_decode {case['case']} 230 µs, the peer 280."
    ]


def test_table_without_a_peer_has_no_ratio(readme_table):
    result = result_file()
    result["rows"] = [row for row in result["rows"] if row["impl"] == "flashmla-cuda"]
    assert all(line.endswith("| – | – |") for line in readme_table.table(result)[2:])


def test_results_of_a_cpu_are_not_shown(readme_table, tmp_path: Path):
    assert readme_table.generated(tmp_path) == "No card's results are recorded yet."
