// The host part that attention_mass and attention_received have in common.

#pragma once

#include "cuda/attention.cuh"
#include "cuda/host.cuh"

namespace pruneops {

// Launches attention_sums: the states of all rows, or in clusters of p.splits also mass and lse. In attention_mass.cu.
template <class T>
void launch_sums(const Attention<T>& p, int64_t batch, cudaStream_t stream);

// Groups [B, S] or flags; none: all are of group 0.
inline GroupView group_view(const Tensor& group) {
  const ScalarType type = group.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Long || type == ScalarType::Int || type == ScalarType::Bool,
                  "pruneops: groups must be int64, int32 or bool");
  const int bytes = type == ScalarType::Long ? 8 : type == ScalarType::Int ? 4 : 1;
  return {group.data_ptr(), {group.stride(0), group.stride(1)}, bytes};
}
inline GroupView group_view(const std::optional<Tensor>& mask) { return mask ? group_view(*mask) : GroupView{}; }

// Strides of a [B, H, S, D] tensor, and whether all its rows are whole pieces of 16 bytes.
template <class T>
bool rows_of(const Tensor& x, int64_t (&stride)[3]) {
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) == 1, "pruneops: features must lie next to each other");
  int64_t all = x.size(3);
  for (int i = 0; i < 3; ++i) {
    stride[i] = x.size(i) > 1 ? x.stride(i) : 0;
    all |= stride[i];
  }
  return (reinterpret_cast<uintptr_t>(x.data_ptr()) | all * sizeof(T)) % 16 == 0;
}

inline void check_attention(const Tensor& query, const Tensor& key, int64_t groups) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && key.scalar_type() == query.scalar_type() &&
                      key.size(0) == query.size(0) && key.size(3) == query.size(3),
                  "pruneops: key does not fit query");
  STD_TORCH_CHECK(key.size(1) > 0 && query.size(1) % key.size(1) == 0, "pruneops: ", key.size(1),
                  " heads of keys for ", query.size(1));
  STD_TORCH_CHECK(query.size(3) <= kWidestHead, "pruneops: at most ", kWidestHead, " features a head");
  STD_TORCH_CHECK(1 <= groups && groups <= kMostKeyGroups, "pruneops: ", groups, " groups");
  STD_TORCH_CHECK(query.size(2) * query.size(1) < kMostTokens && key.size(2) < kMostTokens,
                  "pruneops: too many queries or keys");
}

template <class T>
Attention<T> attention_of(const Tensor& query, const Tensor& key, int64_t groups, bool causal, double scale,
                          const std::optional<Tensor>& lse) {
  Attention<T> p{static_cast<const T*>(query.data_ptr()), static_cast<const T*>(key.data_ptr())};
  p.query_aligned = rows_of<T>(query, p.query_stride);
  p.key_aligned = rows_of<T>(key, p.key_stride);
  if (lse) {
    p.lse = static_cast<const float*>(lse->data_ptr());
    for (int i = 0; i < 3; ++i) p.lse_stride[i] = lse->stride(i);
  }
  p.scale = static_cast<float>(scale);
  p.causal = causal;
  p.key_heads = static_cast<int>(key.size(1));
  p.ratio = static_cast<int>(query.size(1) / key.size(1));
  p.queries = static_cast<int>(query.size(2));
  p.keys = static_cast<int>(key.size(2));
  p.width = static_cast<int>(query.size(3));
  p.groups = static_cast<int>(groups);
  return p;
}

}  // namespace pruneops
