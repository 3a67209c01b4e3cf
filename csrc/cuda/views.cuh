// Non-owning views of tensors for kernels: pointer, strides and element access.

#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/primitives.cuh"

namespace pruneops {

template <class T>
using Bits = std::conditional_t<sizeof(T) == 2, uint16_t, uint32_t>;

template <class T>
__device__ __forceinline__ float value_at(const T* data, int64_t i) {
  return value_of<T>(reinterpret_cast<const Bits<T>*>(data)[i]);
}

template <class T>
struct Matrix {
  const T* data;
  int64_t stride;  // elements between rows; a row is contiguous
  int width;
  bool aligned;  // every row starts on a multiple of 16 bytes
};

// x [B, N, D], or [T, D] with batch stride 0.
template <class T>
struct Tokens {
  const T* data;
  int64_t batch_stride, row_stride;
  int width;
  bool aligned;

  __device__ Matrix<T> matrix(int64_t offset) const { return {data + offset, row_stride, width, aligned}; }
};

// bool [B, N]; data is null if there is no mask.
struct MaskView {
  const bool* data;
  int64_t stride[2];

  __device__ bool at(int64_t row, int64_t token, bool default_value) const {
    return data ? data[row * stride[0] + token * stride[1]] : default_value;
  }
};

}  // namespace pruneops
