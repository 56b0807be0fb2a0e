"""Figures of stage 00: the roofline and what bends it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure

from flashmla.lab.figures import INK, TIER_COLOURS, canvas, style

__all__ = ["Point", "Roof", "bandwidth_by_size", "latency_floor", "roofline"]


@dataclass(frozen=True)
class Roof:
    """What a machine can do at best.

    ``flops`` in operations a second, ``bandwidth`` in bytes a second, both measured.
    """

    label: str
    flops: float
    bandwidth: float

    @property
    def ridge(self) -> float:
        """The intensity (operations a byte) at which both limits take the same time."""
        return self.flops / self.bandwidth

    def attainable(self, intensity: float | np.ndarray) -> np.ndarray:
        """Operations a second at an arithmetic intensity, the lower of the two limits."""
        return np.minimum(self.flops, np.asarray(intensity) * self.bandwidth)


@dataclass(frozen=True)
class Point:
    """One case on the roofline: a measured rate, or None for a case only predicted."""

    label: str
    intensity: float
    flops: float | None = None
    tier: str = "torch"


def roofline(roofs: Sequence[Roof], points: Sequence[Point], title: str = "") -> Figure:
    """Both axes logarithmic; the roofs as lines, measured cases as dots.

    A case without a measured rate stands as a tick on the intensity axis.
    """
    intensities = [point.intensity for point in points] + [roof.ridge for roof in roofs]
    span = np.geomspace(min(intensities) / 4, max(intensities) * 8, 200)
    rates = [point.flops for point in points if point.flops]
    floor = min(rates + [float(roof.attainable(span[0])) for roof in roofs]) / 2
    with style():
        figure, (axes,) = canvas(7.4, 4.2)
        for roof, line in zip(roofs, cycle(("-", "--", ":")), strict=False):
            axes.plot(span, roof.attainable(span), line, color=INK, label=roof.label)
            axes.plot([roof.ridge], [roof.flops], "|", color=INK, markersize=12)
        for point in points:
            colour = TIER_COLOURS[point.tier]
            if point.flops:
                axes.plot([point.intensity], [point.flops], "o", color=colour)
            else:
                axes.axvline(point.intensity, color=colour, linewidth=1, linestyle=(0, (2, 3)))
            axes.annotate(
                point.label,
                (point.intensity, point.flops or floor),
                xytext=(5, -4 if point.flops else 6),
                textcoords="offset points",
                fontsize=8.5,
                color=colour,
                rotation=0 if point.flops else 90,
                va="top" if point.flops else "bottom",
            )
        axes.set(xscale="log", yscale="log", xlim=(span[0], span[-1]), title=title)
        axes.set_ylim(bottom=floor)
        axes.set(xlabel="arithmetic intensity, operations a byte", ylabel="operations a second")
        axes.grid(which="major")
        # Below the axes: dots and labels may stand anywhere on them.
        figure.legend(loc="outside lower center", ncols=2 if len(roofs) > 1 else 1, fontsize=8.5)
    return figure


def bandwidth_by_size(sizes: Sequence[float], rates: Sequence[float], title: str) -> Figure:
    """Bytes a second against the bytes that are read again and again."""
    with style():
        figure, (axes,) = canvas(7.2, 3.0)
        axes.plot(np.asarray(sizes) / 2**20, np.asarray(rates) / 1e9, "o-", color=INK)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="working set, MiB", ylabel="GB/s", title=title)
        axes.set_ylim(bottom=0)
        axes.grid()
    return figure


def latency_floor(sizes: Sequence[float], seconds: Sequence[float], rate: float) -> Figure:
    """Time of a call against its bytes, beside the time the bandwidth alone would give.

    Args:
        sizes: bytes moved a call; seconds: measured time a call; rate: bytes a second at best.
    """
    moved = np.asarray(sizes)
    with style():
        figure, (axes,) = canvas(7.2, 3.2)
        axes.loglog(moved, np.asarray(seconds) * 1e6, "o-", color=INK, label="measured")
        axes.loglog(moved, moved / rate * 1e6, "--", color="#9ca3af", label="bytes / bandwidth")
        axes.axhline(min(seconds) * 1e6, color=TIER_COLOURS["torch"], linewidth=1, label="floor")
        axes.set(xlabel="bytes moved by one call", ylabel="µs a call", title="The latency floor")
        axes.grid()
        axes.legend()
    return figure
