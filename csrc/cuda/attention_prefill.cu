// Host side of attention_mass for many rows on compute capability 9.0. Kernels and cost: attention_prefill.cuh.
// docs/kernels/attention.md

#include "cuda/attention_prefill.cuh"

#include "cuda/host.cuh"
#include "cuda/tuning.h"

namespace pruneops {
namespace {

inline Tuned min_rows{"attention_prefill_rows", 256};         // of a key head
inline Tuned warpgroups{"attention_prefill_warpgroups", 4};   // 2, 3, 4; bfloat16 with 128 features, lse not given
inline Tuned turns{"attention_prefill_turns", 0};             // 0, 1, 2
inline Tuned with_lse{"attention_prefill_lse", 0};            // whether also if lse is given
inline Tuned overlap{"attention_prefill_overlap", 1};         // whether launches overlap

constexpr int kWarpgroups = 4;

// A launch that may start before the previous one of the stream has ended (programmatic dependent launch).
template <class T>
void launch_dependent(void (*kernel)(prefill::Params<T>), int64_t blocks, int threads, size_t shared_bytes,
                      cudaStream_t stream, prefill::Params<T> p) {
  if (shared_bytes > 48 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          "cudaFuncSetAttribute");
  STD_TORCH_CHECK(blocks <= INT32_MAX, "pruneops: a launch of ", blocks, " blocks");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(blocks);
  config.blockDim = threads;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap.value;
  check(cudaLaunchKernelEx(&config, kernel, p), "kernel launch");
}

template <int W, int D, bool LSE, class T>
void launch_sums(prefill::Params<T>& p, int64_t batch, cudaStream_t stream) {
  p.tiles = (p.rows() + W * prefill::kRows - 1) / (W * prefill::kRows);
  launch_dependent(prefill::sums<T, W, D, LSE>, p.tiles * batch * p.key_heads, prefill::kSumsThreads<W>,
                   sizeof(prefill::SumsShared<W, D>), stream, p);
}

template <class T>
void choose_sums(prefill::Params<T>& p, int64_t batch, cudaStream_t stream) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (p.head_dim == 128 && !p.lse && warpgroups.value == 2) return launch_sums<2, 128, false>(p, batch, stream);
    if (p.head_dim == 128 && !p.lse && warpgroups.value == 3) return launch_sums<3, 128, false>(p, batch, stream);
  }
  if (p.head_dim == 64) {
    if (p.lse) launch_sums<kWarpgroups, 64, true>(p, batch, stream);
    else launch_sums<kWarpgroups, 64, false>(p, batch, stream);
  } else {
    if (p.lse) launch_sums<kWarpgroups, 128, true>(p, batch, stream);
    else launch_sums<kWarpgroups, 128, false>(p, batch, stream);
  }
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
  p.turns = turns.value;
  launch(prefill::lists<T>, {2 * batch, prefill::kListThreads, sizeof(prefill::ListShared)}, stream, p);
  choose_sums(p, batch, stream);
  launch_dependent(prefill::reduce<T>, batch * p.heads(), prefill::kListThreads, sizeof(prefill::ReduceShared), stream,
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
