"""Seeded inputs for every kernel, with everything that must not be read poisoned, and the answers.

A case is a frozen dataclass of sizes.  `case.build(device)` makes its torch tensors, the same on
every device, and `inputs.expected()` asks the oracle, which reads copies on the CPU: call the
kernel first, so that memory it finds by luck can't hold the answer.  In a test:

    from cases import DECODE_CASES, case_id

    @pytest.mark.parametrize("case", DECODE_CASES, ids=case_id)
    def test_decode(case):
        inputs = case.build("cpu")
        out, lse = kernel(inputs.q, inputs.k_cache, ...)
        want_out, want_lse = inputs.expected()
        assert_out_close(out, want_out); assert_lse_close(lse, want_lse)

Poison: NaN in the tail of each last page, in every unused page, and in the memory between the
slices that are passed; block numbers of 2147480000 behind the length; indices that point to NaN
behind `topk_length`.  Values are normal with deviation 0.1 and queries with 10, so that scores
have deviation 1 and the absolute bound of the outputs means something.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch

from flashmla.reference import dsa, fp8, mha, paged_kv

WILD = 2147480000  # a block number that no cache has
LENGTHS = (0, 1, 63, 64, 65, 127, 128, 129, 200, 321)
Q_STD, KV_STD = 10.0, 0.1


def case_id(case: Any) -> str:
    """A short name for pytest."""
    return case.name


def to_numpy(x: torch.Tensor | None) -> np.ndarray | None:
    """A CPU copy of the same dtype, bfloat16 and float8 as ml_dtypes has them."""
    if x is None:
        return None
    x = x.detach().cpu().contiguous()
    special = {
        torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
        torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    }
    if x.dtype in special:
        as_int, as_numpy = special[x.dtype]
        return x.view(as_int).numpy().view(as_numpy)
    return x.numpy()


def inside_nan(x: torch.Tensor, extra: dict[int, int]) -> torch.Tensor:
    """x as a slice of a larger tensor: `extra[dim]` entries of NaN before it along each dim.

    Bytes stand for packed tokens, every field of which is NaN where all bits are set.
    """
    shape = [n + extra.get(dim, 0) for dim, n in enumerate(x.shape)]
    view = torch.full(shape, 255 if x.dtype == torch.uint8 else float("nan"), dtype=x.dtype)
    for dim, n in extra.items():
        view = view.narrow(dim, n, x.shape[dim])
    return view.copy_(x)


def moved(x: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """x on the device with its strides, and with whatever lies between its rows."""
    if torch.device(device).type == "cpu":
        return x
    base = x._base if x._base is not None else x
    return base.to(device).as_strided(x.shape, x.stride(), x.storage_offset())


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _normal(shape: tuple[int, ...], std: float, dtype: torch.dtype, g: torch.Generator):
    return (torch.randn(shape, generator=g) * std).to(dtype)


# --- dense decode over a paged cache ---------------------------------------------------------


@dataclass(frozen=True)
class DecodeCase:
    """Sizes of one dense decode; lengths has one entry a request, 0 allowed."""

    name: str
    lengths: tuple[int, ...] = LENGTHS
    s_q: int = 1
    h_q: int = 16
    h_kv: int = 1
    page: int = 64
    causal: bool = False
    dtype: torch.dtype = torch.bfloat16
    d_qk: int = 576
    d_v: int = 512
    softmax_scale: float | None = None
    shared_prefix_pages: int = 0  # full pages that all long enough requests have in common
    unused_blocks: int = 5
    sink: bool = False
    fp8: bool = False  # the cache is packed, what is unused in it to NaN codes and NaN scales
    power_of_two: bool = True  # its scales
    strided: bool = True  # q and the cache are slices of larger tensors full of NaN
    seed: int = 0

    @property
    def b(self) -> int:
        return len(self.lengths)

    @property
    def scale(self) -> float:
        return self.d_qk**-0.5 if self.softmax_scale is None else self.softmax_scale

    def build(self, device: str | torch.device = "cpu") -> DecodeInputs:
        """The tensors of flash_mla_with_kvcache on a device, poisoned."""
        g = _generator(self.seed)
        table, blocks = self._block_table(g)
        q = _normal((self.b, self.s_q, self.h_q, self.d_qk), Q_STD, self.dtype, g)
        shape = (blocks, self.page, self.h_kv, self.d_qk)
        cache = torch.full(shape, float("nan"), dtype=self.dtype)
        for i, length in enumerate(self.lengths):
            for j in range(-(-length // self.page)):
                used = min(self.page, length - j * self.page)
                tokens = _normal((used, *shape[2:]), KV_STD, self.dtype, g)
                block = cache[table[i, j]]
                # A shared page keeps the values that its first owner gave it.
                block[:used] = torch.where(block[:used].isnan(), tokens, block[:used])
        if self.fp8:
            cache = torch.from_numpy(fp8.pack(to_numpy(cache), self.power_of_two))
        if self.strided:
            q = inside_nan(q, {2: 1, 3: 64})
            cache = inside_nan(cache[:, None], {1: 1})[:, 0]  # one layer of a cache of two
        return DecodeInputs(
            case=self,
            q=moved(q, device),
            k_cache=moved(cache, device),
            block_table=table.to(device),
            cache_seqlens=torch.tensor(self.lengths, dtype=torch.int32, device=device),
            attn_sink=self._sink(g).to(device) if self.sink else None,
        )

    def _sink(self, g: torch.Generator) -> torch.Tensor:
        """Sinks about as heavy as the keys, two of them without end."""
        sink = torch.randn(self.h_q, generator=g) * 2 + 4
        for head, value in ((1, float("inf")), (2, float("-inf"))):
            sink[head : head + 1] = value
        return sink

    def _block_table(self, g: torch.Generator) -> tuple[torch.Tensor, int]:
        """Scattered block numbers, WILD behind each length, and how many blocks the cache has."""
        pages = [-(-length // self.page) for length in self.lengths]
        blocks = sum(pages) + self.unused_blocks
        free = torch.randperm(blocks, generator=g).to(torch.int32)
        table = torch.full((self.b, max(pages, default=0) + 2), WILD, dtype=torch.int32)
        taken = 0
        for i, n in enumerate(pages):
            table[i, :n] = free[taken : taken + n]
            taken += n
        full = [
            i for i in range(self.b) if self.lengths[i] // self.page >= self.shared_prefix_pages
        ]
        if self.shared_prefix_pages and full:
            table[full, : self.shared_prefix_pages] = table[full[0], : self.shared_prefix_pages]
        return table, blocks


@dataclass
class DecodeInputs:
    """What flash_mla_with_kvcache takes; `expected()` is what it has to give."""

    case: DecodeCase
    q: torch.Tensor  # [b, s_q, h_q, d_qk], last dimension contiguous, others maybe strided
    k_cache: torch.Tensor  # [blocks, page, h_kv, d_qk or 656 bytes], free stride between pages
    block_table: torch.Tensor  # int32 [b, max_blocks]
    cache_seqlens: torch.Tensor  # int32 [b]
    attn_sink: torch.Tensor | None = None  # float32 [h_q]

    @property
    def scale(self) -> float:
        return self.case.scale

    def expected(self, sink: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """out float64 [b, s_q, h_q, d_v], lse float64 [b, h_q, s_q]."""
        oracle = fp8.dense_decode if self.case.fp8 else paged_kv.paged_decode
        return oracle(
            to_numpy(self.q), to_numpy(self.k_cache), to_numpy(self.block_table),
            to_numpy(self.cache_seqlens), self.case.d_v, self.scale, self.case.causal,
            to_numpy(self.attn_sink) if sink else None,
        )  # fmt: skip


_HALF = torch.float16

# Small enough for a CPU.
DECODE_CASES: tuple[DecodeCase, ...] = (
    DecodeCase("plain", seed=1),
    DecodeCase("fp16", dtype=_HALF, h_q=8, seed=2),
    DecodeCase("contiguous", (70, 3, 128), strided=False, seed=3),
    DecodeCase("one_token", (1,), h_q=128, seed=4),
    DecodeCase("one_head", (65, 0, 190), h_q=1, seed=5),
    DecodeCase("odd_heads", (65, 130), h_q=5, seed=6),
    DecodeCase("all_empty", (0, 0, 0), h_q=4, seed=7),
    DecodeCase("empty_first_and_last", (0, 64, 0, 129, 0), h_q=4, seed=8),
    DecodeCase("causal", s_q=2, causal=True, seed=9),
    DecodeCase("causal_rows_with_nothing", (0, 1, 2, 3, 64, 66), s_q=4, causal=True, seed=10),
    DecodeCase("causal_fp16", (65, 1, 200), s_q=3, h_q=8, causal=True, dtype=_HALF, seed=11),
    DecodeCase("two_tokens_not_causal", (64, 1, 130), s_q=2, seed=12),
    DecodeCase("two_kv_heads", (63, 0, 129), h_q=8, h_kv=2, s_q=2, causal=True, seed=13),
    DecodeCase("kv_head_each", (65, 10), h_q=3, h_kv=3, seed=14),
    DecodeCase("more_rows_than_a_tile", (65, 128), h_q=48, s_q=3, causal=True, seed=15),
    DecodeCase("other_scale", (100, 64), softmax_scale=0.1, seed=16),
    DecodeCase("shared_prefix", (130, 64, 200, 63), shared_prefix_pages=1, seed=17),
    DecodeCase("one_long", (2500,), h_q=8, seed=18),
    DecodeCase("one_long_among_short", (3, 2000, 0, 65), h_q=8, s_q=2, causal=True, seed=19),
    DecodeCase("many_short", tuple(i % 70 for i in range(150)), h_q=2, seed=20),
    DecodeCase("sink", s_q=2, sink=True, causal=True, seed=25),
    DecodeCase(
        "sink_over_empty_rows", (0, 1, 2, 70), s_q=3, h_q=4, sink=True, causal=True, seed=26
    ),
    DecodeCase("sink_split", (3, 2600), h_q=8, sink=True, seed=27),
    DecodeCase("no_rope", d_qk=512, s_q=2, causal=True, seed=28),
    DecodeCase(
        "no_rope_fp16_sink", (65, 0, 1100), h_q=8, d_qk=512, sink=True, dtype=_HALF, seed=29
    ),
    DecodeCase("page_16", page=16, seed=21),
    DecodeCase("page_48", (0, 47, 48, 49, 150), page=48, s_q=2, causal=True, seed=22),
    DecodeCase("page_128", (0, 127, 128, 300), page=128, seed=23),
    DecodeCase("page_256_fp16", (0, 255, 257), page=256, dtype=_HALF, seed=24),
)


# The same over the FP8 cache.
DENSE_FP8_CASES: tuple[DecodeCase, ...] = (
    DecodeCase("fp8", fp8=True, seed=1),
    DecodeCase("fp8_any_scale", (65, 3, 200), fp8=True, power_of_two=False, seed=2),
    DecodeCase("fp8_causal", s_q=2, causal=True, fp8=True, seed=3),
    DecodeCase("fp8_causal_rows_with_nothing", (0, 1, 2, 3, 64, 66), 4, 8, causal=True, fp8=True),
    DecodeCase("fp8_two_tokens_not_causal", (64, 1, 130), 2, 5, fp8=True, seed=5),
    DecodeCase("fp8_sink", (0, 1, 70, 129), 3, 4, causal=True, sink=True, fp8=True, seed=6),
    DecodeCase("fp8_all_empty", (0, 0), h_q=4, fp8=True, seed=7),
    DecodeCase("fp8_one_head", (65, 0, 190), h_q=1, fp8=True, seed=8),
    DecodeCase("fp8_128_heads", (1, 100), 2, 128, causal=True, fp8=True, seed=9),
    DecodeCase("fp8_split", (3, 2600), h_q=8, fp8=True, power_of_two=False, seed=10),
    DecodeCase("fp8_page_1", (0, 5, 33), h_q=2, page=1, fp8=True, seed=11),
    DecodeCase("fp8_page_48", (0, 47, 48, 49, 150), 2, page=48, causal=True, fp8=True, seed=12),
    DecodeCase("fp8_page_256", (0, 255, 257), page=256, fp8=True, strided=False, seed=13),
    DecodeCase("fp8_shared_prefix", (130, 64, 200), shared_prefix_pages=1, fp8=True, seed=14),
)


def varied_lengths(b: int, mean: int, std: float, seed: int, least: int = 1) -> tuple[int, ...]:
    """b lengths, normal around a mean, none below `least`."""
    lengths = np.random.default_rng(seed).normal(mean, std, b)
    return tuple(int(length) for length in np.maximum(lengths, least))


def large_decode_cases() -> list[DecodeCase]:
    """For a card: every head count that matters, both dtypes, long and many sequences."""
    dtypes = torch.bfloat16, _HALF
    heads = [
        DecodeCase(f"h{h_q}_sq{s_q}_{str(dtype)[6:]}", (*LENGTHS, 1000, 4097), s_q, h_q, 1, 64,
                   s_q > 1, dtype, seed=100 + h_q + s_q)
        for h_q in (1, 2, 7, 8, 16, 24, 32, 48, 64, 65, 96, 127, 128)
        for s_q, dtype in ((1, dtypes[0]), (2, dtypes[1]), (5, dtypes[0]))
    ]  # fmt: skip
    pages = [
        DecodeCase(f"page_{page}_h{h_q}", (*LENGTHS, page - 1, page, page + 1, 1000, 4097), 2, h_q,
                   page=page, causal=True, seed=400 + page + h_q)
        for page in (16, 32, 64, 128, 256)
        for h_q in (16, 128)
    ]  # fmt: skip
    return [*heads, *pages] + [
        DecodeCase("sink_large", (*LENGTHS, 5000), 2, 128, causal=True, sink=True, seed=500),
        DecodeCase("sink_whole", (2000,) * 132, 1, 16, sink=True, seed=501),
        DecodeCase("no_rope_large", (*LENGTHS, 5000), 2, 128, causal=True, d_qk=512, seed=502),
        DecodeCase(
            "no_rope_sink_page_32", (*LENGTHS, 3000), 1, 24, page=32, d_qk=512, sink=True, seed=503
        ),
        DecodeCase(
            "gqa_2_sink_fp16",
            (*LENGTHS, 3000),
            2,
            64,
            2,
            causal=True,
            sink=True,
            dtype=_HALF,
            seed=504,
        ),
        DecodeCase("gqa_2", (*LENGTHS, 3000), 2, 128, 2, causal=True, seed=300),
        DecodeCase("gqa_4_not_causal", (*LENGTHS, 3000), 3, 64, 4, seed=301),
        DecodeCase("kv_head_each_large", (*LENGTHS, 700), 1, 16, 16, seed=302),
        DecodeCase("b1_long", (32768,), 1, 128, seed=303),
        DecodeCase("b1_long_few_heads", (65537,), 1, 16, seed=304),
        DecodeCase("b128_short", tuple(i % 67 for i in range(128)), 1, 128, seed=305),
        DecodeCase("b500_tiny", tuple(i % 5 for i in range(500)), 1, 16, seed=306),
        DecodeCase("b32_varied", varied_lengths(32, 2048, 1024, 0), 2, 128, causal=True, seed=307),
        DecodeCase("b128_4096", (4096,) * 128, 1, 16, seed=308),
        DecodeCase("no_split", (4096,) * 8, 2, 128, causal=True, seed=309),
        DecodeCase("all_empty_large", (0,) * 40, 1, 128, seed=310),
        DecodeCase("sharp", (*LENGTHS, 2000), 1, 64, softmax_scale=0.4, seed=311),
        DecodeCase("shared_prefix_large", (2000,) * 16, 1, 128, shared_prefix_pages=20, seed=312),
        DecodeCase("cache_over_4_gib", (*LENGTHS, 3000), 2, 64, unused_blocks=40_000, seed=313),
    ]


def large_dense_fp8_cases() -> list[DecodeCase]:
    """For a card: the large cases again, over the FP8 cache."""
    plain = [
        dataclasses.replace(
            case, name=f"fp8_{case.name}", fp8=True, power_of_two=i % 2 == 0, seed=case.seed + 1000
        )
        for i, case in enumerate(large_decode_cases())
        if case.dtype == torch.bfloat16
        and case.d_qk == 576
        and case.h_kv == 1
        and case.unused_blocks < 1000
    ]
    return [
        *plain,
        DecodeCase("fp8_pages_of_1", (0, 1, 700), 2, 16, page=1, causal=True, fp8=True, seed=1600),
        DecodeCase("fp8_pages_of_100", (*LENGTHS, 3000), 1, 64, page=100, fp8=True, seed=1601),
    ]


# --- sparse decode over a paged cache, FP8 or not --------------------------------------------


@dataclass(frozen=True)
class SparseDecodeCase:
    """Sizes of one sparse decode; topk_length is None, one number a request, or one a query."""

    name: str
    b: int = 2
    s_q: int = 2
    h_q: int = 16
    topk: int = 100
    blocks: int = 6
    page: int = 64
    topk_length: tuple | None = None
    fp8: bool = True
    power_of_two: bool = True
    sink: bool = False
    invalid: float = 0.2  # share of the indices that point to nothing
    dtype: torch.dtype = torch.bfloat16
    d_v: int = 512
    seed: int = 0

    def build(self, device: str | torch.device = "cpu") -> SparseDecodeInputs:
        """The tensors of flash_mla_with_kvcache with indices; unreferenced tokens are NaN."""
        g = _generator(self.seed)
        n = self.blocks * self.page
        lengths = None
        if self.topk_length is not None:
            lengths = torch.tensor(self.topk_length, dtype=torch.int32)
        read = torch.randperm(n, generator=g)[: n * 3 // 4]  # the other tokens are never pointed to
        limit = None if lengths is None else lengths.view(self.b, -1).expand(self.b, self.s_q)
        indices = _indices((self.b, self.s_q, self.topk), read, n, limit, self.invalid, g)
        x = torch.full((n, 576), float("nan"), dtype=self.dtype)
        x[read] = _normal((len(read), 576), KV_STD, self.dtype, g)
        cache = x
        if self.fp8:
            cache = torch.full((n, fp8.TOKEN_BYTES), 255, dtype=torch.uint8)  # NaN in every field
            cache[read] = torch.from_numpy(fp8.pack(to_numpy(x[read]), self.power_of_two))
        cache = cache.view(self.blocks, self.page, 1, -1)
        q = inside_nan(_normal((self.b, self.s_q, self.h_q, 576), Q_STD, self.dtype, g), {2: 1})
        sink = torch.randn(self.h_q, generator=g) * 2 + 4 if self.sink else None
        return SparseDecodeInputs(
            case=self,
            q=moved(q, device),
            k_cache=cache.to(device),
            indices=indices.to(device),
            topk_length=None if lengths is None else lengths.to(device),
            attn_sink=None if sink is None else sink.to(device),
        )


@dataclass
class SparseDecodeInputs:
    """What sparse flash_mla_with_kvcache takes; `expected()` is what it has to give."""

    case: SparseDecodeCase
    q: torch.Tensor  # [b, s_q, h_q, 576]
    k_cache: torch.Tensor  # uint8 [blocks, page, 1, 656], or [blocks, page, 1, 576] of q's dtype
    indices: torch.Tensor  # int32 [b, s_q, topk]
    topk_length: torch.Tensor | None  # int32 [b] or [b, s_q]
    attn_sink: torch.Tensor | None  # float32 [h_q]

    @property
    def scale(self) -> float:
        return 576**-0.5

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """out float64 [b, s_q, h_q, d_v], lse float64 [b, h_q, s_q]."""
        return dsa.sparse_decode(
            to_numpy(self.q), to_numpy(self.k_cache), to_numpy(self.indices), self.case.d_v,
            self.scale, to_numpy(self.attn_sink), to_numpy(self.topk_length),
        )  # fmt: skip


def _indices(
    shape: tuple[int, ...],
    read: torch.Tensor,
    n: int,
    lengths: torch.Tensor | None,
    invalid: float,
    g: torch.Generator,
) -> torch.Tensor:
    """Indices into `read`, some of them nothing, and from `lengths` on pointing to NaN or away."""
    indices = read[torch.randint(len(read), shape, generator=g)].to(torch.int32)
    nothing = torch.tensor([-1, -1, n, n + 7, WILD, -WILD], dtype=torch.int32)
    is_nothing = torch.rand(shape, generator=g) < invalid
    indices[is_nothing] = nothing[torch.randint(len(nothing), shape, generator=g)][is_nothing]
    if lengths is not None:
        unread = torch.ones(n, dtype=torch.bool)
        unread[read] = False
        traps = torch.cat([unread.nonzero()[:, 0], torch.tensor([WILD, -1])]).to(torch.int32)
        behind = torch.arange(shape[-1]) >= lengths[..., None]
        indices[behind] = traps[torch.randint(len(traps), shape, generator=g)][behind]
    return indices


SPARSE_DECODE_CASES: tuple[SparseDecodeCase, ...] = (
    SparseDecodeCase("fp8", seed=1),
    SparseDecodeCase("fp8_any_scale", power_of_two=False, seed=2),
    SparseDecodeCase("fp8_all_valid", invalid=0.0, topk=128, seed=3),
    SparseDecodeCase("fp8_nothing_valid", invalid=1.0, topk=64, seed=4),
    SparseDecodeCase("fp8_sink", sink=True, seed=5),
    SparseDecodeCase("fp8_length", b=4, topk_length=(0, 1, 65, 100), seed=6),
    SparseDecodeCase("fp8_length_each", topk_length=((0, 100), (64, 1)), sink=True, seed=7),
    SparseDecodeCase("fp8_nothing_valid_sink", invalid=1.0, sink=True, topk=3, seed=8),
    SparseDecodeCase("fp8_one_index", topk=1, h_q=128, seed=9),
    SparseDecodeCase("fp8_long", b=1, s_q=1, topk=2048, blocks=40, h_q=8, seed=10),
    SparseDecodeCase("fp8_odd_page", page=48, h_q=5, seed=11),
    SparseDecodeCase("bf16_cache", fp8=False, sink=True, topk_length=(50, 100), seed=12),
    SparseDecodeCase("fp16_query", dtype=torch.float16, fp8=False, seed=13),
)


# --- sparse prefill --------------------------------------------------------------------------


@dataclass(frozen=True)
class SparsePrefillCase:
    """Sizes of one sparse prefill; topk_length is None or has one number a query."""

    name: str
    s_q: int = 10
    s_kv: int = 300
    h_q: int = 16
    topk: int = 100
    d_qk: int = 576
    topk_length: tuple[int, ...] | None = None
    sink: bool = False
    invalid: float = 0.2
    dtype: torch.dtype = torch.bfloat16
    d_v: int = 512
    seed: int = 0

    def build(self, device: str | torch.device = "cpu") -> SparsePrefillInputs:
        """The tensors of flash_mla_sparse_fwd; rows of kv that nobody points to are NaN."""
        g = _generator(self.seed)
        lengths = None
        if self.topk_length is not None:
            lengths = torch.tensor(self.topk_length, dtype=torch.int32)
        read = torch.randperm(self.s_kv, generator=g)[: -(-self.s_kv * 3 // 4)]
        shape = (self.s_q, self.topk)
        indices = _indices(shape, read, self.s_kv, lengths, self.invalid, g)[:, None]
        kv = torch.full((self.s_kv, 1, self.d_qk), float("nan"), dtype=self.dtype)
        kv[read] = _normal((len(read), 1, self.d_qk), KV_STD, self.dtype, g)
        q = _normal((self.s_q, self.h_q, self.d_qk), Q_STD, self.dtype, g)
        sink = torch.randn(self.h_q, generator=g) * 2 + 4 if self.sink else None
        return SparsePrefillInputs(
            case=self,
            q=moved(inside_nan(q, {1: 1}), device),
            kv=moved(inside_nan(kv, {2: 64}), device),
            indices=indices.to(device),
            topk_length=None if lengths is None else lengths.to(device),
            attn_sink=None if sink is None else sink.to(device),
        )


@dataclass
class SparsePrefillInputs:
    """What flash_mla_sparse_fwd takes; `expected()` is what it has to give."""

    case: SparsePrefillCase
    q: torch.Tensor  # [s_q, h_q, d_qk]
    kv: torch.Tensor  # [s_kv, 1, d_qk]
    indices: torch.Tensor  # int32 [s_q, 1, topk]
    topk_length: torch.Tensor | None  # int32 [s_q]
    attn_sink: torch.Tensor | None  # float32 [h_q]

    @property
    def scale(self) -> float:
        return self.case.d_qk**-0.5

    def expected(self, lse_base_2: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """out float64 [s_q, h_q, d_v], max_logits and lse float64 [s_q, h_q]."""
        return dsa.sparse_prefill(
            to_numpy(self.q), to_numpy(self.kv), to_numpy(self.indices), self.scale,
            self.case.d_v, to_numpy(self.attn_sink), to_numpy(self.topk_length), lse_base_2,
        )  # fmt: skip


SPARSE_PREFILL_CASES: tuple[SparsePrefillCase, ...] = (
    SparsePrefillCase("plain", seed=1),
    SparsePrefillCase("sink", sink=True, seed=2),
    SparsePrefillCase("length", topk_length=(0, 1, 2, 63, 64, 65, 99, 100, 0, 7), seed=3),
    SparsePrefillCase("nothing_valid", invalid=1.0, sink=True, topk=5, seed=4),
    SparsePrefillCase("all_valid", invalid=0.0, topk=128, seed=5),
    SparsePrefillCase("one_token", s_kv=1, topk=3, h_q=128, seed=6),
    SparsePrefillCase("fp16", dtype=torch.float16, h_q=5, seed=7),
    SparsePrefillCase("no_rope", d_qk=512, seed=8),
)


# --- dense prefill, sequences end to end -----------------------------------------------------


@dataclass(frozen=True)
class PrefillCase:
    """Sizes of one dense prefill; a sequence is (s_q, s_k), either may be 0."""

    name: str
    sequences: tuple[tuple[int, int], ...] = ((65, 65), (1, 64), (0, 5), (30, 130), (5, 0))
    h_q: int = 4
    h_kv: int = 4
    d_qk: int = 192
    d_v: int = 128
    causal: bool = False
    dtype: torch.dtype = torch.bfloat16
    softmax_scale: float | None = None
    seed: int = 0

    @property
    def scale(self) -> float:
        return self.d_qk**-0.5 if self.softmax_scale is None else self.softmax_scale

    def build(self, device: str | torch.device = "cpu") -> PrefillInputs:
        """The tensors of flash_attn_varlen_func, slices of larger ones, and a gradient of out."""
        g = _generator(self.seed)
        total_q, total_kv = (sum(lengths) for lengths in zip(*self.sequences, strict=True))
        cu_qo, cu_kv = (
            torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32)
            for lengths in zip(*self.sequences, strict=True)
        )
        q = _normal((total_q, self.h_q, self.d_qk), 1.0, self.dtype, g)
        k = _normal((total_kv, self.h_kv, self.d_qk), 1.0, self.dtype, g)
        v = _normal((total_kv, self.h_kv, self.d_v), KV_STD, self.dtype, g)
        return PrefillInputs(
            case=self,
            q=moved(inside_nan(q, {1: 1}), device),
            k=moved(inside_nan(k, {2: 64}), device),
            v=moved(inside_nan(v, {2: 64}), device),
            cu_seqlens_qo=cu_qo.to(device),
            cu_seqlens_kv=cu_kv.to(device),
            max_seqlen_qo=max(s_q for s_q, _ in self.sequences),
            max_seqlen_kv=max(s_k for _, s_k in self.sequences),
            d_out=_normal((total_q, self.h_q, self.d_v), 1.0, self.dtype, g).to(device),
        )


@dataclass
class PrefillInputs:
    """What flash_attn_varlen_func takes; `expected...()` are the answers."""

    case: PrefillCase
    q: torch.Tensor  # [total_q, h_q, d_qk]
    k: torch.Tensor  # [total_kv, h_kv, d_qk]
    v: torch.Tensor  # [total_kv, h_kv, d_v]
    cu_seqlens_qo: torch.Tensor  # int32 [sequences + 1]
    cu_seqlens_kv: torch.Tensor  # int32 [sequences + 1]
    max_seqlen_qo: int
    max_seqlen_kv: int
    d_out: torch.Tensor  # [total_q, h_q, d_v]

    @property
    def scale(self) -> float:
        return self.case.scale

    def _arguments(self) -> tuple[Any, ...]:
        tensors = self.q, self.k, self.v, self.cu_seqlens_qo, self.cu_seqlens_kv
        return *(to_numpy(x) for x in tensors), self.scale, self.case.causal

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        """out float64 [total_q, h_q, d_v], lse float64 [total_q, h_q]."""
        return mha.attention_varlen(*self._arguments())

    def expected_gradients(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """dq, dk, dv in float64, for `d_out`."""
        return mha.attention_varlen_backward(to_numpy(self.d_out), *self._arguments())


PREFILL_CASES: tuple[PrefillCase, ...] = (
    PrefillCase("plain", seed=1),
    PrefillCase("causal", causal=True, seed=2),
    PrefillCase("causal_128", d_qk=128, causal=True, seed=3),
    PrefillCase("fp16", dtype=torch.float16, seed=4),
    PrefillCase("gqa", h_q=6, h_kv=2, causal=True, seed=5),
    PrefillCase("mqa", h_q=3, h_kv=1, d_qk=128, seed=6),
    PrefillCase("rows_with_nothing", ((70, 3), (2, 1), (4, 4)), causal=True, seed=7),
    PrefillCase("one_token", ((1, 1),), seed=8),
    PrefillCase("long", ((300, 300), (129, 257)), h_q=2, h_kv=2, causal=True, seed=9),
    PrefillCase("other_scale", softmax_scale=0.05, causal=True, seed=10),
)
