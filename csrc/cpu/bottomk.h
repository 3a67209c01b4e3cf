// The lowest keys of a stream.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/common.h"

namespace pruneops {

// Keeps the `wanted` lowest of the keys added; keys come in order of their indices. There is room for twice as many,
// and whenever it is full the upper half is dropped: linear time in whatever order scores come.
class Lowest {
 public:
  explicit Lowest(int64_t wanted) : wanted_(wanted), keys_(2 * wanted + 16) {}

  // Only a token whose order is below this can still be among them.
  uint32_t bound() const { return bound_; }

  void add(Key key) {
    keys_[count_++] = key;
    if (count_ == int64_t(keys_.size())) drop();
  }

  // Those found, lowest first; fewer than wanted if no more were added.
  const std::vector<Key>& sorted() {
    if (count_ > wanted_) drop();
    keys_.resize(count_);
    std::sort(keys_.begin(), keys_.end());
    return keys_;
  }

 private:
  void drop() {
    std::nth_element(keys_.begin(), keys_.begin() + (wanted_ - 1), keys_.begin() + count_);
    count_ = wanted_;
    bound_ = uint32_t(keys_[wanted_ - 1] >> 32);
  }

  const int64_t wanted_;
  std::vector<Key> keys_;
  int64_t count_ = 0;
  uint32_t bound_ = kTaken;
};

}  // namespace pruneops
