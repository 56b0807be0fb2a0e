// What the files that Python calls into share: tensors seen as pointers, checks that guard memory,
// and the caller's device and stream.
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/c_env_api.h>
#include <tvm/ffi/function.h>
#include <tvm/ffi/tvm_ffi.h>

#include "cuda_check.h"

namespace flashmla {

using tvm::ffi::Optional;
using tvm::ffi::ShapeView;
using tvm::ffi::String;
using tvm::ffi::Tensor;
using tvm::ffi::TensorView;

constexpr DLDataType kInt32{kDLInt, 32, 1};
constexpr DLDataType kFloat32{kDLFloat, 32, 1};

// Makes the tensors' device current for the launch, and the caller's again afterwards. A thread
// that has launched nothing yet, such as autograd's, has no context, which tensor maps need:
// setting the device makes it current.
class DeviceGuard {
 public:
  explicit DeviceGuard(const DLDevice& device) : device_(device) {
    static thread_local int last_set = -1;
    FLASHMLA_CUDA_CHECK(cudaGetDevice(&previous_));
    if (previous_ != device.device_id || last_set != device.device_id) {
      FLASHMLA_CUDA_CHECK(cudaSetDevice(device.device_id));
    }
    last_set = device.device_id;
  }
  ~DeviceGuard() {
    if (previous_ != device_.device_id) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

  cudaStream_t stream() const {
    return static_cast<cudaStream_t>(TVMFFIEnvGetStream(device_.device_type, device_.device_id));
  }

 private:
  DLDevice device_;
  int previous_ = 0;
};

template <class T>
T* data(const TensorView& t) {
  return reinterpret_cast<T*>(static_cast<char*>(t.data_ptr()) + t.byte_offset());
}

inline bool same(DLDataType a, DLDataType b) {
  return a.code == b.code && a.bits == b.bits && a.lanes == b.lanes;
}

inline bool same(DLDevice a, DLDevice b) {
  return a.device_type == b.device_type && a.device_id == b.device_id;
}

// Whether a tensor is what a kernel was written for: of a dtype, a rank and a device, its last
// dimension contiguous. For functions that answer false to whatever they cannot take.
inline bool is(const TensorView& t, DLDataType dtype, int ndim, DLDevice device) {
  return t.ndim() == ndim && same(t.dtype(), dtype) && same(t.device(), device) &&
         (t.size(ndim - 1) <= 1 || t.stride(ndim - 1) == 1);
}

inline bool aligned(const TensorView& t) {
  return reinterpret_cast<uintptr_t>(data<char>(t)) % 16 == 0;
}

inline void require(bool condition, const char* what) {
  if (!condition) TVM_FFI_THROW(ValueError) << what;
}

inline bool is_bf16(const TensorView& t) {
  return t.dtype().code == kDLBfloat;
}

inline int size32(const TensorView& t, int axis) {
  return static_cast<int>(t.size(axis));
}

}  // namespace flashmla
