"""Stage 04 on Hopper: the split plan, and the merging of results that callers made.

Dense decode merges what the plan split by itself: see `flashmla.cuda.mla`.

Source: ``csrc/sm90/scheduler.cu``, ``csrc/sm90/merge_state.cu``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flashmla.cuda.library import load
from flashmla.schedule import CHUNK, metadata_columns

__all__ = ["get_metadata", "merge_state", "quick_get_metadata"]


def get_metadata(
    cache_seqlens: Tensor,
    parts: int,
    batch_invariant: bool = False,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """(tile_scheduler_metadata [parts, 8 or 16], num_splits [b + 1]), int32, for lengths [b]."""
    if out is None:
        metadata = cache_seqlens.new_empty(parts, metadata_columns(batch_invariant))
        out = metadata, cache_seqlens.new_empty(cache_seqlens.shape[0] + 1)
    if not load().get_metadata(cache_seqlens, *out, CHUNK if batch_invariant else 0):
        raise RuntimeError("flashmla: the kernel refuses a plan that was checked; please report it")
    return out


def quick_get_metadata() -> Callable[..., tuple[Tensor, Tensor] | None]:
    """The plan from tensors that nobody has looked at, bound to the library as it is now.

    The library checks them in one go; None, and nothing is launched, if they are not in order.
    """
    kernel = load().get_metadata

    def run(
        cache_seqlens: Tensor, parts: int, batch_invariant: bool, out: object
    ) -> tuple[Tensor, Tensor] | None:
        if out is None:
            metadata = cache_seqlens.new_empty(parts, metadata_columns(batch_invariant))
            num_splits = cache_seqlens.new_empty(cache_seqlens.shape[0] + 1)
        elif type(out) is tuple and len(out) == 2:
            metadata, num_splits = out
            if not type(metadata) is type(num_splits) is Tensor or metadata.shape[:1] != (parts,):
                return None
        else:
            return None
        try:
            launched = kernel(cache_seqlens, metadata, num_splits, CHUNK if batch_invariant else 0)
        except RuntimeError:  # what torch does not hand over: tensors on meta, sparse ones
            return None
        return (metadata, num_splits) if launched else None

    return run


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
