// Where tokens come from: a list of indices for each query (sparse decode), or the pages of each
// request up to its length (dense decode). A source says what a CTA works on, where the tokens of a
// tile lie, and which of them a row may see.
#pragma once

#include "../dense_decode/softmax.cuh"
#include "config.cuh"

namespace flashmla::sm90::sparse_decode {

constexpr uint32_t kNowhere = 0xffffffffu;  // in place of a token's offset

// What a step to the next tile says: the number of an item, where the tile is its first; or
constexpr int kSameItem = -2;
constexpr int kEnd = -1;

// ---- lists ----

// A stretch of the list of one query, for up to 64 of its heads.
struct WorkItem {
  int number;  // and the slot of the partial result
  int query;
  int first_head;
  int first_tile;
  int tiles;   // 0: nothing to attend to, and the result says so
  int length;  // of the whole list

  __device__ __forceinline__ bool whole(const KernelParams& p) const {
    return p.splits.divisor == 1;
  }
  // Of a row of the CTA: among those of the query, and the first of these among all.
  __device__ __forceinline__ int row(int r) const { return first_head + r; }
  __device__ __forceinline__ bool exists(const KernelParams& p, int r) const {
    return row(r) < p.h_q;
  }
  __device__ __forceinline__ int64_t base_row(const KernelParams& p) const {
    return static_cast<int64_t>(query) * p.h_q;
  }
  __device__ __forceinline__ int head(const KernelParams&, int r) const { return row(r); }
  __device__ __forceinline__ int query_of(const KernelParams&, int) const { return query; }
};

// Splits of one list come first: those are the CTAs that meet (merge.cuh). Then the row tiles of
// one query, which run side by side and read the same tokens, once from memory and once from L2.
__device__ __forceinline__ WorkItem work_item(const KernelParams& p, int number) {
  WorkItem w;
  w.number = number;
  int unit, split, row_tile;
  p.splits(unit, split, number);
  p.row_tiles(w.query, row_tile, unit);
  w.first_head = row_tile * kRows;
  w.length = p.topk;
  if (p.topk_length != nullptr) {
    w.length = min(p.topk, max(0, p.topk_length[p.queries_a_length.div(w.query)]));
  }
  int each, over;
  p.splits(each, over, (w.length - 1) / kTokens + (w.length > 0));  // no overflow at INT_MAX
  w.first_tile = split * each + min(split, over);
  w.tiles = each + (split < over);
  return w;
}

// Walks the tiles of this CTA's items, looking up one token of each.
class ListCursor {
 public:
  __device__ __forceinline__ explicit ListCursor(const KernelParams& p)
      : p_(p), number_(static_cast<int>(blockIdx.x) - static_cast<int>(gridDim.x)) {}

  // Goes to the next tile. token: which of a tile's 64 this thread looks up.
  __device__ __forceinline__ int advance(int token) {
    if (tiles_ > 0) {
      list_ += kTokens;
      left_ -= kTokens;
      --tiles_;
      return kSameItem;
    }
    do {
      if (number_ >= p_.items - static_cast<int>(gridDim.x)) return kEnd;
      number_ += gridDim.x;
      const WorkItem item = work_item(p_, number_);
      tiles_ = item.tiles;
      const int at = item.first_tile * kTokens + token;
      list_ = p_.indices + item.query * p_.indices_stride + at;
      left_ = item.length - at;
    } while (tiles_ == 0);
    --tiles_;
    return number_;
  }

  // The index of this thread's token; -1 behind the end of the list.
  __device__ __forceinline__ int index() const { return left_ > 0 ? __ldg(list_) : -1; }

 private:
  const KernelParams& p_;
  int number_;
  int tiles_ = 0;  // still to come of this item
  const int* list_ = nullptr;
  int left_ = 0;
};

// The query rows of a unit in q.
struct UnitRows {
  int64_t offset;  // in elements
  int first;       // of the CTA's
  int count;
};

struct ListSource {
  static constexpr bool kPaged = false;
  using Item = WorkItem;
  using Cursor = ListCursor;
  using Found = int;  // an index
  static constexpr Found kNothing = -1;

  __device__ __forceinline__ static UnitRows rows(const KernelParams& p, int number) {
    const WorkItem item = work_item(p, number);
    return {item.query * p.q_stride_query, item.first_head, p.h_q};
  }

  // A token's offset in the cache in units of 16 bytes; kNowhere for what is not in the cache.
  template <int kTokenBytes>
  __device__ __forceinline__ static uint32_t offset(const KernelParams& p, int index) {
    if (static_cast<uint32_t>(index) >= p.tokens) return kNowhere;
    int block, offset;
    p.page(block, offset, index);
    return static_cast<uint32_t>(block) * p.page_stride16 + offset * (kTokenBytes / 16);
  }

  // Scores of tokens that don't count become -inf; their rows of K are zeros.
  struct Mask {
    __device__ __forceinline__ Mask(const KernelParams&, const WorkItem&, int) {}

    template <class Scores>
    __device__ __forceinline__ void apply(int, const ValidBits* bits, Scores& s) const {
      const uint64_t valid = *reinterpret_cast<const uint64_t*>(bits);
      if (valid == ~uint64_t{0}) return;
      const uint64_t mine = valid >> (threadIdx.x % 4 * 2);  // from this thread's first column on
      CUTE_UNROLL
      for (int i = 0; i < cute::size(s); ++i) {
        if (!(mine >> (i / 4 * 8 + (i & 1)) & 1)) s(i) = -INFINITY;
      }
    }
  };
};

// ---- pages ----

// A stretch of a request's tokens, for up to 64 of its query rows.
struct PagedItem {
  int request;
  int first_row;
  int first_tile;
  int tiles;   // 0: nothing to attend to, and the result says so
  int length;  // of the request
  bool is_whole;
  int slot;  // of the partial result, if not whole

  __device__ __forceinline__ bool whole(const KernelParams&) const { return is_whole; }
  __device__ __forceinline__ int row(int r) const { return first_row + r; }
  __device__ __forceinline__ bool exists(const KernelParams& p, int r) const {
    return row(r) < p.pages.rows;
  }
  __device__ __forceinline__ int64_t base_row(const KernelParams& p) const {
    return static_cast<int64_t>(request) * p.pages.rows;
  }
  __device__ __forceinline__ int head(const KernelParams& p, int r) const { return row(r) % p.h_q; }
  __device__ __forceinline__ int query_of(const KernelParams& p, int r) const {
    return request * p.s_q + row(r) / p.h_q;
  }
};

// Keys that a query row may see: all of the request's, or, causal, those up to its own query, the
// last query being aligned with the last key.
__device__ __forceinline__ int key_limit(const KernelParams& p, int length, int row) {
  const int s = min(row, p.pages.rows - 1) / p.h_q;
  return p.pages.causal ? length - (p.s_q - 1 - s) : length;
}

// The plan's stretches, as in dense decode: this part's share of each request, or each chunk of
// it. A plan that was made for another batch gives wrong results, but nothing outside the tensors
// is read or written.
class PagedWorkList {
 public:
  __device__ __forceinline__ explicit PagedWorkList(const KernelParams& p)
      : p_(p), request_(max(0, plan().begin_request)), tile_(max(0, plan().begin_tile)) {}

  __device__ __forceinline__ bool next(PagedItem& w) {
    const Pages& pages = p_.pages;
    const PlanRow& plan = this->plan();
    const int r = request_;
    if (r >= pages.batch || r > plan.end_request) return false;
    if (r == plan.end_request && (plan.end_tile == 0 || tile_ >= plan.end_tile)) return false;
    const int seqlen = min(pages.cache_seqlens[r], pages.max_tokens);
    w.request = r;
    w.first_row = blockIdx.x * kRows;
    w.length = seqlen;
    w.first_tile = tile_;
    int end = r == plan.end_request ? plan.end_tile : tiles_of(seqlen);
    const int chunk = plan.chunk_tiles;
    const bool more = chunk > 0 && chunk < end - tile_;
    if (more) end = tile_ + chunk;
    // No row of this CTA, or of the pair of CTAs, sees past its last row's limit.
    const int last_row = (blockIdx.x | (pages.pairs ? 1 : 0)) * kRows + kRows - 1;
    const int seen = min(end, tiles_of(key_limit(p_, seqlen, last_row)));
    w.tiles = max(0, seen - tile_);
    const int first_slot = pages.num_splits[r];
    w.is_whole = pages.num_splits[r + 1] - first_slot == 1;
    const int split = r == plan.begin_request ? plan.begin_split : 0;
    w.slot = first_slot + (chunk > 0 ? tile_ / chunk : split);
    request_ = more ? r : r + 1;
    tile_ = more ? end : 0;
    return true;
  }

 private:
  __device__ __forceinline__ const PlanRow& plan() const {
    return p_.pages.plan[blockIdx.y * p_.pages.plan_stride];
  }
  const KernelParams& p_;
  int request_;
  int tile_;
};

// Walks the tiles of this CTA's items, looking up the page of one token of each.
class PagedCursor {
 public:
  struct Found {
    int block;
    int in_page;
  };

  __device__ __forceinline__ explicit PagedCursor(const KernelParams& p) : p_(p), work_(p) {}

  // Goes to the next tile. token: which of a tile's 64 this thread looks up.
  __device__ __forceinline__ int advance(int token) {
    if (tiles_ > 0) {
      position_ += kTokens;
      --tiles_;
      return kSameItem;
    }
    PagedItem item;
    do {
      if (!work_.next(item)) return kEnd;
    } while (item.tiles == 0);
    tiles_ = item.tiles - 1;
    pages_ = p_.pages.block_table + item.request * p_.pages.block_table_stride;
    position_ = item.first_tile * kTokens + token;
    length_ = item.length;
    return item.request;
  }

  __device__ __forceinline__ Found index() const {
    Found found;
    int nth;
    p_.page(nth, found.in_page, position_);
    found.block = position_ < length_ ? __ldg(pages_ + nth) : -1;
    return found;
  }

 private:
  const KernelParams& p_;
  PagedWorkList work_;
  int tiles_ = 0;  // still to come of this item
  const int* pages_ = nullptr;
  int position_ = 0;
  int length_ = 0;
};

struct PagedSource {
  static constexpr bool kPaged = true;
  using Item = PagedItem;
  using Cursor = PagedCursor;
  using Found = PagedCursor::Found;
  static constexpr Found kNothing{-1, 0};

  __device__ __forceinline__ static UnitRows rows(const KernelParams& p, int request) {
    return {request * p.q_stride_query, static_cast<int>(blockIdx.x) * kRows, p.pages.rows};
  }

  template <int kTokenBytes>
  __device__ __forceinline__ static uint32_t offset(const KernelParams& p, const Found& found) {
    if (static_cast<uint32_t>(found.block) >= p.pages.blocks) return kNowhere;
    return static_cast<uint32_t>(found.block) * p.page_stride16 +
           found.in_page * (kTokenBytes / 16);
  }

  // Scores of tokens that a row may not see become -inf.
  class Mask {
   public:
    __device__ __forceinline__ Mask(const KernelParams& p, const PagedItem& w, int row)
        : begin_(w.first_tile * kTokens), lowest_limit_(key_limit(p, w.length, w.first_row)) {
      CUTE_UNROLL
      for (int h = 0; h < 2; ++h) limit_[h] = key_limit(p, w.length, w.row(row + 8 * h));
    }

    template <class Scores>
    __device__ __forceinline__ void apply(int j, const ValidBits*, Scores& s) const {
      const int first_token = begin_ + j * kTokens;
      if (first_token + kTokens <= lowest_limit_) return;
      dense_decode::OnlineSoftmax::mask(s, first_token, limit_);
    }

   private:
    int begin_;
    int lowest_limit_;  // of the CTA's rows: tiles that end below it need no mask
    int limit_[2];      // of this thread's two rows
  };
};

}  // namespace flashmla::sm90::sparse_decode
