"""Figures of stage 06: where attention lies, what is chosen of it, and what that saves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from flashmla.lab.figures import INK, TIER_COLOURS, canvas, style, to_numpy

__all__ = ["mass_by_k", "selected_text", "time_by_context"]

_LINES = (INK, TIER_COLOURS["cuda"], TIER_COLOURS["torch"], TIER_COLOURS["triton"], "#9ca3af")


def mass_by_k(counts: Sequence[int], panels: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Share of the attention that k tokens keep, against k, a panel a layer.

    Args:
        counts: the k's; panels: title -> way of choosing -> share, 0 to 1, one a k.
    """
    with style():
        figure, axes = canvas(8.0, 3.4, columns=len(panels))
        for ax, (title, lines) in zip(axes, panels.items(), strict=True):
            for (name, kept), colour in zip(lines.items(), _LINES, strict=False):
                ax.plot(counts, kept, "o-", color=colour, label=name, markersize=3.5)
            ax.set(xscale="log", ylim=(0, 1.02), xlabel="tokens chosen, k", title=title)
            ax.set_xticks(list(counts), [str(k) for k in counts], fontsize=7.5)
            ax.minorticks_off()
            ax.grid()
        axes[0].set_ylabel("attention kept")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def selected_text(text: bytes, panels: Mapping[str, Any], width: int = 80) -> Figure:
    """A text in lines of ``width`` bytes, each byte's background as dark as its weight.

    Args:
        text: ASCII; anything that has no glyph is shown as a dot.
        panels: title -> weights [len(text)]; each panel is scaled by its own largest weight.
    """
    shown = [chr(byte) if 32 < byte < 127 else " " for byte in text]
    rows = -(-len(shown) // width)
    font = {"fontsize": 5.8, "family": "monospace", "ha": "center", "va": "center"}
    with style():
        size = (8.2, (0.16 * rows + 0.35) * len(panels))
        figure, axes = plt.subplots(len(panels), 1, figsize=size, squeeze=False)
        plt.close(figure)
        for ax, (title, weights) in zip(axes[:, 0], panels.items(), strict=True):
            cells = np.zeros(rows * width)
            cells[: len(shown)] = to_numpy(weights)
            cells = np.sqrt(cells / max(cells.max(), 1e-30)).reshape(rows, width)
            ax.imshow(cells, cmap="Greens", vmin=0, vmax=1.5, aspect="auto")
            for at, letter in enumerate(shown):
                if letter != " ":
                    y, x = divmod(at, width)
                    ax.text(x, y, letter, **font)
            ax.set(xticks=[], yticks=[], title=title)
    return figure


def time_by_context(
    contexts: Sequence[int],
    measured: Mapping[str, Sequence[float]],
    predicted: Mapping[str, Sequence[float]],
    title: str,
) -> Figure:
    """Microseconds of a decode step against the length of the context, dense and sparse.

    Args:
        contexts: tokens; measured and predicted: name -> µs, one a context; the same names.
    """
    colours = dict(zip(predicted, (TIER_COLOURS["peer"], TIER_COLOURS["cuda"]), strict=False))
    with style():
        figure, (axes,) = canvas(7.4, 3.5)
        for name, colour in colours.items():
            axes.loglog(contexts, predicted[name], "--", color=colour, linewidth=1)
            if name in measured:
                axes.loglog(contexts, measured[name], "o-", color=colour, label=name)
            else:
                axes.plot([], [], "--", color=colour, label=name)
        axes.plot([], [], "--", color=INK, linewidth=1, label="predicted")
        axes.set_xticks(list(contexts), [_thousands(n) for n in contexts])
        axes.minorticks_off()
        axes.set(xlabel="context, tokens", ylabel="µs a step", title=title)
        axes.grid()
        axes.legend(loc="upper left")
    return figure


def _thousands(n: int) -> str:
    return f"{n // 1024}k" if n >= 1024 and n % 1024 == 0 else str(n)
