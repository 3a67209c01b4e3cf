// Host side of attention_mass and attention_received where few rows count. Kernels and cost: attention_decode.cuh.
// docs/kernels/attention.md

#include "cuda/attention_decode.cuh"

#include "cuda/host.cuh"
#include "cuda/tuning.h"

namespace pruneops {
namespace {

inline Tuned enabled{"attention_decode", 1};
inline Tuned min_keys{"attention_decode_keys", 256};  // of a block, unless all keys of a head are fewer
inline Tuned max_queries{"attention_decode_queries", decode::kMaxQueries};
inline Tuned max_unmasked{"attention_decode_unmasked", 64};  // queries of attention_received without a mask

template <class T, int D>
void launch_mass(const AttentionParams<T>& p, const LaunchConfig& config, cudaStream_t stream) {
  if (p.lse) launch(decode::mass_with_lse<T, D>, config, stream, p);
  else launch(decode::mass<T, D>, config, stream, p);
}
template <class T, int D>
void launch_received(const AttentionParams<T>& p, const LaunchConfig& config, cudaStream_t stream) {
  if (p.lse) launch(decode::received<T, D, true>, config, stream, p);
  else launch(decode::received<T, D, false>, config, stream, p);
}

}  // namespace

template <class T>
bool launch_decode(const AttentionParams<T>& params, int64_t batch, cudaStream_t stream) {
  AttentionParams<T> p = params;
  const bool is_mass = p.mass;
  int warps = 0;
  const int most = is_mass || p.query_group.data ? max_queries.value : max_unmasked.value;
  if (!enabled.value || p.queries > most || !decode::supports(p, is_mass) || !has_clusters() ||
      !decode::plan(p, warps, min_keys.value))
    return false;
  const int64_t bytes = decode::shared_bytes(p, warps, is_mass);
  if (bytes > max_shared_memory()) return false;
  const bool exchange = is_mass || !p.lse;
  if (exchange && p.splits == 1) return false;  // st.async in a launch without clusters faulted on an H200
  const int cluster = exchange ? p.splits : 1;
  const LaunchConfig config{batch * p.key_heads * p.splits, 32 * warps, size_t(bytes), cluster};
  if (is_mass) p.head_dim == 64 ? launch_mass<T, 64>(p, config, stream) : launch_mass<T, 128>(p, config, stream);
  else p.head_dim == 64 ? launch_received<T, 64>(p, config, stream) : launch_received<T, 128>(p, config, stream);
  return true;
}
template bool launch_decode(const AttentionParams<__half>&, int64_t, cudaStream_t);
template bool launch_decode(const AttentionParams<__nv_bfloat16>&, int64_t, cudaStream_t);

}  // namespace pruneops
