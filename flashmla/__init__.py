"""Multi-head latent attention on Hopper: the public names.

``import flashmla as flash_mla`` serves FlashMLA's callers. Nothing is compiled at import, and
neither a GPU nor a compiler nor Triton has to be there.
"""

from flashmla import fp8
from flashmla.backend import use_backend
from flashmla.cache import OutOfPages, PagedKVCache
from flashmla.ops.dsa import flash_mla_sparse_fwd, indexer_logits, indexer_logits_paged, topk
from flashmla.ops.mha import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flashmla.ops.mla import flash_mla_with_kvcache
from flashmla.ops.paged_kv import paged_append
from flashmla.ops.split_kv import SplitPlan, get_mla_metadata, merge_state

__version__ = "0.1.0"

__all__ = [
    "OutOfPages",
    "PagedKVCache",
    "SplitPlan",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_mla_sparse_fwd",
    "flash_mla_with_kvcache",
    "fp8",
    "get_mla_metadata",
    "indexer_logits",
    "indexer_logits_paged",
    "merge_state",
    "paged_append",
    "topk",
    "use_backend",
]
