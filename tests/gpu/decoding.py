"""Dense decode of a case on a card, through the public operations."""

from __future__ import annotations

import torch
from cases import DecodeCase, DecodeInputs

import flashmla
from flashmla import backend
from flashmla.cuda.mla import PAGE_SIZES

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
