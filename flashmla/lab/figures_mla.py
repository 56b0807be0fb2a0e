"""Figures of stage 02: what is in a latent, and which form of attention costs what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from flashmla.lab.figures import INK, TIER_COLOURS, canvas, style

__all__ = ["operations_by_queries", "rotation", "shares", "spectrum"]

EXPANDED, ABSORBED = TIER_COLOURS["peer"], TIER_COLOURS["cuda"]


def spectrum(latents: Mapping[str, np.ndarray], marks: Mapping[str, int]) -> Figure:
    """Singular values of latents [s, 512], the largest being 1: how many directions are in use.

    ``marks``: label to a rank at which to draw a line.
    """
    with style():
        figure, (axes,) = canvas(7.4, 3.1)
        for (name, values), colour in zip(latents.items(), (EXPANDED, ABSORBED, INK), strict=False):
            singular = np.linalg.svd(np.asarray(values, np.float64), compute_uv=False)
            axes.semilogy(np.arange(1, len(singular) + 1), singular / singular[0], color=colour)
            axes.plot([], [], color=colour, label=name)
        for (label, rank), line in zip(marks.items(), ("--", ":"), strict=False):
            axes.axvline(rank, color="#b91c1c", linestyle=line, linewidth=1, label=label)
        axes.set_ylim(1e-7, 2)
        axes.set(xlabel="number", ylabel="relative to the largest", title="Singular values")
        axes.legend(loc="upper right", fontsize=8)
    return figure


def rotation(distance: np.ndarray, turned: np.ndarray, plain: float) -> Figure:
    """Dot product of one query and one key, both rotated by their places, by distance."""
    with style():
        figure, (axes,) = canvas(7.2, 2.6)
        axes.plot(distance, turned, color=ABSORBED, label="rotated")
        axes.axhline(plain, color=INK, linewidth=0.8, linestyle="--", label="not rotated")
        axes.set(xlabel="distance between query and key, tokens", ylabel="q · k")
        axes.set_title("A rotated pair knows its distance and nothing else of its places")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def operations_by_queries(
    s_q: Sequence[int], expanded: Sequence[float], absorbed: Sequence[float], crossing: float
) -> Figure:
    """Operations a cached token and head for s_q queries, in both forms, logarithmic."""
    with style():
        figure, (axes,) = canvas(7.2, 3.2)
        axes.loglog(s_q, expanded, color=EXPANDED, label="expanded: per-head keys and values")
        axes.loglog(s_q, absorbed, color=ABSORBED, label="absorbed: the latent itself")
        axes.axvline(crossing, color=INK, linewidth=0.8, linestyle="--")
        axes.text(crossing * 1.1, min(absorbed), f"{crossing:.0f} queries", fontsize=9)
        axes.set(xlabel="queries that read the cache at once (s_q)", ylabel="operations")
        axes.set_title("Operations a cached token and head")
        axes.grid()
        axes.legend(loc="upper left")
    return figure


def shares(percent: Mapping[str, float], title: str) -> Figure:
    """Bars of the share of the predicted speed that was reached, by case, in per cent."""
    with style():
        figure, (axes,) = canvas(7.2, 1.1 + 0.26 * len(percent))
        bars = axes.barh(list(percent), list(percent.values()), 0.66, color=TIER_COLOURS["cuda"])
        axes.bar_label(bars, fmt="%.0f %%", padding=3, fontsize=8)
        axes.axvline(100, color=INK, linewidth=0.8, linestyle="--")
        axes.invert_yaxis()
        axes.set(xlabel="% of the predicted speed", title=title)
        axes.set_xlim(0, max(112, 1.12 * max(percent.values())))
    return figure
