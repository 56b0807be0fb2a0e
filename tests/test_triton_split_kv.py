"""The Triton tier's plan, combine and merge against the oracle, in Triton's interpreter."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from triton_bodies import check_combine, check_merge, check_plan, check_split_anywhere  # noqa: E402
from triton_worker import interpreted  # noqa: E402


def _random_plans():
    rng = np.random.default_rng(0)
    for _ in range(25):
        b = int(rng.integers(1, 12))
        seqlens = rng.integers(0, 1500, b) * (rng.random(b) > 0.3)
        check_plan(seqlens.tolist(), int(rng.integers(1, 140)))
        check_plan(rng.integers(1400, 1500, b).tolist(), int(rng.integers(1, 140)))


PLANS = {
    "no_request": ([], 4),
    "empty_requests": ([0, 0, 0], 7),
    "one_part": ([64, 0, 1], 1),
    "more_parts_than_places": ([1, 64], 132),
    "more_parts_than_a_block": ([5000, 1, 300], 200),
    "every_tile_edge": ([0, 1, 63, 64, 65, 127, 128, 129], 9),
    "cut_alike": ([4096, 4000, 4200], 66),
    "cut_alike_but_for_an_empty_one": ([4096, 4096, 0], 66),
    "one_a_part": ([640, 1300, 700], 3),
    "more_requests_than_a_block": ([i % 130 for i in range(1300)], 5),
    "places_times_parts_beyond_32_bits": ([2_000_000_000] * 3 + [5], 132),
}


@pytest.mark.parametrize(("seqlens", "parts"), PLANS.values(), ids=PLANS.keys())
def test_plan_equals_the_oracle(seqlens, parts):
    interpreted(check_plan, seqlens, parts)


def test_random_plans_equal_the_oracle():
    interpreted(_random_plans)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [1, 48, 512])
def test_merge_state_matches_the_oracle(d, dtype):
    interpreted(check_merge, d, dtype)


def test_combine_matches_the_oracle():
    interpreted(check_combine)


def test_two_halves_of_the_keys_merge_to_the_whole():
    interpreted(check_split_anywhere)
