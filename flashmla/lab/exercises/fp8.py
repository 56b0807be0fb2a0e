"""Exercises of stage 05."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flashmla.lab.check import assert_identical
from flashmla.lab.exercises.common import answer, expect_equal, passed
from flashmla.reference import fp8

__all__ = ["check_lost", "check_pack"]


def _tokens() -> dict[str, np.ndarray]:
    """float32 [576] each, what a pack can go wrong on; every scale a different one."""
    rng = np.random.default_rng(5)
    token = rng.normal(size=576).astype(np.float32)
    token[:512] *= np.repeat(np.array([0.1, 3.0, 40.0, 1e-3], np.float32), 128)
    # Halfway between two codes, all over a binade: scale 1 makes the quotients the values.
    ties = np.full(576, 448.0, np.float32)
    ties[1:128] = 1 + (2 * (np.arange(127) % 8) + 1) / 16
    ties[129:256] = -ties[1:128] / 4
    exact = token.copy()
    exact[:512] = np.sign(exact[:512]) * 0.25
    exact[:512:128] = 448.0 * np.array([0.25, 0.5, 2.0, 8.0], np.float32)
    empty = token.copy()
    empty[128:256] = 0.0
    empty[256:384] *= 1e-9
    # A free scale here is 1 + 2^-23 and rounds up to 2; and beside the outlier most codes are 0.
    outlier = token.copy()
    outlier[5] = np.nextafter(np.float32(448), np.float32(500))
    outlier[300] = -3e5
    return {
        "four tiles of different sizes": token,
        "values halfway between two codes": ties,
        "maxima that are 448 times a power of two": exact,
        "a tile of zeros and a tiny one": empty,
        "outliers": outlier,
    }


def check_pack(pack: Callable[..., Any]) -> None:
    """pack(x): one token x float32 [576] -> its bytes, uint8 [656], scales powers of two."""
    hints = {
        "codes": "code = float8_e4m3fn of the float32 quotient x / scale, clamped to ±448",
        "scales": "scale = max(max|x|, 1e-4) / 448 in float32, rounded up to a power of two",
        "RoPE values": "the last 64 values as bfloat16, from byte 528 on",
    }
    # Scales first: a wrong one makes its codes wrong as well.
    ends = {"scales": (512, 528), "codes": (0, 512), "RoPE values": (528, 656)}
    for name, token in _tokens().items():
        got = np.asarray(answer(pack, token.copy()))
        if got.shape != (656,) or got.dtype != np.uint8:
            raise AssertionError(f"pack must return uint8 [656], got {got.dtype} {got.shape}")
        want = fp8.pack(token)
        for part, (begin, end) in ends.items():
            try:
                assert_identical(part, got[begin:end], want[begin:end])
            except AssertionError as wrong:
                raise AssertionError(f"{name}: {wrong}. {hints[part]}") from None
    passed("pack writes the very bytes of the oracle, for ties, zeros and outliers too")


def check_lost(lost: Callable[..., Any]) -> None:
    """lost(x): how many values of a tile x float32 [128], not 0 themselves, get the code 0."""
    hint = (
        "The smallest positive code is 2^-9. What lies below half of it rounds to 0, and so does "
        "the half itself: ties go to the even code. Values are divided by the scale first."
    )
    rng = np.random.default_rng(6)
    plain = rng.normal(size=128).astype(np.float32)
    outlier = plain.copy()
    outlier[7] = 3e5
    # Scale 1: quotients on both sides of 2^-10, and on it.
    edge = np.full(128, 448.0, np.float32)
    near = np.array([1.0, 1.001, -1.0, 0.5, 0.0, 2.0], np.float32) * np.float32(2**-10)
    edge[:60] = np.repeat(near, 10)
    cases = {
        "values of one size": plain,
        "one outlier": outlier,
        "values around 2^-10, scale 1": edge,
        "zeros": np.zeros(128, np.float32),
        "values of 1e-8": plain * np.float32(1e-8),
    }
    for name, tile in cases.items():
        codes, _ = fp8.quantise(tile)
        want = int(((codes.astype(np.float32) == 0) & (tile != 0)).sum())
        expect_equal(f"lost of {name}", answer(lost, tile.copy()), want, hint)
    passed("lost counts what falls under half of the smallest code")
