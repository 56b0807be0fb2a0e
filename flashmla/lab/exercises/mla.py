"""Exercises of stage 02."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np

from flashmla.lab.exercises.common import answer, expect_close, expect_equal, passed

__all__ = ["check_balancing_rows", "check_cheaper_form", "check_values_from_latents"]

D_LATENT, D_ROPE, D_NOPE, D_V = 512, 64, 128, 128


def check_balancing_rows(balancing_rows: Callable[..., Any]) -> None:
    """balancing_rows(tflops, gbps): the least h_q · s_q at which arithmetic takes at least as long
    as reading a bf16 cache, for the absorbed form, the bytes of q and out left out."""
    hint = "2 · (576 + 512) operations a row and token; 576 values of 2 bytes a token, read once."
    per_row = 2 * (D_LATENT + D_ROPE + D_LATENT) / (2 * (D_LATENT + D_ROPE))
    for tflops, gbps in ((800.0, 3000.0), (764.0, 3110.0), (100.0, 1000.0), (1.0, 50.0)):
        want = math.ceil(tflops * 1e3 / gbps / per_row)
        got = answer(balancing_rows, tflops, gbps)
        expect_equal(f"balancing_rows({tflops}, {gbps})", got, want, hint)
    passed("balancing_rows counts the latent's bytes once and its operations twice")


def check_values_from_latents(values_from_latents: Callable[..., Any]) -> None:
    """values_from_latents(p, kv, w_uv) -> out [h, 128], with no token's values ever expanded.

    p [h, s_k] attention probabilities of one query, kv [s_k, 576], w_uv [512, h, 128].
    """
    rng = np.random.default_rng(2)
    for h, s_k in ((4, 2048), (3, 700)):
        p = rng.dirichlet(np.ones(s_k), size=h)
        kv = rng.normal(size=(s_k, D_LATENT + D_ROPE))
        w_uv = rng.normal(size=(D_LATENT, h, D_V))
        want = np.stack([p[i] @ (kv[:, :D_LATENT] @ w_uv[:, i]) for i in range(h)])
        tracemalloc.start()
        try:
            got = answer(values_from_latents, p, kv, w_uv)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        hint = "Is the RoPE part left out, and does each head meet its own slice of w_uv?"
        expect_close(f"out for h={h}, s_k={s_k}", got, want, hint=hint)
        one_head = s_k * D_V * 8  # bytes of one head's expanded values, float64
        assert peak < 0.9 * one_head, (
            f"the answer is right, but took {peak:,} bytes on the way; one head's values for all "
            f"{s_k} tokens are {one_head:,}. Bring the probabilities to the latents first"
        )
    passed("values_from_latents expands one vector a head, however long the cache")


def check_cheaper_form(cheaper_form: Callable[..., Any]) -> None:
    """cheaper_form(s_q, s_k) -> "absorbed" or "expanded", by operations for one head.

    s_q new queries against s_k latents, no mask. A tie goes to "absorbed".
    """
    hint = (
        "Expanding costs 2·512·(128 + 128) a token of the cache; absorbing costs that a query; "
        "after that a pair of query and token costs 2·(192 + 128) or 2·(576 + 512)."
    )
    for s_k in (1, 64, 171, 300, 4096, 131072):
        for s_q in (1, 2, 100, 128, 170, 171, 200, 4096):
            expanded = s_k * D_LATENT * (D_NOPE + D_V) + s_q * s_k * (D_NOPE + D_ROPE + D_V)
            absorbed = s_q * D_LATENT * (D_NOPE + D_V) + s_q * s_k * (2 * D_LATENT + D_ROPE)
            want = "absorbed" if absorbed <= expanded else "expanded"
            got = answer(cheaper_form, s_q, s_k)
            expect_equal(f"cheaper_form(s_q={s_q}, s_k={s_k})", got, want, hint)
    passed("cheaper_form knows when the cache is worth expanding")
