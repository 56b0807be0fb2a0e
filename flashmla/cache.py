"""A paged KV cache: pages handed out to sequences, shared by forks, copied before they diverge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral

import torch
from torch import Tensor

from flashmla import fp8
from flashmla.checks import check_bool, check_dtype, check_int
from flashmla.ops.paged_kv import paged_append

__all__ = ["OutOfPages", "PagedKVCache"]

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class OutOfPages(RuntimeError):
    """The cache has fewer free pages than a call needs; the call changed nothing."""


@dataclass
class _Sequence:
    row: int  # of the device tensors
    length: int = 0
    pages: list[int] = field(default_factory=list)


@dataclass
class _Growth:
    """What appending to one sequence takes."""

    sequence: _Sequence
    length: int  # afterwards
    copied: int | None = None  # place in `pages` of a shared page that is only partly full
    new_pages: int = 0  # behind the last one
    pages: list[int] = field(default_factory=list)  # afterwards
    copy: tuple[int, int] | None = None  # the shared page and the one that takes its place


class PagedKVCache:
    """Keys of many sequences in one tensor of pages, with a block table for each sequence.

    A sequence is an int that :meth:`allocate` or :meth:`fork` gives out and :meth:`free` takes
    back; it is never given out again. A fork shares its parent's pages, and a shared page that is
    only partly full is copied when one of its owners is about to write into it, so neither ever
    sees the other's tokens. A call that fails changes nothing.

    The page lists live on the host, where they are decided; :attr:`block_table` and
    :attr:`lengths` mirror them on the device, in buffers that never move, as CUDA graphs need.

    Args:
        num_pages: pages in the cache.
        page_size: tokens in a page; 64 is the fastest on Hopper.
        num_heads: KV heads; 1 for MLA.
        head_dim: numbers a token and head; 576 for MLA.
        dtype: of the cache and of what is appended: bfloat16, float16 or float32.
        device: where the tensors are.
        max_sequences: sequences that may be alive at the same time.
        max_pages_per_sequence: width of the block table; ``num_pages`` unless given.
        fp8_format: keep tokens in the 656-byte format of :mod:`flashmla.fp8`, to be read with
            ``is_fp8_kvcache=True``; needs one head of 576.

    Attributes:
        kv: [num_pages, page_size, num_heads, head_dim] of ``dtype``, or uint8
            [num_pages, page_size, 1, 656]: what :func:`flashmla.flash_mla_with_kvcache` takes
            as ``k_cache``.
        block_table: int32 [max_sequences, max_pages_per_sequence], -1 behind a sequence's pages.
        lengths: int32 [max_sequences], 0 in rows that no sequence has.

    Raises:
        TypeError: an argument of the wrong kind, or another dtype.
        ValueError: numbers below 1, or an FP8 cache of other sizes.

    Example:
        >>> cache = flashmla.PagedKVCache(num_pages=4, page_size=64)
        >>> parent = cache.allocate(torch.randn(100, 576).bfloat16())
        >>> child = cache.fork(parent)
        >>> cache.append([parent, child], torch.randn(2, 1, 576).bfloat16())
        >>> cache.pages(parent), cache.pages(child)  # one page shared, the partly full one not
        ([0, 2], [0, 1])
        >>> cache.free(parent)
        >>> cache.free_pages
        2

    Source: ``flashmla/cache.py``.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int = 64,
        *,
        num_heads: int = 1,
        head_dim: int = 576,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        max_sequences: int = 256,
        max_pages_per_sequence: int | None = None,
        fp8_format: bool = False,
    ) -> None:
        self.num_pages = check_int("num_pages", num_pages, 1)
        self.page_size = check_int("page_size", page_size, 1)
        self.num_heads = check_int("num_heads", num_heads, 1)
        self.head_dim = check_int("head_dim", head_dim, 1)
        rows = check_int("max_sequences", max_sequences, 1)
        width = num_pages if max_pages_per_sequence is None else max_pages_per_sequence
        width = check_int("max_pages_per_sequence", width, 1)
        if dtype not in _FLOATS:
            raise TypeError(f"dtype must be torch.bfloat16, float16 or float32, got {dtype!r}")
        self.dtype = dtype
        self.fp8_format = check_bool("fp8_format", fp8_format)
        if fp8_format and (num_heads, head_dim) != (1, fp8.HEAD_DIM):
            raise ValueError(
                f"fp8_format needs num_heads 1 and head_dim {fp8.HEAD_DIM}, got {num_heads} and "
                f"{head_dim}"
            )
        token = (1, fp8.BYTES_PER_TOKEN) if fp8_format else (num_heads, head_dim)
        stored = torch.uint8 if fp8_format else dtype
        self.kv = torch.zeros(num_pages, page_size, *token, dtype=stored, device=device)
        self.block_table = torch.full((rows, width), -1, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.int32, device=device)

        self._sequences: dict[int, _Sequence] = {}
        self._next_id = 0
        self._free_rows = list(range(rows - 1, -1, -1))
        self._free_pages = list(range(num_pages - 1, -1, -1))
        self._owners = [0] * num_pages

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.kv.device

    @property
    def free_pages(self) -> int:
        """Pages that no sequence has."""
        return len(self._free_pages)

    @property
    def sequences(self) -> list[int]:
        """The sequences alive, in the order of their making."""
        return list(self._sequences)

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return self._get(sequence).length

    def pages(self, sequence: int) -> list[int]:
        """The pages of a sequence, in the order of its tokens."""
        return list(self._get(sequence).pages)

    def owners(self, page: int) -> int:
        """How many sequences have a page.

        Raises:
            TypeError, ValueError: no page of this cache.
        """
        return self._owners[check_int("page", page, 0, self.num_pages - 1)]

    def allocate(self, tokens: Tensor | None = None) -> int:
        """Start a sequence, empty or with tokens [n, num_heads, head_dim] (or [n, head_dim]).

        Raises:
            OutOfPages: not enough free pages for the tokens.
            RuntimeError: ``max_sequences`` are alive already.
            TypeError, ValueError: see :meth:`append`.
        """
        sequence = self._new_sequence([], 0)
        if tokens is not None:
            try:
                self.append(sequence, tokens)
            except BaseException:
                self.free(sequence)
                raise
        return sequence

    def fork(self, sequence: int, length: int | None = None) -> int:
        """Start a sequence with the first tokens of another, sharing its pages.

        No page is taken and nothing is copied until one of the two appends to a page that both
        have.

        Args:
            sequence: the parent.
            length: how many of its tokens; all of them unless given.

        Raises:
            RuntimeError: ``max_sequences`` are alive already.
            ValueError: the parent is not alive, or has fewer tokens.
        """
        parent = self._get(sequence)
        shared = parent.length if length is None else check_int("length", length, 0)
        if shared > parent.length:
            raise ValueError(
                f"length must be at most the {parent.length} tokens of sequence {sequence}, got "
                f"{shared}"
            )
        return self._new_sequence(parent.pages[: self._pages_for(shared)], shared)

    @torch.no_grad()
    def append(self, sequences: int | Sequence[int], tokens: Tensor) -> None:
        """Write tokens behind the last ones of one sequence, or of several at once.

        Args:
            sequences: a sequence, or several different ones.
            tokens: of the cache's dtype and device (an FP8 cache also takes bfloat16, float16 and
                float32). For one sequence [n, num_heads, head_dim]; for a list of b sequences
                [b, n, num_heads, head_dim], n tokens each. With one head that dimension may
                be left out. Their values are kept, without gradients.

        Raises:
            OutOfPages: not enough free pages for all of them; nothing was appended to any.
            TypeError: sequences or tokens of the wrong kind or dtype.
            ValueError: a sequence that is not alive or named twice, a wrong shape or device, or
                more pages than a row of the block table has.
        """
        single = isinstance(sequences, Integral)
        names = _names(sequences)
        members = self._get_all(names)
        rows = self._check_tokens(tokens, None if single else len(names))
        count = rows.shape[1]
        growths = [
            self._plan_growth(name, m, count) for name, m in zip(names, members, strict=True)
        ]
        needed = sum(g.new_pages + (g.copied is not None) for g in growths)
        needed -= self._last_owners_spared(growths)
        if needed > len(self._free_pages):
            raise OutOfPages(
                f"appending {count} tokens to {len(names)} sequences needs {needed} pages, and "
                f"{len(self._free_pages)} of {self.num_pages} are free; nothing was appended"
            )
        if count == 0 or not names:
            return
        self._lay_out(growths)
        slots = self._slots(growths, count)
        # Whatever can fail comes before the lists change: until then the new tokens lie in pages
        # or places that no sequence reads.
        mirror = self._mirror([(g.sequence.row, g.length, g.pages) for g in growths])
        places = slots.to(self.device)
        self._copy_shared(growths)
        self._write(places, rows.flatten(0, 1))
        mirror.write()
        self._commit(growths, needed)

    def free(self, sequences: int | Sequence[int]) -> None:
        """End one sequence or several; pages that nobody else has become free.

        Raises:
            TypeError: not an int, or ints.
            ValueError: one of them is not alive (freed before, or never given out) or is named
                twice; then none is freed.
        """
        names = _names(sequences)
        members = self._get_all(names)
        self._mirror([(member.row, 0, []) for member in members]).write()
        for name, member in zip(names, members, strict=True):
            for page in member.pages:
                self._release(page)
            del self._sequences[name]
            member.pages, member.length = [], 0
            self._free_rows.append(member.row)

    def tables(self, sequences: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(block_table, cache_seqlens) of some sequences, for flash_mla_with_kvcache.

        Returns:
            int32 [b, max_blocks], as wide as the longest of them needs and at least 1, and int32
            [b]: copies, in the order given, on the cache's device.

        Raises:
            TypeError: not a sequence of ints.
            ValueError: one of them is not alive.
        """
        if isinstance(sequences, Integral):
            raise TypeError(
                f"sequences must be a sequence of ints, got {type(sequences).__name__}; for one "
                f"sequence, [{sequences}]"
            )
        members = [self._find(name) for name in _names(sequences)]
        rows = torch.tensor([m.row for m in members], dtype=torch.long, device=self.device)
        width = max((len(m.pages) for m in members), default=0)
        return self.block_table[rows, : max(1, width)], self.lengths[rows]

    def _get(self, sequence: int) -> _Sequence:
        return self._find(_name("sequence", sequence))

    def _find(self, sequence: int) -> _Sequence:
        found = self._sequences.get(sequence)
        if found is None:
            given_out = 0 <= sequence < self._next_id
            why = "it was freed" if given_out else "no such sequence was given out"
            raise ValueError(f"sequence {sequence!r} is not alive: {why}")
        return found

    def _get_all(self, names: list[int]) -> list[_Sequence]:
        members = [self._find(name) for name in names]
        if len(set(names)) != len(names):
            raise ValueError(f"sequences must differ from one another, got {names}")
        return members

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size)

    def _new_sequence(self, pages: list[int], length: int) -> int:
        if not self._free_rows:
            raise RuntimeError(
                f"max_sequences is {len(self.lengths)} and as many sequences are alive; free one"
            )
        member = _Sequence(self._free_rows[-1], length, list(pages))
        self._mirror([(member.row, length, member.pages)]).write()
        name, self._next_id = self._next_id, self._next_id + 1
        self._free_rows.pop()
        for page in pages:
            self._owners[page] += 1
        self._sequences[name] = member
        return name

    def _check_tokens(self, tokens: object, batch: int | None) -> Tensor:
        """tokens as [b, n, num_heads, head_dim]."""
        lead = "" if batch is None else "b, "
        dims = f"[{lead}n, num_heads, head_dim]"
        if not isinstance(tokens, Tensor):
            raise TypeError(f"tokens must be a torch.Tensor {dims}, got {type(tokens).__name__}")
        check_dtype("tokens", tokens, _FLOATS if self.fp8_format else (self.dtype,))
        if tokens.device != self.device:
            raise ValueError(f"tokens must be on {self.device}, got {tokens.device}")
        rows = tokens if batch is not None else tokens.unsqueeze(0)
        if rows.dim() == 3 and self.num_heads == 1:
            rows = rows.unsqueeze(2)
        want = (1 if batch is None else batch, self.num_heads, self.head_dim)
        if rows.dim() != 4 or (rows.shape[0], *rows.shape[2:]) != want:
            sizes = f"num_heads {self.num_heads}, head_dim {self.head_dim}"
            count = "" if batch is None else f"b {batch}, "
            raise ValueError(
                f"tokens must have shape {dims} with {count}{sizes}, got {list(tokens.shape)}"
            )
        return rows

    def _plan_growth(self, name: int, member: _Sequence, count: int) -> _Growth:
        growth = _Growth(member, member.length + count)
        growth.new_pages = self._pages_for(growth.length) - len(member.pages)
        width = self.block_table.shape[1]
        if len(member.pages) + growth.new_pages > width:
            raise ValueError(
                f"sequence {name} would have {growth.length} tokens, more than the "
                f"{width * self.page_size} of max_pages_per_sequence = {width}"
            )
        last = len(member.pages) - 1
        partly_full = member.length % self.page_size != 0
        if count and partly_full and self._owners[member.pages[last]] > 1:
            growth.copied = last
        return growth

    def _last_owners_spared(self, growths: list[_Growth]) -> int:
        """Copies not made after all: of a page's owners that all append now, the last keeps it."""
        copies: dict[int, int] = {}
        for growth in growths:
            if growth.copied is not None:
                page = growth.sequence.pages[growth.copied]
                copies[page] = copies.get(page, 0) + 1
        return sum(count == self._owners[page] for page, count in copies.items())

    def _lay_out(self, growths: list[_Growth]) -> None:
        """Fill in which pages each sequence has afterwards; the cache's own lists stay."""
        taken = 0
        parted: dict[int, int] = {}  # owners that a shared page loses

        def take() -> int:
            nonlocal taken
            taken += 1
            return self._free_pages[-taken]

        for growth in growths:
            growth.pages = list(growth.sequence.pages)
            if growth.copied is not None:
                shared = growth.pages[growth.copied]
                left = parted.get(shared, 0)
                if self._owners[shared] - left > 1:
                    parted[shared] = left + 1
                    growth.pages[growth.copied] = own = take()
                    growth.copy = (shared, own)
            growth.pages.extend(take() for _ in range(growth.new_pages))

    def _slots(self, growths: list[_Growth], count: int) -> Tensor:
        """Where the new tokens go, page * page_size + offset of each: [b * count] on the host."""
        size = self.page_size
        lengths = torch.tensor([growth.sequence.length for growth in growths]).unsqueeze(1)
        written = [growth.pages[growth.sequence.length // size :] for growth in growths]
        width = max(len(pages) for pages in written)
        table = torch.tensor([pages + [0] * (width - len(pages)) for pages in written])
        positions = lengths + torch.arange(count)  # [b, count]
        pages = table.gather(1, positions // size - lengths // size)
        return (pages * size + positions % size).flatten()

    def _copy_shared(self, growths: list[_Growth]) -> None:
        for growth in growths:
            if growth.copy is not None:
                shared, own = growth.copy
                used = growth.sequence.length % self.page_size
                self.kv[own, :used] = self.kv[shared, :used]

    def _commit(self, growths: list[_Growth], taken: int) -> None:
        """The pages laid out become the sequences'; nothing in here can fail."""
        if taken:
            for page in self._free_pages[-taken:]:
                self._owners[page] = 1
            del self._free_pages[-taken:]
        for growth in growths:
            if growth.copy is not None:
                self._owners[growth.copy[0]] -= 1
            growth.sequence.pages, growth.sequence.length = growth.pages, growth.length

    def _write(self, slots: Tensor, rows: Tensor) -> None:
        if self.fp8_format:
            fp8.append(self.kv, slots, rows.reshape(-1, self.head_dim))
        else:
            paged_append(self.kv, slots, rows)

    def _release(self, page: int) -> None:
        self._owners[page] -= 1
        if self._owners[page] == 0:
            self._free_pages.append(page)

    def _mirror(self, states: list[tuple[int, int, list[int]]]) -> _Mirror:
        """Rows of the device's tensors as they are to be, from (row, length, pages) of each."""
        if self.kv.is_inference() and not torch.is_inference_mode_enabled():
            # torch refuses such a write after it is done.
            raise RuntimeError("a cache made in inference mode can be changed only in that mode")
        width = self.block_table.shape[1]
        used = max((len(pages) for _, _, pages in states), default=0)
        table = [pages + [-1] * (used - len(pages)) for _, _, pages in states]
        block = torch.full((len(states), width), -1, dtype=torch.int32)
        block[:, :used] = torch.tensor(table, dtype=torch.int32).view(len(states), used)
        lengths = torch.tensor([length for _, length, _ in states], dtype=torch.int32)
        rows = torch.tensor([row for row, _, _ in states], dtype=torch.long, device=self.device)
        return _Mirror(self, rows, block.to(self.device), lengths.to(self.device))


@dataclass
class _Mirror:
    """New rows of the device's tensors, made before anything is written."""

    cache: PagedKVCache
    rows: Tensor
    block_table: Tensor
    lengths: Tensor

    def write(self) -> None:
        """In place: the buffers never move."""
        if len(self.rows):
            self.cache.block_table[self.rows] = self.block_table
            self.cache.lengths[self.rows] = self.lengths


def _name(argument: str, value: object) -> int:
    """A sequence's name as Python's int; a bool would pass for 0 or 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{argument} must be an int, got {type(value).__name__}")
    return int(value)


def _names(sequences: object) -> list[int]:
    """The names of one sequence or of several."""
    if isinstance(sequences, Integral):
        return [_name("sequences", sequences)]
    if not isinstance(sequences, Iterable) or isinstance(sequences, str | bytes | Tensor):
        raise TypeError(
            f"sequences must be an int or a sequence of ints, got {type(sequences).__name__}"
        )
    return [_name(f"sequences[{place}]", name) for place, name in enumerate(sequences)]
