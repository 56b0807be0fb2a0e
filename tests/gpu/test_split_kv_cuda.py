"""The split plan and merge_state on a Hopper card, against Python and the oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import flashmla
from flashmla import backend, schedule
from flashmla.lab.check import assert_identical, assert_lse_close, assert_out_close
from flashmla.reference import split_kv

pytestmark = pytest.mark.gpu
DEVICE = "cuda"

LENGTHS = {
    "one": [1000],
    "one_empty": [0],
    "all_empty": [0] * 9,
    "mixed": [0, 1, 63, 64, 65, 5000, 0, 131072, 7],
    "equal": [4096] * 128,
    "cut_alike": [8192] * 11,
    "nearly_alike": [4096 + i * 13 for i in range(-6, 5)],
    "alike_but_for_one": [4096] * 10 + [5000],
    "alike_but_for_an_empty_one": [4096] * 10 + [0],
    "many": [(i * 7919) % 3001 for i in range(5000)],
    "more_than_threads": [i % 130 for i in range(70001)],
}


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 33, 66, 132])
@pytest.mark.parametrize("name", LENGTHS)
def test_plan_equals_python(name: str, parts: int, batch_invariant: bool) -> None:
    lengths = LENGTHS[name]
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    arguments = (seqlens, parts, batch_invariant)
    with backend.use_backend("cuda"):
        plan, num_splits = backend.call("split_kv.get_metadata", seqlens.device, *arguments)
    want_plan, want_splits = schedule.plan(np.array(lengths), parts, batch_invariant)
    assert_identical("tile_scheduler_metadata", plan, want_plan)
    assert_identical("num_splits", num_splits, want_splits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(3, 5, 512), (7, 33), (1, 128), (0, 64)])
def test_merge_state(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(1)
    out_a, out_b = (torch.randn(shape, generator=g).to(dtype) for _ in range(2))
    lse_a, lse_b = (torch.randn(shape[:-1], generator=g) * 5 for _ in range(2))
    empties = [(np.inf, 0.3), (-0.5, np.inf), (np.inf, np.inf), (-np.inf, 1.0), (-np.inf, np.inf)]
    flat_a, flat_b = lse_a.view(-1), lse_b.view(-1)
    for i, (a, b) in enumerate(empties[: max(0, flat_a.numel() - 1)]):
        flat_a[i], flat_b[i] = a, b
        if np.isinf(a):
            out_a.view(-1, shape[-1])[i] = 0
        if np.isinf(b):
            out_b.view(-1, shape[-1])[i] = 0
    with backend.use_backend("cuda"):
        out, lse = flashmla.merge_state(*(x.to(DEVICE) for x in (out_a, lse_a, out_b, lse_b)))
    want_out, want_lse = split_kv.merge(*(x.double().numpy() for x in (out_a, lse_a, out_b, lse_b)))
    if out.numel():
        assert_out_close(out, want_out)
        assert_lse_close(lse, want_lse)
    assert out.shape == out_a.shape and lse.shape == lse_a.shape


def test_merge_state_of_slices() -> None:
    """Views with gaps between rows, and one that begins at no multiple of 16 bytes."""
    g = torch.Generator().manual_seed(2)
    wide = torch.randn(2, 6, 7, 528, generator=g).to(torch.bfloat16).to(DEVICE)
    lses = torch.randn(2, 6, 7, generator=g).to(DEVICE)
    shifted = torch.randn(6 * 512 + 1, generator=g).to(torch.bfloat16).to(DEVICE)[1:].view(6, 512)
    out_a, lse_a, lse_b = wide[0, :, 3, :512], lses[0, :, 3], lses[1, :, 5]
    with backend.use_backend("cuda"):
        out, lse = flashmla.merge_state(out_a, lse_a, shifted, lse_b)
    want = split_kv.merge(*(x.double().cpu().numpy() for x in (out_a, lse_a, shifted, lse_b)))
    assert_out_close(out, want[0])
    assert_lse_close(lse, want[1])
