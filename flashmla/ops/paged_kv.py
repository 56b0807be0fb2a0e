"""Writing tokens into a paged cache, each into its slot."""

from __future__ import annotations

import torch
from torch import Tensor

from flashmla.checks import (
    check_page_strides,
    check_shape,
    check_slots,
    check_tensor,
    values_wanted,
)
from flashmla.ops.library import define

__all__ = ["paged_append"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def _fake_append(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    return None


_append = define(
    "paged_kv.append", "(Tensor(a!) cache, Tensor slots, Tensor x) -> ()", _fake_append
)


def paged_append(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    """Write tokens into a paged cache, in place, as they are; :func:`flashmla.fp8.append` is the
    same for the FP8 format.

    Args:
        cache: [blocks, page, h_kv, d], bfloat16, float16 or float32; the stride between pages is
            free.
        slots: int32 or int64 [n]: block * page + offset of each token. A negative slot drops its
            token, and so does one beyond the cache. Slots must differ from one another: one given
            twice holds a mixture of its tokens afterwards.
        x: [n, h_kv, d] of the cache's dtype.

    Raises:
        TypeError: not a tensor, or of the wrong dtype.
        ValueError: shapes, devices or strides that do not fit; with ``FLASHMLA_CHECK=1`` also a
            slot beyond the cache, or given twice.

    Example:
        >>> cache = torch.zeros(2, 64, 1, 576).bfloat16()
        >>> flashmla.paged_append(cache, torch.tensor([64, -1]), torch.ones(2, 1, 576).bfloat16())
        >>> cache[:, :2, 0, 0].tolist()
        [[0.0, 0.0], [1.0, 0.0]]

    Source: ``flashmla/torch/paged_kv.py``, ``flashmla/triton/paged_kv.py``,
    ``csrc/sm90/fp8_cache/append.cu``.
    """
    dims = "[blocks, page, h_kv, d]"
    check_tensor("cache", cache, dims, _FLOATS)
    check_page_strides("cache", cache, dims)
    check_tensor("slots", slots, "[n]", (torch.int32, torch.int64), cache.device)
    check_tensor("x", x, "[n, h_kv, d]", (cache.dtype,), cache.device)
    check_shape("x", x, (slots.shape[0], *cache.shape[2:]), "[n, h_kv, d]")
    if values_wanted():
        check_slots("slots", slots, cache.shape[0] * cache.shape[1])
    _append(cache, slots, x)
