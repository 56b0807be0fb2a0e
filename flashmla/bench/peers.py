"""Who can do an operation: this package's tiers, and other libraries found in the environment.

A peer is measured through its own public function, on the same tensors as ours.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch

import flashmla
from flashmla import backend
from flashmla.bench import mha
from flashmla.bench.cases import D_QK, D_V, MHA_BACKWARD, MHA_FORWARD
from flashmla.bench.indexing import TopK
from flashmla.bench.problems import DenseDecode, Writing
from flashmla.bench.sparse import SparseDecode, SparsePrefill
from flashmla.bench.timing import Side

__all__ = ["TIER_OF_OP", "find_peers", "own", "sides"]

# The operation whose tier decides who serves a benchmark's call.
TIER_OF_OP = {
    "dense_decode": "mla.dense_decode",
    "dense_decode_fp8": "fp8.dense_decode",
    "paged_append": "paged_kv.append",
    "fp8_append": "fp8.append",
    "index_append": "fp8.index_append",
    "topk": "dsa.topk",
    "indexer": "dsa.indexer_logits",
    "indexer_paged": "dsa.indexer_logits_paged",
    "dsa_step": "dsa.sparse_decode",
    "mha_forward": "mha.forward",
    "mha_backward": "mha.backward",
    "sparse_decode": "dsa.sparse_decode",
    "sparse_prefill": "dsa.sparse_prefill",
}

PEER = "sgl-flash-mla"  # the distribution that keeps FlashMLA's Hopper kernels, frozen


def own(problem: Any, tier: str) -> Side:
    """This package's operation on one tier, planned once as a caller would.

    The first of what a call returns is what is compared. The tier that would serve it anyway is
    called as users call it, with nothing around; another one pays for the context manager in its
    host time.
    """
    call = _writing(problem) if isinstance(problem, Writing) else problem.side()
    if backend.tier_for(TIER_OF_OP[problem.case.op], problem.device) == tier:
        return call

    def forced(copy: int) -> Any:
        with backend.use_backend(tier):
            return call(copy)

    return forced


def _writing(problem: Writing) -> Side:
    """Returns (cache,)."""
    op = problem.case.op
    append = {
        "paged_append": flashmla.paged_append,
        "fp8_append": flashmla.fp8.append,
        "index_append": flashmla.fp8.index_append,
    }[op]
    x = problem.x if op != "paged_append" else tuple(x.unsqueeze(1) for x in problem.x)

    def call(copy: int) -> Any:
        append(problem.caches[copy], problem.slots, x[copy])
        return (problem.caches[copy],)

    return call


def find_peers(device: torch.device, op: str = "dense_decode") -> dict[str, Callable[[Any], Side]]:
    """The peers of an operation that are installed and can use this device: name -> maker.

    One that is installed and does not load (another CUDA, say) is left out, with a warning.
    """
    if device.type != "cuda":
        return {}
    if op in ("paged_append", "topk"):
        make = _indexed_assignment if op == "paged_append" else TopK.peer
        return {f"peer:torch-{torch.__version__.split('+')[0]}": make}
    if op == "dense_decode_fp8":  # what the smaller cache is worth
        return {"peer:own-bf16-cache": lambda problem: problem.plain.side()}
    if op in (MHA_FORWARD, MHA_BACKWARD):
        return mha.peers(device, op)
    makers: dict[str, Callable[[Any], Side]] = {
        "dense_decode": _frozen_flash_mla,
        "sparse_decode": SparseDecode.peer,
        "sparse_prefill": SparsePrefill.peer,
    }
    if op not in makers or importlib.util.find_spec("flash_mla") is None:
        return {}
    try:
        version = importlib.metadata.version(PEER)
        importlib.import_module("flash_mla")
    except importlib.metadata.PackageNotFoundError:
        return {}  # another package of that module's name: its calling convention is not known
    except (ImportError, OSError) as error:
        warnings.warn(f"{PEER} is installed and does not load: {error}", stacklevel=2)
        return {}
    return {f"peer:{PEER}-{version}": makers[op]}


def _frozen_flash_mla(problem: DenseDecode) -> Side:
    """The frozen Hopper kernels; their first call makes the plan, which later calls reuse."""
    peer = importlib.import_module("flash_mla")
    plan, _ = peer.get_mla_metadata()

    def call(copy: int) -> Any:
        return peer.flash_mla_with_kvcache(
            problem.q,
            problem.caches[copy],
            problem.block_table,
            problem.cache_seqlens,
            D_V,
            plan,
            softmax_scale=problem.scale,
            causal=problem.case.causal,
            is_fp8_kvcache=False,
            use_legacy=True,
        )

    return call


def _indexed_assignment(problem: Writing) -> Side:
    """What torch has for writing rows to where indices say."""
    slots = problem.slots.long()

    def call(copy: int) -> Any:
        problem.caches[copy].view(-1, D_QK)[slots] = problem.x[copy]
        return (problem.caches[copy],)

    return call


def sides(problem: Any, tiers: list[str], with_peers: bool = True) -> dict[str, Side]:
    """Everybody who can serve a problem: result rows' ``impl`` -> call."""
    found = {f"flashmla-{tier}": own(problem, tier) for tier in tiers}
    if with_peers:
        for name, make in find_peers(problem.device, problem.case.op).items():
            if problem.case.cache != "bf16":  # through indices the peer reads FP8 only
                found[name] = make(problem)
    return found
