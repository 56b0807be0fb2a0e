"""Exercises of stage 06."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flashmla.lab.exercises.common import answer, expect_close, expect_equal, passed
from flashmla.reference import dsa

__all__ = ["check_choose", "check_kept"]


def check_choose(choose: Callable[..., Any]) -> None:
    """choose(logits, k, length): positions of the k largest of logits[:length], ascending, as a
    list; of equals the lower positions; NaN and -inf are never chosen."""
    rng = np.random.default_rng(7)
    inf, nan = np.inf, np.nan
    plain = rng.normal(size=40)
    ties = rng.integers(0, 4, 60).astype(np.float64)
    some_nan = plain.copy()
    some_nan[[3, 17, 39]] = nan
    cases = {
        "plain logits": (plain, 7, 40),
        "many equal logits": (ties, 20, 60),
        "all equal": (np.zeros(30), 5, 30),
        "a length of 12": (plain, 7, 12),
        "a length below k": (plain, 30, 9),
        "length 0": (plain, 4, 0),
        "k = 0": (plain, 0, 40),
        "NaN among the logits": (some_nan, 10, 40),
        "all NaN but one": (np.where(np.arange(20) == 11, -5.0, nan), 4, 20),
        "-inf, which is no candidate": (np.array([1.0, -inf, -inf, 0.5, -inf]), 4, 5),
        "+inf": (np.array([0.0, inf, 1.0, inf]), 2, 4),
        "one huge value behind the length": (np.array([1.0, 2.0, 3.0, 1e30]), 2, 3),
    }
    hint = "Leave out NaN and -inf first; sort stably by descending value; keep k; sort positions."
    for name, (logits, k, length) in cases.items():
        row = dsa.topk(logits[None], k, [length])[0]
        want = [int(i) for i in row if i >= 0]
        got = [int(i) for i in answer(choose, logits.copy(), k, length)]
        expect_equal(f"choose of {name} (k={k}, length={length})", got, want, hint)
    passed("choose is exact, ignores what is no number, and settles ties by position")


def check_kept(kept: Callable[..., Any]) -> None:
    """kept(lse_sparse, lse_dense): each row's share of the dense attention that the chosen tokens
    have, from the LSEs alone; +inf is the LSE of a row with nothing chosen."""
    rng = np.random.default_rng(8)
    scores = rng.normal(size=(6, 50)) * 3
    scores[1] += 1500
    scores[2] -= 1500
    chosen = rng.random((6, 50)) < 0.3
    chosen[4] = True
    chosen[5] = False
    dense = np.logaddexp.reduce(scores, axis=1)
    with np.errstate(divide="ignore"):
        sparse = np.logaddexp.reduce(np.where(chosen, scores, -np.inf), axis=1)
    sparse[5] = np.inf
    weights = np.exp(scores - dense[:, None])
    want = (weights * chosen).sum(axis=1)
    hint = "The LSE is the log of what a softmax divides by: a share is a quotient of two of those."
    with np.errstate(all="ignore"):
        got = answer(kept, sparse.copy(), dense.copy())
    expect_close("kept for six rows, the last with nothing chosen", got, want, hint=hint)
    passed("kept reads off two LSEs what the choice was worth")
