"""One look for every figure of the notebooks, and the figures that several stages share.

Each function takes real arrays and returns the matplotlib figure it drew; each stage's own figures
are in ``figures_<stage>.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = [
    "TIER_COLOURS",
    "canvas",
    "kv_bytes_per_token",
    "predicted_and_measured",
    "request_colour",
    "style",
    "to_numpy",
]

# A tier keeps its colour through the whole book.
TIER_COLOURS: dict[str, str] = {
    "reference": "#6b7280",
    "torch": "#e07a2f",
    "triton": "#7c5cc4",
    "cuda": "#3d8b37",
    "peer": "#2f6fb0",
}
INK = "#1f2937"
PALE = "#e5e7eb"

_RC: dict[Any, Any] = {
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "grid.color": PALE,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw what is inside in the book's style, and leave matplotlib as it was."""
    with plt.rc_context(_RC):
        yield


def to_numpy(x: Any) -> np.ndarray:
    """A torch tensor on any device, or anything NumPy takes, as an array."""
    if hasattr(x, "detach"):
        x = x.detach().cpu()
        x = x.float() if x.is_floating_point() else x
    return np.asarray(x)


def canvas(width: float = 7.2, height: float = 3.2, columns: int = 1) -> tuple[Figure, list[Axes]]:
    """An empty figure of inches ``width`` x ``height`` with axes side by side.

    The figure is closed for pyplot at once, so that a notebook shows it once: as the cell's value.
    """
    figure, axes = plt.subplots(1, columns, figsize=(width, height), squeeze=False)
    plt.close(figure)
    return figure, list(axes[0])


def request_colour(request: int) -> tuple[float, float, float, float]:
    """A colour for request number ``request``; ten of them, then again from the first."""
    return plt.get_cmap("tab10")(request % 10)


def kv_bytes_per_token(layouts: Mapping[str, int], title: str | None = None) -> Figure:
    """Bars of the KV bytes that one token costs in one layer.

    Args:
        layouts: name of a layout, such as ``"MHA"``, to bytes a token.
        title: what stands above; by default it says what the bars count.
    """
    names, values = list(layouts), np.array(list(layouts.values()), dtype=float)
    with style():
        figure, (axes,) = canvas(7.2, 0.55 + 0.42 * len(names))
        axes.barh(names, values, color=[_layout_colour(name) for name in names], height=0.62)
        for row, value in enumerate(values):
            times = f"  {value:,.0f} B"
            if 0 < value < values.max():
                ratio = f"{values.max() / value:.1f}".removesuffix(".0")
                times += f"  ({ratio}x less)"
            axes.text(value, row, times, va="center", fontsize=9)
        axes.invert_yaxis()
        axes.set_xlim(0, values.max() * 1.28)
        axes.set_xlabel("bytes")
        axes.set_title(title or "KV cache of one token in one layer")
    return figure


def _layout_colour(name: str) -> str:
    return TIER_COLOURS["cuda"] if "MLA" in name.upper() else "#9ca3af"


def predicted_and_measured(
    labels: Sequence[str],
    predicted: Sequence[float],
    measured: Sequence[float],
    unit: str,
    title: str,
    *,
    tier: str = "cuda",
) -> Figure:
    """Pairs of bars: what the arithmetic promised and what the clock said.

    Args:
        labels: one a pair; ``predicted`` and ``measured``: the values, in ``unit``.
        tier: whose colour the measured bars take.
    """
    if not len(labels) == len(predicted) == len(measured):
        raise ValueError("labels, predicted and measured must have one entry a case each")
    place = np.arange(len(labels))
    with style():
        figure, (axes,) = canvas(7.2, 0.9 + 0.5 * len(labels))
        axes.barh(place - 0.19, predicted, 0.36, color=PALE, edgecolor=INK, label="predicted")
        axes.barh(place + 0.19, measured, 0.36, color=TIER_COLOURS[tier], label="measured")
        axes.set_yticks(place, labels)
        axes.invert_yaxis()
        axes.set(xlabel=unit, title=title)
        axes.legend(loc="best")
        axes.grid(axis="x")
    return figure
