// Types and constants that all CPU kernels share.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <new>

namespace pruneops {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// 16-bit float types as bits; simd.h converts them to float32.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
enum class Element { kFloat, kHalf, kBFloat16 };

inline int64_t size_of(Element type) { return type == Element::kFloat ? 4 : 2; }

constexpr int64_t kPad = 16;  // floats in the widest SIMD vector; rows are padded to a multiple

inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Uninitialised floats, aligned to a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<float*>(::operator new(size * sizeof(float), kCacheLine))) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, kCacheLine); }
  operator float*() const { return data_; }

 private:
  static constexpr std::align_val_t kCacheLine{64};
  float* data_;
};

// A key orders tokens by (score, index): ordered_bits(score) in the upper half, the index in the lower.
using Key = uint64_t;
constexpr Key kLastKey = ~Key{0};
constexpr uint32_t kOrderedInfinity = 0xff800000u, kTaken = ~0u;  // kTaken sorts after every score

// The bits of a score, mapped so that unsigned comparison sorts as the scores do; -0 equals +0.
inline uint32_t ordered_bits(float score) {
  const auto bits = std::bit_cast<uint32_t>(score + 0.0f);  // -0 becomes +0
  return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
}

inline Key make_key(uint32_t score_bits, int64_t index) { return Key{score_bits} << 32 | uint32_t(index); }

}  // namespace pruneops
