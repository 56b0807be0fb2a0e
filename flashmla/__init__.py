"""Multi-head latent attention on Hopper: the public names."""

from flashmla.backend import use_backend
from flashmla.ops.mla import flash_mla_with_kvcache
from flashmla.ops.split_kv import SplitPlan, get_mla_metadata, merge_state

__version__ = "0.1.0"

__all__ = [
    "SplitPlan",
    "flash_mla_with_kvcache",
    "get_mla_metadata",
    "merge_state",
    "use_backend",
]
