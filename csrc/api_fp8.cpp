// What Python calls to write and read token caches. Arguments were checked in flashmla/fp8.py and
// flashmla/ops; what is checked again here guards memory.
#include <initializer_list>

#include "common/ffi.h"
#include "sm90/fp8_cache/launch.h"

namespace flashmla {
namespace {

constexpr int64_t kHeadDim = 576;
constexpr int64_t kTokenBytes = 656;
constexpr int64_t kIndexDim = 128;
constexpr int64_t kIndexPage = 64;
constexpr int64_t kIndexTokenBytes = kIndexDim + 4;

bool aligned(const void* address, std::initializer_list<int64_t> byte_strides) {
  bool fine = reinterpret_cast<uintptr_t>(address) % 16 == 0;
  for (const int64_t stride : byte_strides) fine = fine && stride % 16 == 0;
  return fine;
}

int64_t element_bytes(const TensorView& t) {
  return t.dtype().bits / 8;
}

sm90::Element element_of(const TensorView& t) {
  if (t.dtype().bits == 32) return sm90::Element::kFp32;
  return is_bf16(t) ? sm90::Element::kBf16 : sm90::Element::kFp16;
}

// slots [tokens] of a cache [blocks, page, ...]
sm90::Slots slots_of(const TensorView& slots, const TensorView& cache) {
  const int64_t capacity = cache.size(0) * cache.size(1);
  require(capacity <= UINT32_MAX, "a cache may hold at most 2^32 - 1 tokens");
  require(slots.ndim() == 1 && (slots.size(0) <= 1 || slots.stride(0) == 1),
          "slots must be contiguous");
  return {data<void>(slots), slots.dtype().bits == 64, capacity,
          static_cast<uint32_t>(cache.size(1))};
}

// x [tokens, width]
template <class Args>
Args args_from(const TensorView& x, int64_t width) {
  Args a{};
  require(x.ndim() == 2 && x.size(1) == width && x.stride(1) == 1, "x must be [tokens, width]");
  a.x = data<void>(x);
  a.x_stride = x.stride(0);
  a.element = element_of(x);
  a.tokens = x.size(0);
  require(aligned(a.x, {a.tokens > 1 ? a.x_stride * element_bytes(x) : 0}),
          "x must lie at multiples of 16 bytes");
  return a;
}

// x [tokens, 576]; packed [tokens, 656] bytes
void fp8_pack(TensorView x, TensorView packed, bool power_of_two) {
  auto a = args_from<sm90::PackArgs>(x, kHeadDim);
  require(packed.size(0) == a.tokens && packed.size(1) == kTokenBytes && packed.IsContiguous() &&
              element_bytes(packed) == 1,
          "packed must be [tokens, 656] bytes");
  require(a.tokens <= UINT32_MAX, "at most 2^32 - 1 tokens at a time");
  if (a.tokens == 0) return;
  a.power_of_two = power_of_two;
  a.cache = data<uint8_t>(packed);
  a.stride_token = kTokenBytes;
  a.slots = {nullptr, false, a.tokens, static_cast<uint32_t>(a.tokens)};
  require(aligned(a.cache, {}), "packed must lie at a multiple of 16 bytes");
  const DeviceGuard guard(x.device());
  sm90::launch_fp8_pack(a, guard.stream());
}

// cache [blocks, page, 1, 656] bytes; slots [tokens] int32 or int64; x [tokens, 576]
void fp8_append(TensorView cache, TensorView slots, TensorView x) {
  auto a = args_from<sm90::PackArgs>(x, kHeadDim);
  require(cache.ndim() == 4 && cache.size(2) == 1 && cache.size(3) == kTokenBytes &&
              cache.stride(3) == 1 && element_bytes(cache) == 1,
          "cache must be [blocks, page, 1, 656] bytes");
  require(slots.size(0) == a.tokens, "a slot for each token");
  a.slots = slots_of(slots, cache);
  if (a.tokens == 0 || a.slots.capacity == 0) return;
  a.power_of_two = true;
  a.cache = data<uint8_t>(cache);
  a.stride_block = cache.stride(0);
  a.stride_token = cache.stride(1);
  require(aligned(a.cache,
                  {cache.size(0) > 1 ? a.stride_block : 0, cache.size(1) > 1 ? a.stride_token : 0}),
          "the cache's tokens must lie at multiples of 16 bytes");
  const DeviceGuard guard(x.device());
  sm90::launch_fp8_pack(a, guard.stream());
}

// cache [outer, inner, 656] bytes; out [outer * inner, 576] float32
void fp8_unpack(TensorView cache, TensorView out) {
  require(cache.ndim() == 3 && cache.size(2) == kTokenBytes && cache.stride(2) == 1 &&
              element_bytes(cache) == 1,
          "cache must be [outer, inner, 656] bytes");
  sm90::UnpackArgs a{};
  a.cache = data<uint8_t>(cache);
  a.tokens = cache.size(0) * cache.size(1);
  require(out.size(0) == a.tokens && out.size(1) == kHeadDim && out.IsContiguous() &&
              out.dtype().bits == 32,
          "out must be [outer * inner, 576] float32");
  require(a.tokens <= UINT32_MAX, "at most 2^32 - 1 tokens at a time");
  if (a.tokens == 0) return;
  a.stride_outer = cache.stride(0);
  a.stride_inner = cache.stride(1);
  a.inner = static_cast<uint32_t>(cache.size(1));
  a.out = data<float>(out);
  require(aligned(a.cache, {cache.size(0) > 1 ? a.stride_outer : 0,
                            cache.size(1) > 1 ? a.stride_inner : 0}) &&
              aligned(a.out, {}),
          "tokens must lie at multiples of 16 bytes");
  const DeviceGuard guard(cache.device());
  sm90::launch_fp8_unpack(a, guard.stream());
}

// x [tokens, 128]; codes [tokens, 128] bytes; scales [tokens] float32
void index_pack(TensorView x, TensorView codes, TensorView scales, bool power_of_two) {
  auto a = args_from<sm90::IndexPackArgs>(x, kIndexDim);
  require(codes.size(0) == a.tokens && codes.size(1) == kIndexDim && codes.IsContiguous() &&
              element_bytes(codes) == 1,
          "codes must be [tokens, 128] bytes");
  require(scales.size(0) == a.tokens && scales.IsContiguous() && scales.dtype().bits == 32,
          "scales must be [tokens] float32");
  require(a.tokens <= UINT32_MAX, "at most 2^32 - 1 tokens at a time");
  if (a.tokens == 0) return;
  a.power_of_two = power_of_two;
  a.codes = data<uint8_t>(codes);
  a.scales = data<float>(scales);
  a.slots = {nullptr, false, a.tokens, static_cast<uint32_t>(a.tokens)};
  require(aligned(a.codes, {}) && aligned(a.scales, {}), "results must lie at 16 bytes");
  const DeviceGuard guard(x.device());
  sm90::launch_index_pack(a, guard.stream());
}

// cache [blocks, 64, 1, 132] bytes; slots [tokens] int32 or int64; x [tokens, 128]
void index_append(TensorView cache, TensorView slots, TensorView x) {
  auto a = args_from<sm90::IndexPackArgs>(x, kIndexDim);
  require(cache.ndim() == 4 && cache.size(1) == kIndexPage && cache.size(2) == 1 &&
              cache.size(3) == kIndexTokenBytes && cache.stride(3) == 1 &&
              cache.stride(1) == kIndexTokenBytes && element_bytes(cache) == 1,
          "cache must be [blocks, 64, 1, 132] bytes, packed within a page");
  require(slots.size(0) == a.tokens, "a slot for each token");
  a.slots = slots_of(slots, cache);
  if (a.tokens == 0 || a.slots.capacity == 0) return;
  a.power_of_two = true;
  a.codes = data<uint8_t>(cache);
  a.scales = reinterpret_cast<float*>(a.codes + kIndexPage * kIndexDim);
  a.stride_block = cache.stride(0);
  require(aligned(a.codes, {cache.size(0) > 1 ? a.stride_block : 0}),
          "the cache's pages must lie at multiples of 16 bytes");
  const DeviceGuard guard(x.device());
  sm90::launch_index_pack(a, guard.stream());
}

// cache [blocks, page, h_kv, d]; slots [tokens] int32 or int64; x [tokens, h_kv, d], heads packed
void paged_append(TensorView cache, TensorView slots, TensorView x) {
  require(cache.ndim() == 4 && x.ndim() == 3 && x.size(1) == cache.size(2) &&
              x.size(2) == cache.size(3) && element_bytes(x) == element_bytes(cache),
          "cache must be [blocks, page, h_kv, d] and x [tokens, h_kv, d] of one type");
  const int64_t d = x.size(2), bytes = element_bytes(x);
  for (const auto& t : {cache, x}) {
    const int heads = t.ndim() - 2;
    require((d <= 1 || t.stride(heads + 1) == 1) && (t.size(heads) <= 1 || t.stride(heads) == d),
            "heads must be packed");
  }
  require(slots.size(0) == x.size(0), "a slot for each token");
  sm90::AppendArgs a{};
  a.slots = slots_of(slots, cache);
  a.tokens = x.size(0);
  require(x.size(1) * d * bytes < (int64_t{1} << 31), "a token may have at most 2 GiB");
  a.width = static_cast<int>(x.size(1) * d * bytes);
  if (a.tokens == 0 || a.slots.capacity == 0 || a.width == 0) return;
  a.x = data<uint8_t>(x);
  a.x_stride = x.stride(0) * bytes;
  a.cache = data<uint8_t>(cache);
  a.stride_block = cache.stride(0) * bytes;
  a.stride_token = cache.stride(1) * bytes;
  require(aligned(a.x, {a.tokens > 1 ? a.x_stride : 0, a.width}) &&
              aligned(a.cache, {cache.size(0) > 1 ? a.stride_block : 0,
                                cache.size(1) > 1 ? a.stride_token : 0}),
          "tokens must lie at multiples of 16 bytes and be of as many");
  const DeviceGuard guard(x.device());
  sm90::launch_append(a, guard.stream());
}

}  // namespace

TVM_FFI_DLL_EXPORT_TYPED_FUNC(fp8_pack, fp8_pack);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fp8_append, fp8_append);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(fp8_unpack, fp8_unpack);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(index_pack, index_pack);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(index_append, index_append);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(paged_append, paged_append);

}  // namespace flashmla
