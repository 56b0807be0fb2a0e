// Turns a CUDA error code into an exception that crosses the FFI with its text.
#pragma once

#include <cuda_runtime.h>
#include <tvm/ffi/tvm_ffi.h>

#define FLASHMLA_CUDA_CHECK(call)                                                         \
  do {                                                                                    \
    const cudaError_t status_ = (call);                                                   \
    if (status_ != cudaSuccess) {                                                         \
      TVM_FFI_THROW(RuntimeError) << #call << " failed: " << cudaGetErrorString(status_); \
    }                                                                                     \
  } while (0)
