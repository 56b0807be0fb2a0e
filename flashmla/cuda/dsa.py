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
from flashmla.cuda.sparse import quick_sparse_decode, sparse_decode, supports_sparse_decode
from flashmla.cuda.sparse_prefill import sparse_prefill, supports_sparse_prefill

__all__ = [
    "indexer_logits",
    "indexer_logits_paged",
    "quick_sparse_decode",
    "sparse_decode",
    "sparse_prefill",
    "supports_indexer_logits",
    "supports_indexer_logits_paged",
    "supports_sparse_decode",
    "supports_sparse_prefill",
    "supports_topk",
    "topk",
]
