// Host code shared by attention_mass and attention_received: argument checks and kernel parameters.
// docs/kernels/attention.md

#pragma once

#include "cuda/attention.cuh"
#include "cuda/host.cuh"

namespace pruneops {

// Launches attention_sums: the states of all rows, or, with clusters, mass and lse. Defined in attention_mass.cu.
template <class T>
void launch_sums(const AttentionParams<T>& p, int64_t batch, cudaStream_t stream);

// The only argument checks of a call. When one fails, pruneops.ops checks again to raise a detailed error message.

inline void check_same_device(const Tensor& x, const Tensor& query) {
  STD_TORCH_CHECK(x.is_cuda() && x.get_device_index() == query.get_device_index(), "pruneops: tensors on two devices");
}

// Groups or mask [B, S] of tokens [B, .., S, D].
inline GroupView group_view(const Tensor& group, const Tensor& tokens) {
  const ScalarType type = group.scalar_type();
  STD_TORCH_CHECK(group.dim() == 2 && group.size(0) == tokens.size(0) && group.size(1) == tokens.size(2),
                  "pruneops: groups do not fit their tokens");
  check_same_device(group, tokens);
  const int bytes = type == ScalarType::Long ? 8 : type == ScalarType::Int ? 4 : 1;
  return {group.data_ptr(), {group.stride(0), group.stride(1)}, bytes};
}
inline GroupView groups_of(const Tensor& group, const Tensor& tokens) {
  const ScalarType type = group.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Long || type == ScalarType::Int, "pruneops: groups must be int64 or int32");
  return group_view(group, tokens);
}
inline GroupView mask_of(const std::optional<Tensor>& mask, const Tensor& tokens) {
  if (!mask) return {};
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool, "pruneops: masks must be bool");
  return group_view(*mask, tokens);
}

// Strides of a [B, H, S, D] tensor, and whether its rows are aligned to 16 bytes and consist of whole 16-byte vectors.
template <class T>
bool row_strides(const Tensor& x, int64_t (&stride)[3]) {
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) == 1, "pruneops: features must lie next to each other");
  int64_t all = x.size(3);
  for (int i = 0; i < 3; ++i) {
    stride[i] = x.size(i) > 1 ? x.stride(i) : 0;
    all |= stride[i];
  }
  return (reinterpret_cast<uintptr_t>(x.data_ptr()) | all * sizeof(T)) % 16 == 0;
}

inline void check_attention(const Tensor& query, const Tensor& key, int64_t groups,
                            const std::optional<Tensor>& lse) {
  STD_TORCH_CHECK(query.dim() == 4 && key.dim() == 4 && key.scalar_type() == query.scalar_type() &&
                      key.size(0) == query.size(0) && key.size(3) == query.size(3),
                  "pruneops: key does not fit query");
  STD_TORCH_CHECK(key.size(1) > 0 && query.size(1) % key.size(1) == 0, "pruneops: ", key.size(1),
                  " heads of keys for ", query.size(1));
  STD_TORCH_CHECK(1 <= query.size(3) && query.size(3) <= kMaxHeadDim, "pruneops: 1 to ", kMaxHeadDim,
                  " features a head");
  check_same_device(key, query);
  STD_TORCH_CHECK(1 <= groups && groups <= kMaxGroups, "pruneops: ", groups, " groups");
  STD_TORCH_CHECK(query.size(2) * query.size(1) < kMaxTokens && key.size(2) < kMaxTokens,
                  "pruneops: too many queries or keys");
  const ScalarType type = query.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16,
                  "pruneops: elements must be float32, float16 or bfloat16");
  if (!lse) return;
  STD_TORCH_CHECK(lse->scalar_type() == ScalarType::Float && lse->dim() == 3 && lse->size(0) == query.size(0) &&
                      lse->size(1) == query.size(1) && lse->size(2) == query.size(2),
                  "pruneops: lse does not fit query");
  check_same_device(*lse, query);
}

template <class T>
AttentionParams<T> attention_params(const Tensor& query, const Tensor& key, int64_t groups, bool causal, double scale,
                                    const std::optional<Tensor>& lse) {
  AttentionParams<T> p{static_cast<const T*>(query.data_ptr()), static_cast<const T*>(key.data_ptr())};
  p.query_aligned = row_strides<T>(query, p.query_stride);
  p.key_aligned = row_strides<T>(key, p.key_stride);
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
  p.head_dim = static_cast<int>(query.size(3));
  p.groups = static_cast<int>(groups);
  return p;
}

}  // namespace pruneops
