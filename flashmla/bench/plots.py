"""Draws result files: where each case lies under the roofline, and time over the cached length."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from flashmla.bench.cases import CASES, SWEEP, TINY, Case
from flashmla.lab.figures import TIER_COLOURS, canvas, style
from flashmla.lab.figures_roofline import Point, Roof, roofline

__all__ = ["roofline_of", "sweep", "time_over_length"]

_BY_NAME = {(case.op, case.name): case for case in (*CASES, *TINY)}


def _case(row: dict[str, Any]) -> Case | None:
    return _BY_NAME.get((row["op"], row["case"]))


def _tier(impl: str) -> str:
    """The colour key of an implementation: its tier, or ``peer``."""
    return "peer" if impl.startswith("peer:") else impl.removeprefix("flashmla-")


def roofline_of(result: dict[str, Any], impls: tuple[str, ...] | None = None) -> Figure:
    """The rows of a result file under the roofline of the machine that they were measured on.

    Args:
        result: what `run.benchmark` returns, or a result file read back.
        impls: only these implementations; by default this package's best tier in the file.
    """
    ceilings = result["ceilings"]
    device = result["provenance"]["gpu"]
    roof = Roof(device, ceilings["matmul_tflops"] * 1e12, ceilings["read_gbps"] * 1e9)
    chosen = impls or (best_impl(result),)
    points = []
    for row in result["rows"]:
        case = _case(row)
        if case is not None and case.flops and row["impl"] in chosen:
            intensity = case.flops / case.bytes_moved
            points.append(Point(row["case"], intensity, row["tflops"] * 1e12, _tier(row["impl"])))
    return roofline([roof], points, f"Measured on {device}: {', '.join(chosen)}")


def best_impl(result: dict[str, Any]) -> str:
    """This package's first tier that the file has rows of, in the order cuda, triton, torch."""
    present = {row["impl"] for row in result["rows"]}
    for tier in ("cuda", "triton", "torch"):
        if f"flashmla-{tier}" in present:
            return f"flashmla-{tier}"
    raise ValueError(f"no row of this package in the result, only of {sorted(present)}")


def time_over_length(result: dict[str, Any], op: str = "dense_decode") -> Figure:
    """Microseconds a call over the cached tokens of the whole batch, a line an implementation."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in result["rows"]:
        case = _case(row)
        if case is not None and row["op"] == op and row["us"] is not None:
            cached = int(case.lengths().sum())
            lines.setdefault(row["impl"], []).append((cached, row["us"]))
    with style():
        figure, (axes,) = canvas(7.2, 3.6)
        for impl, points in lines.items():
            lengths, times = zip(*sorted(points), strict=True)
            axes.loglog(lengths, times, "o", color=TIER_COLOURS[_tier(impl)], label=impl)
        axes.set(xlabel="cached tokens in the batch", ylabel="µs a call", title=op)
        axes.grid()
        axes.legend()
    return figure


def sweep(result: dict[str, Any]) -> Figure:
    """Microseconds a call over s_k, b and h_q, one panel each, a line an implementation; dashed,
    what bytes and operations alone would take at the ceilings of the same run."""
    rows = {(row["case"], row["impl"]): row for row in result["rows"]}
    impls = list(dict.fromkeys(row["impl"] for row in result["rows"]))
    with style():
        figure, panels = canvas(10.5, 3.4, columns=len(SWEEP))
        for axes, (axis, cases) in zip(panels, SWEEP.items(), strict=True):
            values = [getattr(case, axis) for case in cases]
            for impl in impls:
                times = [rows[case.name, impl]["us"] for case in cases]
                axes.loglog(values, times, "o-", color=TIER_COLOURS[_tier(impl)], label=impl)
            predicted = [rows[case.name, impls[0]]["predicted_us"] for case in cases]
            axes.loglog(values, predicted, "--", color=TIER_COLOURS["reference"], label="predicted")
            fixed = [f"{name}={getattr(cases[0], name)}" for name in SWEEP if name != axis]
            axes.set(xlabel=axis, ylabel="µs a call", title=" ".join(fixed))
            axes.set_xticks(values, [str(value) for value in values], rotation=45)
            axes.minorticks_off()
            axes.grid()
        panels[0].legend()
        figure.suptitle(f"Dense decode on {result['provenance']['gpu']}")
    return figure
