// pruneops._C: what this library was built with. Importing it registers the CPU kernels
// and defines the operators of pruneops_native that the CUDA library implements.

#include <pybind11/pybind11.h>
#include <torch/csrc/stable/library.h>

#include "cpu/cpu_features.h"

STABLE_TORCH_LIBRARY(pruneops_native, m) {
  m.def("kcenter(Tensor x, int k, Tensor? seeds, Tensor? mask, bool cosine) -> (Tensor, Tensor)");
  m.def(
      "kcenter_varlen(Tensor x, Tensor cu_seqlens, int[] ks, Tensor? seeds, bool cosine) -> (Tensor, Tensor)");
}

PYBIND11_MODULE(_C, m) {
  m.attr("version") = PRUNEOPS_VERSION;
  m.def("cpu_capability", [] { return pruneops::name(pruneops::cpu_capability()); },
        "Instruction set the CPU kernels run with here: default, avx2 or avx512.");
}
