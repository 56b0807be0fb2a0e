"""Exercises of stage 01."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from flashmla.lab.exercises.common import answer, expect_close, expect_equal, passed
from flashmla.reference.mha import attention, causal_mask

__all__ = ["check_one_pass", "check_tokens_that_fit", "check_visible_keys"]


def check_visible_keys(visible_keys: Callable[..., Any]) -> None:
    """visible_keys(i, s_q, s_k): how many keys query i of s_q sees among s_k, causally."""
    hint = "The last query sees every key; each query before it sees one fewer, and none below 0."
    for s_q, s_k in ((1, 1), (1, 9), (4, 4), (3, 10), (7, 4), (2, 0)):
        mask = causal_mask(s_q, s_k)
        for i in range(s_q):
            got = answer(visible_keys, i, s_q, s_k)
            expect_equal(
                f"visible_keys(i={i}, s_q={s_q}, s_k={s_k})", got, int(mask[i].sum()), hint
            )
    passed("visible_keys agrees with the causal mask, also where there are more queries than keys")


def check_tokens_that_fit(tokens_that_fit: Callable[..., Any]) -> None:
    """tokens_that_fit(memory, layers, h_kv, d_qk, d_v, value_bytes): whole tokens of KV cache."""
    hint = "Every layer keeps a key and a value for each KV head, and the two may differ in width."
    cases = ((10**9, 32, 8, 128, 128, 2), (64 * 2**30, 61, 128, 192, 128, 2), (999, 1, 1, 5, 7, 4))
    for case in cases:
        memory, layers, h_kv, d_qk, d_v, value_bytes = case
        whole = memory // (layers * h_kv * (d_qk + d_v) * value_bytes)
        got = answer(tokens_that_fit, *case)
        expect_equal(f"tokens_that_fit{case}", got, whole, hint)
    passed("tokens_that_fit counts keys and values of every head in every layer")


class _Once:
    """Yields (key, value) pairs, and says so if somebody asks for them a second time."""

    def __init__(self, k: np.ndarray, v: np.ndarray) -> None:
        self.pairs, self.started = list(zip(k, v, strict=True)), False

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        if self.started:
            raise AssertionError("the cache was read a second time: one pass is all there is")
        self.started = True
        return iter(self.pairs)

    def __len__(self) -> int:
        raise AssertionError("how many keys are to come is not known before they have come")


def check_one_pass(one_pass: Callable[..., Any]) -> None:
    """one_pass(q, cache, d_v, scale) -> (out [d_v], lse): attention of one query.

    q [d_qk]; cache is an iterable of (key [d_qk], value [d_v]) that can be walked once.
    """
    rng = np.random.default_rng(1)
    for n, loudness in ((1, 1.0), (40, 1.0), (40, 60.0), (0, 1.0)):
        q = rng.normal(size=8) * loudness
        k, v = rng.normal(size=(n, 8)) * loudness, rng.normal(size=(n, 3))
        want_out, want_lse = attention(q[None, None], k[:, None], v[:, None], 0.5)
        result = answer(one_pass, q, _Once(k, v), 3, 0.5)
        if not isinstance(result, tuple) or len(result) != 2:
            raise AssertionError(f"one_pass must return (out, lse), got {type(result).__name__}")
        case = f"with {n} keys and scores up to {abs(k @ q).max(initial=0.0) * 0.5:.0f}"
        hint = "Is what was summed so far rescaled when the maximum grows?"
        expect_close(f"out {case}", result[0], want_out[0, 0], hint=hint)
        hint = "The LSE is the maximum plus the natural log of the sum taken relative to it."
        expect_close(f"lse {case}", result[1], want_lse[0, 0], hint=hint)
    passed("one_pass reads each key once, survives large scores, and knows the empty cache")
