"""What tests of decoding on a card share: dense decode of a case, and calls at the same time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from cases import DecodeCase, DecodeInputs

import flashmla
from flashmla import backend
from flashmla.cuda.mla import PAGE_SIZES
from flashmla.lab.check import assert_identical

DEVICE = "cuda"


def plan_for(
    inputs: DecodeInputs, batch_invariant: bool = False, out=None
) -> tuple[torch.Tensor, torch.Tensor]:
    case = inputs.case
    rows = case.s_q * case.h_q // case.h_kv
    return flashmla.get_mla_metadata(
        inputs.cache_seqlens, rows, case.h_kv, batch_invariant=batch_invariant, out=out
    )


def tier_of(case: DecodeCase) -> str:
    """CUDA, but for pages that its kernel does not take: those Triton has to serve."""
    return "cuda" if case.page in PAGE_SIZES else "triton"


def decode(inputs: DecodeInputs, plan=None, batch_invariant: bool = False):
    """The public call, served by the tier that has to serve it or not at all."""
    tile_scheduler_metadata, num_splits = plan or plan_for(inputs, batch_invariant)
    with backend.use_backend(tier_of(inputs.case)):
        return flashmla.flash_mla_with_kvcache(
            inputs.q,
            inputs.k_cache,
            inputs.block_table,
            inputs.cache_seqlens,
            inputs.case.d_v,
            tile_scheduler_metadata,
            num_splits,
            softmax_scale=inputs.scale,
            causal=inputs.case.causal,
            attn_sink=inputs.attn_sink,
        )


def poison_free_memory() -> None:
    """Fills what the allocator will hand out next with NaN: an unwritten output is then seen."""
    torch.full((1 << 28,), float("nan"), device=DEVICE)
    torch.cuda.synchronize()


def assert_at_once_as_alone(*calls: Callable[[], tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Each of the calls gives (out, lse) bit for bit as alone when all run at the same time, each
    on its stream, ten in a row, again and again: the last eagerly, the others in graphs."""
    want = [call() for call in calls]
    torch.cuda.synchronize()
    graphs, results = [], []
    for call in calls[:-1]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results.append([call() for _ in range(10)])
        graphs.append(graph)
    *streams, last = (torch.cuda.Stream() for _ in calls)
    eager = []
    for _ in range(5):
        for graph, stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(last):
            eager += [calls[-1]() for _ in range(10)]
    torch.cuda.synchronize()
    for got, (want_out, want_lse) in zip([*results, eager], want, strict=True):
        for out, lse in got:
            assert_identical("out", out, want_out)
            assert_identical("lse", lse, want_lse)


MAGNITUDES = {
    "tiny": (1e-6, 1e-6, 1e-6, 1e-6),
    "large": (1e4, 1e4, 1e4, 1e4),
    "mixed": (1e5, 1e-3, 1e-30, 1e-36),
    "huge_beside_zeros": (1e30, 1e25, 0.0, 0.0),
}
"""Of values in each group of 128 columns, two of which share a unit in a partial result."""


def values_of_magnitude(name: str, tokens: int) -> torch.Tensor:
    """[tokens, 512] of MAGNITUDES[name], each 1 to 2 times a power of two in steps of an eighth:
    exact in bfloat16, and in FP8 with that power as the scale."""
    steps = torch.randint(0, 8, (tokens, 512), generator=torch.Generator().manual_seed(0)) / 8
    of_group = torch.tensor(MAGNITUDES[name], dtype=torch.float64)
    scale = torch.where(of_group > 0, 2.0 ** of_group.log2().floor(), 0.0)
    return ((1 + steps) * scale.repeat_interleave(128)).float()


def assert_mean_of(values: torch.Tensor, out: torch.Tensor) -> None:
    """Each row of out, [..., 512], is the mean of values, [tokens, 512], to the bits that are kept:
    the output's half ulp, a partial result's, what float32 sums round; and what is too small beside
    the largest of its half of a row, or for float32."""
    want = values.double().mean(0)
    largest = want.view(2, 256).amax(1).repeat_interleave(256)
    power = torch.where(want > 0, 2.0 ** want.log2().floor(), 0.0)
    allowed = (2**-8 + 2**-11 + 2**-18) * power + 2**-38 * largest + 2.0**-126
    error = (out.double().cpu() - want).abs()
    assert not (error > allowed).any(), f"{(error / allowed).max()} times what is allowed"
