"""Pages made when the book is built: the stages' notebooks, the measured tables, the questions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
STAGES = ROOT / "book" / "stages"
GENERATED = ROOT / "book" / "generated"

NOT_EXECUTED = """```{note}
This page shows the notebook as it is in the source: no copy executed on a card is there yet, so
it has no outputs. `make notebooks` runs it on your machine.
```"""


def write_if_changed(path: Path, text: str) -> None:
    """Leaves an unchanged file alone, so that Sphinx does not read it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def with_note(text: str) -> str:
    """A notebook with the note that it was not executed behind its first cell, the title."""
    notebook = json.loads(text)
    note = {"cell_type": "markdown", "id": "not-executed", "metadata": {}, "source": NOT_EXECUTED}
    notebook["cells"].insert(1, note)
    return json.dumps(notebook, indent=1, ensure_ascii=False)


def write_stages(notebooks: Path, executed: Path, target: Path) -> list[str]:
    """One page a notebook: its executed copy, or where there is none its source with a note."""
    names = sorted(path.name for path in notebooks.glob("*.ipynb"))
    for name in names:
        copy = executed / name
        source = (copy if copy.exists() else notebooks / name).read_text(encoding="utf-8")
        write_if_changed(target / name, source if copy.exists() else with_note(source))
    for stale in set(target.glob("*.ipynb")) - {target / name for name in names}:
        stale.unlink()
    return names


def benchmark_page(results: list[tuple[str, dict[str, Any]]], folder: Path) -> str:
    """The measured rows of each result file, its figures drawn, its provenance named."""
    from flashmla.bench import plots, run

    lines = ["# Measured", ""]
    lines += [
        "Times are medians over rounds in which all sides took turns, each a replayed CUDA graph "
        "whose calls go round several copies of the cache, so that a call reads memory and not "
        "L2. *Eager* is a call from Python, its launch included. *Error* is the largest absolute "
        "error of the output against the formula in float64.",
        "",
    ]
    if not results:
        lines += ["No card's results are recorded yet: `make bench` measures the machine at hand."]
    for name, result in results:
        said = result["provenance"]
        lines += [f"## {said['gpu']}", ""]
        for kind, draw in (("roofline", plots.roofline_of), ("time", plots.time_over_length)):
            figure = draw(result)
            figure.savefig(folder / f"{name}-{kind}.svg", metadata={"Date": None})
            lines += [f"![{kind} of {said['gpu']}]({name}-{kind}.svg)", ""]
        lines += [run.table(result), ""]
        ceilings = ", ".join(f"{key} {value:g}" for key, value in result["ceilings"].items())
        lines += [f"Ceilings measured in the same run: {ceilings}.", ""]
        facts = "; ".join(f"{key} {value}" for key, value in said.items())
        lines += [f"Provenance: {facts}.", ""]
    return "\n".join(lines) + "\n"


def read_results(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Result files of cards, by name; a CPU's tiny cases say nothing about speed."""
    files = [(p.stem, json.loads(p.read_text(encoding="utf-8"))) for p in folder.glob("*.json")]
    return sorted((stem, file) for stem, file in files if not file.get("tiny"))


def questions_page(readme: str) -> str:
    """README's questions as a page of their own, one level up."""
    begin, end = "<!-- questions: begin -->", "<!-- questions: end -->"
    text = readme.split(begin)[1].split(end)[0]
    return "# Questions people ask\n\n" + text.replace("\n### ", "\n## ").strip() + "\n"


def generate(app: Any) -> None:
    write_stages(ROOT / "notebooks", ROOT / "book" / "executed", STAGES)
    GENERATED.mkdir(exist_ok=True)
    results = read_results(ROOT / "benchmarks" / "results")
    write_if_changed(GENERATED / "benchmarks.md", benchmark_page(results, GENERATED))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    write_if_changed(GENERATED / "questions.md", questions_page(readme))


def without_missing(text: str, stages: Path) -> str:
    """A page's Markdown with links to stages that are not written yet turned into words."""

    def resolve(link: re.Match[str]) -> str:
        there = (stages / link[2]).exists()
        return link[0] if there else f"{link[1]} (to come)"

    return re.sub(r"\[([^\]]+)\]\(stages/([^)]+)\)", resolve, text)


def read_source(app: Any, name: str, content: list[str]) -> None:
    if name == "index":
        content[0] = without_missing(content[0], STAGES)


def setup(app: Any) -> dict[str, bool]:
    app.connect("builder-inited", generate, priority=100)  # before Sphinx looks for documents
    app.connect("source-read", read_source)
    return {"parallel_read_safe": True}
