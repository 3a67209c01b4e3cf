// What every CUDA operator does on the host: error checks, the current stream, element types.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <tuple>
#include <type_traits>

namespace pruneops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "pruneops: ", what, " failed: ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                  "pruneops: no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline int multiprocessors() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}

// Launches on the current device. More than 48 KB of dynamic shared memory is asked for first, as it must be.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, bool cooperative,
            cudaStream_t stream, const Arguments&... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          "cudaFuncSetAttribute");
  STD_TORCH_CHECK(blocks > 0 && blocks <= INT32_MAX, "pruneops: a launch of ", blocks, " blocks");
  const dim3 grid(static_cast<unsigned>(blocks)), block(threads);
  std::tuple<std::decay_t<Parameters>...> values(arguments...);
  std::apply(
      [&](auto&... value) {
        void* pointers[] = {&value...};
        check(cooperative ? cudaLaunchCooperativeKernel(function, grid, block, pointers, shared_bytes, stream)
                          : cudaLaunchKernel(function, grid, block, pointers, shared_bytes, stream),
              "kernel launch");
      },
      values);
}

// Calls run(T{}) with the element type of a feature tensor.
template <class Run>
void by_element(ScalarType type, const Run& run) {
  switch (type) {
    case ScalarType::Float: return run(float{});
    case ScalarType::Half: return run(__half{});
    case ScalarType::BFloat16: return run(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, "pruneops: features must be float32, float16 or bfloat16");
  }
}

}  // namespace pruneops
