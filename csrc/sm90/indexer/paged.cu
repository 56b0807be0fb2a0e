// Indexer scores at decode: the newest queries of each request against its cached keys, which are
// read once, as fast as memory delivers them.
//
// A page of the cache is a tile: 64 x 128 codes, then 64 float32 scales. All pages of all requests
// stand in one line, of which each CTA gets the same share, to the page. One of its warpgroups
// fetches pages by TMA through the block table, up to 20 ahead, and writes -inf where nobody sees
// anything; the two others take every other page.
#include <algorithm>

#include "../../common/shared_memory.h"
#include "../../common/tensor_map.h"
#include "pipeline.cuh"

namespace flashmla::sm90 {
namespace indexer {

template <int kColumns>
struct PagedStorage {
  static constexpr int kStages = kColumns > 128 ? 16 : 20;
  static_assert(kStages % 2 == 0, "a place belongs to one of two consumers");
  alignas(1024) Element q[2][kColumns * kDim];       // [place][(query, head)][128]
  alignas(1024) Element k[kStages][kTokens * kDim];  // [stage][64 tokens][128]
  alignas(128) float k_scale[kStages][kTokens];      // [stage][64 tokens]
  uint64_t q_full[2], q_empty[2];
  uint64_t full[kStages], empty[kStages];
};

struct PagedParams {
  int batch, s_q, groups, max_blocks;
  const float* weights;    // [batch, s_q, heads]
  const int* block_table;  // [batch, max_blocks]
  int64_t block_table_stride;
  const int* lengths;  // [batch]
  float* logits;       // [batch, s_q, max_blocks * 64]
};

// A few queries of a request against pages [begin, end) of it.
struct PagedItem {
  int request, first_query;
  int begin, end;
  int length;
};

// The items of this CTA: its share of the line of all pages, cut where a row ends. A row is a
// request and a group of its queries; it has as many pages as its last query sees.
template <int kQueries>
class PagedList {
 public:
  // By whole warps: their lanes share in adding up the rows.
  __device__ __forceinline__ explicit PagedList(const PagedParams& p)
      : p_(p), rows_(p.batch * p.groups) {
    const int lane = threadIdx.x % 32;
    int64_t total = 0;
    for (int base = 0; base < rows_; base += 32) {
      total += __reduce_add_sync(~0u, base + lane < rows_ ? pages_of(base + lane) : 0);
    }
    const int64_t begin = total * blockIdx.x / gridDim.x;
    left_ = static_cast<int>(total * (blockIdx.x + 1) / gridDim.x - begin);
    if (left_ == 0) return;
    int64_t before = 0;
    for (row_ = 0;; row_ += 32) {
      int sum = row_ + lane < rows_ ? pages_of(row_ + lane) : 0;
      CUTE_UNROLL
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += other;
      }
      const unsigned behind = __ballot_sync(~0u, before + sum > begin);
      if (behind != 0) {  // the first row that ends behind where this CTA begins
        const int first = __ffs(static_cast<int>(behind)) - 1;
        const int64_t until = first == 0 ? 0 : __shfl_sync(~0u, sum, (first + 31) % 32);
        row_ += first;
        page_ = static_cast<int>(begin - before - until);
        return;
      }
      before += __shfl_sync(~0u, sum, 31);
    }
  }

  __device__ __forceinline__ bool next(PagedItem& item) {
    if (left_ == 0) return false;
    int pages = pages_of(row_);
    while (pages == 0) pages = pages_of(++row_);
    item.request = row_ / p_.groups;
    item.first_query = row_ % p_.groups * kQueries;
    item.length = length(item.request);
    item.begin = page_;
    item.end = page_ + min(left_, pages - page_);
    left_ -= item.end - item.begin;
    ++row_;
    page_ = 0;
    return true;
  }

  // One behind the last token that a query sees: the last query sees all.
  __device__ __forceinline__ int limit(int length, int query) const {
    return length - (p_.s_q - 1 - query);
  }
  __device__ __forceinline__ int length(int request) const {
    const int64_t room = int64_t{p_.max_blocks} * kTokens;
    return static_cast<int>(min(int64_t{p_.lengths[request]}, room));
  }
  __device__ __forceinline__ int pages_of(int row) const {
    const int last_query = min(row % p_.groups * kQueries + kQueries, p_.s_q) - 1;
    return (max(0, limit(length(row / p_.groups), last_query)) + kTokens - 1) / kTokens;
  }

 private:
  const PagedParams& p_;
  int rows_;
  int row_ = 0, page_ = 0;
  int left_;  // pages of this CTA that are still to come
};

template <int kHeads, int kQueries>
struct Paged {
  static constexpr int kColumns = kHeads * kQueries;
  using Storage = PagedStorage<kColumns>;
  static constexpr int kStages = Storage::kStages;
  using Score = Scorer<kHeads, kQueries>;
  using List = PagedList<kQueries>;

  // One warp, whose lanes know the block numbers of 32 pages, and of the 32 after them.
  static __device__ __forceinline__ void produce(const PagedParams& p, Storage& shared,
                                                 const CUtensorMap& q_map, const CUtensorMap& k_map,
                                                 const CUtensorMap& scale_map) {
    const int lane = threadIdx.x % 32;
    const auto keep = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
    // Several groups of queries read the same pages.
    const auto once =
        p.groups > 1 ? keep : static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_FIRST);
    int items = 0;
    int pages = 0;
    List list(p);
    for (PagedItem item; list.next(item); ++items) {
      const int* table = p.block_table + item.request * p.block_table_stride;
      const auto number = [&](int page) { return page < item.end ? table[page] : 0; };
      int soon = number(item.begin + lane);
      const int place = items % 2;
      Barrier::wait(&shared.q_empty[place], (items / 2 & 1) ^ 1);
      if (lane == 0) {
        Barrier::arrive_and_expect_tx(&shared.q_full[place], sizeof(shared.q[0]));
        cute::SM90_TMA_LOAD_4D::copy(&q_map, &shared.q_full[place], keep, shared.q[place], 0, 0,
                                     item.first_query, item.request);
      }
      int now = 0;
      for (int i = 0; i < item.end - item.begin; ++i, ++pages) {
        if (i % 32 == 0) {
          now = soon;
          soon = number(item.begin + i + 32 + lane);
        }
        const int block = __shfl_sync(~0u, now, i % 32);
        const int stage = pages % kStages;
        Barrier::wait(&shared.empty[stage], (pages / kStages & 1) ^ 1);
        if (lane == 0) {
          uint64_t* full = &shared.full[stage];
          Barrier::arrive_and_expect_tx(full, sizeof(shared.k[0]) + sizeof(shared.k_scale[0]));
          cute::SM90_TMA_LOAD_3D::copy(&k_map, full, once, shared.k[stage], 0, 0, block);
          cute::SM90_TMA_LOAD_2D::copy(&scale_map, full, once, shared.k_scale[stage], 0, block);
        }
        __syncwarp();
      }
    }
  }

  // -inf behind the last page that a query's group sees; all CTAs share in it.
  static __device__ __forceinline__ void fill(const PagedParams& p, int thread, int threads) {
    const List list(p);
    const int64_t width = int64_t{p.max_blocks} * kTokens;
    const int64_t step = int64_t{threads} * gridDim.x;
    for (int64_t i = 0; i < int64_t{p.batch} * p.s_q; ++i) {
      const int request = static_cast<int>(i / p.s_q);
      const int group = static_cast<int>(i % p.s_q) / kQueries;
      const int64_t seen = int64_t{list.pages_of(request * p.groups + group)} * kTokens;
      for (int64_t s = seen + blockIdx.x * threads + thread; s < width; s += step) {
        p.logits[i * width + s] = -INFINITY;
      }
    }
  }

  template <int kMine>
  static __device__ __forceinline__ void consume(const PagedParams& p, Storage& shared) {
    const int thread = threadIdx.x % 128;
    Score score;
    score.lane = thread % 32;
    const int row = thread / 32 * 16 + score.lane / 4;  // and row + 8
    const int first_sum = score.first_sum();            // of 2 * query + (row or row + 8)
    typename Score::Mma mma;
    auto products = cute::partition_fragment_C(
        mma, cute::Shape<cute::Int<kTokens>, cute::Int<kColumns>>{});  // [64 keys, kColumns]
    auto thread_mma = mma.get_thread_slice(thread);

    const int64_t width = int64_t{p.max_blocks} * kTokens;
    int items = 0;
    int pages = 0;  // of all items so far
    int own = 0;    // of them, how many were this consumer's: every other one
    List list(p);
    for (PagedItem item; list.next(item); ++items) {
      const int place = items % 2;
      const int64_t query_row = static_cast<int64_t>(item.request) * p.s_q + item.first_query;
      score.load_weights(p.weights + query_row * kHeads, p.s_q - item.first_query);
      auto q = cute::make_tensor(cute::make_smem_ptr(shared.q[place]), Tile<kColumns>{});
      auto q_fragment = thread_mma.partition_fragment_B(q);
      const int first_page = item.begin - pages;  // of number 0
      pages += item.end - item.begin;
      Barrier::wait(&shared.q_full[place], items / 2 & 1);

      for (; 2 * own + kMine < pages; ++own) {
        const int stage = (2 * own + kMine) % kStages;
        Barrier::wait(&shared.full[stage], (2 * own + kMine) / kStages & 1);
        auto k = cute::make_tensor(cute::make_smem_ptr(shared.k[stage]), Tile<kTokens>{});
        fence_fragment(products);
        cute::warpgroup_arrive();
        mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
        gemm_k_loop(mma, thread_mma.partition_fragment_A(k), q_fragment, products);
        cute::warpgroup_commit_batch();
        cute::warpgroup_wait<0>();
        fence_fragment(products);
        float scale[Score::kValues];
        CUTE_UNROLL
        for (int v = 0; v < Score::kValues; ++v) {
          scale[v] = shared.k_scale[stage][row + (first_sum + v) % 2 * 8];
        }
        __syncwarp();
        if (score.lane == 0) Barrier::arrive(&shared.empty[stage]);

        float values[Score::kValues];
        score.sum_heads(products, values);
        CUTE_UNROLL
        for (int v = 0; v < Score::kValues; ++v) {
          const int query = (first_sum + v) / 2;  // of the item's
          const int page = first_page + 2 * own + kMine;
          const int token = page * kTokens + row + (first_sum + v) % 2 * 8;
          if (item.first_query + query < p.s_q && score.owns_sums()) {
            const bool seen = token < list.limit(item.length, item.first_query + query);
            p.logits[(query_row + query) * width + token] = seen ? values[v] * scale[v] : -INFINITY;
          }
        }
      }
      if (score.lane == 0) Barrier::arrive(&shared.q_empty[place]);
    }
  }
};

template <int kHeads, int kQueries>
__global__ void __launch_bounds__(kThreads, 1)
    paged_kernel(const __grid_constant__ PagedParams p, const __grid_constant__ CUtensorMap q_map,
                 const __grid_constant__ CUtensorMap k_map,
                 const __grid_constant__ CUtensorMap scale_map) {
  using Work = Paged<kHeads, kQueries>;
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<typename Work::Storage*>(raw);
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&q_map);
    cute::prefetch_tma_descriptor(&k_map);
    cute::prefetch_tma_descriptor(&scale_map);
    for (int i = 0; i < 2; ++i) {
      Barrier::init(&shared.q_full[i], 1);
      Barrier::init(&shared.q_empty[i], 8);  // one arrival a consumer warp
    }
    for (int s = 0; s < Work::Storage::kStages; ++s) {
      Barrier::init(&shared.full[s], 1);
      Barrier::init(&shared.empty[s], 4);  // the warps of the consumer whose place it is
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (threadIdx.x < 32) {
      Work::produce(p, shared, q_map, k_map, scale_map);
    } else {
      Work::fill(p, threadIdx.x - 32, 96);
    }
  } else if (warpgroup == 1) {
    cutlass::arch::warpgroup_reg_alloc<232>();
    Work::template consume<0>(p, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    Work::template consume<1>(p, shared);
  }
}

template <int kHeads, int kQueries>
void launch_paged(const PagedIndexerArgs& a, cudaStream_t stream) {
  const auto u64 = [](auto x) { return static_cast<uint64_t>(x); };
  const CUtensorMap q_map =
      make_tensor_map<4>(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, CU_TENSOR_MAP_SWIZZLE_128B, a.q,
                         {kDim, u64(kHeads), u64(a.s_q), u64(a.batch)},
                         {u64(a.q_stride_head), u64(a.q_stride_token), u64(a.q_stride_batch)},
                         {kDim, kHeads, kQueries, 1});
  const CUtensorMap k_map = make_tensor_map<3>(
      CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, CU_TENSOR_MAP_SWIZZLE_128B, a.cache,
      {kDim, kTokens, u64(a.blocks)}, {kDim, u64(a.page_stride)}, {kDim, kTokens, 1});
  const CUtensorMap scale_map = make_tensor_map<2>(
      CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, CU_TENSOR_MAP_SWIZZLE_NONE,
      static_cast<const char*>(a.cache) + kTokens * kDim, {kTokens, u64(a.blocks)},
      {u64(a.page_stride) / sizeof(float)}, {kTokens, 1});

  int device = 0, sms = 0;
  FLASHMLA_CUDA_CHECK(cudaGetDevice(&device));
  FLASHMLA_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  PagedParams p;
  p.batch = a.batch;
  p.s_q = a.s_q;
  p.groups = (a.s_q + kQueries - 1) / kQueries;
  p.max_blocks = a.max_blocks;
  p.weights = a.weights;
  p.block_table = a.block_table;
  p.block_table_stride = a.block_table_stride;
  p.lengths = a.lengths;
  p.logits = a.logits;

  constexpr int kShared = sizeof(typename Paged<kHeads, kQueries>::Storage);
  static_assert(kShared <= 232448, "227 KB a CTA");
  const auto kernel = &paged_kernel<kHeads, kQueries>;
  allow_shared_memory<&paged_kernel<kHeads, kQueries>>(kShared);
  const int64_t most = static_cast<int64_t>(p.batch) * p.groups * p.max_blocks;
  const auto grid = static_cast<unsigned>(std::min<int64_t>(most, sms));
  kernel<<<grid, kThreads, kShared, stream>>>(p, q_map, k_map, scale_map);
  FLASHMLA_CUDA_CHECK(cudaGetLastError());
}

template <int kHeads>
void launch_paged_heads(const PagedIndexerArgs& a, cudaStream_t stream) {
  if (a.s_q == 1) return launch_paged<kHeads, 1>(a, stream);
  if (a.s_q == 2) return launch_paged<kHeads, 2>(a, stream);
  return launch_paged<kHeads, 4>(a, stream);
}

}  // namespace indexer

void launch_indexer_paged(const PagedIndexerArgs& args, cudaStream_t stream) {
  const auto launch =
      args.heads == 64 ? indexer::launch_paged_heads<64> : indexer::launch_paged_heads<32>;
  launch(args, stream);
}

}  // namespace flashmla::sm90
