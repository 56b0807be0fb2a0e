"""Exercises of stage 03."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from flashmla.lab.exercises.common import answer, expect_equal, passed

__all__ = ["check_pages_after_fork", "check_slots", "check_wasted_tokens"]


def check_slots(slots: Callable[..., Any]) -> None:
    """slots(table_row, positions, page): where tokens at these positions lie, counted in tokens
    from the start of the pool: block · page + offset, an int array like ``positions``."""
    cases = (
        ([7, 2, 9], [0, 63, 64, 130, 191], 64),
        ([3, 0, 5, 1], [0, 15, 16, 31, 32, 63], 16),
        ([4], [0], 1),
        ([70_000], [5], 64),
    )
    hint = "The logical page is position // page; the table turns it into a block number."
    for row, positions, page in cases:
        want = [row[t // page] * page + t % page for t in positions]
        got = answer(slots, np.array(row, np.int32), np.array(positions, np.int64), page)
        got = np.asarray(got).tolist()
        expect_equal(f"slots({row}, {positions}, page={page})", got, want, hint)
    passed("slots finds every token through the table")


def check_wasted_tokens(wasted_tokens: Callable[..., Any]) -> None:
    """wasted_tokens(lengths, page): tokens that the pages of these requests could still hold."""
    hint = "A full last page wastes nothing, and a request of length 0 has no page."
    for lengths, page in (([1, 64, 65], 64), ([0], 64), ([128, 256], 128), ([10, 20, 30], 16)):
        want = sum(-length % page for length in lengths)
        got = answer(wasted_tokens, lengths, page)
        expect_equal(f"wasted_tokens({lengths}, page={page})", got, want, hint)
    passed("wasted_tokens looks at last pages only")


def check_pages_after_fork(pages_after_fork: Callable[..., Any]) -> None:
    """pages_after_fork(length, page, children, appended): pages in use when a sequence of
    ``length`` tokens is forked into ``children``, each of which then appends ``appended`` tokens,
    while the parent lives on as it is."""
    hint = (
        "Full pages stay shared for good. A partly full one is copied by every child that "
        "writes to it, and the parent keeps its own."
    )
    for length, page, children, appended in (
        (100, 64, 3, 1),
        (128, 64, 3, 1),
        (100, 64, 3, 0),
        (100, 64, 2, 28),
        (100, 64, 2, 29),
        (1000, 16, 8, 100),
        (0, 64, 2, 1),
    ):
        own = -(-(length % page + appended) // page) if appended else 0
        want = -(-length // page) + children * own
        got = answer(pages_after_fork, length, page, children, appended)
        what = f"pages_after_fork({length}, page={page}, children={children}, appended={appended})"
        expect_equal(what, got, want, hint)
    passed("pages_after_fork shares what is full and copies what is written")
