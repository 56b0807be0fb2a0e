"""The quick way through decoding on a card: the kernels' library looks at the arguments itself.

What is in order takes it and gives what the slow way gives; what is not is found out by the slow
way, with its messages, before anything is launched.
"""

from __future__ import annotations

import threading

import pytest
import torch
from cases import DecodeCase, SparseDecodeCase, moved
from test_ops_mla import BAD_DENSE, BAD_METADATA, BAD_SPARSE, arguments, sparse_arguments

import flashmla
from flashmla import backend
from flashmla.cuda import results
from flashmla.lab.check import assert_identical, assert_lse_close, assert_out_close
from flashmla.ops import dsa, mla, split_kv

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


def on_card(value):
    """The same argument on the card; tensors on meta and what is no tensor stay what they are."""
    if isinstance(value, torch.Tensor) and value.device.type == "cpu":
        return moved(value, DEVICE)
    if isinstance(value, tuple | list):
        return type(value)(on_card(x) for x in value)
    return value


def call(given):
    return flashmla.flash_mla_with_kvcache(**given)


def good(plan_object: bool = False, **changes):
    given = {name: on_card(value) for name, value in arguments().items()}
    given["q"] = given["q"].contiguous()
    plan = flashmla.get_mla_metadata(given["cache_seqlens"], 8, 1)
    given |= {"tile_scheduler_metadata": plan[0], "num_splits": plan[1]}
    if plan_object:
        given |= {"tile_scheduler_metadata": flashmla.SplitPlan(), "num_splits": None}
    return given | changes


def refuse(*_, **__):
    raise AssertionError("took the slow way")


def test_good_calls_take_the_quick_way(monkeypatch: pytest.MonkeyPatch) -> None:
    with_object = good(plan_object=True)
    calls = [good(), good(causal=True, softmax_scale=0.05, head_dim_v=512), with_object]
    slow = []
    monkeypatch.setenv("FLASHMLA_CHECK", "1")
    for given in calls:
        slow.append(call(given))
    monkeypatch.delenv("FLASHMLA_CHECK")
    call(with_object)  # the call after the one that fills it in still looks at the plan
    monkeypatch.setattr(mla, "_checked_dense_decode", refuse)
    monkeypatch.setattr(split_kv, "_get_metadata", refuse)
    before = backend.calls["mla.dense_decode"]["cuda"]
    for given, want in zip(calls, slow, strict=True):
        for name, x, y in zip(("out", "lse"), call(given), want, strict=True):
            assert_identical(name, x, y)
    assert backend.calls["mla.dense_decode"]["cuda"] == before + 3
    lengths = calls[0]["cache_seqlens"]
    plan = flashmla.get_mla_metadata(lengths, 8, 1)
    for name, x, y in zip(("metadata", "splits"), plan, list(calls[0].values())[5:7], strict=True):
        assert_identical(name, x, y)
    assert flashmla.get_mla_metadata(lengths, 8, 1, 8, False, out=plan) is plan


def test_what_forbids_the_quick_way(monkeypatch: pytest.MonkeyPatch) -> None:
    given = good()
    call(given)
    monkeypatch.setattr(mla, "_checked_dense_decode", refuse)
    call(given)
    for name, value in (("FLASHMLA_CHECK", "1"), ("FLASHMLA_BACKEND", "triton")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(AssertionError, match="slow way"):
                call(given)
        call(given)
    with backend.use_backend("torch"), pytest.raises(AssertionError, match="slow way"):
        call(given)
    with backend.use_backend("cuda"):
        call(given)


def argument_of(message: str) -> str:
    """The part of an error message that does not depend on the device: the argument's name."""
    return message.split(" must")[0].split(" has")[0]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_DENSE, ids=lambda x: str(x)[:24])
def test_bad_dense_input(changes, error, message) -> None:
    given = {name: on_card(value) for name, value in arguments(**changes).items()}
    with pytest.raises(error, match=argument_of(message)):
        call(given)


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), BAD_METADATA)
def test_bad_metadata_input(args, kwargs, error, message) -> None:
    kwargs = {name: on_card(value) for name, value in kwargs.items()}
    with pytest.raises(error, match=argument_of(message)):
        flashmla.get_mla_metadata(*map(on_card, args), **kwargs)


def test_tensors_of_another_kind_of_memory() -> None:
    """One tensor left on the CPU, of another type, scattered, cut short: named, each of them."""
    tensors = ["k_cache", "block_table", "cache_seqlens", "tile_scheduler_metadata", "num_splits"]
    for name in tensors:
        given = good()
        for change, error in (
            (lambda x: x.cpu(), ValueError),
            (lambda x: x.double(), TypeError),
            (lambda x: x[None], ValueError),
            (lambda x: x.repeat_interleave(2, -1)[..., ::2], ValueError),
            (lambda x: None, TypeError),
        ):
            with pytest.raises(error, match=name):
                call(given | {name: change(given[name])})


@pytest.mark.parametrize("what", ["heads apart", "tokens apart", "begins askew", "a parameter"])
def test_queries_that_only_the_slow_way_takes(what: str) -> None:
    case = DecodeCase("scattered", (700, 64, 1), s_q=2, h_q=16, causal=True, strided=False, seed=11)
    inputs = case.build(DEVICE)
    plan = flashmla.get_mla_metadata(inputs.cache_seqlens, 32, 1)
    q = inputs.q
    if what == "heads apart":
        q = torch.cat([q, q], -1)[..., :576]
    elif what == "tokens apart":
        q = torch.stack([q, q], 2)[:, :, 1]
    elif what == "begins askew":
        q = torch.cat([q.new_zeros(1), q.flatten()])[1:].view(q.shape)
    else:
        q = torch.nn.Parameter(q)
    with backend.use_backend("cuda"):
        out, lse = flashmla.flash_mla_with_kvcache(
            q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, *plan, causal=True
        )
    want_out, want_lse = inputs.expected()
    assert_out_close(out, want_out)
    assert_lse_close(lse, want_lse)


def test_threads_on_streams_of_their_own() -> None:
    """Eight threads decode at the same time, each its own problem on its own stream."""
    problems = []
    for i in range(8):
        case = DecodeCase("thread", (200 + 300 * i, 64 * i, 1, 3000), h_q=16 * (i + 1), seed=i)
        inputs = case.build(DEVICE)
        plan = flashmla.get_mla_metadata(inputs.cache_seqlens, case.h_q, 1)
        arguments = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, *plan)
        problems.append((arguments, flashmla.flash_mla_with_kvcache(*arguments)))
    torch.cuda.synchronize()
    differing: list[int] = []

    def work(number: int) -> None:
        arguments, want = problems[number]
        with torch.cuda.stream(torch.cuda.Stream()):
            results = [flashmla.flash_mla_with_kvcache(*arguments) for _ in range(50)]
            torch.cuda.current_stream().synchronize()
        if not all(torch.equal(x, y) for got in results for x, y in zip(got, want, strict=True)):
            differing.append(number)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(problems))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert differing == []


def test_memory_for_partial_results_goes_back() -> None:
    inputs = DecodeCase("memory", (5000,), h_q=128, seed=12).build(DEVICE)
    plan = flashmla.get_mla_metadata(inputs.cache_seqlens, 128, 1)
    arguments = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, 512, *plan)
    out, lse = flashmla.flash_mla_with_kvcache(*arguments)
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        out, lse = flashmla.flash_mla_with_kvcache(*arguments)
    assert torch.cuda.memory_allocated() == before
    del out, lse
    rounded = 512 * 128 * 2 + 512  # allocations are multiples of 512 bytes
    assert torch.cuda.memory_allocated() == before - rounded


@pytest.mark.parametrize(
    "changes",
    [{"_quick_empty": None}, {"_quick_empty": refuse, "current_device": lambda: -1}],
    ids=["no such function", "another device"],
)
@pytest.mark.parametrize("inference", [False, True])
def test_results_are_the_tensors_that_torch_would_make(
    changes, inference: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever way to memory is taken: the quickest, or new_empty where that one is closed."""
    assert results._quick_empty is not None, "this torch has lost it, and calls take longer"
    given = good()
    with torch.inference_mode(inference):
        quick = call(given)
        for name, value in changes.items():
            monkeypatch.setattr(results, name, value)
        plain = call(given)
        made = given["q"].new_empty(*quick[0].shape)
    for name, x, y in zip(("out", "lse"), quick, plain, strict=True):
        assert_identical(name, x, y)
        for z in (x, y):
            assert z.is_inference() is inference and not z.requires_grad and z.is_contiguous()
            assert z.device == given["q"].device and z.stride() == y.stride()
            assert z.untyped_storage().nbytes() == z.numel() * z.element_size()
    assert quick[0].dtype == made.dtype and quick[0].stride() == made.stride()
    assert quick[1].dtype == torch.float32


SPARSE = SparseDecodeCase("quick", 2, 2, 40, 300, 20, sink=True, invalid=0.0, seed=90)


def good_sparse(case: SparseDecodeCase = SPARSE, **changes):
    x = case.build(DEVICE)
    given = dict(
        q=x.q, k_cache=x.k_cache, block_table=None, cache_seqlens=None, head_dim_v=512,
        tile_scheduler_metadata=None, softmax_scale=x.scale, is_fp8_kvcache=case.fp8,
        indices=x.indices, attn_sink=x.attn_sink, topk_length=x.topk_length,
    )  # fmt: skip
    return given | changes


def test_good_sparse_calls_take_the_quick_way(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = torch.tensor([9, 3], dtype=torch.int32, device=DEVICE)
    plan = flashmla.get_mla_metadata(lengths, 80, 1)
    tensors = dict(tile_scheduler_metadata=plan[0], num_splits=plan[1])
    claimed = flashmla.SplitPlan()
    given = good_sparse()
    lists = SparseDecodeCase("lists", 1, 1, 128, 4096, 64, fp8=False, invalid=0.0, seed=91)
    calls = [
        given,
        good_sparse(k_cache=given["k_cache"].view(torch.float8_e4m3fn), head_dim_v=512),
        good_sparse(cache_seqlens=lengths, block_table=lengths[:, None], **tensors),
        good_sparse(tile_scheduler_metadata=claimed),
        good_sparse(topk_length=lengths),
        good_sparse(topk_length=torch.full((2, 2), 7, dtype=torch.int32, device=DEVICE)),
        good_sparse(indices=given["indices"][:1].expand(2, 2, 300)[:, :, 5:250].contiguous()),
        good_sparse(lists),
    ]
    slow = []
    monkeypatch.setenv("FLASHMLA_CHECK", "1")
    for given in calls:
        slow.append(call(given))
    monkeypatch.delenv("FLASHMLA_CHECK")
    monkeypatch.setattr(dsa, "sparse_decode", refuse)
    before = backend.calls["dsa.sparse_decode"]["cuda"]
    for given, want in zip(calls, slow, strict=True):
        for name, x, y in zip(("out", "lse"), call(given), want, strict=True):
            assert_identical(name, x, y)
    assert backend.calls["dsa.sparse_decode"]["cuda"] == before + len(calls)
    for name, value in (("FLASHMLA_CHECK", "1"), ("FLASHMLA_BACKEND", "triton")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(AssertionError, match="slow way"):
                call(given)


@pytest.mark.parametrize(("changes", "error", "message"), BAD_SPARSE, ids=lambda x: str(x)[:24])
def test_bad_sparse_input(changes, error, message) -> None:
    given = {name: on_card(value) for name, value in sparse_arguments(**changes).items()}
    plan = given["tile_scheduler_metadata"]
    if isinstance(plan, flashmla.SplitPlan):
        tensors = plan.tile_scheduler_metadata, plan.num_splits
        given["tile_scheduler_metadata"] = flashmla.SplitPlan(*map(on_card, tensors))
    with pytest.raises(error, match=argument_of(message)):
        call(given)


def test_sparse_tensors_of_another_kind_of_memory() -> None:
    lengths = torch.tensor([9, 3], dtype=torch.int32, device=DEVICE)
    plan = flashmla.get_mla_metadata(lengths, 80, 1)
    given = good_sparse(
        topk_length=lengths, cache_seqlens=lengths, block_table=lengths[:, None].repeat(1, 2),
        tile_scheduler_metadata=plan[0], num_splits=plan[1],
    )  # fmt: skip
    names = [name for name, x in given.items() if isinstance(x, torch.Tensor) and name != "q"]
    assert len(names) == 8
    call(given)
    for name in names:
        for change, error in (
            (lambda x: x.cpu(), ValueError),
            (lambda x: x.double(), TypeError),
            (lambda x: x[None], ValueError),
            (lambda x: x.repeat_interleave(2, -1)[..., ::2], ValueError),
        ):
            with pytest.raises(error, match=name):
                call(given | {name: change(given[name])})


@pytest.mark.parametrize("what", ["heads apart", "requests apart", "begins askew", "lists apart"])
def test_sparse_calls_that_only_the_slow_way_takes(
    what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = good_sparse()
    want = call(given)
    q, indices = given["q"], given["indices"]
    if what == "heads apart":
        q = torch.cat([q, q[..., :4]], -1)[..., :576]
    elif what == "requests apart":
        q = torch.cat([q, q], 1)[:, :2]
    elif what == "begins askew":
        q = torch.cat([q.new_zeros(1), q.flatten()])[1:].view(q.shape)
    else:
        indices = torch.cat([indices, indices], 1)[:, :2]
    given |= dict(q=q, indices=indices)
    for name, x, y in zip(("out", "lse"), call(given), want, strict=True):
        assert_identical(name, x, y)
    monkeypatch.setattr(dsa, "sparse_decode", refuse)
    with pytest.raises(AssertionError, match="slow way"):
        call(given)


def test_memory_for_partial_sparse_results_goes_back() -> None:
    given = good_sparse(SparseDecodeCase("memory", 1, 1, 128, 8192, 200, seed=92))
    out, lse = call(given)
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        out, lse = call(given)
    assert torch.cuda.memory_allocated() == before
    del out, lse
    rounded = 512 * 128 * 2 + 512  # allocations are multiples of 512 bytes
    assert torch.cuda.memory_allocated() == before - rounded
