"""The Triton tier's indexer, top-k and sparse attention against the oracle, in the interpreter."""

import pytest
from cases import SPARSE_DECODE_CASES, SPARSE_PREFILL_CASES, case_id

pytest.importorskip("triton")

import indexer_bodies as bodies  # noqa: E402
from triton_bodies import check_sparse_decode, check_sparse_prefill, check_topk  # noqa: E402
from triton_worker import interpreted  # noqa: E402

ROUNDING = 2.0**-20  # of the sum of absolute products


@pytest.mark.parametrize(
    ("s_q", "s_kv", "h", "kind"),
    [(1, 1, 64, "all"), (3, 64, 16, "all"), (9, 200, 4, "any"), (5, 130, 33, "causal")],
)
def test_prefill(s_q, s_kv, h, kind):
    interpreted(bodies.check_prefill, "triton", s_q, s_kv, h, kind, ROUNDING)


def test_prefill_reads_what_it_may():
    interpreted(bodies.check_prefill_reads_what_it_may, "triton", ROUNDING)


@pytest.mark.parametrize(("s_q", "h"), [(1, 64), (3, 5)])
def test_paged(s_q, h):
    interpreted(bodies.check_paged, "triton", [0, 1, 63, 64, 65, 130], s_q, h, ROUNDING)


@pytest.mark.parametrize("case", SPARSE_DECODE_CASES, ids=case_id)
def test_sparse_decode(case):
    interpreted(check_sparse_decode, case)


@pytest.mark.parametrize("case", SPARSE_PREFILL_CASES, ids=case_id)
def test_sparse_prefill(case):
    interpreted(check_sparse_prefill, case)


@pytest.mark.parametrize(("lengths", "table"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize(("n", "k"), [(200, 1), (200, 64), (200, 300), (1, 2), (2049, 700)])
def test_topk(n, k, lengths, table):
    interpreted(check_topk, n, k, lengths, table)


def _empty():
    import torch

    from flashmla.triton import dsa

    return [dsa.topk(torch.zeros(rows, n), k, None, None, 64) for rows, n, k in _EMPTY]


_EMPTY = [(0, 10, 4), (3, 10, 0), (3, 0, 5)]


def test_topk_of_nothing():
    for got, (rows, _, k) in zip(interpreted(_empty), _EMPTY, strict=True):
        assert got.shape == (rows, k) and (got == -1).all()
