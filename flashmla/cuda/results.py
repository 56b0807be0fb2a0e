"""Memory for what decoding returns, in the quickest way that torch has."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.cuda import current_device

__all__ = ["HEAD_DIM_V", "empty_results"]

HEAD_DIM_V = 512

_float32 = torch.float32

# What code that torch has compiled calls: half the time of new_empty. It serves the current device
# alone, and is private to torch.
_guards = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
_quick_empty = getattr(_guards, "_empty_strided_cuda", None)


def empty_results(q: Tensor, b: int, s_q: int, h_q: int) -> tuple[Tensor, Tensor]:
    """(out [b, s_q, h_q, 512] in q's dtype, lse [b, h_q, s_q] float32) on q's device, unwritten."""
    if _quick_empty is not None and q.get_device() == current_device():
        query = h_q * HEAD_DIM_V
        strides = s_q * query, query, HEAD_DIM_V, 1
        out = _quick_empty((b, s_q, h_q, HEAD_DIM_V), strides, q.dtype)
        return out, _quick_empty((b, h_q, s_q), (h_q * s_q, s_q, 1), _float32)
    # As methods and with sizes one by one, which is how torch is quickest otherwise.
    return q.new_empty(b, s_q, h_q, HEAD_DIM_V), q.new_empty(b, h_q, s_q, dtype=_float32)
