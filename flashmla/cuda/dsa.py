"""Stage 06 on Hopper, gathered under the name by which tiers are asked for it."""

from __future__ import annotations

from flashmla.cuda.indexer import (
    indexer_logits,
    indexer_logits_paged,
    supports_indexer_logits,
    supports_indexer_logits_paged,
    supports_topk,
    topk,
)

__all__ = [
    "indexer_logits",
    "indexer_logits_paged",
    "supports_indexer_logits",
    "supports_indexer_logits_paged",
    "supports_topk",
    "topk",
]
