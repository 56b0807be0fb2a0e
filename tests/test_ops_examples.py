"""The examples in the docstrings do what they say."""

from __future__ import annotations

import doctest

import pytest
import torch

import flashmla
from flashmla import cache, fp8
from flashmla.ops import dsa, mla, paged_kv, split_kv


@pytest.mark.parametrize(
    "module", [mla, split_kv, dsa, cache, fp8, paged_kv], ids=lambda m: m.__name__
)
def test_examples(module):
    done = doctest.testmod(module, extraglobs={"torch": torch, "flashmla": flashmla})
    assert done.attempted > 0 and done.failed == 0
