"""The package without Triton, and with it asked for by name."""

import subprocess
import sys

import pytest

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # what an import finds where Triton is not installed
import flashmla, flashmla.triton, torch
plan = flashmla.get_mla_metadata(torch.tensor([100], dtype=torch.int32), 4, 1)
assert plan[1].tolist()[0] == 0
try:
    import flashmla.triton.mla
except ImportError as error:
    assert error.name == "triton", error
else:
    raise AssertionError("flashmla.triton.mla came without Triton")
print("fine")
"""


def test_package_imports_and_works_without_triton():
    run = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "fine\n"


def _decode_by_name():
    from cases import DecodeCase

    import flashmla
    from flashmla import backend
    from flashmla.lab.check import assert_lse_close, assert_out_close

    case = DecodeCase("by_name", (100, 0, 65), h_q=4, seed=60)
    x = case.build()
    with flashmla.use_backend("triton"):
        plan = flashmla.get_mla_metadata(x.cache_seqlens, case.h_q, 1)
        out, lse = flashmla.flash_mla_with_kvcache(
            x.q, x.k_cache, x.block_table, x.cache_seqlens, case.d_v, *plan
        )
        merged, _ = flashmla.merge_state(out, lse.transpose(1, 2), out, lse.transpose(1, 2))
    want_out, want_lse = x.expected()
    assert_lse_close(lse, want_lse)
    assert_out_close(out, want_out)
    assert_out_close(merged, want_out)
    ops = ("split_kv.get_metadata", "mla.dense_decode", "split_kv.merge_state")
    return [backend.last_tier(op) for op in ops]


def test_public_ops_reach_the_kernels():
    pytest.importorskip("triton")
    from triton_worker import interpreted

    assert interpreted(_decode_by_name) == ["triton"] * 3


def _prefill_by_name():
    from cases import PrefillCase

    import flashmla
    from flashmla import backend
    from flashmla.lab.check import assert_lse_close, assert_out_close

    case = PrefillCase("by_name", ((20, 20), (3, 30)), causal=True, seed=61)
    x = case.build()
    with flashmla.use_backend("triton"):
        out, lse = flashmla.flash_attn_varlen_func(
            x.q, x.k, x.v, x.cu_seqlens_qo, x.cu_seqlens_kv, x.max_seqlen_qo, x.max_seqlen_kv,
            causal=True,
        )  # fmt: skip
    want_out, want_lse = x.expected()
    assert_lse_close(lse, want_lse)
    assert_out_close(out, want_out)
    return backend.last_tier("mha.forward")


def test_public_prefill_reaches_the_kernel():
    pytest.importorskip("triton")
    from triton_worker import interpreted

    assert interpreted(_prefill_by_name) == "triton"
