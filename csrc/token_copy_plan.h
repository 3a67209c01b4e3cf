// Host part of kv_compact, paged_kv_compact_ and gather_tokens, shared by CPU and CUDA: checks the arguments, describes
// the memory layout of each tensor (merged dimensions, byte strides) and lists the copies. Reads no values of keep and
// lengths. An argument that does not fit is a RuntimeError here, before anything is launched; pruneops/ops then says
// which one.
// Documentation: docs/kernels/token_copy.md
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <vector>

#ifdef __CUDACC__
#define PRUNEOPS_HOST_DEVICE __host__ __device__
#else
#define PRUNEOPS_HOST_DEVICE
#endif

namespace pruneops {

constexpr int kMaxDims = 6;

// A dimension other than the tokens'. Strides of source and result are in bytes, the stride of keep in elements.
struct Dim {
  int64_t size, src_stride, dst_stride, keep_stride;
  bool operator==(const Dim&) const = default;
};

// A slice is one index of every dimension of a Layout: a matrix [tokens, width bytes]. Offsets of its start.
struct SliceOffsets {
  int64_t batch, src, dst, keep;
};

// Memory layout of a source and its result: a token is `width` contiguous bytes in each slice. dims[0] is the batch.
struct Layout {
  int rank = 0;
  Dim dims[kMaxDims] = {};
  int64_t src_token_stride = 0, dst_token_stride = 0, page_stride = 0, width = 0;  // bytes
  bool operator==(const Layout&) const = default;

  PRUNEOPS_HOST_DEVICE int64_t slices() const {
    int64_t count = 1;
    for (int i = 0; i < rank; ++i) count *= dims[i].size;
    return count;
  }
  PRUNEOPS_HOST_DEVICE SliceOffsets slice(int64_t index) const {
    SliceOffsets offsets{0, 0, 0, 0};
    for (int i = rank; i-- > 0;) {
      const int64_t coordinate = index % dims[i].size;
      index /= dims[i].size;
      offsets.src += coordinate * dims[i].src_stride;
      offsets.dst += coordinate * dims[i].dst_stride;
      offsets.keep += coordinate * dims[i].keep_stride;
      offsets.batch = coordinate;  // the last iteration is dims[0]
    }
    return offsets;
  }
};

// One tensor to copy; `layout` is an index into Plan::layouts.
struct CopyDesc {
  const char* src;
  char* dst;
  int layout;
};

// Token r of a slice comes from position keep[slice.keep + r * keep_stride]. Strides are in elements.
struct Positions {
  const int64_t* keep;
  int64_t keep_stride, count;
  const void* lengths;  // valid entries of each batch row; null: all `count`
  int64_t lengths_stride;
  bool lengths_are_int64;      // else int32
  const int32_t* block_table;  // pages of each batch row; null: tokens are `token_stride` apart
  int64_t table_batch_stride, table_block_stride, page_size;

  PRUNEOPS_HOST_DEVICE int64_t length(int64_t batch) const {
    if (!lengths) return count;
    const int64_t i = batch * lengths_stride;
    return lengths_are_int64 ? static_cast<const int64_t*>(lengths)[i] : static_cast<const int32_t*>(lengths)[i];
  }
  // Bytes from the start of a slice to a position.
  PRUNEOPS_HOST_DEVICE int64_t offset(const Layout& layout, int64_t batch, int64_t position,
                                      int64_t token_stride) const {
    if (!block_table) return position * token_stride;
    const int64_t page = block_table[batch * table_batch_stride + position / page_size * table_block_stride];
    return page * layout.page_stride + position % page_size * token_stride;
  }
};

// In place: sources are the results, positions ascend, and nothing is written past a row's length. Otherwise results
// are zero past it.
struct Plan {
  std::vector<Layout> layouts;
  std::vector<CopyDesc> copies;
  Positions positions;
  bool in_place;
};

// Width of the vectors that a copy can use: the largest power of two, at most 16, that divides all its addresses,
// strides and widths.
inline int max_vec_bytes(const Layout& layout, const CopyDesc& copy) {
  uint64_t bits = 16 | uint64_t(layout.width) | uint64_t(layout.page_stride) | reinterpret_cast<uintptr_t>(copy.src) |
                  reinterpret_cast<uintptr_t>(copy.dst) | uint64_t(layout.src_token_stride) |
                  uint64_t(layout.dst_token_stride);
  for (int i = 0; i < layout.rank; ++i)
    bits |= uint64_t(layout.dims[i].src_stride) | uint64_t(layout.dims[i].dst_stride);
  return int(bits & -bits);
}

namespace token_copy {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check(bool condition, const char* message) { STD_TORCH_CHECK(condition, "pruneops: ", message); }

struct Device {
  int32_t type = 0, index = 0;
  explicit Device(const Tensor& tensor) {
    aoti_torch_get_device_type(tensor.get(), &type);
    aoti_torch_get_device_index(tensor.get(), &index);
  }
  bool operator==(const Device&) const = default;
};

inline void check_same_device(const Tensor& tensor, const Device& device) {
  check(Device(tensor) == device, "devices differ");
}

// Shape, strides and element size, valid while the tensor lives. Read once per tensor: with many tensors, calls through
// the stable ABI dominate the host time.
struct TensorView {
  const int64_t *sizes, *strides;
  int64_t rank, element_size;
  explicit TensorView(const Tensor& tensor)
      : strides(tensor.strides().data()), element_size(tensor.element_size()) {
    const auto shape = tensor.sizes();
    sizes = shape.data(), rank = int64_t(shape.size());
  }
  bool operator==(const TensorView& other) const {
    return element_size == other.element_size && rank == other.rank &&
           std::equal(sizes, sizes + rank, other.sizes) && std::equal(strides, strides + rank, other.strides);
  }
};

inline Positions make_positions(const Tensor& keep, const std::optional<Tensor>& lengths) {
  Positions positions{};
  check(keep.scalar_type() == ScalarType::Long, "keep must be int64");
  positions.keep = static_cast<const int64_t*>(keep.const_data_ptr());
  positions.keep_stride = keep.stride(keep.dim() - 1), positions.count = keep.size(keep.dim() - 1);
  if (lengths) {
    const ScalarType type = lengths->scalar_type();
    check(type == ScalarType::Long || type == ScalarType::Int, "lengths must be int64 or int32");
    check(lengths->dim() == 1 && lengths->size(0) == keep.size(0), "lengths must be [B], as keep says");
    check_same_device(*lengths, Device(keep));
    positions.lengths = lengths->const_data_ptr(), positions.lengths_stride = lengths->stride(0);
    positions.lengths_are_int64 = type == ScalarType::Long;
  }
  return positions;
}

// Index of each special dimension of a tensor; -1: none.
struct DimRoles {
  int64_t token, batch, head, page;
  bool operator==(const DimRoles&) const = default;
};

// Merges dimensions that are adjacent in both source and result.
inline Layout make_layout(const Tensor& src, const Tensor& dst, const DimRoles& roles, const Tensor& keep) {
  const int64_t element_size = src.element_size();
  Layout layout;
  layout.width = element_size;
  layout.src_token_stride = src.stride(roles.token) * element_size;
  layout.dst_token_stride = dst.stride(roles.token) * element_size;
  layout.page_stride = roles.page < 0 ? 0 : src.stride(roles.page) * element_size;
  const bool batched = keep.dim() > 1;
  Dim batch{batched ? keep.size(0) : 1, 0, 0, batched ? keep.stride(0) : 0};
  std::vector<Dim> dims;
  for (int64_t d = 0; d < dst.dim(); ++d) {
    if (d == roles.token || d == roles.page) continue;
    const bool broadcast = src.size(d) == 1;  // over the batch
    Dim dim{dst.size(d), broadcast ? 0 : src.stride(d) * element_size, dst.stride(d) * element_size, 0};
    if (d == roles.batch) batch.src_stride = dim.src_stride, batch.dst_stride = dim.dst_stride;
    if (d == roles.batch || dim.size == 1) continue;
    if (d == roles.head && keep.dim() == 3) dim.keep_stride = keep.stride(1);
    dims.push_back(dim);
  }
  const auto mergeable = [](const Dim& dim) { return dim.keep_stride == 0; };
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t i = 0; i < dims.size() && !changed; ++i) {
      const Dim inner = dims[i];
      if (!mergeable(inner)) continue;
      if (inner.src_stride == layout.width && inner.dst_stride == layout.width) {  // contiguous bytes of a token
        layout.width *= inner.size;
        dims.erase(dims.begin() + i), changed = true;
        continue;
      }
      for (Dim& outer : dims) {
        if (!mergeable(outer) || outer.src_stride != inner.src_stride * inner.size ||
            outer.dst_stride != inner.dst_stride * inner.size)
          continue;
        if (&outer == &dims[i]) continue;
        outer = {outer.size * inner.size, inner.src_stride, inner.dst_stride, 0};
        dims.erase(dims.begin() + i), changed = true;
        break;
      }
    }
  }
  dims.insert(dims.begin(), batch);
  check(dims.size() <= kMaxDims, "a tensor has too many dimensions that cannot be merged");
  layout.rank = int(dims.size());
  std::copy(dims.begin(), dims.end(), layout.dims);
  return layout;
}

// Appends copies to a plan; tensors of the same layout share one entry of Plan::layouts.
class PlanBuilder {
 public:
  PlanBuilder(Plan& plan, const Tensor& keep) : plan_(plan), keep_(keep) {}

  void add(const Tensor& src, const Tensor& dst, const DimRoles& roles) {
    const TensorView src_view(src), dst_view = src.get() == dst.get() ? src_view : TensorView(dst);
    const Key key{src_view, dst_view, roles};
    if (!last_key_ || !(key == *last_key_)) {
      layout_ = layout_index(make_layout(src, dst, roles, keep_));
      last_key_ = key;
    }
    if (layout_ >= 0)
      plan_.copies.push_back(
          {static_cast<const char*>(src.const_data_ptr()), static_cast<char*>(dst.mutable_data_ptr()), layout_});
  }

 private:
  struct Key {
    TensorView src, dst;
    DimRoles roles;
    bool operator==(const Key&) const = default;
  };

  // -1: no bytes to copy.
  int layout_index(const Layout& layout) {
    if (layout.slices() == 0 || layout.width == 0 || plan_.positions.count == 0) return -1;
    for (size_t i = 0; i < plan_.layouts.size(); ++i)
      if (plan_.layouts[i] == layout) return int(i);
    plan_.layouts.push_back(layout);
    return int(plan_.layouts.size()) - 1;
  }

  Plan& plan_;
  const Tensor& keep_;
  std::optional<Key> last_key_;  // most tensors have the layout of the previous one
  int layout_ = -1;
};

// No tensor is passed twice or overlaps itself.
inline void check_no_overlap(const std::vector<Tensor>& tensors) {
  std::vector<const void*> addresses;
  addresses.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    const TensorView view(tensor);
    bool empty = false;
    for (int64_t d = 0; d < view.rank; ++d) {
      check(view.strides[d] != 0 || view.sizes[d] <= 1, "an expanded tensor cannot be changed in place");
      empty |= view.sizes[d] == 0;
    }
    if (!empty) addresses.push_back(tensor.const_data_ptr());
  }
  std::sort(addresses.begin(), addresses.end());
  check(std::adjacent_find(addresses.begin(), addresses.end()) == addresses.end(), "a tensor is passed twice");
}

// Uninitialised [B, Hk, K, D] for every cache, each an allocation of its own, with the order of heads and tokens that
// the cache has in memory.
inline std::vector<Tensor> new_caches(const std::vector<Tensor>& caches, int64_t K) {
  std::vector<Tensor> results;
  results.reserve(caches.size());
  const Device device(caches[0]);
  for (const Tensor& cache : caches) {
    const TensorView view(cache);
    const int64_t B = view.sizes[0], Hk = view.sizes[1], D = view.sizes[3];
    const bool heads_inside = Hk > 1 && view.sizes[2] > 1 && view.strides[1] < view.strides[2];
    const int64_t sizes[] = {B, Hk, K, D};
    const int64_t strides[] = {Hk * K * D, heads_inside ? D : K * D, heads_inside ? Hk * D : D, 1};
    int32_t type = 0;
    aoti_torch_get_dtype(cache.get(), &type);
    AtenTensorHandle result = nullptr;
    check(aoti_torch_empty_strided(4, sizes, strides, type, device.type, device.index, &result) ==
              AOTI_TORCH_SUCCESS, "the allocation of a result failed");
    results.emplace_back(result);
  }
  return results;
}

}  // namespace token_copy

inline Plan plan_compact(const std::vector<torch::stable::Tensor>& caches,
                         const std::vector<torch::stable::Tensor>& results, const torch::stable::Tensor& keep,
                         const std::optional<torch::stable::Tensor>& lengths, bool in_place) {
  Plan plan{{}, {}, token_copy::make_positions(keep, lengths), in_place};
  plan.copies.reserve(caches.size());
  token_copy::PlanBuilder builder(plan, keep);
  for (size_t i = 0; i < caches.size(); ++i) builder.add(caches[i], results[i], {2, 0, 1, -1});
  return plan;
}

// To be called before results are allocated.
inline void check_caches(const std::vector<torch::stable::Tensor>& caches, const torch::stable::Tensor& keep,
                         bool in_place) {
  token_copy::check(!caches.empty(), "caches must not be empty");
  token_copy::check(keep.dim() == 2 || keep.dim() == 3, "keep must be of rank 2 or 3");
  const int64_t rank = keep.dim(), B = keep.size(0), Hk = keep.size(1), K = keep.size(rank - 1);
  const token_copy::Device device(keep);
  for (const auto& cache : caches) {
    const auto sizes = cache.sizes();
    token_copy::check(sizes.size() == 4 && sizes[0] == B, "caches must be [B, Hk, S, D] with the B of keep");
    token_copy::check(rank == 2 || sizes[1] == Hk, "numbers of heads differ");
    token_copy::check(!in_place || K <= sizes[2], "keep has more entries than a cache has positions");
    token_copy::check_same_device(cache, device);
  }
  if (in_place) token_copy::check_no_overlap(caches);
}

inline Plan plan_paged(const std::vector<torch::stable::Tensor>& pages, const torch::stable::Tensor& block_table,
                       const torch::stable::Tensor& keep, const torch::stable::Tensor& lengths, bool nhd) {
  using token_copy::check;
  check(!pages.empty(), "pages must not be empty");
  check(keep.dim() == 2 || keep.dim() == 3, "keep must be of rank 2 or 3");
  Plan plan{{}, {}, token_copy::make_positions(keep, lengths), true};
  Positions& positions = plan.positions;
  check(block_table.dim() == 2 && block_table.size(0) == keep.size(0) &&
            block_table.scalar_type() == token_copy::ScalarType::Int, "block_table must be int32 [B, blocks]");
  const token_copy::Device device(keep);
  token_copy::check_same_device(block_table, device);
  positions.block_table = static_cast<const int32_t*>(block_table.const_data_ptr());
  positions.table_batch_stride = block_table.stride(0), positions.table_block_stride = block_table.stride(1);
  token_copy::PlanBuilder builder(plan, keep);
  for (const auto& tensor : pages) {
    const int64_t rank = tensor.dim(), token = rank - (nhd ? 3 : 2), head = rank - (nhd ? 2 : 3);
    check(rank == 4 || rank == 5, "pages must be of rank 4 or 5");
    const int64_t page_size = tensor.size(token);
    check(page_size > 0 && (positions.page_size == 0 || positions.page_size == page_size),
          "pages must be of one size, at least one token");
    check(keep.dim() == 2 || tensor.size(head) == keep.size(1), "numbers of heads differ");
    token_copy::check_same_device(tensor, device);
    positions.page_size = page_size;
    builder.add(tensor, tensor, {token, -1, head, 0});
  }
  token_copy::check_no_overlap(pages);
  return plan;
}

// dims[i]: the token dimension of tensors[i]; if keep has a batch, it is the dimension before. Allocates results.
inline Plan plan_gather(const std::vector<torch::stable::Tensor>& tensors, const torch::stable::Tensor& keep,
                        const std::vector<int64_t>& dims, std::vector<torch::stable::Tensor>& results) {
  using token_copy::check;
  check(!tensors.empty() && dims.size() == tensors.size(), "tensors must not be empty, with one of dims each");
  check(keep.dim() == 1 || keep.dim() == 2, "keep must be of rank 1 or 2");
  Plan plan{{}, {}, token_copy::make_positions(keep, {}), false};
  const bool batched = keep.dim() == 2;
  const token_copy::Device device(keep);
  token_copy::PlanBuilder builder(plan, keep);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto& tensor = tensors[i];
    check(batched <= dims[i] && dims[i] < tensor.dim(), "a token dimension is out of range");
    token_copy::check_same_device(tensor, device);
    std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
    if (batched) {
      check(sizes[dims[i] - 1] == 1 || sizes[dims[i] - 1] == keep.size(0), "batch sizes differ");
      sizes[dims[i] - 1] = keep.size(0);
    }
    sizes[dims[i]] = plan.positions.count;
    results.push_back(torch::stable::new_empty(tensor, sizes));
    builder.add(tensor, results.back(), {dims[i], batched ? dims[i] - 1 : -1, -1, -1});
  }
  return plan;
}

}  // namespace pruneops
