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
