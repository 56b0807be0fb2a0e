"""Keeps README's benchmark table in step with benchmarks/results/.

``python tools/readme_table.py`` rewrites it; with ``--check`` it fails if it would.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- benchmark: begin -->", "<!-- benchmark: end -->"
OURS = "flashmla-cuda"
MARKS = "¹²³⁴⁵⁶⁷⁸⁹"
EAGER = "†"


def number(value: float | None) -> str:
    """Three digits and more before the point, else three in all."""
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(result: dict[str, Any]) -> list[str]:
    """The cases of one result file: ours, the fastest peer beside it, and their ratio."""
    lines = ["| case | µs | TFLOPS | GB/s | error | peer, µs | ratio |"]
    lines.append("|---|--:|--:|--:|--:|--:|--:|")
    earlier = earlier_runs(result)
    for row in result["rows"]:
        if row["impl"] != OURS:
            continue
        others = [
            time_of(other)
            for other in result["rows"]
            if (other["op"], other["case"]) == (row["op"], row["case"])
            and other["impl"].startswith("peer:")
        ]
        peer = min(others, default=None)
        ratio = f"{peer / time_of(row):.2f}" if peer is not None else "–"
        rates = [number(row[k] or None) for k in ("tflops", "gbps")]  # a choice has no operations
        mark = MARKS[earlier.index(row["commit"])] if "commit" in row else ""
        mark += EAGER if row["us"] is None else ""
        cells = [f"{row['op']} {row['case']}{mark}", number(time_of(row)), *rates]
        lines.append("| " + " | ".join([*cells, f"{row['error']:.1e}", number(peer), ratio]) + " |")
    return lines


def earlier_runs(result: dict[str, Any]) -> list[str]:
    """Commits other than the file's that rows were measured with."""
    return list(dict.fromkeys(row["commit"] for row in result["rows"] if "commit" in row))


def time_of(row: dict[str, Any]) -> float:
    """Microseconds from graph replay, or call by call where the call could not be captured."""
    return float(row["us"] if row["us"] is not None else row["eager_us"])


def section(result: dict[str, Any]) -> list[str]:
    """A result file as README shows it: device, peers, table, and where the figures come from."""
    said = result["provenance"]
    facts = f"driver {said['driver']}, CUDA {said['cuda']}, torch {said['torch']}"
    lines = [f"**{said['gpu']}**{beside(result)}", "", *table(result), ""]
    lines += [*eager(result), *ceilings(result)]
    for mark, commit in zip(MARKS, earlier_runs(result)):
        lines += [f"{mark} Measured with commit {commit[:12]}.", ""]
    if any(row["us"] is None for row in result["rows"] if row["impl"] == OURS):
        lines += [f"{EAGER} Called one by one, all sides: no graph could be captured.", ""]
    return [*lines, f"{facts}, commit {said['commit'][:12]}, {said['date'][:10]}."]


def beside(result: dict[str, Any]) -> str:
    """The peers, each with the operations that it was measured at."""
    ops: dict[str, dict[str, None]] = {}
    for row in result["rows"]:
        if row["impl"].startswith("peer:"):
            ops.setdefault(row["impl"].removeprefix("peer:"), {})[row["op"]] = None
    named = [f"{peer} ({', '.join(ops[peer])})" for peer in sorted(ops)]
    return f", beside {', '.join(named)}" if named else ""


def eager(result: dict[str, Any]) -> list[str]:
    """What the shortest decodes take when each is called from Python."""
    said = []
    for op in ("dense_decode", "sparse_decode"):
        rows = [row for row in result["rows"] if row["op"] == op and row["impl"] == OURS]
        ours = min(rows, key=time_of, default=None)
        if ours is None or ours["us"] is None or ours["eager_us"] is None:
            continue
        others = [
            row["eager_us"]
            for row in result["rows"]
            if (row["op"], row["case"]) == (op, ours["case"])
            and row["impl"].startswith("peer:")
            and row["eager_us"] is not None
        ]
        peer = f", the peer {number(min(others))}" if others else ""
        said.append(f"{op} {ours['case']} {number(ours['eager_us'])} µs{peer}")
    return [f"Called from Python, without a graph: {'; '.join(said)}.", ""] if said else []


def ceilings(result: dict[str, Any]) -> list[str]:
    """What the card did at best in the same run."""
    names = {"read_gbps": "reading", "copy_gbps": "copying", "matmul_tflops": "bf16 products"}
    names["fp8_matmul_tflops"] = "FP8 products"
    known = result.get("ceilings", {})
    said = [
        f"{what} {known[name]:.0f} {'GB/s' if name.endswith('gbps') else 'TFLOPS'}"
        for name, what in names.items()
        if name in known
    ]
    return [f"Ceilings: {', '.join(said)}.", ""] if said else []


def generated(folder: Path) -> str:
    """What stands between README's markers, from the result files of cards."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    parts = ["\n".join(section(file)) for file in files if not file.get("tiny")]
    return "\n\n".join(parts) if parts else "No card's results are recorded yet."


def filled(readme: str, text: str) -> str:
    """README with this text between its markers."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> None:
    path = ROOT / "README.md"
    readme = path.read_text(encoding="utf-8")
    wanted = filled(readme, generated(ROOT / "benchmarks" / "results"))
    if "--check" in sys.argv:
        sys.exit(0 if readme == wanted else "README.md: run python tools/readme_table.py")
    path.write_text(wanted, encoding="utf-8")


if __name__ == "__main__":
    main()
