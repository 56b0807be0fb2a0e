"""PagedKVCache: what is in it, who owns which page, and that failures change nothing."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from cases import to_numpy

import flashmla
from flashmla import OutOfPages, PagedKVCache, fp8
from flashmla.lab.check import assert_lse_close, assert_out_close
from flashmla.reference.paged_kv import paged_decode


def make(num_pages=8, page_size=4, **options):
    return PagedKVCache(num_pages, page_size, head_dim=3, dtype=torch.float32, **options)


def tokens(n, start=0.0, d=3):
    """Different numbers everywhere."""
    return torch.arange(n * d, dtype=torch.float32).view(n, 1, d) + start


def contents(cache, sequence):
    """The tokens of a sequence, read through the device's tables."""
    table, lengths = cache.tables([sequence])
    pages = cache.kv[table[0].clamp(min=0).long()]
    return pages.flatten(0, 1)[: int(lengths[0])]


def state(cache):
    """Everything that a failed call must leave as it was, the free pages as a set."""
    host = {name: (m.row, m.length, list(m.pages)) for name, m in cache._sequences.items()}
    device = [cache.kv.clone(), cache.block_table.clone(), cache.lengths.clone()]
    return copy.deepcopy(host), sorted(cache._free_pages), list(cache._owners), device


def assert_same_state(cache, before):
    after = state(cache)
    assert after[:3] == before[:3]
    assert all(torch.equal(x, y) for x, y in zip(after[3], before[3], strict=True))


def assert_consistent(cache):
    """Each page is free or owned, as often as sequences name it; the device says the same."""
    owners = [0] * cache.num_pages
    for name in cache.sequences:
        pages = cache.pages(name)
        assert len(pages) == len(set(pages)) == -(-cache.length(name) // cache.page_size)
        for page in pages:
            owners[page] += 1
    assert owners == cache._owners
    assert sorted(cache._free_pages) == [p for p, n in enumerate(owners) if n == 0]
    rows = {cache._sequences[name].row: name for name in cache.sequences}
    for row in range(len(cache.lengths)):
        name = rows.get(row)
        pages = [] if name is None else cache.pages(name)
        assert cache.block_table[row].tolist() == pages + [-1] * (
            cache.block_table.shape[1] - len(pages)
        )
        assert cache.lengths[row] == (0 if name is None else cache.length(name))


def test_append_token_by_token_and_all_at_once():
    cache = make()
    whole, stepwise = cache.allocate(tokens(10)), cache.allocate()
    for token in tokens(10).split(1):
        cache.append(stepwise, token)
    for sequence in (whole, stepwise):
        assert torch.equal(contents(cache, sequence), tokens(10))
        assert cache.length(sequence) == 10
    assert set(cache.pages(whole)).isdisjoint(cache.pages(stepwise))
    assert cache.free_pages == 2
    assert_consistent(cache)


def test_append_to_several():
    cache = make()
    names = [cache.allocate(tokens(n, 100 * n)) for n in (0, 3, 4)]
    new = torch.randn(3, 2, 1, 3)
    cache.append(names, new)
    for name, n, added in zip(names, (0, 3, 4), new, strict=True):
        assert torch.equal(contents(cache, name), torch.cat([tokens(n, 100 * n), added]))
    table, lengths = cache.tables(names[::-1])
    assert lengths.tolist() == [6, 5, 2] and lengths.dtype == table.dtype == torch.int32
    assert table.shape == (3, 2) and table[2].tolist() == [cache.pages(names[0])[0], -1]
    assert_consistent(cache)


def test_the_head_may_be_left_out_if_there_is_one():
    cache = make()
    name = cache.allocate(tokens(5)[:, 0])
    cache.append([name], tokens(2, 50.0)[None, :, 0])
    assert torch.equal(contents(cache, name), torch.cat([tokens(5), tokens(2, 50.0)]))


def test_free_gives_pages_back_and_the_buffers_stay_put():
    cache = make()
    buffers = [x.data_ptr() for x in (cache.kv, cache.block_table, cache.lengths)]
    for _ in range(5):
        names = [cache.allocate(tokens(9)), cache.allocate(tokens(17))]
        assert cache.free_pages == 0
        cache.free(names)
        assert cache.free_pages == 8 and cache.sequences == []
        assert_consistent(cache)
    assert buffers == [x.data_ptr() for x in (cache.kv, cache.block_table, cache.lengths)]


def test_fork_shares_full_pages_and_copies_the_partly_full_one():
    cache = make()
    parent = cache.allocate(tokens(6))
    child = cache.fork(parent)
    assert cache.pages(child) == cache.pages(parent) and cache.free_pages == 6
    cache.append(child, tokens(1, 70.0))
    assert cache.pages(child)[0] == cache.pages(parent)[0]
    assert cache.pages(child)[1] != cache.pages(parent)[1]
    cache.append(parent, tokens(1, 90.0))
    assert cache.free_pages == 5  # the parent had its page to itself again: nothing to copy
    assert torch.equal(contents(cache, child), torch.cat([tokens(6), tokens(1, 70.0)]))
    assert torch.equal(contents(cache, parent), torch.cat([tokens(6), tokens(1, 90.0)]))
    assert_consistent(cache)


def test_fork_at_a_page_boundary_copies_nothing():
    cache = make()
    parent = cache.allocate(tokens(8))
    child = cache.fork(parent)
    cache.append([parent, child], torch.stack([tokens(1, 70.0), tokens(1, 90.0)]))
    assert cache.pages(child)[:2] == cache.pages(parent)[:2] and cache.free_pages == 4
    assert torch.equal(contents(cache, child), torch.cat([tokens(8), tokens(1, 90.0)]))
    assert torch.equal(contents(cache, parent), torch.cat([tokens(8), tokens(1, 70.0)]))


@pytest.mark.parametrize("length", [0, 1, 3, 4, 5, 8])
def test_fork_of_a_prefix(length):
    cache = make()
    parent = cache.allocate(tokens(9))
    child = cache.fork(parent, length)
    cache.append(child, tokens(3, 70.0))
    assert torch.equal(contents(cache, child), torch.cat([tokens(9)[:length], tokens(3, 70.0)]))
    assert torch.equal(contents(cache, parent), tokens(9))
    assert_consistent(cache)


def test_a_fork_outlives_its_parent():
    cache = make()
    parent = cache.allocate(tokens(6))
    child = cache.fork(parent)
    cache.free(parent)
    assert cache.free_pages == 6
    cache.append(child, tokens(1, 70.0))
    assert cache.free_pages == 6  # the last owner writes in place
    assert torch.equal(contents(cache, child), torch.cat([tokens(6), tokens(1, 70.0)]))
    cache.free(child)
    assert cache.free_pages == 8


def test_owners_that_part_together_need_one_copy_less_than_they_are():
    cache = make(num_pages=3)
    names = [cache.allocate(tokens(2))]
    names += [cache.fork(names[0]), cache.fork(names[0])]
    new = torch.randn(3, 1, 1, 3)
    cache.append(names, new)  # 3 owners and 2 free pages: the last of them keeps the page
    for name, added in zip(names, new, strict=True):
        assert torch.equal(contents(cache, name), torch.cat([tokens(2), added]))
    assert cache.free_pages == 0
    assert_consistent(cache)


def test_out_of_pages_changes_nothing():
    cache = make()
    first, second = cache.allocate(tokens(14)), cache.allocate(tokens(13))
    before = state(cache)
    with pytest.raises(OutOfPages, match=r"appending 5 tokens to 2 sequences needs 2 pages, and 0"):
        cache.append([first, second], torch.zeros(2, 5, 1, 3))
    assert_same_state(cache, before)
    with pytest.raises(OutOfPages, match=r"needs 1 pages, and 0 of 8 are free; nothing was"):
        cache.allocate(tokens(1))
    assert_same_state(cache, before)
    child = cache.fork(first)
    before = state(cache)
    with pytest.raises(OutOfPages):
        cache.append(child, tokens(1))  # a copy takes a page too
    assert_same_state(cache, before)
    cache.free(second)
    cache.append(child, tokens(1, 70.0))
    assert torch.equal(contents(cache, child), torch.cat([tokens(14), tokens(1, 70.0)]))
    assert_consistent(cache)


def test_double_free_changes_nothing():
    cache = make()
    first, second = cache.allocate(tokens(5)), cache.allocate(tokens(5))
    cache.free(first)
    before = state(cache)
    for wrong in (first, [second, first], [second, second], 99, [second, -1]):
        with pytest.raises(ValueError):
            cache.free(wrong)
        assert_same_state(cache, before)
    with pytest.raises(ValueError, match=f"sequence {first} is not alive: it was freed"):
        cache.free(first)
    with pytest.raises(ValueError, match="sequence 99 is not alive: no such sequence was given"):
        cache.free(99)
    with pytest.raises(ValueError, match="sequences must differ from one another"):
        cache.free([second, second])
    assert cache.allocate() not in (first, second)  # a name is never given out again
    for use in (cache.length, cache.pages, cache.fork, lambda s: cache.append(s, tokens(1))):
        with pytest.raises(ValueError, match="it was freed"):
            use(first)


def test_wrong_tokens_change_nothing():
    cache = make(num_heads=2)
    name = cache.allocate(torch.zeros(3, 2, 3))
    before = state(cache)
    wrong = [
        (name, [[0.0]], TypeError, r"tokens must be a torch.Tensor \[n, num_heads, head_dim], got"),
        (
            name,
            torch.zeros(1, 2, 3).half(),
            TypeError,
            "tokens must be of dtype float32, got float16",
        ),
        (name, torch.zeros(1, 2, 4), ValueError, r"num_heads 2, head_dim 3, got \[1, 2, 4]"),
        (name, torch.zeros(1, 3), ValueError, r"got \[1, 3]"),
        (name, torch.zeros(1, 2, 3, device="meta"), ValueError, "must be on cpu, got meta"),
        ([name], torch.zeros(2, 1, 2, 3), ValueError, r"with b 1, num_heads 2, head_dim 3, got"),
        ([name, name], torch.zeros(2, 1, 2, 3), ValueError, "must differ from one another"),
    ]
    for sequences, value, error, message in wrong:
        with pytest.raises(error, match=message):
            cache.append(sequences, value)
        assert_same_state(cache, before)
    with pytest.raises(
        ValueError, match=r"length must be at most the 3 tokens of sequence 0, got 4"
    ):
        cache.fork(name, 4)
    assert_same_state(cache, before)
    cache.append(name, torch.zeros(0, 2, 3))
    cache.append([], torch.zeros(0, 5, 2, 3))
    assert_same_state(cache, before)


def test_an_append_that_fails_halfway_changes_nothing(monkeypatch):
    """Whichever tensor cannot be made, and if the write itself is refused."""
    cache = make(num_pages=12)
    parent = cache.allocate(tokens(6))
    names = [parent, cache.fork(parent), cache.allocate(tokens(4))]
    before = state(cache)

    def fail_at(call):
        count = [0]

        def tensor(*args, **kwargs):
            count[0] += 1
            if count[0] > call:
                raise RuntimeError("no memory")
            return original(*args, **kwargs)

        return tensor

    original = torch.tensor
    new = torch.randn(3, 5, 1, 3)
    for action in (lambda: cache.append(names, new), lambda: cache.allocate(tokens(3)),
                   lambda: cache.fork(parent), lambda: cache.free(names)):  # fmt: skip
        for call in range(3):
            with monkeypatch.context() as patch:
                patch.setattr(torch, "tensor", fail_at(call))
                with pytest.raises(RuntimeError, match="no memory"):
                    action()
            assert_same_state(cache, before)
    with monkeypatch.context() as patch:
        patch.setattr(cache, "_write", fail_at(0))
        with pytest.raises(RuntimeError, match="no memory"):
            cache.append(names, new)
    assert_consistent(cache)
    cache.append(names, new)
    assert_consistent(cache)
    assert torch.equal(contents(cache, names[1]), torch.cat([tokens(6), new[1]]))


def test_a_cache_made_in_inference_mode_refuses_writes_from_outside():
    with torch.inference_mode():
        cache = make()
        name = cache.allocate(tokens(3))
    before = state(cache)
    for action in (lambda: cache.append(name, tokens(1)), lambda: cache.fork(name),
                   lambda: cache.free(name), lambda: cache.allocate(tokens(2))):  # fmt: skip
        with pytest.raises(RuntimeError, match="[Ii]nference"):
            action()
        assert_same_state(cache, before)
    with torch.inference_mode():
        cache.append(name, tokens(1, 9.0))
    assert cache.length(name) == 4


def test_no_gradients_get_in():
    cache = make()
    name = cache.allocate(tokens(3).requires_grad_())
    for _ in range(2):
        cache.append([name], tokens(1)[None].requires_grad_())
    assert not cache.kv.requires_grad and cache.kv.grad_fn is None
    assert torch.is_grad_enabled()
    packed = PagedKVCache(2, 64, fp8_format=True)
    packed.allocate(torch.randn(3, 576).requires_grad_())
    assert not packed.kv.requires_grad


def test_names_of_sequences_and_pages():
    cache = make()
    first, second = cache.allocate(tokens(3)), cache.allocate(tokens(5))
    cache.append(np.int64(second), tokens(1))
    cache.append(np.array([first, second]), torch.zeros(2, 1, 1, 3))
    assert cache.length(np.int64(second)) == 7 and cache.length(first) == 4
    assert cache.tables((np.int32(second),))[1].tolist() == [7]
    before = state(cache)
    wrong = [
        (lambda: cache.length(True), r"sequence must be an int, got bool"),
        (lambda: cache.pages(None), r"sequence must be an int, got NoneType"),
        (lambda: cache.fork(1.0), r"sequence must be an int, got float"),
        (lambda: cache.free(None), r"sequences must be an int or a sequence of ints, got NoneType"),
        (lambda: cache.free(True), r"sequences must be an int, got bool"),
        (lambda: cache.free([first, True]), r"sequences\[1] must be an int, got bool"),
        (lambda: cache.append(0.5, tokens(1)), r"sequences must be an int or a .*, got float"),
        (lambda: cache.append([[0]], tokens(1)), r"sequences\[0] must be an int, got list"),
        (lambda: cache.append(torch.tensor(0), tokens(1)), r"sequences must be .*, got Tensor"),
        (lambda: cache.tables(0), r"sequences must be a sequence of ints, got int"),
        (lambda: cache.tables("01"), r"sequences must be an int or a sequence of ints, got str"),
        (lambda: cache.owners(1.0), r"page must be an int, got float"),
        (lambda: PagedKVCache(2, dtype=torch.int8), r"dtype must be .*, got torch.int8"),
        (lambda: PagedKVCache(2, dtype="half"), r"dtype must be .*, got 'half'"),
    ]
    for action, message in wrong:
        with pytest.raises(TypeError, match=message):
            action()
        assert_same_state(cache, before)
    for page, message in ((-1, "page must be at least 0, got -1"), (99, "at most 7, got 99")):
        with pytest.raises(ValueError, match=message):
            cache.owners(page)
    assert cache.owners(cache.pages(first)[0]) == 1


def test_limits():
    cache = make(max_sequences=2, max_pages_per_sequence=2)
    name = cache.allocate(tokens(8))
    before = state(cache)
    with pytest.raises(ValueError, match=r"sequence 0 would have 9 tokens, more than the 8 of max"):
        cache.append(name, tokens(1))
    assert_same_state(cache, before)
    cache.fork(name)
    before = state(cache)
    for make_another in (cache.allocate, lambda: cache.fork(name)):
        with pytest.raises(
            RuntimeError, match="max_sequences is 2 and as many sequences are alive"
        ):
            make_another()
        assert_same_state(cache, before)
    with pytest.raises(ValueError, match="num_pages must be at least 1, got 0"):
        make(num_pages=0)
    with pytest.raises(
        ValueError, match="fp8_format needs num_heads 1 and head_dim 576, got 1 and"
    ):
        make(fp8_format=True)


def test_anything_goes_for_a_while():
    """A thousand random steps against a model that keeps each sequence's tokens in a list."""
    rng = random.Random(1)
    cache = make(num_pages=20, max_sequences=6)
    model = {}
    refused = 0
    for step in range(1000):
        action = rng.choice(["allocate", "append", "append", "append", "fork", "free"])
        try:
            if action == "allocate":
                new = tokens(rng.randrange(9), 10.0 * step)
                model[cache.allocate(new)] = new
            elif model and action == "append":
                names = rng.sample(sorted(model), rng.randint(1, min(3, len(model))))
                n = rng.randrange(6)
                new = torch.randn(len(names), n, 1, 3)
                cache.append(names, new)
                for name, added in zip(names, new, strict=True):
                    model[name] = torch.cat([model[name], added])
            elif model and action == "fork":
                parent = rng.choice(sorted(model))
                length = rng.randint(0, len(model[parent]))
                model[cache.fork(parent, length)] = model[parent][:length]
            elif model and action == "free":
                name = rng.choice(sorted(model))
                cache.free(name)
                del model[name]
        except RuntimeError:
            refused += 1
        if step % 10 == 0:
            assert_consistent(cache)
            for name, want in model.items():
                assert torch.equal(contents(cache, name), want)
    assert refused > 50
    cache.free(sorted(model))
    assert cache.free_pages == 20


def test_decode_through_the_cache_is_the_oracles():
    cache = PagedKVCache(16, 64)
    cache.kv.fill_(float("nan"))
    parent = cache.allocate((torch.randn(100, 576) * 0.1).bfloat16())
    names = [parent, cache.fork(parent), cache.allocate()]
    cache.append(names, (torch.randn(3, 2, 576) * 0.1).bfloat16())
    table, lengths = cache.tables(names)
    q = (torch.randn(3, 2, 8, 576) * 10).bfloat16()
    plan, _ = flashmla.get_mla_metadata()
    out, lse = flashmla.flash_mla_with_kvcache(q, cache.kv, table, lengths, 512, plan, causal=True)
    arrays = [to_numpy(x) for x in (q, cache.kv, table, lengths)]
    want_out, want_lse = paged_decode(*arrays, 512, 576**-0.5, True)
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)


def test_fp8_cache():
    cache = PagedKVCache(4, 64, fp8_format=True)
    assert cache.kv.shape == (4, 64, 1, 656) and cache.kv.dtype == torch.uint8
    x = torch.randn(70, 576).bfloat16()
    parent = cache.allocate(x)
    child = cache.fork(parent)
    cache.append(child, torch.zeros(1, 576))
    table, _ = cache.tables([child])
    rows = cache.kv[table[0].long()].view(-1, 656)[:71]
    want = fp8.pack(torch.cat([x, torch.zeros(1, 576).bfloat16()]))
    np.testing.assert_array_equal(rows.numpy(), want.numpy())
