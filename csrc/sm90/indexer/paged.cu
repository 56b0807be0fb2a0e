// Indexer scores at decode: the newest queries of each request against its cached keys, which are
// read once, as fast as memory delivers them.
//
// A page of the cache is a tile: 64 x 128 codes, then 64 float32 scales. A CTA stays on its SM and
// walks chunks of pages. One of its warpgroups fetches pages by TMA through the block table, up to
// 20 ahead, and writes the -inf of pages that nobody sees; the two others take every other page.
#include <algorithm>

#include "../../common/tensor_map.h"
#include "pipeline.cuh"

namespace flashmla::sm90 {
namespace indexer {

constexpr int kChunkPages = 16;  // of one request: small enough to share out evenly
static_assert(kChunkPages <= 32, "a lane of the producer knows the block number of one page");

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
  int batch, s_q, groups, chunks, max_blocks;
  const float* weights;    // [batch, s_q, heads]
  const int* block_table;  // [batch, max_blocks]
  int64_t block_table_stride;
  const int* lengths;  // [batch]
  float* logits;       // [batch, s_q, max_blocks * 64]
};

// A few queries of a request against a chunk of its pages: [begin, end) is what they see of
// [begin, chunk_end).
struct PagedItem {
  int request, first_query;
  int begin, end, chunk_end;
  int length;
};

template <int kQueries>
class PagedList {
 public:
  __device__ __forceinline__ explicit PagedList(const PagedParams& p)
      : p_(p), next_(blockIdx.x), count_(static_cast<int64_t>(p.batch) * p.groups * p.chunks) {}

  __device__ __forceinline__ bool next(PagedItem& item) {
    if (next_ >= count_) return false;
    const int chunk = static_cast<int>(next_ % p_.chunks);
    const int row = static_cast<int>(next_ / p_.chunks);
    next_ += gridDim.x;
    item.request = row / p_.groups;
    item.first_query = row % p_.groups * kQueries;
    item.begin = chunk * kChunkPages;
    item.chunk_end = min(item.begin + kChunkPages, p_.max_blocks);
    const int room = static_cast<int>(min(int64_t{p_.max_blocks} * kTokens, int64_t{INT_MAX}));
    item.length = min(p_.lengths[item.request], room);
    const int last_query = min(item.first_query + kQueries, p_.s_q) - 1;
    const int pages = (max(0, limit(item, last_query)) + kTokens - 1) / kTokens;
    item.end = max(item.begin, min(item.chunk_end, pages));
    return true;
  }
  // One behind the last token that a query sees: the last query sees all.
  __device__ __forceinline__ int limit(const PagedItem& item, int query) const {
    return item.length - (p_.s_q - 1 - query);
  }
  __device__ __forceinline__ float* out(const PagedItem& item, int query) const {
    const int64_t row = static_cast<int64_t>(item.request) * p_.s_q + query;
    return p_.logits + row * p_.max_blocks * kTokens;
  }

 private:
  const PagedParams& p_;
  int64_t next_, count_;
};

template <int kHeads, int kQueries>
struct Paged {
  static constexpr int kColumns = kHeads * kQueries;
  using Storage = PagedStorage<kColumns>;
  static constexpr int kStages = Storage::kStages;
  using Score = Scorer<kHeads, kQueries>;
  using List = PagedList<kQueries>;

  // One warp; each of its lanes knows the block number of one page of the chunk.
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
    for (PagedItem item; list.next(item);) {
      if (item.begin == item.end) continue;
      const int* table = p.block_table + item.request * p.block_table_stride;
      const int own = item.begin + lane < item.end ? table[item.begin + lane] : 0;
      const int place = items % 2;
      Barrier::wait(&shared.q_empty[place], (items / 2 & 1) ^ 1);
      if (lane == 0) {
        Barrier::arrive_and_expect_tx(&shared.q_full[place], sizeof(shared.q[0]));
        cute::SM90_TMA_LOAD_4D::copy(&q_map, &shared.q_full[place], keep, shared.q[place], 0, 0,
                                     item.first_query, item.request);
      }
      for (int i = 0; i < item.end - item.begin; ++i, ++pages) {
        const int block = __shfl_sync(~0u, own, i);
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
      ++items;
    }
  }

  // -inf for the pages that none of an item's queries sees.
  static __device__ __forceinline__ void fill(const PagedParams& p, int thread, int threads) {
    List list(p);
    for (PagedItem item; list.next(item);) {
      for (int t = item.first_query; t < min(item.first_query + kQueries, p.s_q); ++t) {
        float* row = list.out(item, t);
        for (int s = item.end * kTokens + thread; s < item.chunk_end * kTokens; s += threads) {
          row[s] = -INFINITY;
        }
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

    int items = 0;
    int pages = 0;
    List list(p);
    for (PagedItem item; list.next(item);) {
      const int count = item.end - item.begin;
      if (count == 0) continue;
      const int place = items % 2;
      const int64_t query_row = static_cast<int64_t>(item.request) * p.s_q + item.first_query;
      score.load_weights(p.weights + query_row * kHeads, p.s_q - item.first_query);
      auto q = cute::make_tensor(cute::make_smem_ptr(shared.q[place]), Tile<kColumns>{});
      auto q_fragment = thread_mma.partition_fragment_B(q);
      Barrier::wait(&shared.q_full[place], items / 2 & 1);

      for (int i = (pages + kMine) % 2; i < count; i += 2) {
        const int stage = (pages + i) % kStages;
        Barrier::wait(&shared.full[stage], (pages + i) / kStages & 1);
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
          const int query = item.first_query + (first_sum + v) / 2;
          const int token = (item.begin + i) * kTokens + row + (first_sum + v) % 2 * 8;
          if (query < p.s_q && score.owns_sums()) {
            const bool seen = token < list.limit(item, query);
            list.out(item, query)[token] = seen ? values[v] * scale[v] : -INFINITY;
          }
        }
      }
      if (score.lane == 0) Barrier::arrive(&shared.q_empty[place]);
      pages += count;
      ++items;
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
  p.chunks = (a.max_blocks + kChunkPages - 1) / kChunkPages;
  p.max_blocks = a.max_blocks;
  p.weights = a.weights;
  p.block_table = a.block_table;
  p.block_table_stride = a.block_table_stride;
  p.lengths = a.lengths;
  p.logits = a.logits;

  constexpr int kShared = sizeof(typename Paged<kHeads, kQueries>::Storage);
  static_assert(kShared <= 232448, "227 KB a CTA");
  const auto kernel = &paged_kernel<kHeads, kQueries>;
  FLASHMLA_CUDA_CHECK(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared));
  const int64_t items = static_cast<int64_t>(p.batch) * p.groups * p.chunks;
  const auto grid = static_cast<unsigned>(std::min<int64_t>(items, sms));
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
