// Indexer scores of a prompt: every query against a range of the keys, float32 [s_q, s_kv], -inf
// outside the ranges.
//
// A CTA keeps the heads of eight queries (of sixteen, with 32 heads) in shared memory and walks a
// chunk of the keys, 64 at a time. Of its three warpgroups one fetches keys by TMA and writes the
// -inf of tiles that nobody sees; the two others own half the queries each: while one multiplies,
// the other applies ReLU and weights to what it has got.
#include <algorithm>

#include "../../common/shared_memory.h"
#include "../../common/tensor_map.h"
#include "pipeline.cuh"

namespace flashmla::sm90 {
namespace indexer {

constexpr int kStages = 8;
constexpr int kMostTiles = 128;  // of a chunk: enough for the fetching of queries not to matter
constexpr int kLeastTiles = 8;
constexpr int kWaves = 8;  // chunks get shorter until there are so many CTAs for each SM

template <int kColumns>
struct PrefillStorage {
  alignas(1024) Element q[2][kColumns * kDim];       // [consumer][(query, head)][128]
  alignas(1024) Element k[kStages][kTokens * kDim];  // [stage][64 tokens][128]
  alignas(128) float k_scale[kStages][kTokens];      // [stage][64 tokens]
  uint64_t q_full;
  uint64_t full[kStages], empty[kStages];
};

struct PrefillParams {
  int s_q, s_kv;
  int chunks, chunk_tiles;
  const float* weights;
  const int* start;
  const int* end;
  float* logits;
};

// What a CTA works on: queries from first_query on, tiles [begin, end) that some of them see of the
// chunk [chunk_begin, chunk_end).
template <int kGroup>
struct PrefillItem {
  int first_query;
  int chunk_begin, chunk_end;
  int begin, end;

  __device__ __forceinline__ explicit PrefillItem(const PrefillParams& p) {
    // Under a causal mask the last queries see most: they go first.
    const int group = (gridDim.x - 1 - blockIdx.x) / p.chunks;
    first_query = group * kGroup;
    chunk_begin = (gridDim.x - 1 - blockIdx.x) % p.chunks * p.chunk_tiles;
    chunk_end = min(chunk_begin + p.chunk_tiles, (p.s_kv + kTokens - 1) / kTokens);
    int low = INT_MAX;
    int high = 0;
    for (int t = first_query; t < min(first_query + kGroup, p.s_q); ++t) {
      const int from = max(0, p.start[t]);
      const int to = min(p.s_kv, p.end[t]);
      if (from < to) {
        low = min(low, from);
        high = max(high, to);
      }
    }
    begin = min(chunk_end, max(chunk_begin, low / kTokens));
    end = max(begin, min(chunk_end, (high + kTokens - 1) / kTokens));
  }
};

template <int kHeads, int kQueries>
struct Prefill {
  static constexpr int kColumns = kHeads * kQueries;  // of one consumer's product
  static constexpr int kGroup = 2 * kQueries;         // queries of a CTA
  using Storage = PrefillStorage<kColumns>;
  using Item = PrefillItem<kGroup>;
  using Score = Scorer<kHeads, kQueries>;

  static __device__ __forceinline__ void produce(const Item& item, Storage& shared,
                                                 const CUtensorMap& q_map, const CUtensorMap& k_map,
                                                 const CUtensorMap& scale_map) {
    const auto hint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
    Barrier::arrive_and_expect_tx(&shared.q_full, sizeof(shared.q));
    for (int i = 0; i < 2; ++i) {
      cute::SM90_TMA_LOAD_3D::copy(&q_map, &shared.q_full, hint, shared.q[i], 0, 0,
                                   item.first_query + i * kQueries);
    }
    for (int tile = item.begin; tile < item.end; ++tile) {
      const int count = tile - item.begin;
      const int stage = count % kStages;
      Barrier::wait(&shared.empty[stage], (count / kStages & 1) ^ 1);
      uint64_t* full = &shared.full[stage];
      Barrier::arrive_and_expect_tx(full, sizeof(shared.k[0]) + sizeof(shared.k_scale[0]));
      cute::SM90_TMA_LOAD_2D::copy(&k_map, full, hint, shared.k[stage], 0, tile * kTokens);
      cute::SM90_TMA_LOAD_1D::copy(&scale_map, full, hint, shared.k_scale[stage], tile * kTokens);
    }
  }

  // -inf for the tiles of the chunk that none of the queries sees.
  static __device__ __forceinline__ void fill(const PrefillParams& p, const Item& item, int thread,
                                              int threads) {
    const int chunk_end = min(p.s_kv, item.chunk_end * kTokens);
    for (int t = item.first_query; t < min(item.first_query + kGroup, p.s_q); ++t) {
      float* row = p.logits + static_cast<int64_t>(t) * p.s_kv;
      for (int s = item.chunk_begin * kTokens + thread; s < item.begin * kTokens; s += threads) {
        row[s] = -INFINITY;
      }
      for (int s = item.end * kTokens + thread; s < chunk_end; s += threads) row[s] = -INFINITY;
    }
  }

  template <int kMine>
  static __device__ __forceinline__ void consume(const PrefillParams& p, const Item& item,
                                                 Storage& shared) {
    constexpr int kValues = Score::kValues;  // scores that this thread ends with in each tile
    const int thread = threadIdx.x % 128;
    const int row = thread / 32 * 16 + thread % 32 / 4;  // and row + 8
    const int first_query = item.first_query + kMine * kQueries;
    Score score;
    score.lane = thread % 32;
    score.load_weights(p.weights + static_cast<int64_t>(first_query) * kHeads, p.s_q - first_query);
    constexpr int kSeen = kValues / 2;  // queries that they belong to, each with both rows
    static_assert(kValues >= 2, "a single score has only one row");
    int start[kSeen], end[kSeen];
    float* out[kSeen];
    CUTE_UNROLL
    for (int i = 0; i < kSeen; ++i) {
      const int query = first_query + score.first_sum() / 2 + i;
      const bool exists = query < p.s_q;
      start[i] = exists ? p.start[query] : 0;
      end[i] = exists ? p.end[query] : 0;
      out[i] = exists ? p.logits + static_cast<int64_t>(query) * p.s_kv : nullptr;
    }

    typename Score::Mma mma;
    auto products = cute::partition_fragment_C(
        mma, cute::Shape<cute::Int<kTokens>, cute::Int<kColumns>>{});  // [64 keys, kColumns]
    auto thread_mma = mma.get_thread_slice(thread);
    auto q = cute::make_tensor(cute::make_smem_ptr(shared.q[kMine]), Tile<kColumns>{});
    auto q_fragment = thread_mma.partition_fragment_B(q);

    Barrier::wait(&shared.q_full, 0);
    for (int count = 0; count < item.end - item.begin; ++count) {
      const int stage = count % kStages;
      Barrier::wait(&shared.full[stage], count / kStages & 1);
      const float scale[2] = {shared.k_scale[stage][row], shared.k_scale[stage][row + 8]};
      auto k = cute::make_tensor(cute::make_smem_ptr(shared.k[stage]), Tile<kTokens>{});
      auto k_fragment = thread_mma.partition_fragment_A(k);

      fence_fragment(products);
      cute::warpgroup_arrive();
      mma.accumulate_ = cute::GMMA::ScaleOut::Zero;
      gemm_k_loop(mma, k_fragment, q_fragment, products);
      cute::warpgroup_commit_batch();
      cute::warpgroup_wait<0>();
      fence_fragment(products);
      __syncwarp();  // all lanes have their scales
      if (score.lane == 0) Barrier::arrive(&shared.empty[stage]);

      float values[kValues];
      score.sum_heads(products, values);
      CUTE_UNROLL
      for (int i = 0; i < kValues; ++i) {
        const int token = (item.begin + count) * kTokens + row + 8 * (i % 2);
        const bool seen = token >= start[i / 2] && token < end[i / 2];
        if (out[i / 2] != nullptr && token < p.s_kv) {
          out[i / 2][token] = seen ? values[i] * scale[i % 2] : -INFINITY;
        }
      }
    }
  }
};

template <int kHeads, int kQueries>
__global__ void __launch_bounds__(kThreads, 1)
    prefill_kernel(const __grid_constant__ PrefillParams p,
                   const __grid_constant__ CUtensorMap q_map,
                   const __grid_constant__ CUtensorMap k_map,
                   const __grid_constant__ CUtensorMap scale_map) {
  using Work = Prefill<kHeads, kQueries>;
  extern __shared__ __align__(1024) uint8_t raw[];
  auto& shared = *reinterpret_cast<typename Work::Storage*>(raw);
  if (threadIdx.x == 0) {
    cute::prefetch_tma_descriptor(&q_map);
    cute::prefetch_tma_descriptor(&k_map);
    cute::prefetch_tma_descriptor(&scale_map);
    Barrier::init(&shared.q_full, 1);
    for (int s = 0; s < kStages; ++s) {
      Barrier::init(&shared.full[s], 1);
      Barrier::init(&shared.empty[s], 8);  // one arrival a consumer warp
    }
    cutlass::arch::fence_barrier_init();
  }
  __syncthreads();

  const typename Work::Item item(p);
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<40>();
    if (threadIdx.x == 0 && item.begin < item.end) {
      Work::produce(item, shared, q_map, k_map, scale_map);
    } else if (threadIdx.x >= 32) {
      Work::fill(p, item, threadIdx.x - 32, 96);
    }
  } else if (warpgroup == 1) {
    cutlass::arch::warpgroup_reg_alloc<232>();
    if (item.begin < item.end) Work::template consume<0>(p, item, shared);
  } else {
    cutlass::arch::warpgroup_reg_alloc<232>();
    if (item.begin < item.end) Work::template consume<1>(p, item, shared);
  }
}

template <int kHeads, int kQueries>
void launch_prefill(const IndexerArgs& a, cudaStream_t stream) {
  const auto u64 = [](auto x) { return static_cast<uint64_t>(x); };
  const CUtensorMap q_map =
      make_tensor_map<3>(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, CU_TENSOR_MAP_SWIZZLE_128B, a.q,
                         {kDim, u64(kHeads), u64(a.s_q)},
                         {u64(a.q_stride_head), u64(a.q_stride_token)}, {kDim, kHeads, kQueries});
  const CUtensorMap k_map =
      make_tensor_map<2>(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, CU_TENSOR_MAP_SWIZZLE_128B, a.k,
                         {kDim, u64(a.s_kv)}, {u64(a.k_stride)}, {kDim, kTokens});
  const CUtensorMap scale_map =
      make_tensor_map<1>(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, CU_TENSOR_MAP_SWIZZLE_NONE, a.k_scale,
                         {u64(a.s_kv)}, {}, {kTokens});

  int device = 0, sms = 0;
  FLASHMLA_CUDA_CHECK(cudaGetDevice(&device));
  FLASHMLA_CUDA_CHECK(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device));
  using Work = Prefill<kHeads, kQueries>;
  const int64_t groups = (a.s_q + Work::kGroup - 1) / Work::kGroup;
  const int64_t tiles = (a.s_kv + kTokens - 1) / kTokens;
  const int64_t even = groups * tiles / (static_cast<int64_t>(sms) * kWaves);
  PrefillParams p;
  p.s_q = a.s_q;
  p.s_kv = a.s_kv;
  p.chunk_tiles = static_cast<int>(std::clamp<int64_t>(even, kLeastTiles, kMostTiles));
  p.chunks = static_cast<int>((tiles + p.chunk_tiles - 1) / p.chunk_tiles);
  p.weights = a.weights;
  p.start = a.start;
  p.end = a.end;
  p.logits = a.logits;

  constexpr int kShared = sizeof(typename Work::Storage);
  static_assert(kShared <= 232448, "227 KB a CTA");
  const auto kernel = &prefill_kernel<kHeads, kQueries>;
  allow_shared_memory<&prefill_kernel<kHeads, kQueries>>(kShared);
  kernel<<<static_cast<unsigned>(groups * p.chunks), kThreads, kShared, stream>>>(p, q_map, k_map,
                                                                                  scale_map);
  FLASHMLA_CUDA_CHECK(cudaGetLastError());
}

}  // namespace indexer

void launch_indexer(const IndexerArgs& args, cudaStream_t stream) {
  const auto launch =
      args.heads == 64 ? indexer::launch_prefill<64, 4> : indexer::launch_prefill<32, 8>;
  launch(args, stream);
}

}  // namespace flashmla::sm90
