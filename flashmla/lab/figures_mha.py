"""Figures of stage 01: what attention looks at, and how its softmax is summed in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from flashmla.lab.figures import INK, PALE, TIER_COLOURS, canvas, style

__all__ = ["attention_maps", "online_walk", "score_range", "time_by_rows"]


def attention_maps(maps: np.ndarray, letters: str, title: str) -> Figure:
    """Causal attention of each head over a short text: maps [h, s, s], rows queries, columns keys.

    ``letters`` are the s characters that stand under the keys. What a query may not see is grey,
    which no weight is.
    """
    h, s, _ = maps.shape
    norm = PowerNorm(0.5, vmin=0, vmax=1)  # the square root: small weights are to be seen too
    colours = colormaps["magma_r"].copy()
    colours.set_bad("#cbd5e1")
    future = np.triu(np.ones((s, s), dtype=bool), k=1)
    shown = ["·" if letter.isspace() else letter for letter in letters]
    with style():
        figure, panels = canvas(2.55 * h, 3.2, columns=h)
        for head, axes in enumerate(panels):
            axes.imshow(
                np.ma.masked_where(future, maps[head]),
                cmap=colours,
                norm=norm,
                interpolation="nearest",
            )
            axes.set_title(f"head {head}")
            axes.set_xticks(range(s), shown, fontsize=5.5)
            axes.set_yticks([])
            axes.set_xlabel("key")
            axes.tick_params(length=0, pad=1)
        panels[0].set_ylabel("query")
        figure.suptitle(title, x=0.01, ha="left", fontsize=10.5)
    return figure


def online_walk(scores: np.ndarray, block: int) -> Figure:
    """One row's scores [s], and the running maximum and LSE after each block of `block` keys."""
    ends = np.arange(block, len(scores) + block, block).clip(max=len(scores))
    running_max = [scores[:end].max() for end in ends]
    running_lse = [np.logaddexp.reduce(scores[:end]) for end in ends]
    with style():
        figure, (axes,) = canvas(7.4, 3.1)
        axes.vlines(np.arange(len(scores)), scores.min(), scores, color=PALE, linewidth=0.9)
        axes.plot(scores, ".", color="#9ca3af", markersize=3, label="score of a key")
        for values, label, tier in (
            (running_lse, "LSE so far", "cuda"),
            (running_max, "maximum so far", "peer"),
        ):
            colour = TIER_COLOURS[tier]
            axes.step(np.r_[0, ends], np.r_[values[0], values], color=colour, label=label)
        for end in ends[:-1]:
            axes.axvline(end - 0.5, color=INK, linewidth=0.3, alpha=0.5)
        axes.set(xlabel="key", ylabel="scaled score", title=f"One query, blocks of {block} keys")
        figure.legend(loc="outside lower center", ncols=3, fontsize=8)
    return figure


def score_range(scores: np.ndarray, limits: dict[str, float]) -> Figure:
    """How often each score occurs, and beyond which score the exponential leaves a format.

    ``limits``: name of a float format to the largest score whose exponential it can hold.
    """
    with style():
        figure, (axes,) = canvas(7.4, 2.7)
        axes.hist(scores.ravel(), bins=160, color="#9ca3af", log=True)
        for (name, limit), line in zip(limits.items(), ("--", ":"), strict=False):
            axes.axvline(limit, color="#b91c1c", linestyle=line, label=f"exp overflows {name}")
        axes.set(xlabel="scaled score", ylabel="pairs", title="Scores of the real activations")
        axes.legend(loc="upper center", fontsize=8)
    return figure


def time_by_rows(
    rows: Sequence[float],
    predicted_us: Sequence[float],
    measured_us: Sequence[float],
    title: str,
    xlabel: str,
    tier: str,
) -> Figure:
    """Time of a call against the number of query rows that share the KV data, logarithmic.

    Predicted: the slower of reading and arithmetic at the machine's measured ceilings.
    """
    with style():
        figure, (axes,) = canvas(7.2, 3.2)
        axes.plot(rows, predicted_us, "--", color=INK, label="predicted: the slower of the two")
        axes.plot(rows, measured_us, "o-", color=TIER_COLOURS[tier], label=f"measured, {tier}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set(xlabel=xlabel, ylabel="µs a call", title=title)
        axes.set_xticks(rows, [f"{row:g}" for row in rows])
        axes.grid()
        axes.legend(loc="upper left")
    return figure
