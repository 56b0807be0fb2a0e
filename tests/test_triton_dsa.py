"""The Triton tier's indexer against the oracle, in Triton's interpreter."""

import pytest

pytest.importorskip("triton")

import indexer_bodies as bodies  # noqa: E402
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
