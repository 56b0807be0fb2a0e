"""The checkers of exercises 00, 03 and 04: solutions pass, planted mistakes do not."""

from __future__ import annotations

import numpy as np
import pytest

from flashmla.lab.exercises import paged_kv, roofline, split_kv

# ---- 00 roofline: planted mistakes -------------------------------------------------------------


def ridge_upside_down(tflops, gbps):
    return gbps / (tflops * 1e3)


def ridge_forgets_tera(tflops, gbps):
    return tflops / gbps


def intensity_one_operation(h_q, s_q, s_k):
    rows = h_q * s_q
    return rows * s_k * 1088 / (2 * (s_k * 576 + rows * 1088))


def intensity_without_ends(h_q, s_q, s_k):
    return 2 * h_q * s_q * s_k * 1088 / (2 * s_k * 576)


def intensity_keys_and_values(h_q, s_q, s_k):
    rows = h_q * s_q
    return 2 * rows * s_k * 1088 / (2 * (s_k * 1088 + rows * 1088))


def intensity_without_rows_of_queries(h_q, s_q, s_k):
    return 2 * h_q * s_q * s_k * 1088 / (2 * (s_k * 576 + h_q * 1088))


def best_sums(flops, bytes_moved, tflops, gbps, floor_us):
    return max(flops / (tflops * 1e6) + bytes_moved / (gbps * 1e3), floor_us)


def best_without_floor(flops, bytes_moved, tflops, gbps, floor_us):
    return max(flops / (tflops * 1e6), bytes_moved / (gbps * 1e3))


def best_adds_floor(flops, bytes_moved, tflops, gbps, floor_us):
    return best_without_floor(flops, bytes_moved, tflops, gbps, floor_us) + floor_us


def best_only_memory(flops, bytes_moved, tflops, gbps, floor_us):
    return max(bytes_moved / (gbps * 1e3), floor_us)


# ---- 03 paged KV -------------------------------------------------------------------------------


def slots_without_table(table_row, positions, page):
    return positions


def slots_without_offset(table_row, positions, page):
    return table_row[positions // page] * page


def slots_of_64(table_row, positions, page):
    return table_row[np.minimum(positions // 64, len(table_row) - 1)] * 64 + positions % 64


def wasted_full_pages_too(lengths, page):
    return sum(page - length % page for length in lengths)


def wasted_of_the_sum(lengths, page):
    return -sum(lengths) % page


def wasted_half_a_page(lengths, page):
    return len(lengths) * page // 2


def fork_copies_all(length, page, children, appended):
    return -(-length // page) + children * -(-(length + appended) // page)


def fork_copies_nothing(length, page, children, appended):
    return -(-length // page) + children * -(-appended // page)


def fork_copies_without_need(length, page, children, appended):
    return -(-length // page) + children * -(-(length % page + appended) // page)


def fork_takes_parents_page(length, page, children, appended):
    own = -(-(length % page + appended) // page) if appended else 0
    return length // page + children * own


# ---- 04 split-KV -------------------------------------------------------------------------------


def merge(out_a, lse_a, out_b, lse_b, *, base=np.e, shift=True, empties=True, mean=False):
    """Right as it stands; each keyword plants one mistake."""
    if empties:
        lse_a, lse_b = (-np.inf if np.isinf(lse) else lse for lse in (lse_a, lse_b))
        if lse_a == lse_b == -np.inf:
            return np.zeros_like(out_a), np.inf
        out_a, out_b = (
            np.zeros_like(out) if lse == -np.inf else out
            for out, lse in ((out_a, lse_a), (out_b, lse_b))
        )
    top = max(lse_a, lse_b) if shift else 0.0
    with np.errstate(all="ignore"):
        weight_a, weight_b = base ** (lse_a - top), base ** (lse_b - top)
        if mean:
            return (out_a + out_b) / 2, top + np.log(weight_a + weight_b)
        total = weight_a + weight_b
        return (weight_a * out_a + weight_b * out_b) / total, top + np.log(total) / np.log(base)


def merge_right(*state):
    return merge(*state)


def merge_base_2(*state):
    return merge(*state, base=2.0)


def merge_without_shift(*state):
    return merge(*state, shift=False)


def merge_reads_empty_halves(*state):
    return merge(*state, empties=False)


def merge_means(*state):
    return merge(*state, mean=True)


def merge_empty_is_minus_infinity(*state):
    out, lse = merge(*state)
    return out, -np.inf if lse == np.inf else lse


def merge_forgets_the_lse(*state):
    return merge(*state)[0]


def merge_knows_only_minus_infinity(out_a, lse_a, out_b, lse_b):
    if lse_b == np.inf:
        return out_b, lse_b
    return merge(out_a, lse_a, out_b, lse_b)


def cut_line(lengths, parts, *, overhead=5, tile=64, clamp=True, rounding=False, end=True):
    """Right as it stands; each keyword plants one mistake."""
    line = [
        (request, max(0, place - overhead) if clamp else place)
        for request, length in enumerate(lengths)
        for place in range(overhead + -(-length // tile))
    ]
    share = -(-len(line) // parts)
    at = [
        min(p * share, len(line) - 1) if rounding else p * len(line) // parts for p in range(parts)
    ]
    return [line[place] for place in at] + ([(len(lengths), 0)] if end else [])


def cuts_right(lengths, parts):
    return cut_line(lengths, parts)


def cuts_without_overhead(lengths, parts):
    return cut_line([max(1, length) for length in lengths], parts, overhead=0)


def cuts_inside_the_overhead(lengths, parts):
    return cut_line(lengths, parts, clamp=False)


def cuts_tiles_of_128(lengths, parts):
    return cut_line(lengths, parts, tile=128)


def cuts_by_a_rounded_share(lengths, parts):
    return cut_line(lengths, parts, rounding=True)


def cuts_without_end(lengths, parts):
    return cut_line(lengths, parts, end=False)


def cuts_by_request(lengths, parts):
    return [(p * len(lengths) // parts, 0) for p in range(parts + 1)]


def unfinished(*_):
    return ...


MISTAKES = [
    (roofline.check_ridge, ridge_upside_down, "expected 266.667"),
    (roofline.check_ridge, ridge_forgets_tera, "1e12 operations a second"),
    (roofline.check_decode_intensity, intensity_one_operation, "2 · .576"),
    (roofline.check_decode_intensity, intensity_without_ends, "q once, out once"),
    (roofline.check_decode_intensity, intensity_keys_and_values, "the cache once"),
    (roofline.check_decode_intensity, intensity_without_rows_of_queries, "s_q=2"),
    (roofline.check_best_us, best_sums, "memory decides.*overlap"),
    (roofline.check_best_us, best_without_floor, "the floor decides"),
    (roofline.check_best_us, best_adds_floor, "memory decides"),
    (roofline.check_best_us, best_only_memory, "arithmetic decides"),
    (paged_kv.check_slots, slots_without_table, r"page=64\): expected \[448"),
    (paged_kv.check_slots, slots_without_offset, "expected"),
    (paged_kv.check_slots, slots_of_64, "page=16"),
    (paged_kv.check_wasted_tokens, wasted_full_pages_too, "full last page"),
    (paged_kv.check_wasted_tokens, wasted_of_the_sum, "expected 126"),
    (paged_kv.check_wasted_tokens, wasted_half_a_page, "expected 126, got 96"),
    (paged_kv.check_pages_after_fork, fork_copies_all, "stay shared"),
    (paged_kv.check_pages_after_fork, fork_copies_nothing, "appended=29.*copied by every child"),
    (paged_kv.check_pages_after_fork, fork_copies_without_need, "appended=0"),
    (paged_kv.check_pages_after_fork, fork_takes_parents_page, "keeps its own"),
    (split_kv.check_merge, merge_base_2, "5 keys and 7"),
    (split_kv.check_merge, merge_means, "out of 5 keys and 7"),
    (split_kv.check_merge, merge_without_shift, "scores near 2000"),
    (split_kv.check_merge, merge_reads_empty_halves, "empty second half"),
    (split_kv.check_merge, merge_knows_only_minus_infinity, "empty second half, LSE .inf"),
    (split_kv.check_merge, merge_empty_is_minus_infinity, "lse of two empty halves"),
    (split_kv.check_merge, merge_forgets_the_lse, r"must return \(out, lse\)"),
    (split_kv.check_cuts, cuts_without_overhead, "5 . ceil"),
    (split_kv.check_cuts, cuts_inside_the_overhead, "moves to the request's tile 0"),
    (split_kv.check_cuts, cuts_tiles_of_128, "expected"),
    (split_kv.check_cuts, cuts_by_a_rounded_share, "parts="),
    (split_kv.check_cuts, cuts_without_end, "expected"),
    (split_kv.check_cuts, cuts_by_request, "expected"),
    (roofline.check_ridge, unfinished, "returned Ellipsis"),
    (paged_kv.check_slots, unfinished, "returned Ellipsis"),
    (split_kv.check_cuts, unfinished, "returned Ellipsis"),
]


@pytest.mark.parametrize(
    "check, mistake, message",
    MISTAKES,
    ids=[f"{check.__name__}-{mistake.__name__}" for check, mistake, _ in MISTAKES],
)
def test_a_planted_mistake_is_caught(check, mistake, message, capsys):
    with pytest.raises(AssertionError, match=message):
        check(mistake)
    assert "passed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "check, right", [(split_kv.check_merge, merge_right), (split_kv.check_cuts, cuts_right)]
)
def test_what_the_mistakes_are_planted_in_is_right(check, right, capsys):
    check(right)
    assert capsys.readouterr().out.startswith("passed")
