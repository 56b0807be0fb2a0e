"""Dense decode on a Hopper card: the CUDA tier against the oracle, poisoned, and bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import DECODE_CASES, DecodeCase, DecodeInputs, case_id, large_decode_cases
from decoding import (
    MAGNITUDES,
    assert_mean_of,
    decode,
    plan_for,
    poison_free_memory,
    values_of_magnitude,
)

import flashmla
from flashmla import backend
from flashmla.lab.check import assert_identical, assert_lse_close, assert_out_close

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
CASES = (*DECODE_CASES, *large_decode_cases())

REPEATS = 20


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_oracle(case: DecodeCase) -> None:
    inputs = case.build(DEVICE)
    results = []
    for batch_invariant in (False, True):
        poison_free_memory()
        results.append(decode(inputs, batch_invariant=batch_invariant))
    want_out, want_lse = inputs.expected()
    for out, lse in results:
        assert_out_close(out, want_out)
        assert_lse_close(lse, want_lse)


@pytest.mark.parametrize("name", ["h128_sq2_float16", "b32_varied", "b1_long", "gqa_2"])
def test_repeats_bit_for_bit(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    inputs = case.build(DEVICE)
    plan = plan_for(inputs)
    first_out, first_lse = decode(inputs, plan)
    for _ in range(REPEATS):
        poison_free_memory()
        out, lse = decode(inputs, plan)
        assert_identical("out", out, first_out)
        assert_identical("lse", lse, first_lse)


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 7, 9, 20, 66, 132])
def test_any_plan_gives_the_same_answer(parts: int) -> None:
    case = DecodeCase("plans", (0, 1, 64, 500, 3000), s_q=2, h_q=64, causal=True, seed=7)
    inputs = case.build(DEVICE)
    plan = backend.implementation("split_kv.get_metadata", DEVICE)(inputs.cache_seqlens, parts)
    out, lse = decode(inputs, plan)
    want_out, want_lse = inputs.expected()
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)


@pytest.mark.parametrize(("b", "h_q"), [(1, 8), (1, 128), (2, 128), (4, 128), (5, 128), (12, 128)])
def test_partial_results_of_few_rows_and_of_many(b: int, h_q: int) -> None:
    """A row's are merged by eight warps where rows are few, by four, two or one where not."""
    lengths = tuple(6000 - 450 * i for i in range(b))
    inputs = DecodeCase("merged", (*lengths, 0), h_q=h_q, sink=True, seed=11).build(DEVICE)
    plan = plan_for(inputs)
    assert plan[1][-1] > b + 1
    poison_free_memory()
    out, lse = decode(inputs, plan)
    want_out, want_lse = inputs.expected()
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)
    for _ in range(REPEATS):
        again_out, again_lse = decode(inputs, plan)
        assert_identical("out", again_out, out)
        assert_identical("lse", again_lse, lse)


@pytest.mark.parametrize("batch_invariant", [False, True], ids=["plain", "invariant"])
@pytest.mark.parametrize("h_q", [3, 64, 128])
@pytest.mark.parametrize("magnitudes", MAGNITUDES)
def test_partial_results_of_any_magnitude(magnitudes: str, h_q: int, batch_invariant: bool) -> None:
    """With zeros for queries each row is the mean of the values, to the bits that are kept."""
    lengths, pages = (5000, 2560), 80
    values = values_of_magnitude(magnitudes, len(lengths) * pages * 64)
    cache = torch.zeros(len(values), 576, dtype=torch.bfloat16)
    cache[:, :512] = values
    table = torch.arange(len(lengths) * pages, dtype=torch.int32).view(len(lengths), pages)
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    plan = flashmla.get_mla_metadata(seqlens, h_q, 1, batch_invariant=batch_invariant)
    assert plan[1][-1] > len(lengths), "nothing is split: the test shows nothing"
    with backend.use_backend("cuda"):
        out, lse = flashmla.flash_mla_with_kvcache(
            torch.zeros(len(lengths), 1, h_q, 576, dtype=torch.bfloat16, device=DEVICE),
            cache.view(-1, 64, 1, 576).to(DEVICE), table.to(DEVICE), seqlens, 512, *plan,
        )  # fmt: skip
    for request, length in enumerate(lengths):
        seen = values.view(len(lengths), -1, 512)[request, :length]
        assert_mean_of(seen, out[request])
        assert_lse_close(lse[request], np.full((h_q, 1), np.log(length)))


def test_a_chain_of_requests_cut_in_two() -> None:
    """Every block has the end of one request and the beginning of the next."""
    lengths = tuple(64 * 12 + 1 + 70 * i % 300 for i in range(40))
    inputs = DecodeCase("chain", lengths, s_q=3, h_q=40, causal=True, sink=True, seed=12).build(
        DEVICE
    )
    tiles = [-(-n // 64) for n in lengths]
    cuts = [(r, tiles[r] * (3 + r % 5) // 9) for r in range(len(lengths))]
    rows = [[*begin, *end, 1] for begin, end in zip(cuts, cuts[1:], strict=False)]
    rows = [[0, 0, *cuts[0], 0], *rows, [*cuts[-1], len(lengths), 0, 1]]
    metadata = torch.zeros(len(rows), 8, dtype=torch.int32)
    metadata[:, :5] = torch.tensor(rows)
    num_splits = torch.arange(0, 2 * len(lengths) + 1, 2, dtype=torch.int32)
    plan = metadata.to(DEVICE), num_splits.to(DEVICE)
    first_out, first_lse = decode(inputs, plan)
    want_out, want_lse = inputs.expected()
    assert_out_close(first_out, want_out)
    assert_lse_close(first_lse, want_lse)
    for _ in range(2 * REPEATS):
        poison_free_memory()
        out, lse = decode(inputs, plan)
        assert_identical("out", out, first_out)
        assert_identical("lse", lse, first_lse)


@pytest.mark.parametrize("b", [2, 5, 40])
def test_a_plan_of_longer_requests(b: int) -> None:
    """Parts whose share of a request has shrunk, to nothing at worst, still merge it rightly."""
    inputs = DecodeCase("shrinking", (1500,) * b, s_q=2, h_q=64, causal=True, seed=13).build(DEVICE)
    plan = plan_for(inputs)
    assert plan[1][-1] > b
    for shorter in ((1000, 0), (64, 900), (0, 1), (500, 700)):
        lengths = (shorter * b)[-b:]
        inputs.cache_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        poison_free_memory()
        out, lse = decode(inputs, plan)
        want_out, want_lse = inputs.expected()
        assert_out_close(out, want_out)
        assert_lse_close(lse, want_lse)


def test_plans_without_sense_end_and_spoil_nothing() -> None:
    inputs = DecodeCase("senseless", (1900,) * 6, h_q=64, seed=14).build(DEVICE)
    plan = plan_for(inputs)
    want_out, want_lse = decode(inputs, plan)
    generator = torch.Generator().manual_seed(15)
    for number in range(40):
        metadata = torch.randint(-1, 8, plan[0].shape, generator=generator, dtype=torch.int32)
        if number % 2:  # each part begins where the one before ends, though not further on
            cuts = torch.randint(0, 6, (len(metadata) + 1, 2), generator=generator).int()
            metadata[:, :2], metadata[:, 2:4], metadata[:, 5] = cuts[:-1], cuts[1:], 0
        splits = torch.randint(-3, 40, plan[1].shape, generator=generator, dtype=torch.int32)
        decode(inputs, (metadata.to(DEVICE), splits.to(DEVICE)))
    out, lse = decode(inputs, plan)
    assert_identical("out", out, want_out)
    assert_identical("lse", lse, want_lse)


@pytest.mark.parametrize("captured", [False, True])
def test_reads_what_the_kernel_before_has_written(captured: bool) -> None:
    """A call may begin while the kernel before it runs, but not read anything before that ends."""
    kinds = [DecodeCase("before", n, h_q=128, seed=16) for n in ((700, 5000), (4000, 65))]
    two = [kind.build(DEVICE) for kind in kinds]
    plans = [plan_for(inputs) for inputs in two]
    wants = [decode(inputs, plan) for inputs, plan in zip(two, plans, strict=True)]
    width = max(inputs.block_table.shape[1] for inputs in two)
    q, seqlens = two[0].q.clone(), two[0].cache_seqlens.clone()
    table = torch.zeros(2, width, dtype=torch.int32, device=DEVICE)
    cache = torch.cat([inputs.k_cache.contiguous() for inputs in two])
    plan = tuple(x.clone() for x in plans[0])
    case = kinds[0]
    inputs = DecodeInputs(case, q, cache, table, seqlens)
    wide = []
    for i, one in enumerate(two):
        padded = torch.zeros_like(table)
        padded[:, : one.block_table.shape[1]] = one.block_table + i * len(two[0].k_cache)
        wide.append(padded)

    def turn(i: int):
        q.copy_(two[i].q)
        seqlens.copy_(two[i].cache_seqlens)
        table.copy_(wide[i])
        plan[0].copy_(plans[i][0])
        plan[1].copy_(plans[i][1])
        return decode(inputs, plan)

    def turns():
        return [turn(n % 2) for n in range(20)]

    if captured:
        turns()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = turns()
        for _ in range(3):
            graph.replay()
    else:
        results = turns()
    torch.cuda.synchronize()
    for n, (out, lse) in enumerate(results):
        assert_identical(f"out of turn {n}", out, wants[n % 2][0])
        assert_identical(f"lse of turn {n}", lse, wants[n % 2][1])


def test_empty_plan_is_filled_in_and_reused() -> None:
    inputs = DecodeCase("planless", h_q=128, seed=3).build(DEVICE)
    plan, none = flashmla.get_mla_metadata()
    assert none is None
    want_out, want_lse = decode(inputs)
    for _ in range(2):
        out, lse = decode(inputs, (plan, None))
        assert_identical("out", out, want_out)
        assert_identical("lse", lse, want_lse)


def test_on_a_side_stream() -> None:
    inputs = DecodeCase("stream", (500, 0, 64), h_q=128, seed=4).build(DEVICE)
    want_out, want_lse = decode(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # were the call on another stream, it would be done by now
        q = inputs.q.clone()
        late = DecodeInputs(
            inputs.case, q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens
        )
        q.mul_(0).add_(inputs.q)
        out, lse = decode(late)
    stream.synchronize()
    assert_identical("out", out, want_out)
    assert_identical("lse", lse, want_lse)


def test_graph_replays_with_other_lengths() -> None:
    long = DecodeCase("graph", (700, 64, 1, 0, 1900), s_q=2, h_q=128, causal=True, seed=5)
    inputs = long.build(DEVICE)
    plan = plan_for(inputs)
    seqlens = inputs.cache_seqlens.clone()
    decode(inputs, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = long.s_q * long.h_q
        flashmla.get_mla_metadata(inputs.cache_seqlens, rows, 1, out=plan)
        out, lse = decode(inputs, plan)
    for shorter_by in (0, 1, 65, 400):
        # In place, as a server does: the graph holds the addresses.
        inputs.cache_seqlens.copy_(torch.clamp(seqlens - shorter_by, min=0))
        graph.replay()
        want_out, want_lse = inputs.expected()
        assert_out_close(out, want_out)
        assert_lse_close(lse, want_lse)


def test_wild_block_numbers_read_nothing_outside() -> None:
    """Out of range within the length is the caller's mistake: no fault, and others are right."""
    inputs = DecodeCase("wild", (300, 300), h_q=16, strided=False, seed=6).build(DEVICE)
    want_out, want_lse = decode(inputs)
    inputs.block_table[0, 1] = 2147480000
    inputs.block_table[0, 2] = -5
    out, lse = decode(inputs)
    torch.cuda.synchronize()
    assert_identical("out of the sound request", out[1], want_out[1])
    assert_identical("lse of the sound request", lse[1], want_lse[1])


def test_a_plan_of_other_requests_touches_nothing_outside() -> None:
    """Metadata of 40 requests with the splits of 2: wrong results, and no fault."""
    inputs = DecodeCase("two", (300, 900), h_q=128, seed=6).build(DEVICE)
    many = torch.full((40,), 5000, dtype=torch.int32, device=DEVICE)
    want_out, want_lse = decode(inputs)
    metadata, _ = flashmla.get_mla_metadata(many, 128, 1)
    _, num_splits = plan_for(inputs)
    for plan in (metadata, -metadata, torch.full_like(metadata, 1), metadata.flip(0)):
        decode(inputs, (plan.contiguous(), num_splits))
    decode(inputs, (metadata, torch.tensor([0, 1 << 30, -7], dtype=torch.int32, device=DEVICE)))
    torch.cuda.synchronize()
    out, lse = decode(inputs)
    assert_identical("out", out, want_out)
    assert_identical("lse", lse, want_lse)


def test_a_length_beyond_the_block_table_ends_with_the_table() -> None:
    inputs = DecodeCase("full", (256, 192), h_q=16, strided=False, seed=6).build(DEVICE)
    inputs.block_table = inputs.block_table[:, :3].contiguous()
    inputs.cache_seqlens = torch.tensor([192, 192], dtype=torch.int32, device=DEVICE)
    want_out, want_lse = decode(inputs)
    plan = plan_for(inputs)
    inputs.cache_seqlens = torch.tensor([2**31 - 1, 193], dtype=torch.int32, device=DEVICE)
    for made in (plan, plan_for(inputs)):
        out, lse = decode(inputs, made)
        assert_out_close(out, want_out.double().cpu())
        assert_lse_close(lse, want_lse.double().cpu())


def test_empty_requests_between_short_ones() -> None:
    """Parts that meet requests with no tile, one tile and two in turn, again and again."""
    lengths = tuple((0, 1, 0, 0, 65, 0, 128)[i % 7] for i in range(700))
    inputs = DecodeCase("gaps", lengths, h_q=128, seed=9).build(DEVICE)
    want_out, want_lse = inputs.expected()
    for _ in range(REPEATS):
        poison_free_memory()
        out, lse = decode(inputs)
        assert_lse_close(lse, want_lse)
    assert_out_close(out, want_out)


def test_a_query_shared_by_all_requests() -> None:
    inputs = DecodeCase("shared_q", (70, 70), h_q=16, strided=False, seed=2).build(DEVICE)
    inputs.q = inputs.q[:1].expand(2, -1, -1, -1)
    out, lse = decode(inputs)
    want_out, want_lse = inputs.expected()
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)


@pytest.mark.parametrize("what", ["no pages", "one page for all"])
def test_caches_that_the_kernel_leaves_to_triton(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLASHMLA_REQUIRE_TIER", raising=False)  # stepping down is the point here
    inputs = DecodeCase("odd_cache", (0, 0), h_q=16, strided=False).build(DEVICE)
    k_cache = inputs.k_cache[:0] if what == "no pages" else inputs.k_cache[:1].expand(4, -1, -1, -1)
    plan = plan_for(inputs)
    out, lse = flashmla.flash_mla_with_kvcache(
        inputs.q, k_cache, inputs.block_table, inputs.cache_seqlens, 512, *plan
    )
    assert backend.last_tier("mla.dense_decode") == "triton"
    assert (out == 0).all() and torch.isposinf(lse).all()


def test_record_says_cuda() -> None:
    before = backend.calls.get("mla.dense_decode", {}).get("cuda", 0)
    decode(DecodeCase("record", (64,), h_q=16).build(DEVICE))
    assert backend.calls["mla.dense_decode"]["cuda"] == before + 1


def test_error_is_that_of_bf16_arithmetic() -> None:
    """The kernel is no further from float64 than plain torch attention in the same dtype, twice."""
    inputs = DecodeCase("error", (4096,), h_q=128, strided=False, seed=8).build(DEVICE)
    out, _ = decode(inputs)
    pages = inputs.block_table[0, : 4096 // 64].long()
    k = inputs.k_cache[pages].reshape(4096, 576)
    scores = (inputs.q[0, 0] @ k.T) * inputs.scale
    plain = torch.softmax(scores.float(), -1).to(k.dtype) @ k[:, :512]
    want = torch.as_tensor(inputs.expected()[0][0, 0])

    def error(x: torch.Tensor) -> float:
        return float(np.linalg.norm(x.double().cpu() - want) / np.linalg.norm(want))

    assert error(out[0, 0]) <= 2 * error(plain)
