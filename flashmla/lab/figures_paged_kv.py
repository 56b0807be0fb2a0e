"""Figures of stage 03: memory in pages, and the table that finds them again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from flashmla.lab.figures import INK, PALE, TIER_COLOURS, canvas, request_colour, style, to_numpy

__all__ = ["block_table", "page_owners", "page_size_trade_off", "reserved_and_used"]

Colour = tuple[float, float, float, float]


def page_owners(table: Any, lengths: Any, page_size: int) -> dict[int, list[tuple[int, int]]]:
    """Who reads each page: page -> [(request, tokens of the page it holds)], from real tensors.

    Args:
        table: [b, max_blocks] int block numbers; entries behind a length are not looked at.
        lengths: [b] int tokens; page_size: tokens a page.
    """
    owners: dict[int, list[tuple[int, int]]] = {}
    rows = to_numpy(table)
    for request, length in enumerate(to_numpy(lengths).tolist()):
        for logical in range(-(-length // page_size)):
            page = int(rows[request][logical])
            held = min(page_size, length - logical * page_size)
            owners.setdefault(page, []).append((request, held))
    return owners


def block_table(
    table: Any,
    lengths: Any,
    num_blocks: int,
    page_size: int = 64,
    names: Sequence[str] | None = None,
    colours: Sequence[int] | None = None,
) -> Figure:
    """The table on the left, the pool of pages on the right, exactly as the tensors say.

    A page is filled as far as it holds tokens; one that several requests share
    has a stripe of each one's colour.

    Args:
        table: [b, max_blocks] int32; lengths: [b] int32; num_blocks: pages in the pool.
        names: what to call each request; by default its number.
        colours: number of each request's colour, such as the cache's own name of it, so that it
            stays from figure to figure; by default its place in the table.
    """
    table, lengths = to_numpy(table), to_numpy(lengths)
    names = names or [f"request {request}" for request in range(len(lengths))]
    paint = [request_colour(number) for number in colours or range(len(lengths))]
    with style():
        figure, (left, right) = canvas(9.0, max(2.2, 0.5 + 0.42 * len(lengths)), columns=2)
        _draw_table(left, table, lengths, page_size, names, paint)
        _draw_pool(right, page_owners(table, lengths, page_size), num_blocks, page_size, paint)
    return figure


def _draw_table(
    axes: Axes,
    table: np.ndarray,
    lengths: np.ndarray,
    page: int,
    names: Sequence[str],
    paint: Sequence[Colour],
) -> None:
    used = -(-lengths // page)
    columns = int(max(used.max(initial=1), 1))
    for request, count in enumerate(used.tolist()):
        for logical in range(columns):
            live = logical < count
            colour = paint[request] if live else "white"
            axes.add_patch(Rectangle((logical, request), 0.92, 0.86, fc=colour, ec=PALE))
            if live:
                text = str(table[request, logical])
                axes.text(
                    logical + 0.46, request + 0.45, text, ha="center", va="center", fontsize=8
                )
    axes.set_yticks(np.arange(len(names)) + 0.45, names)
    axes.set_xticks(np.arange(columns) + 0.46, [str(column) for column in range(columns)])
    axes.set(xlim=(0, columns), ylim=(len(names), 0), xlabel="logical page")
    axes.set_title("block table: block number of each logical page")
    _bare(axes)


def _draw_pool(
    axes: Axes,
    owners: dict[int, list[tuple[int, int]]],
    blocks: int,
    page: int,
    paint: Sequence[Colour],
) -> None:
    across = int(np.ceil(np.sqrt(blocks * 2)))
    for block in range(blocks):
        row, column = divmod(block, across)
        axes.add_patch(Rectangle((column, row), 0.9, 0.86, fc="white", ec="#9ca3af", lw=0.7))
        held = owners.get(block, [])
        for stripe, (request, tokens) in enumerate(held):
            height = 0.86 / len(held)
            corner = (column, row + stripe * height)
            # A page of one token must not look like an empty one.
            width = 0.9 * max(tokens / page, 0.08)
            axes.add_patch(Rectangle(corner, width, height, fc=paint[request], lw=0))
        axes.text(column + 0.45, row + 0.45, str(block), ha="center", va="center", fontsize=7.5)
    axes.set(xlim=(0, across), ylim=(-(-blocks // across), 0), xticks=[], yticks=[])
    free = blocks - len(owners)
    axes.set_title(f"pool of {blocks} pages of {page} tokens, {free} free")
    _bare(axes)


def _bare(axes: Axes) -> None:
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def reserved_and_used(schemes: Mapping[str, tuple[float, float]], unit: str) -> Figure:
    """Bars of memory set aside, and how much of each holds tokens.

    Args:
        schemes: name -> (reserved, used), in ``unit``.
    """
    names = list(schemes)
    reserved, used = np.array([schemes[name] for name in names]).T
    with style():
        figure, (axes,) = canvas(7.2, 0.9 + 0.42 * len(names))
        axes.barh(names, reserved, color=PALE, height=0.6, label="set aside")
        axes.barh(names, used, color=TIER_COLOURS["cuda"], height=0.6, label="holds tokens")
        for row, (whole, part) in enumerate(zip(reserved, used, strict=True)):
            axes.text(whole, row, f"  {part / whole:.0%} used", va="center", fontsize=9)
        axes.invert_yaxis()
        axes.set(xlabel=unit, xlim=(0, reserved.max() * 1.18))
        axes.legend(loc="lower right")
    return figure


def page_size_trade_off(
    sizes: Sequence[int], waste: Sequence[float], entries: Sequence[float]
) -> Figure:
    """Tokens wasted a request and table entries a request, against the page size."""
    with style():
        figure, (left, right) = canvas(7.6, 2.8, columns=2)
        for axes, values, label, colour in (
            (left, waste, "tokens wasted a request", TIER_COLOURS["torch"]),
            (right, entries, "block numbers a request", TIER_COLOURS["peer"]),
        ):
            axes.plot(sizes, values, "o-", color=colour)
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(sizes), [str(size) for size in sizes])
            axes.set(xlabel="tokens a page", title=label)
            axes.axvline(64, color=INK, linewidth=0.8, linestyle=":")
            axes.grid()
    return figure
