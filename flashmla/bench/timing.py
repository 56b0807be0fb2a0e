"""How long a call takes: on the card by replaying a CUDA graph, on the host by the clock.

A graph holds one call for each copy of the data, so that a call finds its own cache in memory and
not in L2. Sides that are compared take turns round by round: a card that warms up slows them all
alike, and the ratio of two sides survives what their absolute times do not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Timing", "copies_for", "copies_needed", "measure"]

# A side is called with the number of the copy that it is to use.
Side = Callable[[int], Any]

ROUND_US = 20_000.0  # what one side runs in one round, so that the events' own cost vanishes
L2_TIMES = 4  # the copies together are this many times as large as the L2 cache


@dataclass(frozen=True)
class Timing:
    """Microseconds a call; None where the way of measuring does not apply.

    Args:
        us: on the card, from graph replay (on a CPU: wall time).
        eager_us: on the card, calls issued one by one from Python.
        host_us: what the host spends on issuing one such call.
        spread: the middle half of the rounds' times, relative to their median.
        clock: ``"graph"``, ``"eager"`` (the call can't be captured) or ``"wall"``.
    """

    us: float | None
    eager_us: float | None
    host_us: float | None
    spread: float
    clock: str


def copies_needed(bytes_each: int, l2_bytes: int, memory: int, most: int = 256) -> int:
    """How many copies of the data keep a call from finding its own in L2.

    At least 2, as many as make 4 L2 caches, no more than fit into half of the free ``memory``.
    """
    wanted = max(2, -(-L2_TIMES * l2_bytes // max(1, bytes_each)))
    fitting = max(1, memory // 2 // max(1, bytes_each))
    return min(wanted, fitting, most)


def copies_for(bytes_each: int, device: torch.device) -> int:
    """:func:`copies_needed` on a device as it is now."""
    if device.type != "cuda":
        return 2  # a CPU's figures mean nothing here; two show that copies are told apart
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return copies_needed(bytes_each, l2, torch.cuda.mem_get_info(device)[0])


def measure(
    sides: Mapping[str, Side], copies: int, device: torch.device, rounds: int = 21
) -> dict[str, Timing]:
    """Times all sides against each other.

    Args:
        sides: name -> call; the call gets the number of a copy, 0 to ``copies`` - 1.
        rounds: how often each side has its turn; medians are taken over them.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):
            return _measure_cuda(sides, copies, rounds)
    samples = _interleave({name: _wall(side, copies) for name, side in sides.items()}, rounds)
    return {name: _summary(times, None, None, "wall") for name, times in samples.items()}


def _interleave(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Gives each side its turn in every round, the order turned about each time."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        for name in names if number % 2 == 0 else reversed(names):
            times[name].append(runs[name]())
    return times


def _summary(
    times: list[float], eager: list[float] | None, host: float | None, clock: str
) -> Timing:
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    eager_us = statistics.median(eager) if eager else None
    return Timing(middle, eager_us, host, (high - low) / middle, clock)


def _wall(side: Side, copies: int) -> Callable[[], float]:
    """A turn on the CPU: one call for each copy."""
    side(0)

    def turn() -> float:
        begun = time.perf_counter()
        for copy in range(copies):
            side(copy)
        return (time.perf_counter() - begun) / copies * 1e6

    return turn


# ---- on the card -----------------------------------------------------------------------------


def _measure_cuda(sides: Mapping[str, Side], copies: int, rounds: int) -> dict[str, Timing]:
    eager = {name: _eager(side, copies) for name, side in sides.items()}
    graphs = {name: _graph(side, copies) for name, side in sides.items()}
    replays = {name: _replays(graph, copies) for name, graph in graphs.items() if graph}
    eager_times = _interleave(eager, max(5, rounds // 3))
    graph_times = _interleave(replays, rounds)
    result = {}
    for name, side in sides.items():
        host = _host(side, copies)
        if name in graph_times:
            result[name] = _summary(graph_times[name], eager_times[name], host, "graph")
        else:
            plain = _summary(eager_times[name], eager_times[name], host, "eager")
            result[name] = Timing(None, plain.us, host, plain.spread, "eager")
    return result


def _elapsed_us(work: Callable[[], object]) -> float:
    """Time on the card between two events around the work."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def _graph(side: Side, copies: int) -> torch.cuda.CUDAGraph | None:
    """A graph with one call for each copy; None if the call can't be captured.

    The calls before it run on the stream that is captured: what a side makes once for a stream is
    there already.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # back to the caller's, also where a capture breaks off
        for copy in range(copies):
            side(copy)
        torch.cuda.synchronize()
        try:
            with torch.cuda.graph(graph, stream=stream):
                for copy in range(copies):
                    side(copy)
        except RuntimeError:  # it synchronises, or allocates in a way that capture forbids
            torch.cuda.synchronize()
            return None
    graph.replay()
    torch.cuda.synchronize()
    return graph


def _replays(graph: torch.cuda.CUDAGraph, copies: int) -> Callable[[], float]:
    """A turn: as many replays as fill a round."""
    once = _elapsed_us(graph.replay)
    times = max(1, round(ROUND_US / once))

    def turn() -> float:
        def work() -> None:
            for _ in range(times):
                graph.replay()

        return _elapsed_us(work) / (times * copies)

    return turn


def _eager(side: Side, copies: int) -> Callable[[], float]:
    """A turn: calls issued one by one, over all copies, until they fill a round."""
    side(0)
    torch.cuda.synchronize()
    once = _elapsed_us(lambda: [side(copy) for copy in range(copies)])
    times = max(1, round(ROUND_US / once))

    def turn() -> float:
        def work() -> None:
            for _ in range(times):
                for copy in range(copies):
                    side(copy)

        return _elapsed_us(work) / (times * copies)

    return turn


def _host(side: Side, copies: int, calls: int = 50) -> float:
    """Host time of a call, with few enough in flight that the launch queue never blocks it."""
    spent = []
    for number in range(calls):
        begun = time.perf_counter()
        side(number % copies)
        spent.append((time.perf_counter() - begun) * 1e6)
        if number % 10 == 9:
            torch.cuda.synchronize()
    return statistics.median(spent)
