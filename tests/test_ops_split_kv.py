"""merge_state as a public operation."""

from __future__ import annotations

import pytest
import torch
from cases import DecodeCase

import flashmla
from flashmla.lab.check import assert_lse_close, assert_out_close
from flashmla.torch.split_kv import get_metadata

OUT, LSE = torch.ones(2, 3, 4), torch.zeros(2, 3)


def test_two_halves_of_a_cache_make_the_whole():
    """Decode over the first pages and over the rest, merged, is decode over all."""
    x = DecodeCase("halves", (300, 65, 64, 200), 2, 8, seed=9).build()
    want_out, want_lse = x.expected()
    halves = []
    first = x.cache_seqlens.clamp(max=128)
    for table, lengths in (
        (x.block_table, first),
        (x.block_table[:, 2:], x.cache_seqlens - first),
    ):
        plan = flashmla.get_mla_metadata(lengths, 16, 1)
        out, lse = flashmla.flash_mla_with_kvcache(x.q, x.k_cache, table, lengths, 512, *plan)
        halves += [out.float(), lse.transpose(1, 2)]
    out, lse = flashmla.merge_state(*halves)
    assert_out_close(out.bfloat16(), want_out)
    assert_lse_close(lse.transpose(1, 2), want_lse)
    assert torch.equal(halves[3][1:3], torch.full_like(halves[3][1:3], float("inf")))


def test_no_leading_dimension_and_no_rows():
    out, lse = flashmla.merge_state(
        torch.ones(4), torch.tensor(0.0), torch.zeros(4), torch.tensor(0.0)
    )
    assert out.tolist() == [0.5] * 4 and lse.shape == ()
    out, lse = flashmla.merge_state(OUT[:0], LSE[:0], OUT[:0], LSE[:0])
    assert out.shape == (0, 3, 4) and lse.shape == (0, 3)


BAD = [
    ((None, LSE, OUT, LSE), TypeError, r"out_a must be a torch.Tensor \[..., d], got NoneType"),
    ((OUT, 1.0, OUT, LSE), TypeError, r"lse_a must be a torch.Tensor \[..., ...], got float"),
    ((OUT, LSE, OUT.half(), LSE), TypeError, "out_b must be of dtype float32, got float16"),
    ((OUT.int(), LSE, OUT, LSE), TypeError,
     "out_a must be of dtype float32 or bfloat16 or float16, got int32"),
    ((OUT, LSE, OUT[:1], LSE), ValueError, r"out_b must have the shape of out_a, \[2, 3, 4], got"),
    ((OUT, LSE, OUT[0], LSE), ValueError, "out_b must have 3 dimensions"),
    ((OUT, LSE, OUT, LSE.double()), TypeError, "lse_b must be of dtype float32, got float64"),
    ((OUT, LSE, OUT, LSE.T), ValueError,
     r"lse_b must have out_a's shape without its last dimension, \[2, 3], got \[3, 2]"),
    ((OUT, LSE.to("meta"), OUT, LSE), ValueError, "lse_a must be on cpu"),
    ((OUT.mT.contiguous().mT, LSE, OUT, LSE), ValueError, "out_a must be contiguous in its last"),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "error", "message"), BAD)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        flashmla.merge_state(*arguments)


def test_parts_follow_the_heads():
    seqlens = torch.tensor([640], dtype=torch.int32)
    for rows, parts in ((64, 132), (128, 66)):
        metadata, _ = flashmla.get_mla_metadata(seqlens, rows, 1)
        assert torch.equal(metadata, get_metadata(seqlens, parts)[0])
