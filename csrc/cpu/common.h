// What the CPU kernels share outside their vector code.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>
#include <new>

namespace pruneops {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Element types as plain bits; simd.h widens them.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
enum class Element { kFloat, kHalf, kBFloat16 };

inline int64_t size_of(Element type) { return type == Element::kFloat ? 4 : 2; }

constexpr int64_t kPad = 16;  // widest vector, in floats

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Uninitialised floats, the first at the start of a cache line.
class Buffer {
 public:
  explicit Buffer(int64_t size) : data_(static_cast<float*>(::operator new(size * sizeof(float), kLine))) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { ::operator delete(data_, kLine); }
  operator float*() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  float* data_;
};

// Scores as unsigned integers that sort alike (-0 equals 0), and lexicographic (score, index) as one integer.
using Key = uint64_t;
constexpr Key kLastKey = ~Key{0};
constexpr uint32_t kOrderedInfinity = 0xff800000u, kTaken = ~0u;

inline uint32_t ordered(float score) {
  const auto bits = std::bit_cast<uint32_t>(score + 0.0f);  // -0 becomes +0
  return bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
}

inline Key make_key(uint32_t order, int64_t index) { return Key{order} << 32 | uint32_t(index); }

}  // namespace pruneops
