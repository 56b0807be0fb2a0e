"""What a Triton kernel has to do, as functions of a case and a device.

Tests without a card call them in Triton's interpreter (`triton_worker.interpreted`), tests with one
call them directly with device="cuda". Each runs the kernel before the oracle, so that memory the
kernel finds by luck can't hold the answer. Triton is imported inside the functions: whether it
interprets is settled at that moment, for the whole process.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from cases import (
    WILD,
    DecodeCase,
    DecodeInputs,
    PrefillCase,
    SparseDecodeCase,
    SparseDecodeInputs,
    SparsePrefillCase,
    to_numpy,
)

from flashmla import schedule
from flashmla.lab.check import as_float64, assert_lse_close, assert_out_close
from flashmla.reference import dsa as reference_dsa
from flashmla.reference import fp8 as reference_fp8
from flashmla.reference import mha as reference_mha
from flashmla.reference import paged_kv as reference_paged_kv
from flashmla.reference import split_kv as reference_split_kv

INF, NAN = float("inf"), float("nan")


def check_decode(
    case: DecodeCase, device: str = "cpu", parts: int | None = None, batch_invariant: bool = False
) -> None:
    """Plan, decode and combine of one case; the plan has as many parts as a full H100 gives it
    unless `parts` says otherwise."""
    from flashmla.triton import mla, split_kv

    x = case.build(device)
    group = case.h_q // case.h_kv
    parts = parts or schedule.num_parts(case.s_q * group, case.h_kv)
    plan = split_kv.get_metadata(x.cache_seqlens, parts, batch_invariant)
    arguments = (
        x.q, x.k_cache, x.block_table, x.cache_seqlens, case.d_v, *plan, x.scale, case.causal,
        x.attn_sink,
    )  # fmt: skip
    assert mla.supports_dense_decode(*arguments) == ""
    out, lse = mla.dense_decode(*arguments)

    assert out.dtype == case.dtype and lse.dtype == torch.float32
    want_out, want_lse = x.expected()
    assert_lse_close(lse, want_lse)
    assert_out_close(out, want_out)
    nothing = torch.from_numpy(np.isposinf(want_lse)).transpose(1, 2)  # [b, s_q, h_q]
    assert (out.cpu()[nothing] == 0).all()


def check_decode_is_bitwise_stable(case: DecodeCase, device: str, repeats: int = 20) -> None:
    """The same call gives the same bits every time: no kernel here uses atomics."""
    from flashmla.triton import mla, split_kv

    x = case.build(device)
    parts = schedule.num_parts(case.s_q * case.h_q // case.h_kv, case.h_kv)
    plan = split_kv.get_metadata(x.cache_seqlens, parts)
    first = None
    for _ in range(repeats):
        result = mla.dense_decode(
            x.q, x.k_cache, x.block_table, x.cache_seqlens, case.d_v, *plan, x.scale, case.causal
        )
        first = first or result
        for got, want in zip(result, first, strict=True):
            assert torch.equal(got, want)


def check_decode_with_wild_blocks(device: str = "cpu") -> None:
    """Block numbers outside the cache, within the length: whatever comes out, nothing outside
    the cache is read, and the other requests are right."""
    from flashmla.triton import mla, split_kv

    case = DecodeCase("wild", (130, 70, 200), h_q=4, strided=False, seed=40)
    x = case.build(device)
    x.block_table[1, 0] = 2147480000
    x.block_table[1, 1] = -2147480000
    plan = split_kv.get_metadata(x.cache_seqlens, 7)
    out, lse = mla.dense_decode(
        x.q, x.k_cache, x.block_table, x.cache_seqlens, case.d_v, *plan, x.scale, case.causal
    )
    x.cache_seqlens[1] = 0  # the oracle can't look there
    want_out, want_lse = x.expected()
    for request in (0, 2):
        assert_lse_close(lse[request], want_lse[request])
        assert_out_close(out[request], want_out[request])


def check_prefill(case: PrefillCase, device: str = "cpu") -> None:
    """Dense attention over packed sequences."""
    from flashmla.triton import mha

    x = case.build(device)
    arguments = (
        x.q, x.k, x.v, x.cu_seqlens_qo, x.cu_seqlens_kv, x.max_seqlen_qo, x.max_seqlen_kv,
        x.scale, case.causal,
    )  # fmt: skip
    assert mha.supports_forward(*arguments) == ""
    out, lse = mha.forward(*arguments)

    assert out.dtype == case.dtype and lse.dtype == torch.float32
    want_out, want_lse = x.expected()
    assert_lse_close(lse, want_lse)
    assert_out_close(out, want_out)
    nothing = torch.from_numpy(np.isposinf(want_lse))  # [total_q, h_q]
    assert (out.cpu()[nothing] == 0).all()


def check_plan(seqlens: list[int], parts: int, device: str = "cpu") -> None:
    """Both kinds of plan from the device equal the oracle's, which walks the line, and Python's; a
    second plan is written into the first one's tensors."""
    for batch_invariant in (False, True):
        _check_plan(seqlens, parts, batch_invariant, device)


def _check_plan(seqlens: list[int], parts: int, batch_invariant: bool, device: str) -> None:
    from flashmla.triton import split_kv

    lengths = torch.tensor(seqlens, dtype=torch.int32, device=device)
    # Stale memory must not shine through: what is not written stays wrong.
    out = (
        torch.full((parts, 16 if batch_invariant else 8), -7, dtype=torch.int32, device=device),
        torch.full((len(seqlens) + 1,), -7, dtype=torch.int32, device=device),
    )
    pointers = [tensor.data_ptr() for tensor in out]
    result = split_kv.get_metadata(lengths, parts, batch_invariant, out)
    assert [tensor.data_ptr() for tensor in result] == pointers
    fresh = split_kv.get_metadata(lengths, parts, batch_invariant)
    wanted = [schedule.plan(seqlens, parts, batch_invariant)]
    if max(seqlens, default=0) < 10_000:  # the oracle counts tile by tile
        wanted.append(reference_split_kv.plan_slow(seqlens, parts, batch_invariant))
    for want in wanted:
        for got in (result, fresh):
            np.testing.assert_array_equal(got[0].cpu().numpy(), want[0])
            np.testing.assert_array_equal(got[1].cpu().numpy(), want[1])


def _halves(rows: int, d: int, dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Two results to merge: outs [rows, d], lses [rows], with every pairing of empty halves.

    The out of an empty half is NaN: it is not to be read.
    """
    g = torch.Generator().manual_seed(rows)
    outs = [torch.randn(rows, d, generator=g).to(dtype) for _ in range(2)]
    lses = [torch.randn(rows, generator=g) * 5 for _ in range(2)]
    lses[0][0], lses[1][0] = INF, INF
    lses[0][1], lses[1][1] = -INF, INF
    lses[0][2], lses[1][3] = INF, -INF
    lses[0][4], lses[1][4] = 80.0, -80.0
    for out, lse in zip(outs, lses, strict=True):
        out[torch.isinf(lse)] = float("nan")
    return [x.to(device) for pair in zip(outs, lses, strict=True) for x in pair]


def check_merge(d: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """merge_state against the oracle, over leading dimensions and with empty halves."""
    from flashmla.triton import split_kv

    out_a, lse_a, out_b, lse_b = _halves(24, d, dtype, device)
    shaped = [x.unflatten(0, (4, 6)) for x in (out_a, lse_a, out_b, lse_b)]
    out, lse = split_kv.merge_state(*shaped)

    assert out.shape == (4, 6, d) and out.dtype == dtype and lse.dtype == torch.float32
    halves = (to_numpy(x) for x in (out_a, lse_a, out_b, lse_b))
    want_out, want_lse = reference_split_kv.merge(*halves)
    assert_lse_close(lse.flatten(), want_lse)
    assert_out_close(out.flatten(0, 1), want_out)
    assert lse.flatten()[0] == INF and (out.flatten(0, 1)[0] == 0).all()


def check_combine(device: str = "cpu") -> None:
    """Requests of 1, 3, 1 and 2 splits: those of one are left alone, empty splits weigh nothing."""
    from flashmla.triton import split_kv

    s_q, h_q, d = 2, 3, 32
    num_splits = [0, 1, 4, 5, 7]
    g = torch.Generator().manual_seed(0)
    outs = torch.randn(9, s_q, h_q, d, generator=g)
    lses = torch.randn(9, h_q, s_q, generator=g) * 5
    lses[2, :, 0] = INF  # one of three splits empty for the first query
    lses[5:7, 1, 1] = INF  # all the splits of a row empty
    outs[2, 0], outs[5:7, 1, 1] = 0.0, 0.0
    outs[[0, 4, 7, 8]], lses[[0, 4, 7, 8]] = float("nan"), float("nan")  # slots nobody reads
    out = torch.full((4, s_q, h_q, d), 5.0, device=device)
    lse = torch.full((4, h_q, s_q), 5.0, device=device)
    prefix = torch.tensor(num_splits, dtype=torch.int32, device=device)
    split_kv.combine(outs.to(device), lses.to(device), prefix, out, lse)

    for request in (0, 2):
        assert (out[request] == 5.0).all() and (lse[request] == 5.0).all()
    for request in (1, 3):
        slots = slice(num_splits[request], num_splits[request + 1])
        want_out, want_lse = reference_split_kv.merge_many(
            list(outs[slots].numpy()), list(lses[slots].transpose(1, 2).numpy())
        )
        assert_lse_close(lse[request].transpose(0, 1), want_lse)
        assert_out_close(out[request], want_out)


def check_split_anywhere(device: str = "cpu") -> None:
    """Attention over two halves of the keys, merged, is attention over all of them."""
    from flashmla.triton import mha, split_kv

    case = PrefillCase("halves", ((40, 90),), h_q=2, h_kv=2, seed=41)
    x = case.build(device)
    results = []
    for begin, end in ((0, 33), (33, 90)):
        cu_seqlens_kv = torch.tensor([0, end - begin], dtype=torch.int32, device=device)
        results += mha.forward(
            x.q, x.k[begin:end], x.v[begin:end], x.cu_seqlens_qo, cu_seqlens_kv,
            x.max_seqlen_qo, end - begin, x.scale, False,
        )  # fmt: skip
    out, lse = split_kv.merge_state(*results)
    want_out, want_lse = reference_mha.attention(
        to_numpy(x.q), to_numpy(x.k), to_numpy(x.v), x.scale
    )
    assert_lse_close(lse, want_lse)
    assert_out_close(out, want_out)


def _keys_as_multiplied(x: DecodeInputs | SparseDecodeInputs) -> np.ndarray:
    """The tokens of an FP8 cache as matrix units get them on a card: code * scale in bfloat16.

    That is exact where scales are powers of two.
    """
    return reference_fp8.unpack(to_numpy(x.k_cache), np.float64).astype(ml_dtypes.bfloat16)


def _assert_near(out: torch.Tensor, want: np.ndarray) -> None:
    """Within what rounding the keys, and the output, may do."""
    assert np.linalg.norm(as_float64(out) - want) <= 2**-8 * np.linalg.norm(want)


def check_sparse_decode(case: SparseDecodeCase, device: str = "cpu") -> None:
    """One case of sparse decode."""
    from flashmla.triton import dsa

    x = case.build(device)
    arguments = (
        x.q, x.k_cache, x.indices, case.d_v, x.scale, case.fp8, x.attn_sink, x.topk_length
    )  # fmt: skip
    why_not = dsa.supports_sparse_decode(*arguments)
    assert why_not == "", why_not
    out, lse = dsa.sparse_decode(*arguments)
    assert out.dtype == case.dtype and lse.dtype == torch.float32
    want_out, want_lse = x.expected()
    if device != "cpu" and case.fp8 and not case.power_of_two:
        _assert_near(out, want_out)
        want_out, want_lse = reference_dsa.sparse_decode(
            to_numpy(x.q), _keys_as_multiplied(x), to_numpy(x.indices), case.d_v, x.scale,
            to_numpy(x.attn_sink), to_numpy(x.topk_length),
        )  # fmt: skip
    assert_lse_close(lse, want_lse)
    assert_out_close(out, want_out)


def check_dense_decode_fp8(case: DecodeCase, device: str = "cpu") -> None:
    """One case of dense decode over the FP8 cache."""
    from flashmla.triton import fp8, split_kv

    x = case.build(device)
    arguments = (
        x.q, x.k_cache, x.block_table, x.cache_seqlens, case.d_v,
        *split_kv.get_metadata(x.cache_seqlens, 9), x.scale, case.causal, x.attn_sink,
    )  # fmt: skip
    why_not = fp8.supports_dense_decode(*arguments)
    assert why_not == "", why_not
    out, lse = fp8.dense_decode(*arguments)
    assert out.dtype == case.dtype and lse.dtype == torch.float32
    want_out, want_lse = x.expected()
    if device != "cpu" and not case.power_of_two:
        _assert_near(out, want_out)
        want_out, want_lse = reference_paged_kv.paged_decode(
            to_numpy(x.q), _keys_as_multiplied(x), to_numpy(x.block_table),
            to_numpy(x.cache_seqlens), case.d_v, x.scale, case.causal, to_numpy(x.attn_sink),
        )  # fmt: skip
    assert_lse_close(lse, want_lse)
    assert_out_close(out, want_out)


def check_sparse_prefill(case: SparsePrefillCase, device: str = "cpu") -> None:
    """One case of sparse prefill."""
    from flashmla.triton import dsa

    x = case.build(device)
    arguments = x.q, x.kv, x.indices, x.scale, case.d_v, x.attn_sink, x.topk_length
    assert dsa.supports_sparse_prefill(*arguments) == ""
    out, max_logits, lse = dsa.sparse_prefill(*arguments)
    assert out.dtype == case.dtype and max_logits.dtype == lse.dtype == torch.float32
    want_out, want_max, want_lse = x.expected()
    assert_lse_close(max_logits, want_max, name="max_logits")
    assert_lse_close(lse, want_lse)
    assert_out_close(out, want_out)
    again, _, base_2 = dsa.sparse_prefill(*arguments, lse_base_2=True)
    assert torch.equal(again, out)
    assert_lse_close(base_2.double() * np.log(2.0), want_lse)  # the bound is in nats


def check_topk(n: int, k: int, lengths: bool, table: bool, device: str = "cpu") -> None:
    """Rows of which ties, NaN, infinities and denormals decide, some wider apart than they are
    long, with everything that wins behind their lengths."""
    from flashmla.triton import dsa

    g = torch.Generator().manual_seed(n + k)
    rows = 9
    logits = torch.randint(-3, 4, (rows, n), generator=g).float()
    for share, value in ((0.1, NAN), (0.1, -INF), (0.02, INF), (0.05, -0.0)):
        logits[torch.rand(rows, n, generator=g) < share] = value
    logits[0], logits[1], logits[2] = NAN, -INF, 1.0
    logits[3] = torch.randn(n, generator=g) * 1e-40
    logits[4] = torch.randn(n, generator=g)
    logits[5] = -torch.rand(n, generator=g)
    logits[6] = torch.arange(n).float()
    logits[7, :] = NAN
    logits[7, n // 2] = -1.5
    ends = torch.randint(0, n + 1, (rows,), generator=g).int()
    ends[4:7] = torch.tensor([k - 1, k, k + 1]).clamp(0, n)
    if lengths:
        logits.masked_fill_(torch.arange(n) >= ends.unsqueeze(1), INF)
    pages = torch.randint(0, 1000, (rows, -(-n // 16)), generator=g).int()
    if lengths:
        pages.masked_fill_(torch.arange(pages.shape[1]) * 16 >= ends.unsqueeze(1), WILD)
    wide = torch.full((rows, n + 3), INF)
    wide[:, 1 : n + 1] = logits
    limit, blocks = ends if lengths else None, pages if table else None
    got = dsa.topk(
        wide.to(device)[:, 1 : n + 1], k, None if limit is None else limit.to(device),
        None if blocks is None else blocks.to(device), 16,
    )  # fmt: skip
    want = reference_dsa.topk(to_numpy(logits), k, to_numpy(limit), to_numpy(blocks), 16)
    np.testing.assert_array_equal(got.cpu().numpy(), want)
