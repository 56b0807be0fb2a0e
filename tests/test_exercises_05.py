"""The checkers of exercises 05: what is right passes, planted mistakes do not."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from flashmla.lab.exercises import fp8
from flashmla.reference import fp8 as reference


def pack(
    x,
    *,
    power="up",
    smallest=1e-4,
    tile=128,
    codes="nearest",
    rope="nearest",
    order="<",
    swapped=False,
    scale_dtype=np.float32,
):
    """Right as it stands; each keyword plants one mistake."""
    groups = x[:512].reshape(-1, tile)
    scales = np.maximum(np.abs(groups).max(axis=1), np.float32(smallest)) / np.float32(448)
    if power == "up":
        scales = reference.round_up_to_power_of_two(scales)
    elif power == "nearest":
        scales = np.exp2(np.rint(np.log2(scales))).astype(np.float32)
    elif power == "doubled":  # one too many where the scale is a power of two already
        scales = np.exp2(np.floor(np.log2(scales)) + 1).astype(np.float32)
    scales = scales.astype(scale_dtype).astype(np.float32)
    with np.errstate(all="ignore"):
        quotients = np.clip(groups / scales[:, None], -448, 448)
    exact = quotients.astype(ml_dtypes.float8_e4m3fn)
    if codes == "truncated":
        bits = exact.view(np.uint8).copy()
        bits -= np.abs(exact.astype(np.float32)) > np.abs(quotients)
        exact = bits.view(ml_dtypes.float8_e4m3fn)
    elif codes == "up":  # halves away from zero instead of to the even code
        exact = (quotients * np.float32(1 + 1e-6)).clip(-448, 448).astype(ml_dtypes.float8_e4m3fn)
    elif codes == "twice":  # by way of bfloat16
        exact = quotients.astype(ml_dtypes.bfloat16).astype(ml_dtypes.float8_e4m3fn)
    last = x[512:].astype(ml_dtypes.bfloat16)
    if rope == "truncated":
        last = (x[512:].view(np.uint32) >> 16).astype(np.uint16)
    scales = np.repeat(scales, tile // 128).astype(f"{order}f4")
    parts = [exact.reshape(-1), scales, last]
    if swapped:
        parts = [parts[0], parts[2], parts[1]]
    return np.concatenate([part.view(np.uint8) for part in parts])


def lost(x, *, scaled=True, ties=True, zeros=False, bound=2**-10):
    """Right as it stands; each keyword plants one mistake."""
    amax = np.maximum(np.abs(x).max(), np.float32(1e-4))
    scale = reference.round_up_to_power_of_two(amax / np.float32(448)) if scaled else 1.0
    small = np.abs(x / scale)
    small = small <= bound if ties else small < bound
    return int((small if zeros else small & (x != 0)).sum())


def planted(function, **mistake):
    def answer(*args):
        return function(*args, **mistake)

    answer.__name__ = f"{function.__name__}-" + "-".join(f"{k}={v}" for k, v in mistake.items())
    return answer


MISTAKES = [
    (fp8.check_pack, planted(pack, power="no"), "rounded up to a power of two"),
    (fp8.check_pack, planted(pack, power="nearest"), "scales"),
    (fp8.check_pack, planted(pack, power="doubled"), "halfway between two codes: scales"),
    (fp8.check_pack, planted(pack, smallest=1e-30), "a tile of zeros and a tiny one"),
    (fp8.check_pack, planted(pack, tile=512), "four tiles of different sizes"),
    (fp8.check_pack, planted(pack, codes="truncated"), "codes: .* bytes differ"),
    (fp8.check_pack, planted(pack, codes="up"), "values halfway between two codes"),
    (fp8.check_pack, planted(pack, codes="twice"), "codes"),
    (fp8.check_pack, planted(pack, rope="truncated"), "RoPE values"),
    (fp8.check_pack, planted(pack, order=">"), "scales"),
    (fp8.check_pack, planted(pack, swapped=True), "scales"),
    (fp8.check_pack, lambda x: pack(x).astype(np.int32), "uint8 .656., got int32"),
    (fp8.check_pack, lambda x: pack(x)[:640], "got uint8 .640"),
    (fp8.check_pack, lambda x: ..., "returned Ellipsis"),
    (fp8.check_lost, planted(lost, scaled=False), "divided by the scale"),
    (fp8.check_lost, planted(lost, ties=False), "scale 1: expected 30, got 10"),
    (fp8.check_lost, planted(lost, zeros=True), "scale 1: expected 30, got 40"),
    (fp8.check_lost, planted(lost, bound=2**-9), "expected"),
    (fp8.check_lost, planted(lost, bound=2**-6), "expected"),
    (fp8.check_lost, lambda x: None, "returned None"),
]


@pytest.mark.parametrize(
    "check, mistake, message",
    MISTAKES,
    ids=[f"{check.__name__}-{mistake.__name__}" for check, mistake, _ in MISTAKES],
)
def test_a_planted_mistake_is_caught(check, mistake, message, capsys):
    with pytest.raises(AssertionError, match=message):
        check(mistake)
    assert "passed" not in capsys.readouterr().out


@pytest.mark.parametrize("check, right", [(fp8.check_pack, pack), (fp8.check_lost, lost)])
def test_what_the_mistakes_are_planted_in_is_right(check, right, capsys):
    check(right)
    assert capsys.readouterr().out.startswith("passed")
