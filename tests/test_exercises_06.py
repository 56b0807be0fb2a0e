"""The checkers of exercises 06: what is right passes, planted mistakes do not."""

from __future__ import annotations

import numpy as np
import pytest

from flashmla.lab.exercises import dsa


def choose(logits, k, length, *, nan="out", inf="out", ties="lower", ordered=True, cut=True):
    """Right as it stands; each keyword plants one mistake."""
    row = logits[:length] if cut else logits
    if nan == "largest":
        candidates = np.flatnonzero((row > -np.inf) | np.isnan(row))
        key = np.where(np.isnan(row), np.inf, row)
    elif nan == "zero":
        key = np.nan_to_num(row, posinf=np.inf, neginf=-np.inf)
        candidates = np.flatnonzero(key > -np.inf)
    else:
        key, candidates = row, np.flatnonzero(row > -np.inf if inf == "out" else ~np.isnan(row))
    if ties == "lower":
        order = candidates[np.argsort(-key[candidates], kind="stable")]
    else:
        order = candidates[np.argsort(key[candidates], kind="stable")[::-1]]
    chosen = order[:k].tolist()
    return sorted(chosen) if ordered else chosen


def choose_smallest(logits, k, length):
    return choose(-logits, k, length)


def choose_with_padding(logits, k, length):
    chosen = choose(logits, k, length)
    return chosen + [-1] * (k - len(chosen))


def choose_above_the_threshold(logits, k, length):
    """Everything not below the k-th largest: too many where there are ties."""
    chosen = choose(logits, k, length)
    if not chosen:
        return []
    row = logits[:length]
    return np.flatnonzero(row >= min(row[i] for i in chosen)).tolist()


def kept(lse_sparse, lse_dense, *, base=np.e, empty=True, shift=0.0, inverse=False):
    """Right as it stands; each keyword plants one mistake."""
    difference = (lse_dense - lse_sparse) if inverse else lse_sparse - lse_dense
    share = base ** (difference + shift)
    return np.where(np.isposinf(lse_sparse), 0.0, share) if empty else share


def kept_without_shift(lse_sparse, lse_dense):
    share = np.exp(lse_sparse) / np.exp(lse_dense)
    return np.where(np.isposinf(lse_sparse), 0.0, share)


def kept_of_logarithms(lse_sparse, lse_dense):
    return np.where(np.isposinf(lse_sparse), 0.0, lse_sparse / lse_dense)


def planted(function, **mistake):
    def answer(*args):
        return function(*args, **mistake)

    answer.__name__ = f"{function.__name__}-" + "-".join(f"{k}={v}" for k, v in mistake.items())
    return answer


MISTAKES = [
    (dsa.check_choose, planted(choose, nan="largest"), "NaN among the logits"),
    (dsa.check_choose, planted(choose, nan="zero"), "NaN"),
    (dsa.check_choose, planted(choose, inf="in"), "-inf, which is no candidate"),
    (dsa.check_choose, planted(choose, ties="higher"), "many equal logits"),
    (dsa.check_choose, planted(choose, ordered=False), "sort positions"),
    (dsa.check_choose, planted(choose, cut=False), "a length of 12"),
    (dsa.check_choose, choose_smallest, "plain logits"),
    (dsa.check_choose, choose_with_padding, "a length below k"),
    (dsa.check_choose, choose_above_the_threshold, "many equal logits"),
    (dsa.check_choose, lambda *_: ..., "returned Ellipsis"),
    (dsa.check_kept, planted(kept, base=2.0), "quotient of two"),
    (dsa.check_kept, planted(kept, empty=False), "kept for six rows"),
    (dsa.check_kept, planted(kept, shift=0.01), "kept for six rows"),
    (dsa.check_kept, planted(kept, inverse=True), "kept for six rows"),
    (dsa.check_kept, kept_without_shift, "kept for six rows"),
    (dsa.check_kept, kept_of_logarithms, "kept for six rows"),
    (dsa.check_kept, lambda *_: None, "returned None"),
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


@pytest.mark.parametrize("check, right", [(dsa.check_choose, choose), (dsa.check_kept, kept)])
def test_what_the_mistakes_are_planted_in_is_right(check, right, capsys):
    check(right)
    assert capsys.readouterr().out.startswith("passed")
