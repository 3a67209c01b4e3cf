// Host utilities of all CUDA operators: error checks, current stream, launch, tensor views, dtype dispatch.

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

#include <atomic>
#include <cstdint>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>

#include "cuda/views.cuh"

namespace pruneops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kMaxTokens = 1 << 30;  // per batch entry; indices are int

inline void check(cudaError_t error, const char* operation) {
  STD_TORCH_CHECK(error == cudaSuccess, "pruneops: ", operation, " failed: ", cudaGetErrorString(error));
}

inline cudaStream_t current_stream(const Tensor& x) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                  "pruneops: no current CUDA stream");
  return static_cast<cudaStream_t>(stream);
}

// Of the current device; asked once per device.
inline int device_attribute(cudaDeviceAttr attribute) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices][cudaDevAttrMax];  // value + 1; 0: not asked yet
  int device = 0, value = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  std::atomic<int>& place = known[device % kDevices][attribute];
  if (const int stored = place.load(std::memory_order_relaxed); stored > 0 && device < kDevices) return stored - 1;
  check(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  if (device < kDevices) place.store(value + 1, std::memory_order_relaxed);
  return value;
}
inline int multiprocessor_count() { return device_attribute(cudaDevAttrMultiProcessorCount); }
inline int max_shared_memory() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }
inline bool has_clusters() { return device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9; }

constexpr int kCooperative = 0;
struct LaunchConfig {
  int64_t blocks;
  int threads;
  size_t shared_bytes = 0;
  int cluster = 1;  // blocks per cluster; kCooperative: a cooperative launch without clusters
  bool dependent = false;  // may start before the previous launch ends; its kernel calls dependency_wait()
};

// Lets a kernel have more than 48 KB of dynamic shared memory; asked for once per kernel, device and size.
inline void allow_shared_memory(const void* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return;
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, size_t> allowed;
  int device = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  const std::lock_guard lock(mutex);
  size_t& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
        "cudaFuncSetAttribute");
  most = bytes;
}

// Launches on the current device.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const LaunchConfig& config, cudaStream_t stream,
            const Arguments&... arguments) {
  const void* function = reinterpret_cast<const void*>(kernel);
  allow_shared_memory(function, config.shared_bytes);
  STD_TORCH_CHECK(config.blocks > 0 && config.blocks <= INT32_MAX, "pruneops: a launch of ", config.blocks, " blocks");
  cudaLaunchAttribute attributes[2]{};
  int count = 0;
  if (config.cluster == kCooperative) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  } else if (config.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(config.cluster), 1, 1};
  }
  if (config.dependent && has_clusters()) {  // compute capability 9.0 has both
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t cuda_config{};
  cuda_config.gridDim = static_cast<unsigned>(config.blocks);
  cuda_config.blockDim = config.threads;
  cuda_config.dynamicSmemBytes = config.shared_bytes;
  cuda_config.stream = stream;
  cuda_config.attrs = attributes;
  cuda_config.numAttrs = count;
  std::tuple<std::decay_t<Parameters>...> values(arguments...);
  std::apply(
      [&](auto&... value) {
        void* pointers[] = {&value...};
        check(cudaLaunchKernelExC(&cuda_config, function, pointers), "kernel launch");
      },
      values);
}

// View of x [B, N, D] or [T, D] with a contiguous last dimension.
template <class T>
Tokens<T> tokens_of(const Tensor& x) {
  const int64_t rank = x.dim(), row = x.stride(rank - 2), width = x.size(rank - 1);
  const int64_t batch = rank == 3 && x.size(0) > 1 ? x.stride(0) : 0;
  STD_TORCH_CHECK(x.stride(rank - 1) == 1 || width == 1, "pruneops: the last dimension must be contiguous");
  STD_TORCH_CHECK(width < INT32_MAX / 4 && x.size(rank - 2) < INT32_MAX, "pruneops: x has too large a dimension");
  const auto address = reinterpret_cast<uintptr_t>(x.data_ptr());
  const bool aligned = (address | (batch | row) * sizeof(T)) % 16 == 0;
  return {static_cast<const T*>(x.data_ptr()), batch, row, static_cast<int>(width), aligned};
}

inline MaskView mask_view(const std::optional<Tensor>& mask) {
  if (!mask) return {};
  return {static_cast<const bool*>(mask->data_ptr()), {mask->stride(0), mask->stride(1)}};
}

// Uninitialised float32 memory on the device of x.
inline Tensor workspace(const Tensor& x, int64_t floats) {
  return torch::stable::new_empty(x, {floats}, ScalarType::Float);
}

// Calls run(T{}) with T the C++ type of a floating-point dtype.
template <class Run>
void dispatch_dtype(ScalarType type, const Run& run) {
  switch (type) {
    case ScalarType::Float: return run(float{});
    case ScalarType::Half: return run(__half{});
    case ScalarType::BFloat16: return run(__nv_bfloat16{});
    default: STD_TORCH_CHECK(false, "pruneops: elements must be float32, float16 or bfloat16");
  }
}

}  // namespace pruneops
