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
from flashmla.bench.cases import D_V
from flashmla.bench.problems import DenseDecode
from flashmla.bench.timing import Side

__all__ = ["TIER_OF_OP", "find_peers", "own", "sides"]

# The operation whose tier decides who serves a benchmark's call.
TIER_OF_OP = {"dense_decode": "mla.dense_decode"}

PEER = "sgl-flash-mla"  # the distribution that keeps FlashMLA's Hopper kernels, frozen


def own(problem: DenseDecode, tier: str) -> Side:
    """This package's dense decode on one tier, planned once as a caller would.

    The call's result is (out, lse). The tier that would serve it anyway is called as users call
    it, with nothing around; another one pays for the context manager in its host time.
    """
    case = problem.case
    metadata, num_splits = flashmla.get_mla_metadata(
        problem.cache_seqlens, case.s_q * case.h_q // case.h_kv, case.h_kv
    )

    def call(copy: int) -> Any:
        return flashmla.flash_mla_with_kvcache(
            problem.q,
            problem.caches[copy],
            problem.block_table,
            problem.cache_seqlens,
            D_V,
            metadata,
            num_splits,
            softmax_scale=problem.scale,
            causal=case.causal,
        )

    if backend.tier_for(TIER_OF_OP[case.op], problem.q.device) == tier:
        return call

    def forced(copy: int) -> Any:
        with backend.use_backend(tier):
            return call(copy)

    return forced


def find_peers(device: torch.device) -> dict[str, Callable[[DenseDecode], Side]]:
    """The peers of dense decode that are installed and can use this device: name -> maker.

    One that is installed and does not load (another CUDA, say) is left out, with a warning.
    """
    if device.type != "cuda" or importlib.util.find_spec("flash_mla") is None:
        return {}
    try:
        version = importlib.metadata.version(PEER)
        importlib.import_module("flash_mla")
    except importlib.metadata.PackageNotFoundError:
        return {}  # another package of that module's name: its calling convention is not known
    except (ImportError, OSError) as error:
        warnings.warn(f"{PEER} is installed and does not load: {error}", stacklevel=2)
        return {}
    return {f"peer:{PEER}-{version}": _frozen_flash_mla}


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


def sides(problem: DenseDecode, tiers: list[str], with_peers: bool = True) -> dict[str, Side]:
    """Everybody who can serve a problem: result rows' ``impl`` -> call."""
    found = {f"flashmla-{tier}": own(problem, tier) for tier in tiers}
    if with_peers:
        for name, make in find_peers(problem.q.device).items():
            found[name] = make(problem)
    return found
