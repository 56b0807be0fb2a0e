"""Exercises of stage 04."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flashmla.lab.exercises.common import answer, expect_close, expect_equal, passed

__all__ = ["check_cuts", "check_merge"]

TILE, OVERHEAD = 64, 5


def check_merge(merge: Callable[..., Any]) -> None:
    """merge(out_a, lse_a, out_b, lse_b) -> (out [d], lse), natural log, for one row.

    A half of LSE +inf or -inf is empty, whatever its out holds; two empty halves give out 0 and
    LSE +inf.
    """
    rng = np.random.default_rng(4)
    scores, values = rng.normal(size=12), rng.normal(size=(12, 8))

    def state(keys: slice, shift: float = 0.0) -> tuple[np.ndarray, np.float64]:
        lse = np.logaddexp.reduce(scores[keys] + shift)
        return np.exp(scores[keys] + shift - lse) @ values[keys], lse

    first, rest, whole = slice(0, 5), slice(5, 12), slice(0, 12)
    nothing, inf = np.full(8, np.nan), np.float64(np.inf)
    cases: list[tuple[str, tuple[Any, ...], tuple[Any, ...]]] = [
        ("5 keys and 7", (*state(first), *state(rest)), state(whole)),
        ("7 keys and 5", (*state(rest), *state(first)), state(whole)),
        ("scores near 2000", (*state(first, 2000), *state(rest, 2000)), state(whole, 2000)),
        ("scores near -2000", (*state(first, -2000), *state(rest, -2000)), state(whole, -2000)),
        ("an empty second half, LSE +inf", (*state(whole), nothing, inf), state(whole)),
        ("an empty first half, LSE -inf", (nothing, -inf, *state(whole)), state(whole)),
        ("two empty halves", (nothing, inf, nothing, -inf), (np.zeros(8), inf)),
    ]
    hint = "Weights are exp(lse_half - lse): shift by the larger LSE first, and drop empty halves."
    for name, arguments, (want_out, want_lse) in cases:
        with np.errstate(all="ignore"):
            got = answer(merge, *arguments)
        if not isinstance(got, tuple) or len(got) != 2:
            raise AssertionError(f"merge must return (out, lse), got {type(got).__name__}")
        expect_close(f"out of {name}", got[0], want_out, hint=hint)
        expect_close(f"lse of {name}", got[1], want_lse, hint=hint)
    passed("merge gives what attention over all the keys at once would")


def check_cuts(cuts: Callable[..., Any]) -> None:
    """cuts(lengths, parts): the parts + 1 places (request, tile) at which equal parts of the line
    begin, and the end (b, 0). Every case has at least as many places on the line as parts."""
    hint = (
        "Request i takes 5 + ceil(length / 64) places. Part p begins at p · places // parts; a cut "
        "within the 5 places of overhead moves to the request's tile 0."
    )
    for lengths, parts in (
        ([4096], 4),
        ([640, 64, 1280], 3),
        ([100, 0, 5000, 63, 65], 7),
        ([0, 0], 3),
        ([131072], 66),
    ):
        got = [tuple(int(i) for i in cut) for cut in answer(cuts, list(lengths), parts)]
        expect_equal(f"cuts({lengths}, parts={parts})", got, _cuts(lengths, parts), hint)
    passed("cuts shares the line fairly and never splits an overhead")


def _cuts(lengths: list[int], parts: int) -> list[tuple[int, int]]:
    line = [
        (request, max(0, place - OVERHEAD))
        for request, length in enumerate(lengths)
        for place in range(OVERHEAD - (-length // TILE))
    ]
    return [line[part * len(line) // parts] for part in range(parts)] + [(len(lengths), 0)]
