"""Sparse decode on a Hopper card: the CUDA tier against the oracle, poisoned, and bit for bit."""

from __future__ import annotations

import functools
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from cases import SPARSE_DECODE_CASES, SparseDecodeCase, SparseDecodeInputs, case_id, to_numpy
from decoding import (
    MAGNITUDES,
    assert_at_once_as_alone,
    assert_mean_of,
    values_of_magnitude,
)

import flashmla
from flashmla import backend
from flashmla.cuda import sparse
from flashmla.lab.check import assert_identical, assert_lse_close, assert_out_close
from flashmla.reference import dsa, fp8

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
REPEATS = 20
Case = SparseDecodeCase
HEADS = tuple(
    Case(f"h{h_q}_sq{s_q}", 3, s_q, h_q, 200 + h_q, 20, power_of_two=h_q % 2 == 0, seed=h_q)
    for h_q in (1, 2, 7, 8, 16, 24, 32, 48, 63, 64, 65, 96, 127, 128)
    for s_q in (1, 2)
)
LARGE = (
    Case("many_queries", 150, 2, 128, 129, 30, seed=40),
    Case("many_lengths", 100, 2, 16, 200, 30, topk_length=tuple(i * 37 % 201 for i in range(100)),
         seed=41),
    Case("few_queries", 2, 2, 128, 2048, 64, sink=True, seed=42),
    Case("few_queries_lengths_each", 2, 2, 40, 2048, 64, topk_length=((1, 2048), (0, 700)),
         sink=True, seed=43),
    Case("one_query", 1, 1, 128, 8192, 200, invalid=0.0, seed=44),
    Case("pages_of_one", 2, 3, 1, 130, 600, page=1, seed=45),
    Case("pages_of_1000", 2, 1, 16, 130, 2, page=1000, seed=46),
    Case("one_short_of_a_tile", 3, 1, 64, 63, 4, invalid=0.0, seed=47),
    Case("one_more_than_a_tile", 3, 1, 64, 65, 4, invalid=0.0, seed=48),
    Case("bf16_cache_large", 3, 2, 128, 1000, 64, fp8=False, seed=49),
    Case("bf16_cache_few", 1, 1, 16, 4096, 64, fp8=False, sink=True, seed=50),
    Case("fp16_large", 2, 1, 100, 1500, 64, fp8=False, dtype=torch.float16, sink=True, seed=51),
)  # fmt: skip
FEW_HEADS = tuple(
    Case(f"few_heads_{i}", *sizes, power_of_two=i % 2 == 1, seed=60 + i, **more)
    for i, (sizes, more) in enumerate((
        ((8, 1, 16, 2048, 100), {"sink": True}),
        ((2, 2, 32, 2048, 64), {"topk_length": ((1, 2048), (0, 700)), "sink": True}),
        ((150, 2, 16, 300, 30), {}),
        ((1, 1, 17, 8192, 200), {"invalid": 0.0}),
        ((3, 1, 16, 600, 30), {"page": 48}),
        ((100, 1, 32, 200, 30), {"topk_length": tuple(i * 37 % 201 for i in range(100))}),
    ))
)  # fmt: skip
CASES = (*SPARSE_DECODE_CASES, *HEADS, *LARGE, *FEW_HEADS)
FEW_ROWS = 32
"""Heads up to which lists that are not split multiply codes as they are, and nothing is rounded."""


def decode(x: SparseDecodeInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The public call, served by CUDA or not at all."""
    with backend.use_backend("cuda"):
        return flashmla.flash_mla_with_kvcache(
            x.q, x.k_cache, None, None, x.case.d_v, None, softmax_scale=x.scale,
            is_fp8_kvcache=x.case.fp8, indices=x.indices, attn_sink=x.attn_sink,
            topk_length=x.topk_length,
        )  # fmt: skip


def poison_free_memory() -> None:
    """Fills what the allocator will hand out next with NaN: an unwritten output is then seen."""
    torch.full((1 << 28,), float("nan"), device=DEVICE)
    torch.cuda.synchronize()


def named(name: str) -> SparseDecodeCase:
    return next(case for case in CASES if case.name == name)


def as_multiplied(x: SparseDecodeInputs) -> tuple[np.ndarray, np.ndarray]:
    """The oracle's answer over keys rounded to bfloat16, which is what the tensor cores get.

    A code times a power of two needs no rounding; with any other scale the keys do.
    """
    keys = fp8.unpack(to_numpy(x.k_cache), np.float64).astype(ml_dtypes.bfloat16)
    return dsa.sparse_decode(
        to_numpy(x.q), keys, to_numpy(x.indices), x.case.d_v, x.scale, to_numpy(x.attn_sink),
        to_numpy(x.topk_length),
    )  # fmt: skip


def multiplies_codes(case: SparseDecodeCase) -> bool:
    sms = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    splits = sparse.splits_for(case.b * case.s_q, case.h_q, case.topk, sms)
    return case.h_q <= FEW_ROWS and splits == 1


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_oracle(case: SparseDecodeCase) -> None:
    x = case.build(DEVICE)
    poison_free_memory()
    out, lse = decode(x)
    want_out, want_lse = x.expected()
    if case.fp8 and not case.power_of_two:
        error = np.linalg.norm(out.double().cpu().numpy() - want_out)
        assert error <= 2**-8 * np.linalg.norm(want_out)  # the keys' rounding, and the output's
        if not multiplies_codes(case):
            want_out, want_lse = as_multiplied(x)
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)


@pytest.mark.parametrize(
    "name",
    [
        "h128_sq2", "few_queries", "many_queries", "bf16_cache_large", "few_heads_0",
        "few_heads_2", "few_heads_5",
    ],
)  # fmt: skip
def test_repeats_bit_for_bit(name: str) -> None:
    x = named(name).build(DEVICE)
    first_out, first_lse = decode(x)
    for _ in range(REPEATS):
        poison_free_memory()
        out, lse = decode(x)
        assert_identical("out", out, first_out)
        assert_identical("lse", lse, first_lse)


@pytest.mark.parametrize("splits", [1, 2, 4, 5, 8, 16, 33])
@pytest.mark.parametrize(
    "name", ["few_queries_lengths_each", "h96_sq2", "fp8_length_each", "few_heads_1"]
)
def test_any_number_of_splits_gives_the_same_answer(
    name: str, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "splits_for", lambda *_: splits)
    x = named(name).build(DEVICE)
    poison_free_memory()
    out, lse = decode(x)
    want_out, want_lse = x.expected()
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)


def constant_queries(
    values: torch.Tensor, fp8_cache: bool, h_q: int, q: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [1, 2, h_q, 512], lse) over all of values, [tokens, 512], in any order: with q zero, or
    no matter for the scores, each row of out is their mean.

    Over an FP8 cache values are codes of 1 to 2 times one scale for each 128 columns.
    """
    tokens = values.shape[0]
    g = torch.Generator().manual_seed(1)
    indices = torch.stack([torch.randperm(tokens, generator=g) for _ in range(2)])
    if fp8_cache:
        of_group = values[0].view(4, 128)[:, 0]
        scale = torch.where(of_group > 0, 2.0 ** of_group.log2().floor(), 1.0)
        codes = (values.view(tokens, 4, 128) / scale[:, None]).to(torch.float8_e4m3fn)
        cache = torch.zeros(tokens, 656, dtype=torch.uint8)
        cache[:, :512] = codes.view(tokens, 512).view(torch.uint8)
        cache[:, 512:528] = scale.expand(tokens, 4).contiguous().view(torch.uint8)
    else:
        cache = torch.zeros(tokens, 576, dtype=torch.bfloat16)
        cache[:, :512] = values
    if q is None:
        q = torch.zeros(576)
    q = q.bfloat16().expand(1, 2, h_q, 576).contiguous()
    with backend.use_backend("cuda"):
        return flashmla.flash_mla_with_kvcache(
            q.to(DEVICE), cache.view(-1, 64, 1, cache.shape[-1]).to(DEVICE), None, None, 512, None,
            is_fp8_kvcache=fp8_cache, indices=indices[None].int().to(DEVICE),
        )  # fmt: skip


@pytest.mark.parametrize("splits", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("h_q", [16, 100])
@pytest.mark.parametrize("fp8_cache", [True, False])
@pytest.mark.parametrize("magnitudes", MAGNITUDES)
def test_partial_results_of_any_magnitude(
    magnitudes: str, fp8_cache: bool, h_q: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean of positive values, whose partial results keep 11 bits of each, comes out right."""
    monkeypatch.setattr(sparse, "splits_for", lambda *_: splits)
    values = values_of_magnitude(magnitudes, 64 * 40)
    out, lse = constant_queries(values, fp8_cache, h_q)
    assert_mean_of(values, out)
    torch.testing.assert_close(
        lse.cpu(), torch.full_like(lse.cpu(), float(np.log(len(values)))), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("splits", [1, 2, 16])
@pytest.mark.parametrize("h_q", [64, 100])
def test_infinities_and_nan_stay_where_they_are(
    h_q: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An infinity in a split list neither spreads to other columns nor takes their unit away."""
    monkeypatch.setattr(sparse, "splits_for", lambda *_: splits)
    values = torch.full((64 * 40, 512), 1e5).bfloat16().float()
    values[:, 5:400:7] = 3e38  # each of them finite, and their sum too large for float32
    values[:, 300] = 1e-3
    values[:, 511] = 1.0
    values[77, 511] = float("inf")  # its score is -inf: 0 times inf
    q = torch.zeros(576)
    q[511] = -1.0
    out, _ = constant_queries(values, False, h_q, q)
    want = values.bfloat16()[0].clone()
    want[5:400:7] = float("inf")
    want[511] = float("nan")
    torch.testing.assert_close(out.cpu(), want.expand_as(out), atol=0, rtol=0, equal_nan=True)


@pytest.mark.parametrize("splits", [1, 2, 16])
def test_a_nan_among_the_keys_is_seen(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "splits_for", lambda *_: splits)
    values = torch.ones(64 * 40, 512)
    values[99, 3] = float("nan")
    out, lse = constant_queries(values, False, 64)
    assert out.isnan().all() and lse.isnan().all()


def test_scales_are_not_rounded_to_bfloat16() -> None:
    """With a scale of 1 + 2^-9, which bfloat16 has not, on keys of one value: V comes out right.

    The output of a query is then that one value times the scale, rounded once. Rounding the scale
    first gives a neighbour.
    """
    x = replace(named("fp8_all_valid"), h_q=64).build(DEVICE)
    cache = torch.zeros_like(x.k_cache)
    code = torch.tensor(1.75).to(torch.float8_e4m3fn).view(torch.uint8)
    cache[..., :512] = code.item()
    scale = torch.tensor([1 + 3 * 2.0**-9] * 4)
    cache[..., 512:528] = scale.view(torch.uint8).to(DEVICE)
    x.k_cache = cache
    out, _ = decode(x)
    assert_identical("out", out, torch.full_like(out, 1.75 * (1 + 3 * 2.0**-9)))


def test_pages_may_lie_apart() -> None:
    x = named("fp8").build(DEVICE)
    want_out, want_lse = decode(x)
    blocks, page, _, width = x.k_cache.shape
    apart = torch.full((blocks, page + 3, 1, width), 255, dtype=torch.uint8, device=DEVICE)
    apart[:, :page] = x.k_cache
    x.k_cache = apart[:, :page]
    out, lse = decode(x)
    assert_identical("out", out, want_out)
    assert_identical("lse", lse, want_lse)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_a_cache_of_any_byte_type(dtype: torch.dtype) -> None:
    x = named("fp8").build(DEVICE)
    want_out, _ = decode(x)
    x.k_cache = x.k_cache.view(dtype)
    assert_identical("out", decode(x)[0], want_out)


def test_an_index_given_twice_counts_twice() -> None:
    x = replace(named("fp8_all_valid"), topk=70).build(DEVICE)
    x.indices[..., 35:] = x.indices[..., :35]
    out, lse = decode(x)
    x.indices = x.indices[..., :35].contiguous()
    want_out, want_lse = x.expected()
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse + np.log(2.0))


def test_more_queries_than_a_grid_dimension() -> None:
    """70,000 query tokens: the same few over and over."""
    x = Case("rows", 70, 1, 8, 65, seed=60).build(DEVICE)
    want_out, want_lse = decode(x)
    x.q, x.indices = x.q.repeat(1000, 1, 1, 1), x.indices.repeat(1000, 1, 1)
    out, lse = decode(x)
    torch.testing.assert_close(out, want_out.repeat(1000, 1, 1, 1), atol=8e-4, rtol=2.01 / 128)
    torch.testing.assert_close(lse, want_lse.repeat(1000, 1, 1), atol=1e-6, rtol=1e-4)


def test_a_cache_of_more_than_4_gib() -> None:
    tokens = (5 << 30) // 656
    cache = torch.full((tokens // 64, 64, 1, 656), 255, dtype=torch.uint8, device=DEVICE)
    x = Case("over_4_gib", topk=64, blocks=6, seed=61).build(DEVICE)
    small = x.k_cache
    cache[-6:] = small
    want_out, _ = decode(x)
    valid = (x.indices >= 0) & (x.indices < 6 * 64)
    shifted = x.indices + (cache.shape[0] - 6) * 64
    x.indices = torch.where(valid, shifted, torch.full_like(shifted, -1))
    x.k_cache = cache
    assert_identical("out", decode(x)[0], want_out)


def test_graph_replays_with_other_indices() -> None:
    x = named("few_queries").build(DEVICE)
    indices = x.indices.clone()
    decode(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = decode(x)
    for shift in (0, 7, 100):
        x.indices.copy_(indices.roll(shift, -1).masked_fill_(indices % 11 == shift % 11, -1))
        graph.replay()
        want_out, want_lse = x.expected()
        assert_out_close(out, want_out)
        assert_lse_close(lse, want_lse)


def test_a_call_waits_for_the_copies_before_it() -> None:
    """Between calls that may begin early, other lists and other queries are copied in."""
    x = named("few_queries").build(DEVICE)
    given = [
        (x.q.roll(i, 2), x.indices.masked_fill(x.indices % 7 == i, -1)) for i in range(6)
    ]  # fmt: skip
    want = []
    for q, indices in given:
        x.q, x.indices = q, indices
        want.append(decode(x))
    x.q, x.indices = x.q.clone(), x.indices.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = []
        for q, indices in given:
            x.q.copy_(q)
            x.indices.copy_(indices)
            results.append(decode(x))
    for _ in range(REPEATS):
        graph.replay()
    for (out, lse), (want_out, want_lse) in zip(results, want, strict=True):
        assert_identical("out", out, want_out)
        assert_identical("lse", lse, want_lse)


def test_split_lists_of_several_calls_at_once() -> None:
    """The CTAs of a call meet, and those of two graphs and of eager calls do not mix."""
    sizes = ((2, 2, 128), (8, 1, 16), (3, 1, 64))
    problems = [
        Case(f"at_once_{i}", *size, 2048, 64, seed=70 + i).build(DEVICE)
        for i, size in enumerate(sizes)
    ]
    assert_at_once_as_alone(*(functools.partial(decode, x) for x in problems))


def test_a_query_that_is_a_strided_view() -> None:
    x = named("fp8").build(DEVICE)
    want_out, _ = decode(x)
    wide = torch.full((*x.q.shape[:-1], 600), float("nan"), dtype=x.q.dtype, device=DEVICE)
    q = x.q
    for first in (0, 1):  # the second lies where 16 bytes can't be read at once
        x.q = wide[..., first : first + 576].copy_(q)
        assert_identical("out", decode(x)[0], want_out)


def test_error_with_any_scale_is_that_of_bf16_arithmetic() -> None:
    """No further from float64 than plain torch attention over bfloat16 keys, twice."""
    x = Case("any_scale", 1, 1, 128, 2048, 64, power_of_two=False, invalid=0.0, seed=62).build()
    keys = torch.from_numpy(fp8.unpack(to_numpy(x.k_cache.view(-1, 656)), np.float64))
    chosen = keys[x.indices[0, 0].long()].bfloat16()
    scores = (x.q[0, 0] @ chosen.T).float() * x.scale
    plain = torch.softmax(scores, -1).bfloat16() @ chosen[:, :512]
    want = torch.as_tensor(x.expected()[0][0, 0])
    out, _ = decode(x.case.build(DEVICE))

    def error(got: torch.Tensor) -> float:
        return float((got.double().cpu() - want).norm() / want.norm())

    assert error(out[0, 0]) <= 2 * error(plain)
