"""The device is taken from the tensors. Not marked as a GPU test: with one card it is skipped."""

from __future__ import annotations

import pytest
import torch
from cases import DecodeCase
from conftest import hopper_present
from decoding import decode, plan_for

from flashmla.lab.check import assert_identical, assert_lse_close, assert_out_close

pytestmark = pytest.mark.skipif(
    not hopper_present() or torch.cuda.device_count() < 2, reason="needs two Hopper cards"
)


@pytest.mark.parametrize("current", [0, 1])
def test_either_card_serves_its_tensors_whichever_is_current(current: int) -> None:
    case = DecodeCase("two", (700, 0, 64, 5000), s_q=2, h_q=128, causal=True, seed=80)
    problems = [case.build(f"cuda:{device}") for device in range(2)]
    want_out, want_lse = problems[0].expected()
    with torch.cuda.device(current):
        results = []
        for _ in range(3):
            for inputs in problems:
                results.append((inputs, *decode(inputs, plan_for(inputs))))
        assert torch.cuda.current_device() == current
    for inputs, out, lse in results:
        assert out.device == lse.device == inputs.q.device
        assert_out_close(out, want_out)
        assert_lse_close(lse, want_lse)
        assert_identical("out", out.cpu(), results[0][1].cpu())


def test_streams_of_the_other_card() -> None:
    inputs = DecodeCase("stream", (3000, 5), h_q=64, seed=81).build("cuda:1")
    plan = plan_for(inputs)
    want, _ = decode(inputs, plan)
    stream = torch.cuda.Stream(device=1)
    stream.wait_stream(torch.cuda.current_stream(1))
    with torch.cuda.device(0), torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        q = inputs.q.clone()
        inputs.q, q0 = q, inputs.q
        q.mul_(0).add_(q0)
        out, _ = decode(inputs, plan)
    stream.synchronize()
    assert_identical("out", out, want)
