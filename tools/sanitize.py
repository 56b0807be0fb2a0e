"""Runs compute-sanitizer over every CUDA kernel of ours, on small shapes, on a Hopper card.

    python tools/sanitize.py                               # memcheck and racecheck, every operation
    python tools/sanitize.py --tools memcheck --ops mla.dense_decode dsa.topk

Each operation runs in a process of its own under each tool, every tensor an allocation of its own,
so that memcheck sees what torch's allocator would hide; only kernels of the namespace flashmla are
checked. The inputs are those of the tests: what must not be read is NaN, what points nowhere points
far away. A report of racecheck is not always a race: the tool knows mbarriers and copies of the
tensor memory accelerator only in part. What it has to say of a kernel belongs into its NOTES.md.

First a canary: a call that reads behind the end of a tensor, which memcheck has to find.

The sanitizer comes with CUDA's toolkit, or by pip install nvidia-cuda-sanitizer-api (13.4; 13.0 and
13.1 lack a part of it).
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

if TYPE_CHECKING:
    from cases import SparsePrefillCase

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
FOUND = 99  # exit code of the sanitizer when it has found something
NO_KERNEL = 98  # exit code of a worker whose operation has no CUDA kernel


# ---- what runs under the sanitizer -------------------------------------------------------------


def dense_decode(device: str) -> None:
    """Whole and split requests, both kinds of plan, sink, RoPE or none, every page size."""
    from cases import DecodeCase

    import flashmla

    few = (0, 1, 65, 130)
    cases = [
        DecodeCase("few_heads", few, h_q=16),
        DecodeCase("odd_heads", few, h_q=24, s_q=2, causal=True),
        DecodeCase("two_row_tiles", (700, 3), h_q=128),
        DecodeCase("two_kv_heads", (65, 0), h_q=8, h_kv=2, s_q=2, causal=True),
        DecodeCase("split", (2100, 64), h_q=64),
        DecodeCase("split_2_3_4", (1000, 1300, 700, 0, 1500), s_q=8, h_q=64, causal=True),
        DecodeCase("sink", (1100, 0, 5), h_q=64, sink=True),
        DecodeCase("no_rope", (1100, 65), h_q=64, d_qk=512),
        *(DecodeCase(f"page_{page}", (300, 1), h_q=64, page=page) for page in (16, 32, 128, 256)),
    ]
    for case in cases:
        for batch_invariant in (False, True):
            x = case.build(device)
            rows = case.s_q * case.h_q // case.h_kv
            plan = flashmla.get_mla_metadata(
                x.cache_seqlens, rows, case.h_kv, batch_invariant=batch_invariant
            )
            flashmla.flash_mla_with_kvcache(
                x.q, x.k_cache, x.block_table, x.cache_seqlens, 512, *plan,
                causal=case.causal, attn_sink=x.attn_sink,
            )  # fmt: skip


def get_metadata(device: str) -> None:
    import torch

    import flashmla

    for lengths in ([0], [1], [5000, 0, 64, 131072], [i % 130 for i in range(700)]):
        for batch_invariant in (False, True):
            seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
            flashmla.get_mla_metadata(seqlens, 128, 1, batch_invariant=batch_invariant)


def merge_state(device: str) -> None:
    import torch

    import flashmla

    for shape, dtype in (((3, 5, 512), torch.bfloat16), ((7, 33), torch.float32)):
        out = torch.randn(shape, device=device).to(dtype)
        lse = torch.randn(shape[:-1], device=device)
        flashmla.merge_state(out, lse, out, lse + 1)


def fp8_cache(device: str) -> None:
    """Packing, unpacking and appending, of latents and of the indexer's keys."""
    import torch

    from flashmla import fp8

    x = torch.randn(70, 576, device=device).bfloat16()
    slots = torch.tensor([*range(60, 129), -1], device=device)
    cache = torch.zeros(3, 64, 1, 656, dtype=torch.uint8, device=device)
    fp8.append(cache, slots, x)
    fp8.unpack(cache)
    fp8.pack(x, False)
    fp8.index_pack(x[:, :128].contiguous())
    keys = torch.zeros(3, 64, 1, 132, dtype=torch.uint8, device=device)
    fp8.index_append(keys, slots, x[:, :128].contiguous())


def paged_append(device: str) -> None:
    import torch

    import flashmla

    cache = flashmla.PagedKVCache(num_pages=4, device=device)
    sequence = cache.allocate(torch.randn(70, 576, device=device).bfloat16())
    cache.append(sequence, torch.randn(3, 576, device=device).bfloat16())


def indexer(device: str) -> None:
    import torch

    import flashmla

    q, k = (
        torch.randn(shape, device=device).to(torch.float8_e4m3fn)
        for shape in ((70, 64, 128), (333, 128))
    )
    weights, scale = torch.randn(70, 64, device=device), torch.rand(333, device=device)
    start = torch.zeros(70, dtype=torch.int32, device=device)
    end = torch.arange(70, dtype=torch.int32, device=device) * 5 - 10
    flashmla.indexer_logits(q, k, scale, weights, start, end.clamp(0, 333))
    cache = torch.zeros(6, 64, 1, 132, dtype=torch.uint8, device=device)
    table = torch.tensor([[5, 2, 2147480000], [0, 1, 3]], dtype=torch.int32, device=device)
    lengths = torch.tensor([100, 190], dtype=torch.int32, device=device)
    flashmla.indexer_logits_paged(
        q[:4].view(2, 2, 64, 128), cache, weights[:4].view(2, 2, 64), table, lengths
    )


def topk(device: str) -> None:
    import torch

    import flashmla

    for columns, k in ((3000, 2048), (70, 100), (5, 1), (40_000, 512)):
        logits = torch.randn(3, columns, device=device)
        logits[1, ::3] = float("-inf")
        logits[2, ::2] = float("nan")
        lengths = torch.tensor([columns, 7, 0], dtype=torch.int32, device=device)
        flashmla.topk(logits, min(k, columns), lengths.clamp(max=columns))
    flashmla.topk(torch.randn(300, 5001, device=device)[:, 1:], 500)  # rows enough for small CTAs


def sparse_decode(device: str) -> None:
    """The tests' cases, which have few heads or one tile; then longer lists, whole or cut."""
    from cases import SPARSE_DECODE_CASES, SparseDecodeCase

    import flashmla
    from flashmla.cuda import sparse

    def run(case: SparseDecodeCase) -> None:
        x = case.build(device)
        flashmla.flash_mla_with_kvcache(
            x.q, x.k_cache, None, None, 512, None, is_fp8_kvcache=True, indices=x.indices,
            attn_sink=x.attn_sink, topk_length=x.topk_length,
        )  # fmt: skip

    for case in SPARSE_DECODE_CASES:
        if case.fp8:
            run(case)
    longer = [
        SparseDecodeCase(f"h{h_q}", 1, 2, h_q, 400, 20, sink=True) for h_q in (16, 32, 64, 100)
    ]
    for splits in (1, 3, 33, 70):  # whole; merged by CTAs that meet, and by a second kernel
        with mock.patch.object(sparse, "splits_for", lambda *_, splits=splits: splits):
            for case in longer:
                run(case)


def dense_decode_fp8(device: str) -> None:
    """The tests' cases, of few rows or an even number of row tiles, and a single row tile."""
    from cases import DENSE_FP8_CASES, DecodeCase

    import flashmla

    more = (
        DecodeCase("one_row_tile", (70, 0, 700), h_q=64, fp8=True),
        DecodeCase("few_rows", (700, 0, 64, 130), 2, 16, causal=True, fp8=True),
    )
    for case in (*DENSE_FP8_CASES, *more):
        x = case.build(device)
        plan, _ = flashmla.get_mla_metadata()
        flashmla.flash_mla_with_kvcache(
            x.q, x.k_cache, x.block_table, x.cache_seqlens, 512, plan, causal=case.causal,
            is_fp8_kvcache=True, attn_sink=x.attn_sink,
        )  # fmt: skip


def sparse_prefill(device: str) -> None:
    """The tests' cases with 33 heads and more, one in which SMs have a second query, and a list
    that goes around the ring of tiles more than once."""
    from dataclasses import replace

    from cases import SPARSE_PREFILL_CASES, SparsePrefillCase

    heads = (33, 64, 100, 128)
    cases = (replace(x, h_q=heads[i % 4]) for i, x in enumerate(SPARSE_PREFILL_CASES))
    many = SparsePrefillCase("many", s_q=140, h_q=100, topk=70, sink=True)
    long = SparsePrefillCase("long", s_q=2, h_q=64, topk=450)
    run_sparse_prefill(device, *cases, many, long)


def sparse_prefill_few_heads(device: str) -> None:
    """The tests' cases, which have few heads, and some in which two SMs of an H100 have a second
    query, each number of heads that there is a kernel for."""
    from cases import SPARSE_PREFILL_CASES, SparsePrefillCase

    few = (x for x in SPARSE_PREFILL_CASES if x.h_q <= 32)
    many = (
        SparsePrefillCase("many", s_q=134, h_q=h_q, topk=topk, sink=True)
        for h_q, topk in ((7, 200), (16, 64), (16, 130), (30, 150))
    )
    run_sparse_prefill(device, *few, *many)


def run_sparse_prefill(device: str, *cases: SparsePrefillCase) -> None:
    import flashmla

    for case in cases:
        x = case.build(device)
        flashmla.flash_mla_sparse_fwd(
            x.q, x.kv, x.indices, x.scale, 512, x.attn_sink, x.topk_length
        )


def prefill(device: str) -> None:
    """Forward and, where there is a kernel for it, backward, deterministic or not."""
    import torch
    from cases import PREFILL_CASES

    import flashmla
    from flashmla import backend

    backward = backend.tier_for("mha.backward", device) == "cuda"
    for case in PREFILL_CASES:
        x = case.build(device)
        q, k, v = (t.detach().requires_grad_(backward) for t in (x.q, x.k, x.v))
        for deterministic in (False, True):
            out, _ = flashmla.flash_attn_varlen_func(
                q, k, v, x.cu_seqlens_qo, x.cu_seqlens_kv, x.max_seqlen_qo, x.max_seqlen_kv,
                softmax_scale=x.scale, causal=case.causal, deterministic=deterministic,
            )  # fmt: skip
            if backward:
                torch.autograd.grad(out, (q, k, v), x.d_out)


def canary(device: str) -> None:
    """A planted mistake: 4096 rows with one log-sum-exp, past the checks of the public function."""
    import torch

    from flashmla.cuda import library

    out, lse = torch.zeros(4096, 512, device=device), torch.zeros(4096, device=device)
    library.load().merge_state(out, lse[:1].clone(), out, lse, out.clone(), lse.clone())


BODIES: dict[str, Callable[[str], None]] = {
    "split_kv.get_metadata": get_metadata,
    "mla.dense_decode": dense_decode,
    "split_kv.merge_state": merge_state,
    "fp8.pack": fp8_cache,
    "paged_kv.append": paged_append,
    "dsa.indexer_logits": indexer,
    "dsa.topk": topk,
    "dsa.sparse_decode": sparse_decode,
    "fp8.dense_decode": dense_decode_fp8,
    "dsa.sparse_prefill": sparse_prefill,
    "dsa.sparse_prefill.few_heads": sparse_prefill_few_heads,
    "mha.forward": prefill,
}
"""What to run, by the operation whose tier says whether there is a kernel to check; what follows
its two names says which of its kernels."""

CANARY = "canary"


def work(op: str) -> int:
    """The process that the sanitizer watches."""
    import torch

    from flashmla import backend

    torch.manual_seed(0)
    if op == CANARY:
        canary("cuda")
    elif backend.tier_for(".".join(op.split(".")[:2]), "cuda") != "cuda":
        return NO_KERNEL
    else:
        BODIES[op]("cuda")
    torch.cuda.synchronize()
    served = {name: sorted(tiers) for name, tiers in backend.calls.items()}
    print(f"served: {served}")
    return 0


# ---- the run ------------------------------------------------------------------------------------


def find_sanitizer() -> str | None:
    """On the PATH, in the toolkit, or in NVIDIA's package for pip."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    places = [Path(home) / "bin" for home in homes if home]
    places += [Path(entry) / "nvidia" / "cu13" / "bin" for entry in sys.path if entry]
    known = [shutil.which("compute-sanitizer")]
    known += [str(place / "compute-sanitizer") for place in places]
    return next((path for path in known if path and Path(path).is_file()), None)


def run(sanitizer: str, tool: str, op: str, log: Path, limit: int) -> tuple[str, float]:
    """Checks one operation with one tool; what came of it, and after how many seconds."""
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--kernel-name", "kns=flashmla"]
    if tool == "racecheck":  # places in the code, not each byte: those can be tens of thousands
        options += ["--racecheck-report", "analysis"]
    command = [sanitizer, *options, sys.executable, __file__, "--work", op]
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
    }
    begun = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        try:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, timeout=limit
            ).returncode
        except subprocess.TimeoutExpired:
            return f"not done within {limit} s", time.monotonic() - begun
    text = log.read_text(encoding="utf-8", errors="replace")
    return verdict(code, text), time.monotonic() - begun


def verdict(code: int, text: str) -> str:
    """clean, no kernel, or what the tool counted."""
    if code == NO_KERNEL:
        return "no CUDA kernel"
    counted = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", text)
    if code == 0 and counted and not re.search(r"[1-9]", counted[0]):
        return "clean"
    return counted[0] if counted and code == FOUND else f"failed with exit code {code}"


def results(arguments: argparse.Namespace, sanitizer: str) -> Iterator[str]:
    """Runs everything asked for; what is not clean, one line each."""
    if "memcheck" in arguments.tools:
        log = arguments.logs / f"{CANARY}-memcheck.log"
        said, seconds = run(sanitizer, "memcheck", CANARY, log, arguments.limit)
        print(f"{CANARY:30s} {'memcheck':10s} {seconds:5.0f} s  {said}", flush=True)
        if not re.search("[1-9][0-9]* error", said):
            yield f"the canary was not found, so nothing else counts: {said} ({log})"
            return
    for op in arguments.ops:
        for tool in arguments.tools:
            log = arguments.logs / f"{op}-{tool}.log"
            said, seconds = run(sanitizer, tool, op, log, arguments.limit)
            print(f"{op:30s} {tool:10s} {seconds:5.0f} s  {said}", flush=True)
            if said == "no CUDA kernel":
                break
            if said != "clean":
                yield f"{op} under {tool}: {said} ({log})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=["memcheck", "racecheck"])
    parser.add_argument("--ops", nargs="+", choices=BODIES, default=list(BODIES))
    parser.add_argument("--sanitizer", help="the program compute-sanitizer")
    parser.add_argument("--logs", type=Path, default=ROOT / ".cache" / "sanitize")
    parser.add_argument("--limit", type=int, default=600, help="seconds for one run")
    parser.add_argument("--work", choices=[*BODIES, CANARY], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return work(arguments.work)
    sanitizer = arguments.sanitizer or find_sanitizer()
    if sanitizer is None:
        print("no compute-sanitizer: pip install nvidia-cuda-sanitizer-api, or --sanitizer PATH")
        return 2
    arguments.logs.mkdir(parents=True, exist_ok=True)
    unclean = list(results(arguments, sanitizer))
    for line in unclean:
        print(line)
    return 1 if unclean else 0


if __name__ == "__main__":
    sys.exit(main())
