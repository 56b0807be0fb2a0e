"""What a float32 scale is worth: sparse decode's error on scales that bfloat16 has not, beside that
of the frozen Hopper kernels, which round them to it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashmla import backend
from flashmla.bench import peers, problems, sparse
from flashmla.bench.cases import D_V, Case

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")


def relative_errors(case: Case) -> tuple[float, float]:
    """Ours and the peer's: the norm of the error of out over that of out in float64."""
    problem = problems.MAKERS["sparse_decode"](case, DEVICE)
    found = peers.find_peers(DEVICE, "sparse_decode")
    if not found:
        pytest.skip("needs the package sgl-flash-mla, the peer")
    keys = sparse.values(problem.caches[0].flatten(0, 2))[problem.indices.long()]  # [b, s_q, k, d]
    scores = torch.einsum("bshd,bskd->bshk", problem.q.double(), keys) * problem.scale
    want = torch.einsum("bshk,bskd->bshd", scores.softmax(-1), keys[..., :D_V])
    with backend.use_backend("cuda"):
        ours = problem.side()(0)[0]
    (peer,) = (make(problem)(0)[0] for make in found.values())
    ours, peer = (float((out.double() - want).norm() / want.norm()) for out in (ours, peer))
    return ours, peer


@pytest.mark.parametrize("topk", [64, 2048])
def test_any_scale(topk: int) -> None:
    ours, peer = relative_errors(
        Case("sparse_decode", b=8, h_q=64, s_k=2048, topk=topk, cache="fp8-any-scale")
    )
    print(f"topk={topk}, any scale: ours {ours:.2e}, the peer's {peer:.2e}")
    assert ours < 2**-8 and ours < 0.9 * peer


@pytest.mark.parametrize("topk", [64, 2048])
def test_powers_of_two(topk: int) -> None:
    """Which bfloat16 has: here both have the rounding of P and of the output, and no other."""
    ours, peer = relative_errors(Case("sparse_decode", b=8, h_q=64, s_k=2048, topk=topk))
    print(f"topk={topk}, powers of two: ours {ours:.2e}, the peer's {peer:.2e}")
    assert ours < 2**-8 and np.isclose(ours, peer, rtol=0.1)
