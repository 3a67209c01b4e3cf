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
#include <optional>
#include <tuple>
#include <type_traits>

#include "cuda/views.cuh"

namespace pruneops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMostTokens = 1 << 30;  // of a batch entry: their indices are ints

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, "pruneops: ", what, " failed: ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                  "pruneops: no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}
inline int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int shared_memory() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
inline bool has_clusters() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

constexpr int kCooperative = 0;
struct Grid {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
  int cluster = 1;  // so many blocks meet; kCooperative: all, which are there at once
};

// Launches on the current device. More than 48 KB of dynamic shared memory is asked for first, as it must be.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, cudaStream_t stream, const Arguments&... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  if (grid.shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.shared_bytes)), "cudaFuncSetAttribute");
  STD_TORCH_CHECK(grid.blocks > 0 && grid.blocks <= INT32_MAX, "pruneops: a launch of ", grid.blocks, " blocks");
  cudaLaunchAttribute attribute{};
  if (grid.cluster == kCooperative) {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  } else {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  }
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(grid.blocks);
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = grid.cluster != 1;
  std::tuple<std::decay_t<Parameters>...> values(arguments...);
  std::apply(
      [&](auto&... value) {
        void* pointers[] = {&value...};
        check(cudaLaunchKernelExC(&config, function, pointers), "kernel launch");
      },
      values);
}

// x [B, N, D] or [T, D], its features next to each other.
template <class T>
Tokens<T> tokens_of(const Tensor& x) {
  const int64_t rank = x.dim(), row = x.stride(rank - 2), width = x.size(rank - 1);
  const int64_t batch = rank == 3 && x.size(0) > 1 ? x.stride(0) : 0;
  STD_TORCH_CHECK(x.stride(rank - 1) == 1 || width == 1, "pruneops: features must lie next to each other");
  STD_TORCH_CHECK(width < INT32_MAX / 4 && x.size(rank - 2) < INT32_MAX, "pruneops: x has too large a dimension");
  const auto address = reinterpret_cast<uintptr_t>(x.data_ptr());
  const bool aligned = (address | (batch | row) * sizeof(T)) % 16 == 0;
  return {static_cast<const T*>(x.data_ptr()), batch, row, static_cast<int>(width), aligned};
}

inline Flags flags_of(const std::optional<Tensor>& flags) {
  if (!flags) return {};
  return {static_cast<const bool*>(flags->data_ptr()), {flags->stride(0), flags->stride(1)}};
}

// Uninitialised float32 memory on the device of x.
inline Tensor scratch(const Tensor& x, int64_t floats) {
  return torch::stable::new_empty(x, {floats}, ScalarType::Float);
}

// Calls run(T{}) with the element type of a tensor of features or scores.
template <class Run>
void by_element(ScalarType type, const Run& run) {
  switch (type) {
    case ScalarType::Float: return run(float{});
    case ScalarType::Half: return run(__half{});
    case ScalarType::BFloat16: return run(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, "pruneops: elements must be float32, float16 or bfloat16");
  }
}

}  // namespace pruneops
