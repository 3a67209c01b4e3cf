// Host side of attention_mass for many rows on compute capability 9.0. Kernels and cost: attention_prefill.cuh.
// docs/kernels/attention.md

#include "cuda/attention_prefill.cuh"

#include "cuda/host.cuh"
#include "cuda/tuning.h"

namespace pruneops {
namespace {

inline Tuned min_rows{"attention_prefill_rows", 256};         // of a key head
inline Tuned with_lse{"attention_prefill_lse", 0};            // whether also if lse is given

constexpr int W = 4;  // warpgroups that consume; 2 and 3 took 169 and 142 us where 4 take 130 (S 3072, H 32)

template <int D, bool LSE, class T>
void launch_sums(prefill::Params<T>& p, int64_t batch, cudaStream_t stream) {
  p.tiles = (p.rows() + W * prefill::kRows - 1) / (W * prefill::kRows);
  launch(prefill::sums<T, W, D, LSE>,
         {p.tiles * batch * p.key_heads, prefill::kSumsThreads<W>, sizeof(prefill::SumsShared<W, D>), 1, true}, stream,
         p);
}

template <class T>
void choose_sums(prefill::Params<T>& p, int64_t batch, cudaStream_t stream) {
  if (p.head_dim == 64) p.lse ? launch_sums<64, true>(p, batch, stream) : launch_sums<64, false>(p, batch, stream);
  else p.lse ? launch_sums<128, true>(p, batch, stream) : launch_sums<128, false>(p, batch, stream);
}

}  // namespace

template <class T>
bool prefill_applies(const AttentionParams<T>& p) {
  return p.rows() >= min_rows.value && p.keys > 0 && (p.head_dim == 64 || p.head_dim == 128) &&
         (!p.lse || with_lse.value) && p.scale > 1e-30f && p.scale < 1e30f &&
         device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         device_attribute(cudaDevAttrComputeCapabilityMinor) == 0;
}

template <class T>
int64_t prefill_floats(const AttentionParams<T>& p, int64_t batch) {
  prefill::Params<T> all{p};
  return prefill::set_workspace(all, batch, nullptr) / 4;
}

template <class T>
void launch_prefill(const AttentionParams<T>& attention, int64_t batch, void* memory, cudaStream_t stream) {
  prefill::Params<T> p{attention};
  prefill::set_workspace(p, batch, memory);
  launch(prefill::lists<T>, {2 * batch, prefill::kListThreads, sizeof(prefill::ListShared)}, stream, p);
  choose_sums(p, batch, stream);
  launch(prefill::reduce<T>, {batch * p.heads(), prefill::kListThreads, sizeof(prefill::ReduceShared), 1, true}, stream,
         p);
}

#define PRUNEOPS_PREFILL(T)                                         \
  template bool prefill_applies(const AttentionParams<T>&);         \
  template int64_t prefill_floats(const AttentionParams<T>&, int64_t); \
  template void launch_prefill(const AttentionParams<T>&, int64_t, void*, cudaStream_t);
PRUNEOPS_PREFILL(__half)
PRUNEOPS_PREFILL(__nv_bfloat16)
#undef PRUNEOPS_PREFILL

}  // namespace pruneops
