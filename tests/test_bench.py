"""The benchmark's own parts: what a case needs, what the clock does, what a file says."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import flashmla
from flashmla.bench import cases, mha, peers, plots, problems, roofline, run, sparse, timing
from flashmla.bench.cases import CASES, QUICK, SWEEP, TINY, Case, PrefillCase, select
from flashmla.reference import fp8, paged_kv

CPU = torch.device("cpu")
H100 = roofline.Ceilings(read_gbps=3110.0, copy_gbps=3020.0, matmul_tflops=800.0)


# ---- cases -----------------------------------------------------------------------------------


def test_names_are_unique_and_quick_cases_are_cases():
    assert len({(case.op, case.name) for case in (*CASES, *TINY)}) == len(CASES) + len(TINY)
    assert set(QUICK) <= set(CASES)


@pytest.mark.parametrize(
    ("name", "us", "tflops", "gbps"),
    [  # time, and the rates that follow from it by the counting that such kernels are quoted in
        ("b=128 h_q=128 s_q=1 s_k=4096", 243, 600, 2628),
        ("b=128 h_q=128 s_q=2 s_k=4096", 476, 613, 1417),
        ("b=128 h_q=128 s_q=2 s_k=32768", 3720, 628, 1318),
        ("b=128 h_q=64 s_q=1 s_k=4096", 213, 343, 2922),
        ("b=128 h_q=16 s_q=1 s_k=16384", 818, 89, 2959),
        ("b=1 h_q=128 s_q=1 s_k=131072", 92, 397, 1646),
        ("b=128 h_q=128 s_q=2 topk=2048", 343, 426, 1210),
        ("h_q=128 s_q=4096 s_kv=8192 topk=2048", 3822, 611, None),
    ],
)
def test_operations_and_bytes_of_a_case(name, us, tflops, gbps):
    case = next(case for case in CASES if case.name == name)
    assert case.flops / us / 1e6 == pytest.approx(tflops, rel=6e-3)
    if gbps is not None:
        assert case.bytes_moved / us / 1e3 == pytest.approx(gbps, rel=6e-3)


def test_lengths_vary_alike_at_every_call_and_hold_the_queries():
    case = next(case for case in CASES if case.spread)
    lengths = case.lengths()
    assert lengths.dtype == np.int32 and np.array_equal(lengths, case.lengths())
    assert lengths.min() >= case.s_q and 3000 < lengths.std() < 5000
    assert case.bytes_moved > int(lengths.sum()) * 1152


def test_selection_by_operation_and_device():
    assert select("dense_decode", "cpu") == TINY
    assert {case.op for case in select("sparse_prefill", "cuda")} == {"sparse_prefill"}
    assert select("all", "cuda") == CASES and select("all", "cuda", quick=True) == QUICK
    message = "op is 'attention', expected 'all', 'sweep' or one of dense"
    with pytest.raises(ValueError, match=message):
        select("attention", "cpu")


# ---- problems --------------------------------------------------------------------------------

GROUPED = Case("dense_decode", b=3, h_q=8, s_q=2, s_k=100, h_kv=2, spread=60)


@pytest.mark.parametrize("case", [*TINY, GROUPED], ids=lambda case: case.name)
def test_reference_of_a_problem_agrees_with_the_oracle(case: Case):
    problem = problems.dense_decode(case, CPU)
    want, _ = paged_kv.paged_decode(
        problem.q.double().numpy(), problem.caches[1].double().numpy(),
        problem.block_table.numpy(), problem.cache_seqlens.numpy(),
        cases.D_V, problem.scale, case.causal,
    )  # fmt: skip
    for sequence in range(case.b):
        got = problem.reference(sequence, copy=1).numpy()
        assert np.abs(got - want[sequence]).max() < 1e-10


def test_copies_differ_and_pages_are_scattered():
    problem = problems.dense_decode(replace(TINY[0], b=4, s_k=1024), CPU)
    assert not torch.equal(problem.caches[0], problem.caches[1])
    pages = problem.block_table.flatten()
    assert sorted(pages.tolist()) == list(range(len(pages)))
    assert not torch.equal(pages, pages.sort().values)


def test_error_sees_one_wrong_number():
    problem = problems.dense_decode(TINY[0], CPU)
    out = torch.stack([problem.reference(i) for i in range(TINY[0].b)])
    assert problem.error(out) == 0.0
    out[-1, 0, 3, 77] += 0.25
    assert problem.error(out) == pytest.approx(0.25)


@pytest.mark.parametrize(
    "case",
    [Case("topk", b=3, s_k=300, topk=20), Case("indexer", h_q=4, s_q=3, s_k=70),
     Case("indexer_paged", b=2, h_q=4, s_q=2, s_k=130, spread=30),
     Case("dsa_step", b=2, h_q=4, s_q=2, s_k=130, spread=30, topk=20)],
    ids=lambda case: case.name,
)  # fmt: skip
def test_problems_of_choosing_tokens(case: Case):
    problem = problems.MAKERS[case.op](case, CPU)
    assert problem.copies == (1 if case.op == "indexer" else 2)
    for copy in range(problem.copies):
        result = problem.side()(copy)[0]
        assert problem.error(result, copy) < (1e-2 if case.op == "dsa_step" else 2e-4)
        result[-1, ..., 5] += 1
        assert problem.error(result, copy) > (0.3 if case.op == "topk" else 0.99)


def test_bytes_and_operations_of_choosing_tokens():
    by_name = {(case.op, case.name): case for case in CASES}
    rows = by_name["topk", "rows=4096 n=32768 k=2048"]
    assert rows.bytes_moved == 4096 * (32768 + 2048) * 4 and rows.flops == 0
    prompt = by_name["indexer", "h_q=64 s_q=4096 s_kv=32768"]
    assert prompt.flops == 2 * 4096 * 32768 * 64 * 128 == 2 * prompt.flops_as_bf16
    cached = by_name["indexer_paged", "b=64 h_q=64 s_q=1 s_k=131072"]
    assert cached.bytes_moved == 64 * (131072 * 136 + 64 * 132)
    whole = by_name["dsa_step", "b=64 h_q=128 s_q=1 s_k=131072 topk=2048"]
    attention = 64 * 2048 * 128 * 2 * (576 + 512)
    assert whole.flops == cached.flops + attention
    assert whole.bytes_moved > cached.bytes_moved + 64 * (131072 * 4 + 2048 * 656)


# ---- timing ----------------------------------------------------------------------------------


def test_copies_outgrow_the_cache_but_not_the_memory():
    mib = 2**20
    assert timing.copies_needed(604 * mib, 50 * mib, 60_000 * mib) == 2
    assert timing.copies_needed(1 * mib, 50 * mib, 60_000 * mib) == 200
    assert timing.copies_needed(mib // 10, 50 * mib, 60_000 * mib) == 256
    assert timing.copies_needed(5000 * mib, 50 * mib, 8000 * mib) == 1


def test_sides_take_turns_and_every_copy_has_its_turn():
    calls: list[tuple[str, int]] = []
    sides = {name: lambda copy, name=name: calls.append((name, copy)) for name in "ab"}
    timing.measure(sides, copies=2, device=CPU, rounds=3)
    assert calls[:2] == [("a", 0), ("b", 0)]  # the warm-up
    order = [name for name, copy in calls[2:] if copy == 0]
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert [copy for _, copy in calls[2:]] == [0, 1] * 6


def test_clock_tells_the_slow_side_from_the_fast():
    sides = {"slow": lambda _: time.sleep(0.004), "fast": lambda _: time.sleep(0.001)}
    measured = timing.measure(sides, copies=1, device=CPU, rounds=5)
    slow, fast = measured["slow"].us, measured["fast"].us
    assert slow is not None and fast is not None
    assert slow > 4000 and fast > 1000 and slow > 1.5 * fast
    assert measured["slow"].clock == "wall" and measured["slow"].eager_us is None


def test_turns_on_the_card_give_the_time_of_one_call(monkeypatch):
    """A card on which a call takes 300 us and a replay 1000: what a turn gives, to the digit."""
    now, work_of_turn = 0, []

    class Graph:
        def replay(self) -> None:
            spend(1000)

    def spend(us: int) -> None:
        nonlocal now
        now += us

    def elapsed_us(work) -> float:
        before = now
        work()
        work_of_turn.append(now - before)
        return now - before

    monkeypatch.setattr(timing, "_elapsed_us", elapsed_us)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert timing._replays(Graph(), copies=4)() == 250.0  # type: ignore[arg-type]
    assert timing._eager(lambda copy: spend(100 * (copy + 1)), copies=5)() == 300.0
    assert work_of_turn == [1000, 20_000, 1500, 13 * 1500]  # a trial, and what fills a round


@pytest.mark.gpu
def test_card_is_timed_by_replaying_a_graph():
    """The card counts the calls that it ran. The bounds hold however busy it is: no call beats its
    memory, and all of them together took no longer than the test's own clock says."""
    device = torch.device("cuda")
    source = torch.ones(2**26, device=device)
    target, ran = torch.empty_like(source), torch.zeros((), dtype=torch.int64, device=device)
    issued = 0

    def copy(_: int) -> None:
        nonlocal issued
        issued += 1
        ran.add_(1)
        target.copy_(source)

    begun = time.perf_counter()
    timed = timing.measure({"copy": copy}, 1, device, rounds=5)["copy"]
    elapsed_us = (time.perf_counter() - begun) * 1e6
    replayed = int(ran) - (issued - 1)  # the call that was captured did not run then
    assert timed.clock == "graph" and replayed >= 2 + 5
    assert timed.us is not None and timed.eager_us is not None and timed.host_us is not None
    assert min(timed.us, timed.eager_us) > 100  # half a gigabyte moved, at 5 TB/s
    # At least every other turn, and every other call, took its median or longer.
    assert timed.us * (replayed - 2) < 2 * elapsed_us
    assert 0 < timed.host_us * 50 < 2 * elapsed_us


@pytest.mark.gpu
def test_row_of_the_hopper_kernel():
    case = Case("dense_decode", b=4, h_q=16, s_q=1, s_k=8192)
    rows = run.measured_rows(case, torch.device("cuda"), rounds=3, with_peers=False)
    assert [row["impl"] for row in rows] == ["flashmla-cuda", "flashmla-triton"]
    assert rows[0]["clock"] == "graph" and all(row["error"] < 4e-3 for row in rows)


# ---- roofline --------------------------------------------------------------------------------


def test_prediction_is_the_slower_of_memory_and_arithmetic():
    assert roofline.predicted_us(0, 3110e6, H100) == pytest.approx(1000)
    assert roofline.predicted_us(800e9, 3110e3, H100) == pytest.approx(1000)
    assert roofline.bound(1, 10**6, H100) == "memory"
    assert roofline.bound(10**12, 10**6, H100) == "compute"


def test_where_the_dense_cases_lie():
    bounds = {
        case.name: roofline.bound(case.flops, case.bytes_moved, H100)
        for case in CASES
        if case.op == "dense_decode"
    }
    assert bounds["b=128 h_q=16 s_q=1 s_k=16384"] == "memory"
    assert bounds["b=128 h_q=128 s_q=2 s_k=32768"] == "compute"


def test_ceilings_of_this_machine_are_measured():
    copied = roofline.copy_gbps(CPU, size=2**22)
    assert 0.05 < copied < 5000 and 0.05 < roofline.read_gbps(CPU, size=2**22) < 5000
    assert 1e-4 < roofline.matmul_tflops(CPU, n=128, dtype=torch.float32) < 100


WRITING = [Case(op, tokens=70) for op in cases.WRITES]


@pytest.mark.parametrize("case", WRITING, ids=lambda case: case.op)
def test_writing_counts_every_byte_once(case: Case):
    problem = problems.writing(case, CPU)
    cache, x = problem.caches[0], problem.x[0]
    token = cache[0, 0].numel() * cache.element_size() + x[0].numel() * 2 + 4
    assert case.bytes_moved == 70 * token and case.flops == 0
    assert len(problem.slots.unique()) == 70 and not torch.equal(*problem.x)
    assert case.name == "tokens=70"


@pytest.mark.parametrize("case", WRITING, ids=lambda case: case.op)
def test_a_write_is_timed_and_its_wrong_bytes_are_counted(case: Case):
    problem = problems.writing(case, CPU)
    (cache,) = peers.own(problem, "torch")(1)
    assert cache is problem.caches[1] and cache.view(torch.uint8).any()
    assert problem.error(cache, copy=1) == 0.0
    wrong = cache.clone()
    wrong.view(torch.uint8).view(-1)[5] ^= 1
    assert problem.error(wrong, copy=1) == pytest.approx(1 / wrong.view(torch.uint8).numel())
    (row,) = run.measured_rows(case, CPU, rounds=1, ceilings=H100)
    assert (row["impl"], row["error"], row["tflops"]) == ("flashmla-torch", 0.0, 0.0)
    assert row["gbps"] == pytest.approx(case.bytes_moved / row["us"] / 1e3, rel=1e-2)
    want = case.bytes_moved / H100.copy_gbps / 1e3
    assert row["predicted_us"] == pytest.approx(want, rel=1e-3)


def test_torch_writes_rows_as_its_peer():
    assert peers.find_peers(torch.device("cuda"), "fp8_append") == {}
    ((name, make),) = peers.find_peers(torch.device("cuda"), "paged_append").items()
    problem = problems.writing(WRITING[0], CPU)
    assert name.startswith("peer:torch-2.") and problem.error(*make(problem)(0)) == 0.0


PREFILL = [
    PrefillCase(op, b=2, s_q=150, s_k=150, spread=spread, h_q=2, h_kv=2, d_qk=d_qk, full=full)
    for op in ("mha_forward", "mha_backward")
    for d_qk, full, spread in ((192, False, 0), (192, True, 90), (128, False, 90))
]


@pytest.mark.parametrize("case", PREFILL, ids=lambda case: f"{case.op} {case.name}")
def test_prefill_is_timed_and_its_error_is_seen(case: PrefillCase):
    problem = problems.MAKERS[case.op](case, CPU)
    assert isinstance(problem, mha.Prefill)
    result = peers.own(problem, "torch")(0)[0].detach()
    assert problem.error(result) < 0.02
    wrong = result.clone()
    wrong[-1, 0, 5] += 1
    assert problem.error(wrong) > 0.9
    (row,) = run.measured_rows(case, CPU, rounds=1, ceilings=H100)
    assert (row["impl"], row["case"]) == ("flashmla-torch", case.name) and row["error"] < 0.02


def test_prefill_counts_operations_and_bytes():
    forward, backward = (
        PrefillCase(op, b=3, s_k=10, h_q=4) for op in ("mha_forward", PREFILL[-1].op)
    )
    assert forward.flops == 3 * 4 * 10 * 10 * (192 + 128)
    assert replace(forward, full=True).flops == 2 * forward.flops
    assert backward.flops == 3 * 4 * 10 * 10 * (3 * 192 + 2 * 128)
    assert forward.bytes_moved == 30 * 4 * (2 * (192 + 128 + 192 + 128) + 4)
    assert backward.bytes_moved == 30 * 4 * (2 * 2 * (192 + 128 + 192 + 128) + 4)
    lengths = PrefillCase("mha_forward", b=64, s_k=544, spread=480).lengths()
    assert lengths.min() >= 64 and lengths.max() <= 1024 and len(set(lengths)) > 50
    names = {"mha_forward": 1, "mha_backward": 1, "dense_decode": 0}
    for op, count in names.items():
        assert sum("cudnn" in name for name in mha.peers(torch.device("cuda"), op)) == count


@pytest.mark.gpu
@pytest.mark.parametrize("full", [False, True])
def test_backward_is_captured_on_every_side(full: bool):
    """Also after calls on the default stream, which a graph of another stream can't wait for."""
    device = torch.device("cuda")
    case = PrefillCase("mha_backward", b=2, s_q=256, s_k=256, h_q=2, h_kv=2, full=full)
    problem = problems.MAKERS[case.op](case, device)
    sides = peers.sides(problem, ["cuda"])
    assert len(sides) == 2 and any("cudnn" in name for name in sides)
    kept: dict[str, torch.Tensor] = {}

    def keep(name: str, copy: int) -> None:
        kept[name] = sides[name](copy)[0]

    for name in sides:
        keep(name, 0)
    for name in sides:
        graph = timing._graph(partial(keep, name), problem.copies)
        assert graph is not None, f"{name} could not be captured"
        replayed = kept[name]
        keep(name, 0)  # a call on the default stream, between capture and replay
        replayed.fill_(float("nan"))
        graph.replay()
        assert problem.error(replayed) < 0.02 and problem.error(kept[name]) < 0.02
    rows = run.measured_rows(case, device, ["cuda"], rounds=3)
    assert [row["clock"] for row in rows] == ["graph", "graph"]


def plant_flash_attention_3(monkeypatch: pytest.MonkeyPatch, path: Path, source: str) -> None:
    """A module of one of its names, and none of the other."""
    path.write_text(source)
    monkeypatch.syspath_prepend(str(path.parent))
    for name in mha.FLASH_ATTENTION_3:
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.parametrize("spread", [0, 90])
@pytest.mark.parametrize("name", mha.FLASH_ATTENTION_3)
def test_flash_attention_3_is_called_as_it_wants_to_be(monkeypatch, tmp_path, name, spread):
    plant_flash_attention_3(monkeypatch, tmp_path / f"{name}.py", FLASH_ATTENTION_3)
    make = mha.peers(torch.device("cuda"), "mha_forward")["peer:flash-attention-3"]
    assert len(mha.peers(torch.device("cuda"), "mha_backward")) == 1
    info = tmp_path / "fa3_fwd-0.0.3.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fa3-fwd\nVersion: 0.0.3\n")
    (info / "top_level.txt").write_text(name)
    assert "peer:fa3-fwd-0.0.3" in mha.peers(torch.device("cuda"), "mha_forward")
    problem = problems.MAKERS["mha_forward"](replace(PREFILL[0], spread=spread), CPU)
    (name_of_call, args, kwargs), shape = make(problem)(0)[0].of
    assert kwargs == {"causal": True}
    if spread:
        assert name_of_call == "varlen" and args[0] is problem.q
        assert args[3] is args[4] is problem.cu_seqlens and args[5] == args[6] == problem.longest
    else:
        assert name_of_call == "batch" and shape == (2, 150, 2, 192)


def test_flash_attention_3_that_does_not_load_is_left_out(monkeypatch, tmp_path: Path):
    source = "raise OSError('libcudart.so.99 is missing')"
    plant_flash_attention_3(monkeypatch, tmp_path / "flash_attn_interface.py", source)
    with pytest.warns(UserWarning, match="does not load: libcudart.so.99 is missing"):
        assert len(mha.peers(torch.device("cuda"), "mha_forward")) == 1


FLASH_ATTENTION_3 = """
class Out:
    def __init__(self, *call):
        self.of = call, tuple(call[1][0].shape)

    def flatten(self, first, last):
        assert (first, last) == (0, 1)
        return self

def flash_attn_func(*args, **kwargs):
    return Out("batch", args, kwargs)

def flash_attn_varlen_func(*args, **kwargs):
    return Out("varlen", args, kwargs)
"""


# ---- peers and rows --------------------------------------------------------------------------


def test_no_peer_without_a_card():
    assert peers.find_peers(CPU) == {}


def plant_peer(monkeypatch: pytest.MonkeyPatch, folder: Path, source: str) -> None:
    """A package of the peer's names in a folder of its own."""
    (folder / "flash_mla.py").write_text(source)
    (folder / "sgl_flash_mla-9.9.dist-info").mkdir()
    metadata = folder / "sgl_flash_mla-9.9.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: sgl-flash-mla\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "flash_mla", raising=False)


def test_peer_is_called_as_it_wants_to_be(monkeypatch, tmp_path: Path):
    source = """
def get_mla_metadata():
    return "plan", None

def flash_mla_with_kvcache(*args, **kwargs):
    return args, kwargs
"""
    plant_peer(monkeypatch, tmp_path, source)
    found = peers.find_peers(torch.device("cuda"))
    assert list(found) == ["peer:sgl-flash-mla-9.9"]
    problem = problems.dense_decode(TINY[1], CPU)
    args, kwargs = found["peer:sgl-flash-mla-9.9"](problem)(1)
    assert args[0] is problem.q and args[1] is problem.caches[1]
    assert args[4:] == (512, "plan")
    assert kwargs["use_legacy"] is True and kwargs["causal"] is True
    assert kwargs["is_fp8_kvcache"] is False and kwargs["softmax_scale"] == 576**-0.5


def test_peer_that_does_not_load_is_left_out(monkeypatch, tmp_path: Path):
    plant_peer(monkeypatch, tmp_path, "raise OSError('libcudart.so.99 is missing')")
    with pytest.warns(UserWarning, match="does not load: libcudart.so.99 is missing"):
        assert peers.find_peers(torch.device("cuda")) == {}


def test_rows_leave_out_who_cannot_and_keep_the_rest(capsys, monkeypatch):
    def refuses(problem, tier):
        def call(copy):
            raise RuntimeError("not on this machine")

        return call if tier == "triton" else own(problem, tier)

    own = peers.own
    monkeypatch.setattr(peers, "own", refuses)
    rows = run.measured_rows(TINY[0], CPU, ["torch", "triton"], rounds=1, ceilings=H100)
    assert [row["impl"] for row in rows] == ["flashmla-torch"]
    assert "flashmla-triton: left out, not on this machine" in capsys.readouterr().err
    assert rows[0]["tflops"] == pytest.approx(TINY[0].flops / rows[0]["us"] / 1e6, rel=1e-3)
    assert set(run.FIELDS) <= set(rows[0])


def result_file() -> dict:
    def row(case: Case, impl: str, us: float) -> dict:
        rates = {"tflops": case.flops / us / 1e6, "gbps": case.bytes_moved / us / 1e3}
        ends = {"eager_us": us, "error": 1e-3}
        return {"op": case.op, "case": case.name, "impl": impl, "us": us, **rates, **ends}

    impls = (("flashmla-cuda", 200.0), ("peer:other-1.0", 250.0))
    return {
        "provenance": {"gpu": "Some Card 80GB", "date": "2026-01-01"},
        "ceilings": H100.as_dict(),
        "tiny": False,
        "rows": [row(case, impl, us) for case in QUICK for impl, us in impls],
    }


def test_result_file_reads_back_a_row_a_line(tmp_path: Path):
    result = result_file()
    path = run.default_path(result, tmp_path)
    assert path.name == "some-card-80gb.json"
    run.write(result, path)
    text = path.read_text()
    assert json.loads(text) == result
    assert sum('"case"' in line for line in text.splitlines()) == len(result["rows"])


def test_table_has_a_line_for_each_row():
    result = result_file()
    lines = run.table(result).splitlines()
    assert len(lines) == 2 + len(result["rows"])
    assert lines[2].startswith("| dense_decode | b=128 h_q=128 s_q=1 s_k=4096 | flashmla-cuda |")


def test_roofline_figure_holds_the_measured_points():
    result = result_file()
    axes = plots.roofline_of(result).axes[0]
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    drawn = sorted((float(d.get_xdata()[0]), float(d.get_ydata()[0])) for d in dots)
    wanted = sorted((c.flops / c.bytes_moved, c.flops / 200.0 * 1e6) for c in QUICK)
    assert np.allclose(drawn, wanted)


def test_time_figure_has_a_series_for_each_implementation():
    axes = plots.time_over_length(result_file()).axes[0]
    assert [line.get_label() for line in axes.lines] == ["flashmla-cuda", "peer:other-1.0"]
    assert all(len(line.get_xdata()) == len(QUICK) for line in axes.lines)


def test_sweep_draws_each_axis_with_its_implementations_and_the_prediction():
    rows = [
        {"op": c.op, "case": c.name, "impl": impl, "us": us * c.s_k, "predicted_us": 1.0 * c.s_k}
        for axis in SWEEP.values()
        for c in axis
        for impl, us in (("flashmla-cuda", 2.0), ("peer:other-1.0", 3.0))
    ]
    assert select("sweep", "cpu") == TINY
    assert len(select("sweep", "cuda")) * 2 == len(rows)
    figure = plots.sweep({"provenance": {"gpu": "Some Card"}, "rows": rows})
    assert [axes.get_xlabel() for axes in figure.axes] == list(SWEEP)
    ours, peer, predicted = figure.axes[0].lines
    values = [case.s_k for case in SWEEP["s_k"]]
    assert list(ours.get_xdata()) == values
    assert list(ours.get_ydata()) == [2.0 * value for value in values]
    assert list(peer.get_ydata()) == [3.0 * value for value in values]
    assert list(predicted.get_ydata()) == values


def test_plot_refuses_a_file_without_own_rows():
    result = {**result_file(), "rows": [{"impl": "peer:x"}]}
    with pytest.raises(ValueError, match="no row of this package"):
        plots.roofline_of(result)


def test_error_of_a_sparse_problem_is_that_of_its_answer():
    case = Case("sparse_decode", b=2, h_q=4, s_q=2, s_k=100, topk=30)
    problem = problems.MAKERS["sparse_decode"](case, CPU)
    assert problem.caches[0].shape == (4, 64, 1, 656) and problem.indices.shape == (2, 2, 30)
    assert int(problem.indices[1].min()) >= 128  # of its own sequence, whose pages come second
    out = problem.side()(1)[0]
    assert problem.error(out, 1) < 0.02 < problem.error(out, 0)
    assert problem.error(out + 1, 1) > 0.9


@pytest.mark.parametrize(("cache", "width"), [("fp8-any-scale", 656), ("bf16", 576)])
def test_a_sparse_problem_over_another_cache(cache: str, width: int):
    case = Case("sparse_decode", b=2, h_q=4, s_k=100, topk=30, cache=cache)
    assert case.name == f"b=2 h_q=4 s_q=1 topk=30 cache={cache}"
    problem = problems.MAKERS["sparse_decode"](case, CPU)
    assert problem.caches[0].shape == (4, 64, 1, width)
    out = problem.side()(1)[0]
    assert problem.error(out, 1) < 0.02 < problem.error(out, 0)
    plain = Case("sparse_decode", b=2, h_q=4, s_k=100, topk=30)
    assert case.bytes_moved - plain.bytes_moved == (60 * (1152 - 656) if width == 576 else 0)


def test_values_of_a_cache_are_exact():
    x = torch.randn(7, 576).bfloat16()
    assert torch.equal(sparse.values(x), x.double())
    packed = flashmla.fp8.pack(x, power_of_two=False)
    want = fp8.unpack(packed.numpy(), np.float64)
    assert np.array_equal(sparse.values(packed).numpy(), want)
    assert not np.array_equal(flashmla.fp8.unpack(packed).double().numpy(), want)


def test_dense_decode_over_the_fp8_cache_stands_beside_our_own_over_bfloat16():
    case = Case("dense_decode_fp8", b=3, h_q=8, s_k=130, s_q=2)
    assert case.causal and case.flops == replace(case, op="dense_decode").flops
    plain = replace(case, op="dense_decode")
    assert plain.bytes_moved - case.bytes_moved == 3 * 130 * (1152 - 656)
    problem = problems.MAKERS["dense_decode_fp8"](case, CPU)
    assert problem.caches[0].shape == (9, 64, 1, 656)
    out = peers.own(problem, "torch")(1)[0]
    assert problem.error(out, 1) < 0.01 < problem.error(out + 1, 1)
    found = peers.find_peers(torch.device("cuda"), "dense_decode_fp8")
    assert list(found) == ["peer:own-bf16-cache"]
    other = found["peer:own-bf16-cache"](problem)(1)[0]
    assert problem.plain.error(other, 1) < 0.01 < problem.error(other, 1) < 0.3


def test_fp8_products_are_a_ceiling_of_cards_that_have_them():
    assert roofline.fp8_matmul_tflops(CPU) is None
    assert "fp8_matmul_tflops" not in H100.as_dict()
    with_fp8 = replace(H100, fp8_matmul_tflops=1440.04)
    assert with_fp8.as_dict()["fp8_matmul_tflops"] == 1440.0


def test_error_of_a_sparse_prefill_is_that_of_its_answer():
    case = Case("sparse_prefill", h_q=4, s_q=5, s_k=100, topk=30)
    problem = problems.MAKERS["sparse_prefill"](case, CPU)
    assert problem.kvs[0].shape == (100, 1, 576) and problem.indices.shape == (5, 1, 30)
    assert all(len(set(row.tolist())) == 30 for row in problem.indices[:, 0])
    out = problem.side()(1)[0]
    assert problem.error(out, 1) < 0.02 < problem.error(out, 0)
    assert problem.error(out + 1, 1) > 0.9
