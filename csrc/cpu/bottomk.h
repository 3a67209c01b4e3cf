// The k smallest keys of a stream.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/common.h"

namespace pruneops {

// Keeps the k smallest keys added; keys are added in index order. The buffer holds 2 k + 16 keys; whenever it is full,
// nth_element drops all but k. Linear time for scores in any order.
class BottomK {
 public:
  explicit BottomK(int64_t k) : k_(k), keys_(2 * k + 16) {}

  // Only keys with score bits below the bound can still be among the k smallest.
  uint32_t bound() const { return bound_; }

  void add(Key key) {
    keys_[count_++] = key;
    if (count_ == int64_t(keys_.size())) compact();
  }

  // The k smallest keys, ascending; fewer than k if fewer were added.
  const std::vector<Key>& sorted() {
    if (count_ > k_) compact();
    keys_.resize(count_);
    std::sort(keys_.begin(), keys_.end());
    return keys_;
  }

 private:
  void compact() {
    std::nth_element(keys_.begin(), keys_.begin() + (k_ - 1), keys_.begin() + count_);
    count_ = k_;
    bound_ = uint32_t(keys_[k_ - 1] >> 32);
  }

  const int64_t k_;
  std::vector<Key> keys_;
  int64_t count_ = 0;
  uint32_t bound_ = kTaken;
};

}  // namespace pruneops
