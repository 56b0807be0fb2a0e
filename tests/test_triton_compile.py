"""The Triton tier compiles, and fits, on cards that need not be there."""

import pytest

pytest.importorskip("triton")

from triton_aot import Kernel, compile_kernel  # noqa: E402
from triton_worker import compiled  # noqa: E402

from flashmla import schedule  # noqa: E402
from flashmla.lab import source  # noqa: E402

SHARED_MEMORY = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

DECODE = {
    "PAGE": 64, "TILE": 64, "D_V": 512, "D_ROPE": 64, "CAUSAL": True, "UPCAST": False,
    "HAS_SINK": True, "PLAN_COLUMNS": 8,
}  # fmt: skip
PREFILL = {"D_MAIN": 128, "D_REST": 64, "D_V": 128, "CAUSAL": True, "UPCAST": False}
SPARSE = {
    "PAGED": False, "FP8": False, "HAS_LIMIT": True, "HAS_SINK": True, "HAS_MAX": False,
    "D_V": 512, "D_ROPE": 64, "UPCAST": False,
}  # fmt: skip
PACK = {"POWER_OF_TWO": False, "TOKENS": 4}
PLAN = {"OVERHEAD": schedule.OVERHEAD, "CHUNK": 0}
PLAN_ACTIVE = PLAN | {"FEW": schedule.FEW, "FULL": schedule.FULL}
PLAN_SLACK = {"SLACK": schedule.SLACK, "MOST_SLACK": schedule.MOST_SLACK, "LEAST": schedule.LEAST}
PLAN_PARTS = PLAN_ACTIVE | PLAN_SLACK | {"SEARCH_STEPS": 8, "BLOCK": 128}

KERNELS = [
    Kernel("decode_128_rows", "mla", "dense_decode_kernel", DECODE, rows=128),
    Kernel("decode_16_rows", "mla", "dense_decode_kernel", DECODE, rows=16),
    Kernel("prefill_192", "mha", "forward_kernel", PREFILL),
    Kernel("prefill_128", "mha", "forward_kernel", PREFILL | {"D_REST": 0, "CAUSAL": False}),
    Kernel("plan_starts", "split_kv", "plan_starts_kernel", PLAN | {"TILE": 64, "BLOCK": 1024}),
    Kernel("plan_parts", "split_kv", "plan_parts_kernel", PLAN_PARTS),
    Kernel("plan_splits", "split_kv", "plan_splits_kernel", PLAN_ACTIVE | {"BLOCK": 1024}),
    Kernel("plan_parts_chunks", "split_kv", "plan_parts_kernel", PLAN_PARTS | {"CHUNK": 16}),
    Kernel("combine", "split_kv", "combine_kernel", {"D": 512, "HAS_SINK": True}),
    Kernel("merge_state", "split_kv", "merge_state_kernel", {"D": 512, "ROWS": 4}),
    Kernel("fp8_pack", "fp8", "pack_kernel", PACK | {"HAS_SLOTS": False}),
    Kernel("fp8_append", "fp8", "pack_kernel", PACK | {"HAS_SLOTS": True}),
    Kernel("fp8_unpack", "fp8", "unpack_kernel", {"TOKENS": 4}),
    Kernel("index_append", "fp8", "index_pack_kernel", PACK | {"HAS_SLOTS": True}),
    Kernel("paged_append", "paged_kv", "append_kernel", {"TOKENS": 4, "BLOCK": 64}),
    Kernel("sparse_fp8", "sparse", "sparse_kernel", SPARSE | {"FP8": True}, rows=128),
    Kernel("sparse_16_heads", "sparse", "sparse_kernel", SPARSE | {"HAS_MAX": True}, rows=16),
    Kernel("dense_fp8", "sparse", "sparse_kernel", SPARSE | {"FP8": True, "PAGED": True}, rows=64),
    Kernel("topk", "topk", "topk_kernel", {"HAS_LENGTHS": True, "HAS_TABLE": True, "BLOCK": 2048}),
    Kernel("indexer", "dsa", "prefill_kernel", {"H": 64, "BLOCK": 64}),
    Kernel("indexer_paged", "dsa", "paged_kernel", {"H": 32}),
]
STAGES = ["common", "dsa", "fp8", "mha", "mla", "paged_kv", "sparse", "split_kv", "topk"]
FP16 = [
    Kernel("decode_fp16", "mla", "dense_decode_kernel", DECODE, rows=64, dtype="fp16"),
    Kernel("prefill_fp16", "mha", "forward_kernel", PREFILL, dtype="fp16"),
]


def _name(kernel):
    return kernel.name


@pytest.mark.parametrize("target", [90, 100])
@pytest.mark.parametrize("kernel", KERNELS, ids=_name)
def test_kernel_compiles_and_fits(kernel, target):
    assert compiled(compile_kernel, kernel, target).shared <= SHARED_MEMORY[target]


@pytest.mark.parametrize("kernel", FP16, ids=_name)
def test_kernel_compiles_and_fits_in_fp16(kernel):
    assert compiled(compile_kernel, kernel, 90).shared <= SHARED_MEMORY[90]


@pytest.mark.parametrize("target", [80, 89])
@pytest.mark.parametrize("kernel", [*KERNELS[:3], *KERNELS[-11:]], ids=_name)
def test_kernel_fits_on_cards_with_less_shared_memory(kernel, target):
    assert compiled(compile_kernel, kernel, target).shared <= SHARED_MEMORY[target]


def test_hopper_uses_the_warpgroups_matrix_instruction():
    """From 64 rows on, that is; 16 rows would leave three quarters of it unused."""
    uses = {k.name: compiled(compile_kernel, k, 90).warpgroup_mma for k in KERNELS[:4]}
    assert uses == {
        "decode_128_rows": True, "decode_16_rows": False, "prefill_192": True, "prefill_128": True,
    }  # fmt: skip


@pytest.mark.parametrize("stage", STAGES)
def test_every_region_can_be_shown(stage):
    path = f"flashmla/triton/{stage}.py"
    names = source.regions(path)
    assert len(names) == len(set(names)) > 0
    for name in names:
        assert len(source.show(path, name).text.splitlines()) > 2
