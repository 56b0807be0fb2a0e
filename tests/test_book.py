"""The book's own parts: what docstrings turn into, which notebooks it shows, what pages load."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of the book's extensions or of tools/ by name."""
    monkeypatch.syspath_prepend(str(ROOT / "book" / "_ext"))
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module


# ---- docstrings ------------------------------------------------------------------------------


def test_docstring_is_taken_literally(part):
    plain = part("plain_docstrings").plain
    assert plain(["max|x| of *args, q_ and `k_cache`, ``v`` and :func:`f_`"]) == [
        r"max\|x\| of \*args, q\_ and ``k_cache``, ``v`` and :func:`f_`"
    ]


def test_formula_in_columns_stays_in_columns(part):
    plain = part("plain_docstrings").plain
    assert plain(["Sums:", "", "    dV = P* dO     dS = |x|", "", "and goes on."]) == [
        "Sums:", "", "::", "", "    dV = P* dO     dS = |x|", "", "and goes on.",
    ]  # fmt: skip


def test_sections_are_left_to_napoleon(part):
    plain = part("plain_docstrings").plain
    lines = ["Does.", "", "Args:", "    q: [b, s_q], a `name`.", "", "Returns:", "    out."]
    assert plain(lines) == [line.replace("`name`", "``name``") for line in lines]


# ---- notebooks -------------------------------------------------------------------------------


def notebook(*sources: str) -> str:
    cells = [{"cell_type": "markdown", "id": f"c{i}", "source": s} for i, s in enumerate(sources)]
    return json.dumps({"cells": cells, "nbformat": 4, "nbformat_minor": 5, "metadata": {}})


def test_executed_copies_are_preferred_and_the_rest_is_marked(part, tmp_path: Path):
    pages = part("generated_pages")
    source, executed, target = (tmp_path / name for name in ("source", "executed", "target"))
    for folder in (source, executed, target):
        folder.mkdir()
    (source / "00_a.ipynb").write_text(notebook("# A"))
    (source / "01_b.ipynb").write_text(notebook("# B", "text"))
    (executed / "00_a.ipynb").write_text(notebook("# A, executed"))
    (target / "02_gone.ipynb").write_text(notebook("# stale"))
    assert pages.write_stages(source, executed, target) == ["00_a.ipynb", "01_b.ipynb"]
    assert sorted(path.name for path in target.iterdir()) == ["00_a.ipynb", "01_b.ipynb"]
    assert (target / "00_a.ipynb").read_text() == notebook("# A, executed")
    cells = json.loads((target / "01_b.ipynb").read_text())["cells"]
    assert [cell["source"] for cell in cells] == ["# B", pages.NOT_EXECUTED, "text"]


def test_executed_copies_are_of_the_sources_as_they_stand():
    def code(file: Path) -> list[str]:
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]

    for path in (ROOT / "book" / "executed").glob("*.ipynb"):
        assert code(path) == code(ROOT / "notebooks" / path.name), f"execute {path.name} again"


# ---- measured figures ------------------------------------------------------------------------


def test_measured_page_has_every_row_figure_and_the_provenance(part, tmp_path: Path):
    from test_bench import result_file

    pages = part("generated_pages")
    result = result_file()
    text = pages.benchmark_page([("card", result)], tmp_path)
    assert all(f"| {row['case']} | {row['impl']} |" in text for row in result["rows"])
    assert "date 2026-01-01" in text and "read_gbps 3110" in text
    for kind in ("roofline", "time"):
        assert (tmp_path / f"card-{kind}.svg").stat().st_size > 1000
        assert f"(card-{kind}.svg)" in text


def test_figures_of_a_cpu_are_not_shown(part, tmp_path: Path):
    from test_bench import result_file

    pages = part("generated_pages")
    (tmp_path / "card.json").write_text(json.dumps(result_file()))
    (tmp_path / "cpu.json").write_text(json.dumps({**result_file(), "tiny": True}))
    assert [name for name, _ in pages.read_results(tmp_path)] == ["card"]
    assert "No card's results are recorded yet" in pages.benchmark_page([], tmp_path)


def test_questions_of_readme_are_a_page(part):
    page = part("generated_pages").questions_page((ROOT / "README.md").read_text(encoding="utf-8"))
    levels = [line.split()[0] for line in page.splitlines() if line.startswith("#")]
    assert levels[0] == "#" and set(levels[1:]) == {"##"} and len(levels) > 4
    assert "\n## Is it paged only?\n" in page


# ---- pages load nothing from elsewhere -------------------------------------------------------

CLEAN = """<html><head><link rel="stylesheet" href="_static/a.css">
<link rel="canonical" href="https://example.org/"><script src="_static/a.js"></script></head>
<body><a href="https://example.org/paper">a paper</a><img src="figure.svg">
<script>window.x = 1</script></body></html>"""

PLANTED = {
    "script": '<script src="https://cdn.example.org/x.js"></script>',
    "without scheme": '<script src="//example.org/x.js"></script>',
    "style": '<link rel="stylesheet" href="https://example.org/x.css">',
    "image": '<img src="http://example.org/x.png">',
    "inline style": '<p style="background: url(https://example.org/x.png)">',
    "inline script": '<script>load("https://cdn.jsdelivr.net/npm/x")</script>',
}


def test_clean_page_passes(part, tmp_path: Path):
    (tmp_path / "index.html").write_text(CLEAN)
    assert part("check_book").check(tmp_path) == []


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_page_that_loads_from_elsewhere_is_named(part, tmp_path: Path, planted: str):
    (tmp_path / "index.html").write_text(CLEAN.replace("</body>", f"{planted}</body>"))
    found = part("check_book").check(tmp_path)
    assert len(found) == 1 and found[0].startswith("index.html: ")


def test_styles_and_scripts_are_looked_at_too(part, tmp_path: Path):
    (tmp_path / "index.html").write_text(CLEAN)
    (tmp_path / "a.css").write_text("@import url('https://fonts.googleapis.com/x');")
    (tmp_path / "a.js").write_text("fetch('https://unpkg.com/x')")
    found = part("check_book").check(tmp_path)
    assert found == ["a.css: https://fonts.googleapis.com/x", "a.js: unpkg.com"]


def test_book_that_was_not_built_is_no_clean_book(part, tmp_path: Path):
    assert part("check_book").check(tmp_path) == [f"{tmp_path}: no page was built"]


# ---- MathJax ---------------------------------------------------------------------------------


def test_mathjax_is_taken_from_the_cache_and_a_spoilt_one_is_not(part, tmp_path, monkeypatch):
    mathjax = part("mathjax")
    monkeypatch.setenv("FLASHMLA_CACHE_DIR", str(tmp_path))
    package = mathjax.cached_package()
    assert package == tmp_path / f"mathjax-{mathjax.VERSION}.tgz" and not mathjax.intact(package)
    package.write_bytes(b"spoilt")
    assert not mathjax.intact(package)
    monkeypatch.setattr(mathjax, "SHA256", mathjax.hashlib.sha256(b"spoilt").hexdigest())
    assert mathjax.intact(package)


def test_missing_npm_is_said_with_the_place_for_a_copy(part, tmp_path, monkeypatch):
    mathjax = part("mathjax")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="install npm, or put the npm package mathjax-3"):
        mathjax.fetch(tmp_path / "mathjax.tgz")


def test_stage_that_is_not_written_yet_is_no_dead_link(part, tmp_path: Path):
    (tmp_path / "01_a.ipynb").touch()
    text = part("generated_pages").without_missing(
        "| [01 A](stages/01_a.ipynb) | [02 B](stages/02_b.ipynb) | [x](api.md) |", tmp_path
    )
    assert text == "| [01 A](stages/01_a.ipynb) | 02 B (to come) | [x](api.md) |"


def test_book_names_every_stage_page_that_there_is():
    text = (ROOT / "book" / "index.md").read_text(encoding="utf-8")
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"(stages/{path.name})" in text
