// Views of feature tensors for the CPU kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <limits>

#include "cpu/common.h"

namespace pruneops {

// Rows of `width` features, `stride` elements apart.
struct Tokens {
  const void* data;
  int64_t stride, width;
  Element type;

  Tokens from(int64_t elements) const {
    return {static_cast<const char*>(data) + elements * size_of(type), stride, width, type};
  }
};

// Tokens packed as float32 rows, padded with zeros to a multiple of kPad features, with their norm factors.
struct Packed {
  const float* const* rows;
  const float* norm_factors;
  int64_t count;
};

// `square` is |x|^2. Cosine: 1 / |x|, 0 for a zero vector. Euclidean: |x|^2. NaN for a non-finite token, so that every
// comparison with its similarities is false.
inline float norm_factor(float square, bool cosine) {
  if (!(square <= std::numeric_limits<float>::max() / 4)) return kNaN;
  if (!cosine) return square;
  return square < std::numeric_limits<float>::min() ? 0.0f : 1.0f / std::sqrt(square);
}

// A tensor [.., N, D] with contiguous features and any other strides.
inline Tokens tokens_of(const char* op, const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(x.stride(last) == 1 || x.size(last) == 1, op, ": the last dimension must be contiguous");
  STD_TORCH_CHECK(x.size(last - 1) < int64_t{1} << 32 && x.size(last) < int64_t{1} << 32, op,
                  ": a dimension is 2^32 or longer");
  Tokens tokens{x.const_data_ptr(), x.stride(last - 1), x.size(last), Element::kFloat};
  switch (x.scalar_type()) {
    case ScalarType::Float: break;
    case ScalarType::Half: tokens.type = Element::kHalf; break;
    case ScalarType::BFloat16: tokens.type = Element::kBFloat16; break;
    default: STD_TORCH_CHECK(false, op, ": values must be float32, float16 or bfloat16");
  }
  return tokens;
}

}  // namespace pruneops
