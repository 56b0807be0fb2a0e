"""What is measured: one row a case, with the operations and bytes that it needs at least.

For dense decode, rows for which the frozen Hopper kernels of the peer have published figures to
meet, among others; for every other operation a few sizes, from small to large.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

__all__ = [
    "CASES",
    "INDEXING",
    "OPS",
    "QUICK",
    "SWEEP",
    "TINY",
    "Case",
    "PrefillCase",
    "select",
]

BF16 = 2  # bytes
FP8_TOKEN = 656  # bytes of a cached token in the FP8 format
INDEX_TOKEN = 132  # bytes of a cached key of the indexer
D_QK, D_V = 576, 512
D_INDEX = 128
MHA_D_V = 128
MHA_FORWARD, MHA_BACKWARD = "mha_forward", "mha_backward"

# Bytes that writing a token takes: values in bfloat16 and an int32 slot in, cache bytes out.
WRITES = {
    "paged_append": D_QK * BF16 + 4 + D_QK * BF16,
    "fp8_append": D_QK * BF16 + 4 + FP8_TOKEN,
    "index_append": D_INDEX * BF16 + 4 + INDEX_TOKEN,
}

DENSE = ("dense_decode", "dense_decode_fp8")
INDEXING = ("topk", "indexer", "indexer_paged")
INDEX_HEADS = 64  # of the indexer in a whole step


@dataclass(frozen=True)
class Case:
    """A problem of one operation; what does not apply to the operation stays at its default.

    Args:
        op: ``dense_decode``, ``dense_decode_fp8`` over the FP8 cache, ``sparse_decode``,
            ``sparse_prefill``; one that chooses tokens:
            ``topk``, ``indexer``, ``indexer_paged``; ``dsa_step``, the indexer, top-k and sparse
            decode one after the other; or one that writes tokens to a cache: ``paged_append``,
            ``fp8_append``, ``index_append``.
        b: sequences in the batch (decode), rows to choose from (``topk``).
        h_q, h_kv: query heads, and the key/value heads that they share.
        s_q: query tokens (of each sequence in decode, in all for prefill).
        s_k: cached tokens of a sequence; the mean when ``spread`` is not 0.
        spread: standard deviation of the lengths, which are normal and at least ``s_q``.
        topk: indices a query attends to (sparse).
        page: tokens in a page of the cache.
        tokens: how many are written to the cache.
        cache: what sparse decode reads: ``fp8``, scales being powers of two; ``fp8-any-scale``;
            ``bf16``.
    """

    op: str
    b: int = 1
    h_q: int = 128
    s_q: int = 1
    s_k: int = 4096
    h_kv: int = 1
    spread: int = 0
    topk: int = 0
    page: int = 64
    tokens: int = 0
    cache: str = "fp8"

    @property
    def name(self) -> str:
        """The case as result files and tables call it."""
        if self.op in WRITES:
            return f"tokens={self.tokens}"
        if self.op == "topk":
            return f"rows={self.b} n={self.s_k} k={self.topk}"
        prefill = self.op in ("sparse_prefill", "indexer")
        parts = [] if prefill else [f"b={self.b}"]
        parts += [f"h_q={self.h_q}", f"s_q={self.s_q}"]
        if self.h_kv != 1:
            parts.append(f"h_kv={self.h_kv}")
        if prefill:
            parts.append(f"s_kv={self.s_k}")
        elif self.op != "sparse_decode":
            parts.append(f"s_k={self.s_k}" + (f"±{self.spread}" if self.spread else ""))
        if self.topk:
            parts.append(f"topk={self.topk}")
        if self.cache != "fp8":
            parts.append(f"cache={self.cache}")
        return " ".join(parts)

    @property
    def causal(self) -> bool:
        """Several query tokens of one sequence are speculated ones, and those are causal."""
        return self.op in DENSE and self.s_q > 1

    def lengths(self) -> np.ndarray:
        """Cached tokens of each sequence, int32 [b], the same at every call."""
        if not self.spread:
            return np.full(self.b, self.s_k, dtype=np.int32)
        drawn = np.random.default_rng(0).normal(self.s_k, self.spread, self.b)
        return np.maximum(drawn, self.s_q).astype(np.int32)

    @property
    def keys(self) -> int:
        """Key tokens that one query head meets, over the batch (or over the queries of prefill)."""
        if self.op in WRITES or self.op == "topk":
            return 0
        if self.op == "indexer":
            return self.s_k * self.s_q
        if self.op in (*DENSE, "indexer_paged"):
            return int(self.lengths().sum()) * self.s_q
        return self.topk * self.s_q * (1 if self.op == "sparse_prefill" else self.b)

    @property
    def flops(self) -> int:
        """Operations: a multiply and an add for each of 576 + 512 numbers, per head and key; of 128
        for the indexer.

        A causal mask over a few speculated tokens saves next to nothing and is not subtracted.
        """
        if self.op == "dsa_step":
            return sum(part.flops for part in self.parts)
        return 2 * self.h_q * self.keys * (D_INDEX if self.op in INDEXING else D_QK + D_V)

    @property
    def parts(self) -> tuple[Case, Case, Case]:
        """What a ``dsa_step`` consists of."""
        scores = replace(self, op="indexer_paged", h_q=INDEX_HEADS, topk=0)
        choice = replace(self, op="topk", b=self.b * self.s_q)
        return scores, choice, replace(self, op="sparse_decode")

    @property
    def flops_as_bf16(self) -> int:
        """As many operations as take that long in bf16: FP8 products run at twice its rate."""
        if self.op == "dsa_step":
            return sum(part.flops_as_bf16 for part in self.parts)
        return self.flops // 2 if self.op in INDEXING else self.flops

    @property
    def bytes_moved(self) -> int:
        """Bytes that have to cross the memory bus: the keys once, queries in, outputs out."""
        if self.op in WRITES:
            return WRITES[self.op] * self.tokens
        if self.op == "dsa_step":
            return sum(part.bytes_moved for part in self.parts)
        if self.op in INDEXING:
            return self._indexing_bytes()
        queries = self.s_q * (1 if self.op == "sparse_prefill" else self.b)
        ends = queries * self.h_q * (D_QK + D_V) * BF16 + queries * self.h_q * 4
        if self.op in DENSE:
            token = self.h_kv * D_QK * BF16 if self.op == "dense_decode" else FP8_TOKEN
            return int(self.lengths().sum()) * token + ends
        if self.op == "sparse_decode":
            return self.keys * (D_QK * BF16 if self.cache == "bf16" else FP8_TOKEN) + ends
        return self.s_k * D_QK * BF16 + ends

    def _indexing_bytes(self) -> int:
        """Queries and keys with their weights and scales in, float32 scores out; or those in, and
        int32 indices out."""
        if self.op == "topk":
            return 4 * self.b * (self.s_k + self.topk)
        queries = self.b * self.s_q * self.h_q * (D_INDEX + 4)
        if self.op == "indexer":
            return queries + self.s_k * INDEX_TOKEN + 4 * self.s_q * self.s_k
        lengths = self.lengths()
        scores = self.b * self.s_q * (-(-int(lengths.max()) // self.page)) * self.page
        return queries + int(lengths.sum()) * INDEX_TOKEN + 4 * scores


@dataclass(frozen=True)
class PrefillCase(Case):
    """Sequences of ``s_k`` tokens that attend to themselves; with ``spread``, of lengths drawn
    evenly from ``s_k - spread`` to ``s_k + spread``.

    Args:
        d_qk: 192 or 128; d_v is 128.
        full: every query sees every key; causal otherwise.
    """

    d_qk: int = 192
    full: bool = False

    @property
    def name(self) -> str:
        s = f"{self.s_k}±{self.spread}" if self.spread else str(self.s_k)
        kind = "full" if self.full else "causal"
        return f"d={self.d_qk}/{MHA_D_V} {kind} b={self.b} s={s} h={self.h_q}"

    @property
    def causal(self) -> bool:
        return not self.full

    def lengths(self) -> np.ndarray:
        low, high = self.s_k - self.spread, self.s_k + self.spread
        return np.random.default_rng(0).integers(low, high, self.b, np.int32, endpoint=True)

    @property
    def flops(self) -> int:
        """Five products backward, two forward; causal, half of them."""
        pairs = int((self.lengths().astype(np.int64) ** 2).sum())
        columns = self.d_qk + MHA_D_V if self.op == MHA_FORWARD else 3 * self.d_qk + 2 * MHA_D_V
        return 2 * self.h_q * pairs * columns // (1 if self.full else 2)

    @property
    def bytes_moved(self) -> int:
        """Forward q, k, v, out and the LSE; backward those, d_out, dq, dk and dv."""
        once = 2 * (self.d_qk + MHA_D_V) * BF16
        each = once + 4 if self.op == MHA_FORWARD else 2 * once + 4
        return int(self.lengths().sum()) * self.h_q * each


def _dense(b: int, h_q: int, s_q: int, s_k: int, spread: int = 0) -> Case:
    return Case("dense_decode", b=b, h_q=h_q, s_q=s_q, s_k=s_k, spread=spread)


def _sparse(b: int, h_q: int, s_q: int, topk: int, cache: str = "fp8") -> Case:
    return Case("sparse_decode", b=b, h_q=h_q, s_q=s_q, s_k=32768, topk=topk, cache=cache)


def _prefill(h_q: int, s_kv: int) -> Case:
    return Case("sparse_prefill", h_q=h_q, s_q=4096, s_k=s_kv, topk=2048)


def _mha(op: str) -> list[PrefillCase]:
    def case(b: int, s: int, h: int, d_qk: int = 192, full: bool = False) -> PrefillCase:
        return PrefillCase(op, b=b, s_q=s, s_k=s, h_q=h, h_kv=h, d_qk=d_qk, full=full)

    return [
        case(1, 8192, 128),
        case(4, 4096, 64),
        case(1, 32768, 16),
        case(1, 8192, 64, full=True),
        case(4, 4096, 32, full=True),
        case(1, 8192, 64, d_qk=128),
        case(4, 4096, 64, d_qk=128),
    ]


MHA_CASES = (
    *_mha(MHA_FORWARD),
    PrefillCase(MHA_FORWARD, b=64, s_q=544, s_k=544, spread=480, h_q=128, h_kv=128),
    *_mha(MHA_BACKWARD),
)

CASES: tuple[Case, ...] = (
    _dense(128, 128, 1, 4096),
    _dense(128, 128, 2, 4096),
    _dense(128, 128, 2, 32768),
    _dense(128, 128, 1, 8192, spread=4096),
    _dense(128, 64, 1, 4096),
    _dense(128, 16, 1, 16384),
    _dense(37, 96, 1, 5000, spread=500),
    _dense(200, 24, 1, 2000, spread=200),
    _dense(1, 128, 1, 131072),
    _dense(8, 128, 1, 4096),
    _dense(4, 16, 1, 8192),
    _dense(1, 128, 1, 1024),
    _sparse(128, 128, 2, 2048),
    _sparse(128, 64, 1, 2048),
    _sparse(2, 128, 2, 2048),
    _sparse(8, 64, 1, 2048),
    _sparse(8, 16, 1, 2048),
    _sparse(32, 128, 2, 32768),
    _sparse(128, 64, 1, 2048, "fp8-any-scale"),
    _sparse(128, 64, 1, 2048, "bf16"),
    _sparse(8, 16, 1, 2048, "bf16"),
    *(Case("dense_decode_fp8", b=128, h_q=h_q, s_k=8192) for h_q in (16, 64, 128)),
    _prefill(128, 8192),
    _prefill(128, 32768),
    _prefill(128, 131072),
    _prefill(64, 32768),
    _prefill(16, 32768),
    _prefill(8, 32768),
    *(Case("topk", b=b, s_k=n, topk=2048) for b, n in ((4096, 32768), (128, 131072), (1, 131072))),
    *(Case("indexer", h_q=h, s_q=4096, s_k=32768) for h in (64, 32)),
    *(Case("indexer_paged", b=64, h_q=64, s_q=s_q, s_k=131072) for s_q in (1, 2)),
    # A whole step of sparse attention, and the dense decode that it takes the place of.
    *(
        Case(op, b=64, s_k=s_k, topk=2048 if op == "dsa_step" else 0)
        for s_k in (4096, 8192, 32768, 131072)
        for op in ("dsa_step", "dense_decode")
    ),
    *MHA_CASES,
    *(Case(op, tokens=tokens) for op in WRITES for tokens in (65536, 128)),
)

# The ends of the range: balanced, compute-bound, memory-bound, one long sequence, a tiny one.
QUICK: tuple[Case, ...] = (
    _dense(128, 128, 1, 4096),
    _dense(128, 128, 2, 4096),
    _dense(128, 16, 1, 16384),
    _dense(1, 128, 1, 131072),
    _dense(1, 128, 1, 1024),
)

# For machines with no card: they show that the benchmark works, and nothing about speed.
TINY: tuple[Case, ...] = (_dense(2, 16, 1, 256), _dense(2, 16, 2, 192, spread=64))

# Dense decode along one axis at a time: what a call costs beside its bytes and operations shows in
# how the time grows.
SWEEP: dict[str, tuple[Case, ...]] = {
    "s_k": tuple(_dense(1, 128, 1, s_k) for s_k in (1024, 4096, 16384, 65536, 262144)),
    "b": tuple(_dense(b, 128, 1, 4096) for b in (1, 2, 4, 8, 16, 32, 64, 128)),
    "h_q": tuple(_dense(64, h_q, 1, 8192) for h_q in (8, 16, 24, 32, 48, 64, 96, 128)),
}

OPS = tuple(dict.fromkeys(case.op for case in CASES))


def select(op: str, device: str, quick: bool = False) -> tuple[Case, ...]:
    """The cases of an operation, of ``all`` or of the ``sweep``, for a device type, ``"cuda"`` or
    ``"cpu"``.

    Raises:
        ValueError: there is no such operation.
    """
    if op not in ("all", "sweep", *OPS):
        raise ValueError(f"op is {op!r}, expected 'all', 'sweep' or one of {', '.join(OPS)}")
    if op == "sweep":
        return TINY if device == "cpu" else tuple(case for axis in SWEEP.values() for case in axis)
    rows = TINY if device == "cpu" else QUICK if quick else CASES
    return tuple(case for case in rows if op in ("all", case.op))
