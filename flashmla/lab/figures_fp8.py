"""Figures of stage 05: what eight bits can say, where they lie, and what they cost and save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flashmla import fp8
from flashmla.lab.figures import INK, PALE, TIER_COLOURS, canvas, style, to_numpy

__all__ = ["byte_map", "cache_memory", "error_by_tile", "part_errors", "values_of"]

NOPE, SCALES, ROPE = TIER_COLOURS["cuda"], TIER_COLOURS["torch"], TIER_COLOURS["peer"]
_LINES = (TIER_COLOURS["cuda"], TIER_COLOURS["torch"], TIER_COLOURS["triton"], INK)


def byte_map() -> Figure:
    """One token in bfloat16 and in the FP8 format, byte for byte to scale."""
    tile, rope = fp8.TILE_DIM, 2 * fp8.ROPE_DIM
    with style():
        figure, (axes,) = canvas(7.6, 2.5)
        _field(axes, 1, 0, 2 * fp8.NOPE_DIM, "512 NoPE values, bfloat16", NOPE, 0.35)
        _field(axes, 1, 2 * fp8.NOPE_DIM, rope, "64 RoPE", ROPE, 0.35)
        for start in range(0, fp8.NOPE_DIM, tile):
            _field(axes, 0, start, tile, f"{tile} codes", NOPE, 0.8)
        _field(axes, 0, fp8.SCALES_OFFSET, fp8.ROPE_OFFSET - fp8.SCALES_OFFSET, "", SCALES, 1.0)
        _field(axes, 0, fp8.ROPE_OFFSET, rope, "64 RoPE\nbfloat16", ROPE, 0.8)
        for byte in (0, fp8.SCALES_OFFSET, fp8.ROPE_OFFSET, fp8.BYTES_PER_TOKEN):
            left = byte == fp8.SCALES_OFFSET
            axes.text(byte, -0.42, str(byte), ha="right" if left else "left", va="top", fontsize=8)
        axes.annotate(
            "4 float32 scales",
            (fp8.SCALES_OFFSET + 8, -0.32),
            (fp8.SCALES_OFFSET + 8, -0.95),
            ha="center",
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": SCALES},
        )
        axes.set(xlim=(-8, 1180), ylim=(-1.1, 1.6), xlabel="byte", title="One token in one layer")
        axes.set_yticks([1, 0], ["bf16, 1,152 bytes", f"FP8, {fp8.BYTES_PER_TOKEN} bytes"])
        axes.spines["left"].set_visible(False)
        axes.tick_params(left=False)
    return figure


def _field(axes: Axes, row: int, start: int, size: int, label: str, colour: str, a: float) -> None:
    """A stretch of bytes as a box with its name."""
    axes.barh(row, size, 0.62, left=start, color=colour, alpha=a, edgecolor="white", linewidth=1)
    axes.text(start + size / 2, row, label, ha="center", va="center", fontsize=8)


def values_of(formats: Mapping[str, Any], title: str) -> Figure:
    """The positive values that each format can say, a row a format, on a logarithmic axis."""
    with style():
        figure, (axes,) = canvas(7.4, 0.9 + 0.42 * len(formats))
        for row, (values, colour) in enumerate(zip(formats.values(), _LINES, strict=False)):
            values = to_numpy(values).astype(np.float64)
            values = values[np.isfinite(values) & (values > 0)]
            axes.plot(values, np.full(len(values), row), "|", color=colour, markersize=15, mew=0.7)
        axes.set_yticks(range(len(formats)), list(formats))
        axes.set(xscale="log", ylim=(len(formats) - 0.4, -0.6), xlabel="value", title=title)
        axes.set_xscale("log", base=2)
        axes.grid(axis="x")
    return figure


def part_errors(errors: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """Bars: errors of scores by what was quantised (outer key), one bar a layer (inner key)."""
    layers = list(next(iter(errors.values())))
    place = np.arange(len(errors))
    with style():
        figure, (axes,) = canvas(7.2, 1.2 + 0.5 * len(errors))
        for number, layer in enumerate(layers):
            values = [by_layer[layer] for by_layer in errors.values()]
            offset = (number - (len(layers) - 1) / 2) * 0.36
            bars = axes.barh(place + offset, values, 0.34, color=_LINES[number], label=layer)
            axes.bar_label(bars, fmt="%.4f", padding=3, fontsize=8)
        axes.set_yticks(place, list(errors))
        axes.invert_yaxis()
        axes.set(xlabel="root mean square error of the scaled scores", title=title)
        axes.set_xlim(0, 1.15 * max(max(by_layer.values()) for by_layer in errors.values()))
        axes.legend(loc="best")
    return figure


def error_by_tile(
    tiles: Sequence[int], panels: Mapping[str, Mapping[str, Sequence[float]]], names: Sequence[str]
) -> Figure:
    """Relative error against the number of values that share a scale, a panel a data set.

    Args:
        tiles: values a scale; panels: title -> format -> errors, one a tile size.
        names: what stands below each tile size.
    """
    with style():
        figure, axes = canvas(8.0, 3.3, columns=len(panels))
        for ax, (title, lines) in zip(axes, panels.items(), strict=True):
            for (name, errors), colour in zip(lines.items(), _LINES, strict=False):
                ax.plot(tiles, errors, "o-", color=colour, label=name, markersize=4)
            ax.set(xscale="log", yscale="log", xlabel="values that share a scale", title=title)
            ax.set_xticks(list(tiles), list(names), fontsize=7.5)
            ax.minorticks_off()
            ax.grid()
        lowest = min(ax.get_ylim()[0] for ax in axes)
        highest = max(ax.get_ylim()[1] for ax in axes)
        for ax in axes:
            ax.set_ylim(lowest, highest)
        axes[0].set_ylabel("relative error")
        axes[0].legend(loc="upper left", fontsize=8)
    return figure


def cache_memory(
    lengths: Sequence[int], bytes_a_token: Mapping[str, int], memory: float, title: str
) -> Figure:
    """Memory of one sequence's cache in GB by its length, one line a layout.

    Args:
        lengths: tokens; bytes_a_token: layout -> bytes of a token in all layers together.
        memory: bytes of a card that are left for caches, drawn as a line.
    """
    tokens = np.asarray(lengths, np.float64)
    with style():
        figure, (axes,) = canvas(7.2, 3.3)
        colours = ("#9ca3af", TIER_COLOURS["peer"], TIER_COLOURS["cuda"])
        for (name, size), colour in zip(bytes_a_token.items(), colours, strict=False):
            axes.loglog(tokens, tokens * size / 1e9, color=colour, label=name)
        axes.axhline(memory / 1e9, color=INK, linewidth=0.8, linestyle="--")
        axes.text(tokens[0], memory / 1e9 * 1.1, f"{memory / 1e9:.0f} GB for caches", fontsize=8.5)
        axes.fill_between(tokens, memory / 1e9, 1e5, color=PALE, alpha=0.5, lw=0)
        top = max(bytes_a_token.values()) * tokens[-1] / 1e9
        axes.set_ylim(min(bytes_a_token.values()) * tokens[0] / 1e9, max(top, memory / 1e9) * 1.5)
        ticks = [2**n for n in range(12, 24, 2) if tokens[0] <= 2**n <= tokens[-1]]
        axes.set_xticks(ticks, [f"{tick // 1024}k" for tick in ticks])
        axes.minorticks_off()
        axes.set(xlabel="tokens of one sequence", ylabel="GB in all layers", title=title)
        axes.grid()
        axes.legend(loc="lower right")
    return figure
