"""Runs the benchmark and writes its rows with their provenance."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from flashmla import backend
from flashmla.bench.cases import WRITES, Case, select
from flashmla.bench.peers import TIER_OF_OP, sides
from flashmla.bench.problems import MAKERS
from flashmla.bench.roofline import Ceilings, measure_ceilings, predicted_us
from flashmla.bench.timing import Timing, measure
from flashmla.lab.provenance import provenance

__all__ = ["benchmark", "default_path", "measured_rows", "table", "write"]

FIELDS = ("op", "case", "impl", "us", "eager_us", "tflops", "gbps", "error")


def benchmark(
    op: str = "all",
    device: str | None = None,
    quick: bool = False,
    tiers: Sequence[str] | None = None,
    with_peers: bool = True,
    rounds: int = 21,
) -> dict[str, Any]:
    """Measures every case of an operation on everybody who can serve it.

    Args:
        op: an operation of `cases.OPS`, or ``"all"``.
        device: ``"cuda"`` or ``"cpu"``; a card if there is one. A CPU gets tiny cases, and the
            result says so: they show that the benchmark works and nothing about speed.
        quick: five cases instead of all.
        tiers: this package's tiers to measure; by default all that the device can run (torch only
            where there is nothing else).
        rounds: how often the sides of a case take turns.

    Returns:
        ``provenance``, ``ceilings``, ``rows`` (those of `measured_rows`), and ``tiny``: true if
        the cases are those for machines with no card.
    """
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    say(f"measuring the ceilings of {target}")
    ceilings = measure_ceilings(target)
    rows: list[dict[str, Any]] = []
    for case in select(op, target.type, quick):
        if case.op not in TIER_OF_OP:
            say(f"{case.op}  {case.name}: no benchmark yet")
            continue
        rows += measured_rows(case, target, tiers, with_peers, rounds, ceilings)
    return {
        "provenance": dict(provenance()),
        "ceilings": ceilings.as_dict(),
        "tiny": target.type == "cpu",
        "rows": rows,
    }


def measured_rows(
    case: Case,
    device: torch.device,
    tiers: Sequence[str] | None = None,
    with_peers: bool = True,
    rounds: int = 21,
    ceilings: Ceilings | None = None,
) -> list[dict[str, Any]]:
    """The rows of one case: a dict for each implementation.

    Keys: op, case, impl; us (graph replay on a card, wall time on a CPU) and eager_us; tflops and
    gbps, from the operations and bytes that the case needs at least; error, the largest absolute
    error of out against float64 (where tokens are written, the share of bytes that are wrong; where
    they are chosen, of rows); and host_us, spread, clock and predicted_us (at the ceilings).
    """
    problem = MAKERS[case.op](case, device)
    chosen = list(tiers) if tiers else available_tiers(case, device)
    contestants = sides(problem, chosen, with_peers)
    outs = {}
    for name in list(contestants):
        try:
            outs[name] = contestants[name](0)[0].clone()
        except (RuntimeError, ValueError) as problem_found:
            say(f"{case.op}  {case.name}  {name}: left out, {problem_found}")
            del contestants[name]
    errors = {name: problem.error(out) for name, out in outs.items()}
    timings = measure(contestants, problem.copies, device, rounds)
    rows = [_row(case, name, timings[name], errors[name]) for name in contestants]
    for row in rows:
        if ceilings is not None:
            us = predicted_us(case.flops_as_bf16, case.bytes_moved, ceilings, case.op in WRITES)
            row["predicted_us"] = _digits(us)
        say(_line(row))
    return rows


def available_tiers(case: Case, device: torch.device) -> list[str]:
    """The tiers worth measuring on a device: torch only if nothing better serves the case."""
    best = backend.tier_for(TIER_OF_OP[case.op], device)
    return ["cuda", "triton"] if best == "cuda" else [best]


def _row(case: Case, impl: str, timing: Timing, error: float) -> dict[str, Any]:
    us = timing.us if timing.us is not None else timing.eager_us
    assert us is not None
    return {
        "op": case.op,
        "case": case.name,
        "impl": impl,
        "us": _digits(timing.us),
        "eager_us": _digits(timing.eager_us),
        "tflops": _digits(case.flops / us / 1e6),
        "gbps": _digits(case.bytes_moved / us / 1e3),
        "error": float(f"{error:.3g}"),
        "host_us": _digits(timing.host_us),
        "spread": round(timing.spread, 4),
        "clock": timing.clock,
    }


def _digits(value: float | None) -> float | None:
    """Four digits: more would claim what no clock here can tell."""
    return None if value is None else float(f"{value:.4g}")


def _line(row: dict[str, Any]) -> str:
    us = row["us"] if row["us"] is not None else row["eager_us"]
    rates = f"{row['tflops']:8.4g} TFLOPS {row['gbps']:8.4g} GB/s  error {row['error']:.1e}"
    return f"{row['op']}  {row['case']:38s} {row['impl']:26s} {us:9.4g} us {rates}"


def say(line: str) -> None:
    """Progress, on stderr: stdout is for the result."""
    print(line, file=sys.stderr, flush=True)


def table(result: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    lines = ["| op | case | impl | µs | eager µs | TFLOPS | GB/s | error |"]
    lines.append("|---|---|---|--:|--:|--:|--:|--:|")
    for row in result["rows"]:
        cells = ["–" if row[name] is None else str(row[name]) for name in FIELDS]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def default_path(result: dict[str, Any], folder: Path) -> Path:
    """``<folder>/<device>.json``, the device's name in lower case with dashes."""
    gpu = result["provenance"]["gpu"]
    name = "cpu" if gpu == "none" or result["tiny"] else gpu
    return folder / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


def write(result: dict[str, Any], path: Path) -> None:
    """Writes a result file, a row a line, so that a diff shows which rows changed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        f'  "{key}": {json.dumps(result[key], indent=2, ensure_ascii=False)}'.replace("\n", "\n  ")
        for key in result
        if key != "rows"
    ]
    rows = [f"    {json.dumps(row, ensure_ascii=False)}" for row in result["rows"]]
    body = ",\n".join([*parts, '  "rows": [\n' + ",\n".join(rows) + "\n  ]"])
    path.write_text(f"{{\n{body}\n}}\n", encoding="utf-8")
