"""The comparison helpers, tried on planted mistakes: each must be caught, the honest one must pass.

The honest result is what a careful kernel gives: scores and sums in float32, probabilities and
outputs rounded to the inputs' dtype, split over several parts and merged.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from cases import DECODE_CASES, DecodeCase, DecodeInputs, case_id

from flashmla.lab.check import (
    assert_gradient_close,
    assert_identical,
    assert_lse_close,
    assert_out_close,
    compare,
)

MISTAKES = ("lse_base_2", "dropped_split", "unmasked_tail", "shifted_block", "scale_off_by_sqrt_2")
TOKENS_PER_SPLIT = 64


def careful_kernel(
    inputs: DecodeInputs, mistake: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split-KV decode as a kernel would round it: out in q's dtype, lse float32 [b, h_q, s_q]."""
    case, q = inputs.case, inputs.q
    scale = inputs.scale * (2**0.5 if mistake == "scale_off_by_sqrt_2" else 1.0)
    out = torch.zeros(*q.shape[:3], case.d_v, dtype=q.dtype)
    lse = torch.full((case.b, case.h_q, case.s_q), float("inf"))
    for i, length in enumerate(case.lengths):
        pages = inputs.block_table[i, : -(-length // case.page)].clone()
        if mistake == "shifted_block" and len(pages) > 1:
            pages[1] = pages[0]
        kv = inputs.k_cache[pages].flatten(0, 1)
        visible = len(kv) if mistake == "unmasked_tail" else length
        kv = torch.nan_to_num(kv[:visible], nan=0.0).float()  # a tail that was zeroed once
        parts = [
            _one_split(q[i], kv, range(start, min(start + TOKENS_PER_SPLIT, visible)), scale, case)
            for start in range(0, visible, TOKENS_PER_SPLIT)
        ]
        if mistake == "dropped_split" and len(parts) > 1:
            parts = parts[:-1]
        if parts:
            lse_parts = torch.stack([part_lse for _, part_lse in parts])
            total = torch.logsumexp(lse_parts, dim=0)
            empty = total == -torch.inf
            weights = torch.exp(lse_parts - torch.where(empty, 0.0, total))
            merged = sum(w[..., None] * part for w, (part, _) in zip(weights, parts, strict=True))
            if inputs.attn_sink is not None:  # its share of the softmax goes to no value
                kept = torch.where(empty, 0.0, torch.sigmoid(total - inputs.attn_sink))
                merged = merged * kept[..., None]
            out[i] = merged.to(q.dtype)
            lse[i] = torch.where(empty, torch.inf, total).T
    if mistake == "lse_base_2":
        lse = lse / np.log(2)
    return out, lse


def _one_split(q, kv, tokens, scale, case):
    """out float32 [s_q, h_q, d_v] and lse [s_q, h_q] (-inf: nothing) over some of the tokens."""
    group = case.h_q // case.h_kv
    keys = kv[tokens.start : tokens.stop].repeat_interleave(group, dim=1)
    scores = torch.einsum("shd,khd->shk", q.float(), keys) * scale
    if case.causal:
        last = torch.arange(case.s_q) + len(kv) - case.s_q
        hidden = torch.arange(tokens.start, tokens.stop)[None] > last[:, None]
        scores = scores.masked_fill(hidden[:, None], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    largest = scores.amax(dim=-1).nan_to_num(neginf=0.0)
    weights = torch.exp(scores - largest[..., None])
    rounded = weights.to(q.dtype).float()
    out = torch.einsum("shk,khd->shd", rounded, keys[..., : case.d_v])
    total = weights.sum(dim=-1)
    return out / torch.where(total > 0, total, 1.0)[..., None], lse


@pytest.mark.parametrize("case", DECODE_CASES, ids=case_id)
def test_the_honest_result_passes(case: DecodeCase) -> None:
    inputs = case.build()
    out, lse = careful_kernel(inputs)
    want_out, want_lse = inputs.expected()
    assert assert_out_close(out, want_out).values == out.numel()
    assert assert_lse_close(lse, want_lse).values == lse.numel()


# Lengths for which every planted mistake has something to get wrong.
TELLING = [
    DecodeCase("bf16", (100, 1, 200, 65), seed=1),
    DecodeCase("fp16", (100, 0, 200, 65), h_q=5, dtype=torch.float16, seed=2),
    DecodeCase("causal", (100, 129, 1, 190), s_q=2, causal=True, h_kv=2, seed=3),
    DecodeCase("one_among_many", (*[64] * 30, 130), h_q=4, seed=4),
    DecodeCase("long", (1500,), h_q=8, seed=5),
]


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("case", TELLING, ids=case_id)
def test_a_planted_mistake_is_caught(case: DecodeCase, mistake: str) -> None:
    inputs = case.build()
    out, lse = careful_kernel(inputs, mistake)
    want_out, want_lse = inputs.expected()
    with pytest.raises(AssertionError, match="^lse: "):
        assert_lse_close(lse, want_lse)
    if mistake == "lse_base_2":  # the output is right: only the LSE can tell
        assert_out_close(out, want_out)
    else:
        with pytest.raises(AssertionError, match="^out: "):
            assert_out_close(out, want_out)


def test_a_base_2_lse_is_recognised() -> None:
    want = np.random.default_rng(0).normal(5.0, 1.0, (3, 4))
    with pytest.raises(AssertionError, match=r"1\.4427 times the expected ones: is it in base 2\?"):
        assert_lse_close(want / np.log(2), want)


def test_float16_is_held_to_tighter_bounds_than_bfloat16() -> None:
    want = np.random.default_rng(0).normal(0.0, 0.1, 10_000)
    rounded = torch.from_numpy(want).to(torch.bfloat16)
    assert_out_close(rounded, want)
    with pytest.raises(AssertionError, match="outside abs 0.0001 or rel 0.00196"):
        assert_out_close(rounded.to(torch.float16), want)
    assert_out_close(rounded.to(torch.float16), want, dtype="bfloat16")


@pytest.mark.parametrize(
    ("got", "want", "message"),
    [
        (
            [1.0, np.nan],
            [1.0, 2.0],
            r"x: NaN in 1 places, expected in 0; first .* at \[1\]",
        ),
        ([1.0, 2.0], [1.0, np.inf], r"x: \+inf in 0 places, expected in 1; .* got 2, expected inf"),
        ([-np.inf, 2.0], [np.inf, 2.0], r"x: \+inf in 0 places, expected in 1"),
        ([-np.inf, 2.0], [1.0, 2.0], r"x: -inf in 1 places, expected in 0"),
        ([[1.0, 2.0]], [1.0, 2.0], r"x: shape \(1, 2\), expected \(2,\)"),
    ],
)
def test_what_is_not_finite_has_to_stand_in_its_place(got, want, message) -> None:
    with pytest.raises(AssertionError, match="^" + message):
        compare("x", np.array(got), np.array(want), abs_tol=1e9, rel_tol=1e9)


def test_nan_and_infinities_in_their_places_pass() -> None:
    x = np.array([np.nan, np.inf, -np.inf, 3.0])
    assert compare("x", x, x, abs_tol=0.0, rel_tol=0.0, cos_tol=1e-9).max_abs == 0.0


def test_the_message_names_the_worst_place_and_the_rows() -> None:
    want = np.ones((4, 3, 2))
    got = want.copy()
    got[2, 1, 0] = 1.5
    got[2, 0, 1] = 1.1
    message = (
        "x: 2 of 24 values are outside abs 0.001 or rel 0.01, all of them at first index 2; "
        "worst at [2, 1, 0]: got 1.5, expected 1, off by 0.5"
    )
    with pytest.raises(AssertionError, match="^" + re.escape(message) + "$"):
        compare("x", got, want, abs_tol=1e-3, rel_tol=1e-2)


def test_the_bounds_are_either_or_and_sharp() -> None:
    want = np.array([1e-6, 100.0])
    measured = compare("x", want + [9e-4, 0.9], want, abs_tol=1e-3, rel_tol=1e-2)
    assert measured.max_abs == pytest.approx(0.9)
    assert measured.max_rel == pytest.approx(0.009)  # the other value is within abs_tol
    for wrong in ([1.1e-3, 0.0], [0.0, 1.1]):
        with pytest.raises(AssertionError, match="x: 1 of 2 values"):
            compare("x", want + wrong, want, abs_tol=1e-3, rel_tol=1e-2)


def test_the_cosine_difference_sees_what_hides_below_the_absolute_bound() -> None:
    want = np.random.default_rng(0).normal(0.0, 1e-3, 1000)
    got = np.random.default_rng(1).normal(0.0, 1e-4, 1000) + want
    compare("x", got, want, abs_tol=8e-4, rel_tol=0.01)
    with pytest.raises(AssertionError, match="^x: cosine difference"):
        compare("x", got, want, abs_tol=8e-4, rel_tol=0.01, cos_tol=5e-6)


def test_the_cosine_difference_is_that_of_the_formula() -> None:
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    formula = 1 - 2 * (x * y).sum() / (x * x + y * y).sum()
    measured = compare("x", x, y, abs_tol=1e9, rel_tol=0.0)
    assert measured.cos_diff == pytest.approx(formula, rel=1e-12)


def test_gradients_are_measured_by_their_largest_value() -> None:
    want = np.random.default_rng(0).normal(0.0, 1e-5, (100, 64))
    rounded = torch.from_numpy(want).to(torch.bfloat16)
    assert_gradient_close(rounded, want)
    wrong = rounded.clone()
    wrong[7, 3] += want.max() / 50
    with pytest.raises(AssertionError, match=r"^dk: 1 of 6400 values .*worst at \[7, 3\]"):
        assert_gradient_close(wrong, want, name="dk")
    with pytest.raises(AssertionError, match="^gradient: "):
        assert_gradient_close(rounded * 1.01, want)
    assert_gradient_close(np.zeros((2, 2)), np.zeros((2, 2)))


def test_identical_means_every_bit() -> None:
    x = torch.tensor([[0.0, float("nan")], [1.0, -2.0]], dtype=torch.bfloat16)
    assert_identical("x", x, x.clone())
    assert_identical("x", x.T, x.T.clone())
    with pytest.raises(AssertionError, match=r"^x: 1 of 8 bytes .* byte 1 of row \[0, 0\]$"):
        assert_identical("x", x, x * torch.tensor([[-1.0, 1.0], [1.0, 1.0]], dtype=x.dtype))
    with pytest.raises(AssertionError, match=r"^x: float32 \(2, 2\), expected bfloat16 \(2, 2\)$"):
        assert_identical("x", x.float(), x)
    with pytest.raises(AssertionError, match=r"^x: bfloat16 \(1, 2\), expected"):
        assert_identical("x", x[:1], x)


def test_nothing_at_all_is_equal_to_nothing() -> None:
    assert compare("x", np.zeros((0, 4)), np.zeros((0, 4)), abs_tol=0.0, rel_tol=0.0).values == 0
