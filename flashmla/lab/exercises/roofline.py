"""Exercises of stage 00."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flashmla.lab.exercises.common import answer, expect_close, passed

__all__ = ["check_best_us", "check_decode_intensity", "check_ridge"]

D_QK, D_V, BF16 = 576, 512, 2


def check_ridge(ridge: Callable[..., Any]) -> None:
    """ridge(tflops, gbps): operations a byte at which arithmetic and memory take equally long."""
    hint = "1 TFLOPS is 1e12 operations a second, 1 GB/s is 1e9 bytes a second."
    for tflops, gbps in ((800.0, 3000.0), (0.05, 20.0), (1.0, 1000.0), (1979.0, 4800.0)):
        got = answer(ridge, tflops, gbps)
        expect_close(f"ridge({tflops}, {gbps})", got, tflops * 1e3 / gbps, hint=hint)
    passed("ridge knows where a machine's two limits meet")


def check_decode_intensity(decode_intensity: Callable[..., Any]) -> None:
    """decode_intensity(h_q, s_q, s_k): operations a byte of one MLA decode call, all in bfloat16,
    reading the cache and q and writing out."""
    hint = "2 · (576 + 512) operations a row and token; bytes: the cache once, q once, out once."
    for h_q, s_q, s_k in ((128, 1, 4096), (128, 2, 4096), (16, 1, 131072), (1, 1, 1), (24, 3, 64)):
        operations = 2 * h_q * s_q * s_k * (D_QK + D_V)
        moved = BF16 * (s_k * D_QK + s_q * h_q * (D_QK + D_V))
        got = answer(decode_intensity, h_q, s_q, s_k)
        what = f"decode_intensity(h_q={h_q}, s_q={s_q}, s_k={s_k})"
        expect_close(what, got, operations / moved, hint=hint)
    passed("decode_intensity counts the cache once and its use by every row")


def check_best_us(best_us: Callable[..., Any]) -> None:
    """best_us(flops, bytes_moved, tflops, gbps, floor_us): the least microseconds a call can take
    when memory and arithmetic overlap and no call is shorter than the floor."""
    cases = {
        "memory decides": (1e9, 1e9, 800.0, 3000.0, 2.0),
        "arithmetic decides": (1e12, 1e9, 800.0, 3000.0, 2.0),
        "the floor decides": (1e6, 1e5, 800.0, 3000.0, 2.0),
        "nothing to do": (0.0, 0.0, 800.0, 3000.0, 2.5),
    }
    hint = "They overlap, so the longest alone counts; 1 GB/s is 1e3 bytes a microsecond."
    for name, (flops, moved, tflops, gbps, floor_us) in cases.items():
        want = max(flops / (tflops * 1e6), moved / (gbps * 1e3), floor_us)
        got = answer(best_us, flops, moved, tflops, gbps, floor_us)
        expect_close(f"best_us where {name}", got, want, hint=hint)
    passed("best_us takes the longest of three, not their sum")
