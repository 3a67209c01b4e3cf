// pruneops._C: importing it defines the operators of pruneops_native, for both native libraries, and registers the CPU
// kernels. The module itself holds build information.

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "cpu/cpu_features.h"

STABLE_TORCH_LIBRARY(pruneops_native, m) {
  m.def("kcenter(Tensor x, int k, Tensor? seeds, Tensor? mask, bool cosine) -> (Tensor, Tensor)");
  m.def(
      "kcenter_varlen(Tensor x, Tensor cu_seqlens, int[] ks, Tensor? seeds, bool cosine) -> (Tensor, Tensor)");
  // x [B, N, D], or packed [1, T, D] with cu_seqlens [n + 1]; reduce: 0 none, 1 max, 2 mean, 3 sum
  m.def("pivot_cosine(Tensor x, Tensor? cu_seqlens, Tensor pivots, Tensor? mask, int reduce) -> Tensor");
  m.def("exclusive_bottomk(Tensor scores, int[] quotas, Tensor? taken) -> Tensor");
  m.def("pivot_bottomk(Tensor x, Tensor pivots, int[] quotas, Tensor? mask) -> Tensor");
  m.def("assign_ranks(Tensor logits, int j) -> Tensor");
  m.def(
      "attention_mass(Tensor query, Tensor key, Tensor query_group, Tensor key_group, int groups, bool causal, "
      "float scale, Tensor? lse) -> (Tensor, Tensor)");
  m.def(
      "attention_received(Tensor query, Tensor key, Tensor? query_mask, Tensor? key_mask, bool causal, float scale, "
      "Tensor? lse) -> Tensor");
  m.def("kv_compact(Tensor[] caches, Tensor keep, Tensor? lengths) -> Tensor[]");
  m.def("kv_compact_(Tensor(a!)[] caches, Tensor keep, Tensor? lengths) -> ()");
  m.def(
      "paged_kv_compact_(Tensor(a!)[] pages, Tensor block_table, Tensor keep, Tensor lengths, bool nhd) -> ()");
  m.def("gather_tokens(Tensor[] tensors, Tensor keep, int[] dims) -> Tensor[]");
}

PYBIND11_MODULE(_C, m) {
  m.attr("version") = PRUNEOPS_VERSION;
  m.def("cpu_capability", [] { return pruneops::name(pruneops::cpu_capability()); },
        "Instruction set the CPU kernels run with here: default, avx2, avx512, avx512_bf16 or amx_bf16.");
}
