"""Figures of stage 04: the schedule over the SMs, and the partial results it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from flashmla.lab.figures import INK, TIER_COLOURS, canvas, request_colour, style, to_numpy
from flashmla.schedule import OVERHEAD, TILE

__all__ = ["Segment", "gantt", "part_times", "parts_sweep", "segments", "split_weights"]


@dataclass(frozen=True)
class Segment:
    """What one part does of one request: tiles [first_tile, last_tile)."""

    part: int
    request: int
    first_tile: int
    last_tile: int


def segments(metadata: Any, cache_seqlens: Any) -> list[Segment]:
    """Unfold the plan's rows into the pieces of work they stand for.

    Args:
        metadata: [parts, 8] int32, as ``get_mla_metadata`` gives it, or [parts, 16], a
            batch-invariant one, whose chunks are pieces of their own.
        cache_seqlens: [b] int32 lengths the plan was made for.
    """
    tiles = -(-to_numpy(cache_seqlens).astype(np.int64) // TILE)
    pieces: list[Segment] = []
    for part, row in enumerate(to_numpy(metadata).tolist()):
        begin, begin_tile, end, end_tile, _, chunk = row[:6]
        for request in range(begin, min(end + 1, len(tiles))):
            first = begin_tile if request == begin else 0
            last = end_tile if request == end else int(tiles[request])
            # A request of no tiles is somebody's, who writes its empty result.
            empty = tiles[request] == 0 and request < end
            if empty:
                pieces.append(Segment(part, request, first, last))
            step = chunk or max(1, last - first)
            for at in range(first, last, step):
                pieces.append(Segment(part, request, at, min(last, at + step)))
    return pieces


def part_times(metadata: Any, cache_seqlens: Any) -> np.ndarray:
    """How long each part takes, in tiles: its tiles, and OVERHEAD for each piece that it opens.

    Args and plans are those of :func:`segments`; the result is int64 [parts].
    """
    times = np.zeros(len(metadata), np.int64)
    for piece in segments(metadata, cache_seqlens):
        times[piece.part] += OVERHEAD + piece.last_tile - piece.first_tile
    return times


def gantt(metadata: Any, cache_seqlens: Any, title: str = "", until: float = 0) -> Figure:
    """One row a part (an SM works through it), time in tiles of 64 tokens from left to right.

    Each piece starts with the pale cost of opening a request, then its tiles in the request's
    colour. Drawn from the plan's own numbers, whichever tier computed them. The time axis goes
    as far as ``until`` at least, so that figures can share it.
    """
    parts = len(metadata)
    # Gaps between rows of less than a few pixels would only shimmer.
    bar: dict[str, Any] = {"height": 0.86 if parts <= 40 else 1.0, "lw": 0, "aa": parts <= 40}
    with style():
        figure, (axes,) = canvas(7.6, float(np.clip(0.9 + 0.11 * parts, 2.2, 6.0)))
        clock = np.zeros(parts)
        for piece in segments(metadata, cache_seqlens):
            start, work = clock[piece.part], piece.last_tile - piece.first_tile
            colour = request_colour(piece.request)
            axes.barh(piece.part, OVERHEAD, left=start, color="#d1d5db", **bar)
            axes.barh(piece.part, work, left=start + OVERHEAD, color=colour, **bar)
            if parts <= 24 and work > 0:
                middle = start + OVERHEAD + work / 2
                axes.text(
                    middle, piece.part, str(piece.request), ha="center", va="center", size=7.5
                )
            clock[piece.part] += OVERHEAD + work
        axes.set_ylim(parts - 0.5, -0.5)  # parts without work are rows as well
        axes.set_xlim(0, 1.02 * max(until, clock.max(initial=1)))
        axes.set(xlabel=f"time, in tiles of {TILE} tokens", ylabel="part", title=title)
        axes.axvline(clock.max(initial=1), color=INK, linewidth=0.8, linestyle=":")
    return figure


def split_weights(lse: Any, title: str = "") -> Figure:
    """How much each split counts in the merged result, a row a head.

    Args:
        lse: [splits, h_q] partial LSEs, natural log, +inf or -inf where a split is empty.
    """
    lse = to_numpy(lse).astype(np.float64)
    lse = np.where(np.isposinf(lse), -np.inf, lse)
    weights = np.exp(lse - np.logaddexp.reduce(lse, axis=0, keepdims=True))
    with style():
        figure, (axes,) = canvas(7.2, 2.6)
        image = axes.imshow(weights.T, aspect="auto", cmap="Greens", vmin=0)
        axes.set(xlabel="split", ylabel="head", title=title)
        figure.colorbar(image, ax=axes, label="weight")
    return figure


def parts_sweep(
    parts: Sequence[int], measured: Mapping[str, Sequence[float]], predicted: Sequence[float]
) -> Figure:
    """Time against the number of parts, both axes logarithmic.

    Args:
        parts: numbers of parts; predicted: microseconds a call, one a number of parts.
        measured: tier -> microseconds a call; may be empty.
    """
    with style():
        figure, (axes,) = canvas(7.2, 3.2)
        axes.plot(parts, predicted, "--", color=INK, label="predicted")
        for tier, times in measured.items():
            axes.plot(parts, times, "o-", color=TIER_COLOURS[tier], label=f"{tier} tier, measured")
        axes.set(xlabel="parts", ylabel="µs a call", xscale="log", yscale="log")
        axes.set_xticks(list(parts), [str(number) for number in parts])
        axes.minorticks_off()
        axes.grid()
        axes.legend(loc="best")
    return figure
