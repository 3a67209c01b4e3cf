// What kv_compact, paged_kv_compact_ and gather_tokens have in common on the host: tokens of tensors of any shape as
// runs of bytes, and where each goes. Shapes are checked here, before anything is launched; pruneops/ops says in words
// what is wrong.
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
#define PRUNEOPS_BOTH __host__ __device__
#else
#define PRUNEOPS_BOTH
#endif

namespace pruneops {

constexpr int kMostDims = 6;

// A dimension beside the tokens: how many, how far apart in source and result (bytes) and in keep (elements).
struct Dim {
  int64_t size, from, to, keep;
  bool operator==(const Dim&) const = default;
};

// What one place of all dimensions adds to the addresses of its tokens.
struct Lane {
  int64_t batch, from, to, keep;
};

// How the tokens of a tensor lie: `width` bytes next to each other in every lane. dims[0] is the batch.
struct Form {
  int rank = 0;
  Dim dims[kMostDims] = {};
  int64_t from_token = 0, to_token = 0, page_stride = 0, width = 0;  // bytes
  bool operator==(const Form&) const = default;

  PRUNEOPS_BOTH int64_t lanes() const {
    int64_t count = 1;
    for (int i = 0; i < rank; ++i) count *= dims[i].size;
    return count;
  }
  PRUNEOPS_BOTH Lane lane(int64_t index) const {
    Lane lane{0, 0, 0, 0};
    for (int i = rank; i-- > 0;) {
      const int64_t place = index % dims[i].size;
      index /= dims[i].size;
      lane.from += place * dims[i].from;
      lane.to += place * dims[i].to;
      lane.keep += place * dims[i].keep;
      lane.batch = place;  // of dims[0] in the end
    }
    return lane;
  }
};

struct Job {
  const char* from;
  char* to;
  int form;
};

// Token r of a lane comes from position keep[lane.keep + r * keep_token]. Strides are in elements.
struct Positions {
  const int64_t* keep;
  int64_t keep_token, count;
  const void* lengths;  // how many entries of a batch row are meant; null: all
  int64_t lengths_stride;
  bool long_lengths;     // int64, else int32
  const int32_t* table;  // pages of a batch row; null: tokens lie one after another
  int64_t table_batch, table_block, page;

  PRUNEOPS_BOTH int64_t length(int64_t batch) const {
    if (!lengths) return count;
    const int64_t i = batch * lengths_stride;
    return long_lengths ? static_cast<const int64_t*>(lengths)[i] : static_cast<const int32_t*>(lengths)[i];
  }
  // Bytes from a lane's start to a position of a tensor whose tokens are `token` bytes apart.
  PRUNEOPS_BOTH int64_t offset(const Form& form, int64_t batch, int64_t position, int64_t token) const {
    if (!table) return position * token;
    const int64_t block = table[batch * table_batch + position / page * table_block];
    return block * form.page_stride + position % page * token;
  }
};

// In place: results are the sources, positions ascend, and nothing is written past a row's length. Else results are
// zero there.
struct Plan {
  std::vector<Form> forms;
  std::vector<Job> jobs;
  Positions positions;
  bool in_place;
};

// Largest power of two, at most 16, that divides every address, stride and width of a job: how it can be moved.
inline int unit_of(const Form& form, const Job& job) {
  uint64_t bits = 16 | uint64_t(form.width) | uint64_t(form.page_stride) | reinterpret_cast<uintptr_t>(job.from) |
                  reinterpret_cast<uintptr_t>(job.to) | uint64_t(form.from_token) | uint64_t(form.to_token);
  for (int i = 0; i < form.rank; ++i) bits |= uint64_t(form.dims[i].from) | uint64_t(form.dims[i].to);
  return int(bits & -bits);
}

namespace token_copy {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void expect(bool condition, const char* what) { STD_TORCH_CHECK(condition, "pruneops: ", what); }

// Where a tensor is; asked once of keep.
struct Device {
  int32_t type = 0, index = 0;
  explicit Device(const Tensor& tensor) {
    aoti_torch_get_device_type(tensor.get(), &type);
    aoti_torch_get_device_index(tensor.get(), &index);
  }
  bool operator==(const Device&) const = default;
};

inline void expect_together(const Tensor& tensor, const Device& there) {
  expect(Device(tensor) == there, "devices differ");
}

// How a tensor lies, as long as it lives. One look each: with many tensors calls through the stable ABI are what costs.
struct Look {
  const int64_t *sizes, *strides;
  int64_t rank, bytes;
  explicit Look(const Tensor& tensor) : strides(tensor.strides().data()), bytes(tensor.element_size()) {
    const auto own = tensor.sizes();
    sizes = own.data(), rank = int64_t(own.size());
  }
  bool operator==(const Look& other) const {
    return bytes == other.bytes && rank == other.rank && std::equal(sizes, sizes + rank, other.sizes) &&
           std::equal(strides, strides + rank, other.strides);
  }
};

inline Positions positions_of(const Tensor& keep, const std::optional<Tensor>& lengths) {
  Positions positions{};
  expect(keep.scalar_type() == ScalarType::Long, "keep must be int64");
  positions.keep = static_cast<const int64_t*>(keep.const_data_ptr());
  positions.keep_token = keep.stride(keep.dim() - 1), positions.count = keep.size(keep.dim() - 1);
  if (lengths) {
    const ScalarType type = lengths->scalar_type();
    expect(type == ScalarType::Long || type == ScalarType::Int, "lengths must be int64 or int32");
    expect(lengths->dim() == 1 && lengths->size(0) == keep.size(0), "lengths do not fit keep");
    expect_together(*lengths, Device(keep));
    positions.lengths = lengths->const_data_ptr(), positions.lengths_stride = lengths->stride(0);
    positions.long_lengths = type == ScalarType::Long;
  }
  return positions;
}

// What each dimension of a tensor is; -1: there is none.
struct Roles {
  int64_t token, batch, head, page;
  bool operator==(const Roles&) const = default;
};

// Dimensions that lie next to each other in source and result become one.
inline Form form_of(const Tensor& from, const Tensor& to, const Roles& roles, const Tensor& keep) {
  const int64_t bytes = from.element_size();
  Form form;
  form.width = bytes;
  form.from_token = from.stride(roles.token) * bytes, form.to_token = to.stride(roles.token) * bytes;
  form.page_stride = roles.page < 0 ? 0 : from.stride(roles.page) * bytes;
  const bool rows = keep.dim() > 1;
  Dim batch{rows ? keep.size(0) : 1, 0, 0, rows ? keep.stride(0) : 0};
  std::vector<Dim> dims;
  for (int64_t d = 0; d < to.dim(); ++d) {
    if (d == roles.token || d == roles.page) continue;
    const bool shared = from.size(d) == 1;  // by all rows of a batch
    Dim dim{to.size(d), shared ? 0 : from.stride(d) * bytes, to.stride(d) * bytes, 0};
    if (d == roles.batch) batch.from = dim.from, batch.to = dim.to;
    if (d == roles.batch || dim.size == 1) continue;
    if (d == roles.head && keep.dim() == 3) dim.keep = keep.stride(1);
    dims.push_back(dim);
  }
  const auto free = [](const Dim& dim) { return dim.keep == 0; };
  for (bool changed = true; changed;) {
    changed = false;
    for (size_t i = 0; i < dims.size() && !changed; ++i) {
      const Dim own = dims[i];
      if (!free(own)) continue;
      if (own.from == form.width && own.to == form.width) {  // part of the bytes of a token
        form.width *= own.size;
        dims.erase(dims.begin() + i), changed = true;
        continue;
      }
      for (Dim& other : dims) {  // `other` steps over all of `own`
        if (!free(other) || other.from != own.from * own.size || other.to != own.to * own.size) continue;
        if (&other == &dims[i]) continue;
        other = {other.size * own.size, own.from, own.to, 0};
        dims.erase(dims.begin() + i), changed = true;
        break;
      }
    }
  }
  dims.insert(dims.begin(), batch);
  expect(dims.size() <= kMostDims, "a tensor of too many dimensions that do not lie next to each other");
  form.rank = int(dims.size());
  std::copy(dims.begin(), dims.end(), form.dims);
  return form;
}

// Adds the jobs of tensors [from, to, roles], one after another.
class Adder {
 public:
  Adder(Plan& plan, const Tensor& keep) : plan_(plan), keep_(keep) {}

  void add(const Tensor& from, const Tensor& to, const Roles& roles) {
    const Look source(from), result = from.get() == to.get() ? source : Look(to);
    const Last own{source, result, roles};
    if (!last_ || !(own == *last_)) {
      form_ = place_of(form_of(from, to, roles, keep_));
      last_ = own;
    }
    if (form_ >= 0)
      plan_.jobs.push_back(
          {static_cast<const char*>(from.const_data_ptr()), static_cast<char*>(to.mutable_data_ptr()), form_});
  }

 private:
  struct Last {
    Look from, to;
    Roles roles;
    bool operator==(const Last&) const = default;
  };

  int place_of(const Form& form) {
    if (form.lanes() == 0 || form.width == 0 || plan_.positions.count == 0) return -1;  // nothing to move
    for (size_t i = 0; i < plan_.forms.size(); ++i)
      if (plan_.forms[i] == form) return int(i);
    plan_.forms.push_back(form);
    return int(plan_.forms.size()) - 1;
  }

  Plan& plan_;
  const Tensor& keep_;
  std::optional<Last> last_;  // most tensors are like the one before
  int form_ = -1;
};

// No tensor twice, and none that overlaps with itself.
inline void expect_apart(const std::vector<Tensor>& tensors) {
  std::vector<const void*> addresses;
  addresses.reserve(tensors.size());
  for (const Tensor& tensor : tensors) {
    const Look look(tensor);
    bool empty = false;
    for (int64_t d = 0; d < look.rank; ++d) {
      expect(look.strides[d] != 0 || look.sizes[d] <= 1, "an expanded tensor can not change in place");
      empty |= look.sizes[d] == 0;
    }
    if (!empty) addresses.push_back(tensor.const_data_ptr());
  }
  std::sort(addresses.begin(), addresses.end());
  expect(std::adjacent_find(addresses.begin(), addresses.end()) == addresses.end(), "a tensor is passed twice");
}

// Uninitialised [B, Hk, K, D] for every cache, each as its cache lies, in memory of its own.
inline std::vector<Tensor> new_caches(const std::vector<Tensor>& caches, int64_t K) {
  std::vector<Tensor> results;
  results.reserve(caches.size());
  const Device device(caches[0]);
  for (const Tensor& cache : caches) {
    const Look look(cache);
    const int64_t B = look.sizes[0], Hk = look.sizes[1], D = look.sizes[3];
    const bool heads_inside = Hk > 1 && look.sizes[2] > 1 && look.strides[1] < look.strides[2];
    const int64_t sizes[] = {B, Hk, K, D};
    const int64_t strides[] = {Hk * K * D, heads_inside ? D : K * D, heads_inside ? Hk * D : D, 1};
    int32_t type = 0;
    aoti_torch_get_dtype(cache.get(), &type);
    AtenTensorHandle result = nullptr;
    expect(aoti_torch_empty_strided(4, sizes, strides, type, device.type, device.index, &result) ==
               AOTI_TORCH_SUCCESS, "no memory for a result");
    results.emplace_back(result);
  }
  return results;
}

}  // namespace token_copy

inline Plan plan_compact(const std::vector<torch::stable::Tensor>& caches,
                         const std::vector<torch::stable::Tensor>& results, const torch::stable::Tensor& keep,
                         const std::optional<torch::stable::Tensor>& lengths, bool in_place) {
  Plan plan{{}, {}, token_copy::positions_of(keep, lengths), in_place};
  plan.jobs.reserve(caches.size());
  token_copy::Adder adder(plan, keep);
  for (size_t i = 0; i < caches.size(); ++i) adder.add(caches[i], results[i], {2, 0, 1, -1});
  return plan;
}

// Before results are made.
inline void expect_caches(const std::vector<torch::stable::Tensor>& caches, const torch::stable::Tensor& keep,
                          bool in_place) {
  token_copy::expect(!caches.empty() && (keep.dim() == 2 || keep.dim() == 3), "no caches, or the rank of keep");
  const int64_t rank = keep.dim(), B = keep.size(0), Hk = keep.size(1), K = keep.size(rank - 1);
  const token_copy::Device device(keep);
  for (const auto& cache : caches) {
    const auto sizes = cache.sizes();
    token_copy::expect(sizes.size() == 4 && sizes[0] == B, "caches do not fit keep");
    token_copy::expect(rank == 2 || sizes[1] == Hk, "heads do not fit keep");
    token_copy::expect(!in_place || K <= sizes[2], "more to keep than there is");
    token_copy::expect_together(cache, device);
  }
  if (in_place) token_copy::expect_apart(caches);
}

inline Plan plan_paged(const std::vector<torch::stable::Tensor>& pages, const torch::stable::Tensor& block_table,
                       const torch::stable::Tensor& keep, const torch::stable::Tensor& lengths, bool nhd) {
  using token_copy::expect;
  expect(!pages.empty() && (keep.dim() == 2 || keep.dim() == 3), "no pages, or the rank of keep");
  Plan plan{{}, {}, token_copy::positions_of(keep, lengths), true};
  Positions& positions = plan.positions;
  expect(block_table.dim() == 2 && block_table.size(0) == keep.size(0) &&
             block_table.scalar_type() == token_copy::ScalarType::Int, "block_table must be int32 [B, blocks]");
  const token_copy::Device device(keep);
  token_copy::expect_together(block_table, device);
  positions.table = static_cast<const int32_t*>(block_table.const_data_ptr());
  positions.table_batch = block_table.stride(0), positions.table_block = block_table.stride(1);
  token_copy::Adder adder(plan, keep);
  for (const auto& tensor : pages) {
    const int64_t rank = tensor.dim(), token = rank - (nhd ? 3 : 2), head = rank - (nhd ? 2 : 3);
    expect(rank == 4 || rank == 5, "pages must be of rank 4 or 5");
    const int64_t page = tensor.size(token);
    expect(page > 0 && (positions.page == 0 || positions.page == page), "pages of different sizes");
    expect(keep.dim() == 2 || tensor.size(head) == keep.size(1), "heads do not fit keep");
    token_copy::expect_together(tensor, device);
    positions.page = page;
    adder.add(tensor, tensor, {token, -1, head, 0});
  }
  token_copy::expect_apart(pages);
  return plan;
}

// dims: where the tokens of each tensor are; the batch, if keep has one, stands before.
inline Plan plan_gather(const std::vector<torch::stable::Tensor>& tensors, const torch::stable::Tensor& keep,
                        const std::vector<int64_t>& dims, std::vector<torch::stable::Tensor>& results) {
  using token_copy::expect;
  expect(!tensors.empty() && dims.size() == tensors.size() && (keep.dim() == 1 || keep.dim() == 2), "no tensors");
  Plan plan{{}, {}, token_copy::positions_of(keep, {}), false};
  const bool batched = keep.dim() == 2;
  const token_copy::Device device(keep);
  token_copy::Adder adder(plan, keep);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const auto& tensor = tensors[i];
    expect(batched <= dims[i] && dims[i] < tensor.dim(), "no such dimension");
    token_copy::expect_together(tensor, device);
    std::vector<int64_t> sizes(tensor.sizes().begin(), tensor.sizes().end());
    if (batched) {
      expect(sizes[dims[i] - 1] == 1 || sizes[dims[i] - 1] == keep.size(0), "batch sizes differ");
      sizes[dims[i] - 1] = keep.size(0);
    }
    sizes[dims[i]] = plan.positions.count;
    results.push_back(torch::stable::new_empty(tensor, sizes));
    adder.add(tensor, results.back(), {dims[i], batched ? dims[i] - 1 : -1, -1, -1});
  }
  return plan;
}

}  // namespace pruneops
