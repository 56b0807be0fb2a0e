"""Writing tokens into the paged cache, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["append"]


@torch.no_grad()
def append(cache: Tensor, slots: Tensor, x: Tensor) -> None:
    """Write x [n, ...] into the slots [n] of a cache [blocks, page, ...] that lie within it."""
    blocks, page = cache.shape[:2]
    kept = ((slots >= 0) & (slots < blocks * page)).nonzero().squeeze(1)
    slots = slots[kept].long()
    cache[slots // page, slots % page] = x[kept]
