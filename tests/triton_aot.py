"""Compiles the Triton tier's kernels ahead of time, for cards that need not be there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

# Pointers by the names of the kernels' arguments; FLOAT stands for the dtype of q. Other arguments
# are int32, apart from scale_log2, or compile-time constants.
FLOAT = "float"
POINTERS = {
    FLOAT: ("q", "k", "v", "k_cache", "out", "out_a", "out_b", "x"),
    "fp32": (
        "attn_sink", "lse", "out_partial", "lse_partial", "lse_a", "lse_b", "values", "weights",
        "logits", "key_scale", "key_scales", "max_logits",
    ),
    "i32": (
        "cu_seqlens_qo", "cu_seqlens_kv", "block_table", "cache_seqlens",
        "tile_scheduler_metadata", "num_splits", "pieces_of_all", "slots", "scales", "start",
        "end", "indices", "limits", "lengths",
    ),
    "i64": ("starts", "extremes"),
    "u8": ("codes", "q_codes", "key_codes"),
    "i16": ("rope", "cache_bits", "x_bits"),
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """A kernel of flashmla.triton with its constants; `rows` chooses a launch config."""

    name: str
    stage: str
    function: str
    constants: dict[str, Any] = field(default_factory=dict)
    rows: int | None = None  # rows to a KV head, for decode
    dtype: str = "bf16"

    def config(self, target: int) -> dict[str, int]:
        """What the tier's launcher would choose for a card of this capability."""
        from flashmla.triton import mha, mla, sparse

        if self.stage == "sparse":
            return sparse.sparse_config(self.rows or 0, target)
        if self.rows is not None:
            return mla.decode_config(self.rows, target)
        if self.stage == "mha":
            return mha.forward_config(self.constants["D_MAIN"] + self.constants["D_REST"], target)
        return {}


@dataclass(frozen=True)
class Binary:
    """What the tests look at."""

    shared: int  # bytes of shared memory
    warpgroup_mma: bool


def compile_kernel(kernel: Kernel, target: int) -> Binary:
    """Compiles for compute capability `target`, with the tier's own tile sides and warps."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(f"flashmla.triton.{kernel.stage}"), kernel.function)
    config = kernel.config(target)
    options = {k: config.pop(k) for k in ("num_warps", "num_stages") if k in config}
    constants = {**kernel.constants, **config}
    types = {name: f"*{dtype}" for dtype, names in POINTERS.items() for name in names}
    types = {k: v.replace(FLOAT, kernel.dtype) for k, v in types.items()} | {"scale_log2": "fp32"}
    names = function.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    # As at run time: tensors begin at multiples of 16 bytes, strides are multiples of 16.
    aligned = [i for i, n in enumerate(names) if signature[n].startswith("*") or "stride" in n]
    source = ASTSource(
        function,
        signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    binary = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    assert binary.asm["cubin"][:4] == b"\x7fELF"
    return Binary(binary.metadata.shared, "wgmma" in binary.asm["ptx"])
