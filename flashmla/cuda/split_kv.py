"""Stage 04 on Hopper: the split plan and the merging of partial results.

Source: ``csrc/sm90/scheduler.cu``, ``csrc/sm90/combine.cu``, ``csrc/sm90/merge_state.cu``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla.cuda.library import load
from flashmla.schedule import CHUNK, metadata_columns

__all__ = ["get_metadata", "merge_state"]


def get_metadata(
    cache_seqlens: Tensor,
    parts: int,
    batch_invariant: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(tile_scheduler_metadata [parts, 8 or 16], num_splits [b + 1]), int32, for lengths [b]."""
    if out is None:
        device = cache_seqlens.device
        columns = metadata_columns(batch_invariant)
        out = (
            torch.empty((parts, columns), dtype=torch.int32, device=device),
            torch.empty(cache_seqlens.shape[0] + 1, dtype=torch.int32, device=device),
        )
    load().get_metadata(cache_seqlens, *out, CHUNK if batch_invariant else 0)
    return out


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Join results over disjoint keys: out [..., d], lse [...]."""
    d = out_a.shape[-1]
    out = torch.empty_like(out_a, memory_format=torch.contiguous_format)
    lse = torch.empty_like(lse_a, memory_format=torch.contiguous_format)
    load().merge_state(
        _packed(out_a).view(-1, d),
        _packed(lse_a).view(-1),
        _packed(out_b).view(-1, d),
        _packed(lse_b).view(-1),
        out.view(-1, d),
        lse.view(-1),
    )
    return out, lse


def _packed(x: Tensor) -> Tensor:
    """x without gaps and where 16 bytes can be read at once; itself if it is so already."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def supports_merge_state(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> str | None:
    """None if the kernel takes these tensors, else why not."""
    if out_a.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"out_a is {out_a.dtype}; the kernel takes bfloat16, float16 and float32"
    if out_b.dtype != out_a.dtype:
        return f"out_a is {out_a.dtype} and out_b {out_b.dtype}; the kernel takes one type"
    return None
