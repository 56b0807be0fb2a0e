"""Dense prefill on a Hopper card: the CUDA tier against the oracle, poisoned, and bit for bit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cases import PREFILL_CASES, PrefillCase, PrefillInputs, case_id

import flashmla
from flashmla import backend
from flashmla.cuda import mha
from flashmla.lab.check import (
    assert_gradient_close,
    assert_identical,
    assert_lse_close,
    assert_out_close,
)

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
HALF = torch.float16
MIXED = ((1000, 1000), (0, 70), (191, 300), (64, 64), (700, 1500), (192, 192), (193, 385), (5, 0))
LARGE = (
    PrefillCase("mixed", MIXED, h_q=4, h_kv=4, seed=100),
    PrefillCase("mixed_causal", MIXED, h_q=4, h_kv=4, causal=True, seed=101),
    PrefillCase("mixed_128_fp16", MIXED, h_q=4, h_kv=4, d_qk=128, dtype=HALF, seed=102),
    PrefillCase("mixed_128_causal", MIXED, h_q=8, h_kv=2, d_qk=128, causal=True, seed=103),
    PrefillCase("mixed_fp16_mqa", MIXED, h_q=5, h_kv=1, causal=True, dtype=HALF, seed=104),
    PrefillCase("more_queries", ((900, 100), (300, 1)), causal=True, seed=105),
    PrefillCase("more_queries_full", ((900, 100), (300, 1)), seed=106),
    PrefillCase("sharp", ((400, 400),), softmax_scale=0.5, causal=True, seed=107),
    PrefillCase(
        "many",
        tuple((i * 37 % 400, i * 53 % 500) for i in range(60)),
        h_q=2,
        h_kv=1,
        causal=True,
        seed=108,
    ),
    PrefillCase(
        "more_than_threads",
        tuple((i % 3, i % 5) for i in range(2500)),
        h_q=2,
        h_kv=2,
        causal=True,
        seed=109,
    ),
    PrefillCase("more_blocks_than_sms", ((1500, 1500),), h_q=40, h_kv=40, causal=True, seed=110),
    PrefillCase("heads_in_sets", ((64, 9000),), h_q=24, h_kv=8, seed=111),
)
# Rows that end in either half of a tile of 128 keys, and keys that do.
ENDS = tuple((s, s + more) for s in (1, 63, 65, 128, 191, 193, 256, 321) for more in (0, 64, 129))
HALVES = tuple(
    PrefillCase(f"halves_{d_qk}_{causal}", ENDS, 2, 2, d_qk, causal=causal, seed=112)
    for d_qk in (192, 128)
    for causal in (True, False)
)
CASES = (*PREFILL_CASES, *LARGE, *HALVES)
REPEATS = 20


def attend(x: PrefillInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The public call, served by CUDA or not at all."""
    with backend.use_backend("cuda"):
        return flashmla.flash_attn_varlen_func(
            x.q,
            x.k,
            x.v,
            x.cu_seqlens_qo,
            x.cu_seqlens_kv,
            x.max_seqlen_qo,
            x.max_seqlen_kv,
            softmax_scale=x.scale,
            causal=x.case.causal,
        )


def assert_right(x: PrefillInputs, out: torch.Tensor, lse: torch.Tensor) -> None:
    want_out, want_lse = x.expected()
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)


def poison_free_memory() -> None:
    """Fills what the allocator will hand out next with NaN: an unwritten output is then seen."""
    torch.full((1 << 28,), float("nan"), device=DEVICE)
    torch.cuda.synchronize()


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_against_oracle(case: PrefillCase) -> None:
    x = case.build(DEVICE)
    poison_free_memory()
    assert_right(x, *attend(x))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d_qk", [192, 128])
def test_what_lies_behind_a_sequence_is_not_read(d_qk: int, causal: bool) -> None:
    """Every second sequence is NaN, and has keys that nobody asks for."""
    sequences = tuple(pair for s in (1, 63, 64, 65, 129, 200, 320) for pair in ((s, s), (0, 130)))
    x = PrefillCase("poison", sequences, 2, 2, d_qk, causal=causal, seed=5).build(DEVICE)
    want = x.expected()
    ends = x.cu_seqlens_kv.tolist()
    for i in range(1, len(sequences), 2):
        x.k[ends[i] : ends[i + 1]] = float("nan")
        x.v[ends[i] : ends[i + 1]] = float("nan")
    out, lse = attend(x)
    assert_out_close(out, want[0])
    assert_lse_close(lse, want[1])


@pytest.mark.parametrize("name", ["mixed_causal", "many", "more_blocks_than_sms"])
def test_repeats_bit_for_bit(name: str) -> None:
    x = next(c for c in LARGE if c.name == name).build(DEVICE)
    first_out, first_lse = attend(x)
    for _ in range(REPEATS):
        poison_free_memory()
        out, lse = attend(x)
        assert_identical("out", out, first_out)
        assert_identical("lse", lse, first_lse)


def test_a_sequence_does_not_notice_its_neighbours() -> None:
    """The same bits whether a sequence is alone in the call or among others."""
    x = PrefillCase("among", ((300, 500), (700, 700), (64, 64)), causal=True, seed=6).build(DEVICE)
    out, lse = attend(x)
    alone = replace(
        x,
        q=x.q[300:1000],
        k=x.k[500:1200],
        v=x.v[500:1200],
        cu_seqlens_qo=x.cu_seqlens_qo[1:3] - 300,
        cu_seqlens_kv=x.cu_seqlens_kv[1:3] - 500,
    )
    alone_out, alone_lse = attend(alone)
    assert_identical("out", alone_out, out[300:1000])
    assert_identical("lse", alone_lse, lse[300:1000])


@pytest.mark.parametrize("d_qk", [192, 128])
def test_packed_views_are_not_copied(d_qk: int) -> None:
    sequences = ((300, 300), (77, 77))
    x = PrefillCase("packed", sequences, 3, 3, d_qk, causal=True, seed=8).build(DEVICE)
    qkv = torch.cat([x.q, x.k, x.v], -1)
    views = qkv.split([d_qk, d_qk, 128], -1)
    assert all(mha._fetchable(view) is view for view in views)
    with backend.use_backend("cuda"):
        out, lse = flashmla.flash_attn_varlen_qkvpacked_func(
            qkv, x.cu_seqlens_qo, 300, d_qk, causal=True
        )
        out_kv, lse_kv = flashmla.flash_attn_varlen_kvpacked_func(
            x.q, qkv[..., d_qk:], x.cu_seqlens_qo, x.cu_seqlens_kv, 300, 300, d_qk, causal=True
        )
    assert_right(x, out, lse)
    assert_identical("out of the kv-packed form", out_kv, out)
    assert_identical("lse of the kv-packed form", lse_kv, lse)


def test_strides_that_the_copy_engine_does_not_take() -> None:
    x = PrefillCase("odd", ((100, 100),), 2, 2, causal=True, seed=9).build(DEVICE)
    wide = torch.zeros(100, 2, 193, dtype=x.q.dtype, device=DEVICE)
    wide[..., 1:] = x.q
    x.q = wide[..., 1:]
    x.k = x.k[:, :1].expand(-1, 2, -1)
    x.v = x.v.transpose(0, 1).contiguous().transpose(0, 1)
    assert_right(x, *attend(x))


def test_a_chunk_and_its_prefix_merge_into_the_whole() -> None:
    """Chunked prefill: the new tokens see the cached prefix whole and themselves causally."""
    prefix, chunk = 517, 300
    x = PrefillCase("chunk", ((chunk, prefix + chunk),), causal=True, seed=10).build(DEVICE)
    starts = torch.zeros(1, dtype=torch.int32, device=DEVICE)

    def call(first: int, last: int, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
        ends = [torch.cat([starts, starts + n]) for n in (chunk, last - first)]
        k, v = x.k[first:last], x.v[first:last]
        return flashmla.flash_attn_varlen_func(x.q, k, v, *ends, chunk, chunk, causal=causal)

    with backend.use_backend("cuda"):
        before = call(0, prefix, False)
        own = call(prefix, prefix + chunk, True)
        merged = flashmla.merge_state(*before, *own)
        nothing = call(0, 0, False)
        same = flashmla.merge_state(*nothing, *own)
    want_out, want_lse = x.expected()
    assert_lse_close(merged[1], want_lse)
    difference = np.abs(merged[0].double().cpu().numpy() - want_out)
    assert (difference <= 2 * 2.0**-9 * np.abs(want_out).max()).all()
    assert_identical("a chunk with an empty prefix", same[0], own[0])


def test_in_a_graph_with_other_lengths() -> None:
    """The plan is made on the device: a replay reads the lengths of its day."""
    x = PrefillCase("graph", ((200, 200), (300, 300)), causal=True, seed=11).build(DEVICE)
    attend(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attend(x)
    for middle in (200, 1, 499, 0):
        for cu_seqlens in (x.cu_seqlens_qo, x.cu_seqlens_kv):
            cu_seqlens.copy_(torch.tensor([0, middle, 500], dtype=torch.int32))
        graph.replay()
        assert_right(x, out, lse)


def test_prefix_sums_that_lie_touch_nothing_outside() -> None:
    x = PrefillCase("lie", ((200, 200), (300, 300)), causal=True, seed=12).build(DEVICE)
    want = attend(x)
    for lie in ([0, 1 << 30, 500], [-7, 3, 9], [500, 200, 0], [0, 0, 2**31 - 1]):
        sums = torch.tensor(lie, dtype=torch.int32, device=DEVICE)
        attend(replace(x, cu_seqlens_qo=sums))
        attend(replace(x, cu_seqlens_kv=sums))
        attend(replace(x, cu_seqlens_qo=sums, cu_seqlens_kv=sums))
    torch.cuda.synchronize()
    out, lse = attend(x)
    assert_identical("out", out, want[0])
    assert_identical("lse", lse, want[1])


def test_on_a_side_stream() -> None:
    x = PrefillCase("stream", ((500, 500),), causal=True, seed=13).build(DEVICE)
    want_out, want_lse = attend(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # were the call on another stream, it would be done by now
        q = x.q.clone()
        late = replace(x, q=q)
        q.mul_(0).add_(x.q)
        out, lse = attend(late)
    stream.synchronize()
    assert_identical("out", out, want_out)
    assert_identical("lse", lse, want_lse)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d_qk", [192, 128])
def test_error_is_that_of_bf16_arithmetic(d_qk: int, causal: bool) -> None:
    """The kernel is no further from float64 than plain torch attention in the same dtype, twice."""
    x = PrefillCase("error", ((2048, 2048),), 2, 2, d_qk, causal=causal, seed=14).build(DEVICE)
    out, _ = attend(x)
    q, k, v = (t.transpose(0, 1) for t in (x.q, x.k, x.v))
    scores = (q @ k.mT) * x.scale
    if causal:
        hidden = torch.ones(2048, 2048, dtype=torch.bool, device=DEVICE).triu(1)
        scores = scores.masked_fill(hidden, float("-inf"))
    plain = (torch.softmax(scores.float(), -1).to(v.dtype) @ v).transpose(0, 1)
    want = x.expected()[0]

    def error(y: torch.Tensor) -> float:
        return float(np.linalg.norm(y.double().cpu().numpy() - want) / np.linalg.norm(want))

    assert error(out) <= 2 * error(plain)


def test_a_scale_that_the_kernel_leaves_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLASHMLA_REQUIRE_TIER", raising=False)  # stepping down is the point here
    x = PrefillCase("negative", ((70, 70),), softmax_scale=-0.1, seed=15).build(DEVICE)
    out, lse = flashmla.flash_attn_varlen_func(
        x.q, x.k, x.v, x.cu_seqlens_qo, x.cu_seqlens_kv, 70, 70, softmax_scale=-0.1
    )
    assert backend.last_tier("mha.forward") == "triton"
    assert_right(x, out, lse)


# --- backward ---------------------------------------------------------------------------------


def gradients(x: PrefillInputs, deterministic: bool = False) -> list[torch.Tensor]:
    """dq, dk, dv by autograd through the public call, served by CUDA or not at all."""
    leaves = [t.detach().requires_grad_() for t in (x.q, x.k, x.v)]
    with backend.use_backend("cuda"):
        out, _ = flashmla.flash_attn_varlen_func(
            *leaves,
            x.cu_seqlens_qo,
            x.cu_seqlens_kv,
            x.max_seqlen_qo,
            x.max_seqlen_kv,
            softmax_scale=x.scale,
            causal=x.case.causal,
            deterministic=deterministic,
        )
        poison_free_memory()
        return list(torch.autograd.grad(out, leaves, x.d_out))


def plain_gradients(x: PrefillInputs) -> list[np.ndarray]:
    """Torch's own gradients of the formula, computed in the inputs' dtype, in float64 arrays."""
    gradients = [torch.zeros(t.shape, dtype=t.dtype, device=DEVICE) for t in (x.q, x.k, x.v)]
    queries, keys = x.cu_seqlens_qo.tolist(), x.cu_seqlens_kv.tolist()
    group = x.case.h_q // x.case.h_kv
    for i, (s_q, s_k) in enumerate(x.case.sequences):
        rows, columns = slice(queries[i], queries[i] + s_q), slice(keys[i], keys[i] + s_k)
        pieces = rows, columns, columns
        q, k, v = leaves = [
            t[piece].detach().clone().requires_grad_()
            for t, piece in zip((x.q, x.k, x.v), pieces, strict=True)
        ]
        if s_q == 0 or s_k == 0:
            continue
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("shd,thd->hst", q, k) * x.scale
        if x.case.causal:
            seen = torch.arange(s_q, device=DEVICE)[:, None] + s_k - s_q
            hidden = torch.arange(s_k, device=DEVICE) > seen
            # A row with nothing left is taken out afterwards: -inf alone would make it NaN.
            scores = scores.masked_fill(hidden, -6e4)
            p = torch.softmax(scores, -1) * ~hidden.all(-1)[:, None]
        else:
            p = torch.softmax(scores, -1)
        out = torch.einsum("hst,thd->shd", p, v)
        for to, piece, gradient in zip(
            gradients, pieces, torch.autograd.grad(out, leaves, x.d_out[rows]), strict=True
        ):
            to[piece] = gradient
    return [g.double().cpu().numpy() for g in gradients]


def assert_gradients(x: PrefillInputs, got: list[torch.Tensor]) -> None:
    """No further from float64 than twice what plain torch is in the same dtype, in norm and in the
    largest value; and 0 for queries that see no key and keys that no query sees."""
    wanted, plain = x.expected_gradients(), plain_gradients(x)
    blind, unseen = np.isinf(x.expected()[1]).all(1), ~wanted[2].any((1, 2))
    for gradient, nothing in zip(got, (blind, unseen, unseen), strict=True):
        assert not gradient[torch.from_numpy(nothing).to(DEVICE)].any()
    for name, gradient, want, rough in zip(("dq", "dk", "dv"), got, wanted, plain, strict=True):
        error, allowed = gradient.double().cpu().numpy() - want, rough - want
        for what, size in (("norm", np.linalg.norm), ("largest", lambda e: np.abs(e).max())):
            ours, theirs = float(size(error.ravel())), float(size(allowed.ravel()))
            print(f"{name}, {what} of the error: {ours:.3g}, plain torch's {theirs:.3g}")
            assert ours <= 2 * theirs, f"{name}: {what} {ours:.3g}, plain torch's {theirs:.3g}"


GRADIENT_CASES = (
    *(c for c in CASES if c.name not in ("one_token", "more_blocks_than_sms", "heads_in_sets")),
    PrefillCase("more_blocks_than_sms", ((400, 400),), h_q=40, h_kv=40, causal=True, seed=110),
    PrefillCase("heads_in_sets", ((700, 300),), h_q=24, h_kv=8, d_qk=128, seed=111),
)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", GRADIENT_CASES, ids=case_id)
def test_gradients_against_oracle(case: PrefillCase, deterministic: bool) -> None:
    x = case.build(DEVICE)
    assert_gradients(x, gradients(x, deterministic))


def test_gradients_of_one_key() -> None:
    """Its probability is 1 whatever q and k are: what their gradients have is out's rounding."""
    x = PrefillCase("one_key", ((100, 1),), seed=20).build(DEVICE)
    dq, dk, dv = gradients(x)
    assert_gradient_close(dv, x.expected_gradients()[2], name="dv")
    step = 2.0**-8 * float(x.v.abs().max()) * 128**0.5 * float(x.d_out.abs().max())
    assert float(dq.abs().max()) <= step * x.scale * float(x.k.abs().max())
    assert float(dk.abs().max()) <= 100**0.5 * step * x.scale * float(x.q.abs().max())


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d_qk", [192, 128])
def test_what_lies_behind_a_sequence_reaches_no_gradient(d_qk: int, causal: bool) -> None:
    """Between sequences lie keys that nobody asks for and queries with no keys, all NaN."""
    sequences = tuple(
        pair for s in (1, 63, 64, 65, 129, 200, 320) for pair in ((s, s), (0, 130), (70, 0))
    )
    x = PrefillCase("poison", sequences, 2, 2, d_qk, causal=causal, seed=5).build(DEVICE)
    clean = gradients(x, deterministic=True)
    queries, keys = x.cu_seqlens_qo.tolist(), x.cu_seqlens_kv.tolist()
    for i in range(len(sequences)):
        if i % 3:
            x.q[queries[i] : queries[i + 1]] = float("nan")
            x.d_out[queries[i] : queries[i + 1]] = float("nan")
            x.k[keys[i] : keys[i + 1]] = float("nan")
            x.v[keys[i] : keys[i + 1]] = float("nan")
    for which, got, want in zip(("dq", "dk", "dv"), gradients(x, True), clean, strict=True):
        assert_identical(which, got, want)


@pytest.mark.parametrize(
    "name", ["mixed_causal", "mixed", "mixed_128_causal", "more_blocks_than_sms"]
)
def test_deterministic_gradients_repeat_bit_for_bit(name: str) -> None:
    x = next(c for c in LARGE if c.name == name).build(DEVICE)
    first = gradients(x, deterministic=True)
    for _ in range(5):
        for which, got, want in zip(("dq", "dk", "dv"), gradients(x, True), first, strict=True):
            assert_identical(which, got, want)


def test_gradients_of_the_lse() -> None:
    """Against float64 gradients of the formula, for a loss of both results."""
    x = PrefillCase("lse", ((130, 200),), 2, 2, dtype=HALF, seed=16).build(DEVICE)
    d_lse = torch.randn(130, 2, device=DEVICE)
    results = []
    for dtype in (x.q.dtype, torch.float64):
        q, k, v = (t.detach().to(dtype).requires_grad_() for t in (x.q, x.k, x.v))
        if dtype == torch.float64:
            scores = torch.einsum("shd,thd->hst", q, k) * x.scale
            lse = scores.logsumexp(-1)
            out = torch.einsum("hst,thd->shd", torch.exp(scores - lse[..., None]), v)
            lse = lse.T
        else:
            with backend.use_backend("cuda"):
                out, lse = flashmla.flash_attn_varlen_func(
                    q, k, v, x.cu_seqlens_qo, x.cu_seqlens_kv, 130, 200
                )
        loss = (out * x.d_out).sum() + (lse * d_lse).sum()
        results.append(torch.autograd.grad(loss, (q, k, v)))
    for name, got, want in zip(("dq", "dk", "dv"), *results, strict=True):
        assert_gradient_close(got, want.cpu().numpy(), name=name)


def test_gradients_of_what_the_prefix_sums_leave_over_are_zero() -> None:
    x = PrefillCase("rest", ((100, 100), (50, 70)), causal=True, seed=17).build(DEVICE)
    short = torch.tensor([0, 90, 90], dtype=torch.int32, device=DEVICE)
    rest = replace(x, cu_seqlens_qo=short, cu_seqlens_kv=short)
    out, lse = attend(rest)
    assert not out[90:].any() and torch.isposinf(lse[90:]).all()
    for gradient in gradients(rest):
        assert gradient[:90].any() and not gradient[90:].any()


def test_gradients_of_a_packed_tensor() -> None:
    x = PrefillCase("packed", ((300, 300), (77, 77)), 3, 3, causal=True, seed=18).build(DEVICE)
    qkv = torch.cat([x.q, x.k, x.v], -1).requires_grad_()
    with backend.use_backend("cuda"):
        out, _ = flashmla.flash_attn_varlen_qkvpacked_func(
            qkv, x.cu_seqlens_qo, 300, 192, causal=True
        )
        (gradient,) = torch.autograd.grad(out, qkv, x.d_out)
    for got, want in zip(gradient.split([192, 192, 128], -1), gradients(x), strict=True):
        assert_gradient_close(got, want.double().cpu().numpy())


def test_lying_prefix_sums_leave_backward_inside_its_memory() -> None:
    x = PrefillCase("lie", ((200, 200), (300, 300)), causal=True, seed=19).build(DEVICE)
    want = gradients(x, deterministic=True)
    for lie in ([0, 1 << 30, 500], [-7, 3, 9], [500, 200, 0], [0, 0, 2**31 - 1]):
        sums = torch.tensor(lie, dtype=torch.int32, device=DEVICE)
        gradients(replace(x, cu_seqlens_qo=sums))
        gradients(replace(x, cu_seqlens_kv=sums))
    torch.cuda.synchronize()
    for which, got, expected in zip(("dq", "dk", "dv"), gradients(x, True), want, strict=True):
        assert_identical(which, got, expected)
