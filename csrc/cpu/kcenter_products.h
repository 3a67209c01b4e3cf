// The dot products of kcenter behind one interface: kcenter.cpp takes the steps, an implementation per element type and
// instruction set computes. Within one implementation a dot product of two tokens has the same bits wherever it is
// computed, so center_dots and column_dots agree, and a squared norm has those of square().
#pragma once

#include <cstdint>
#include <memory>

#include "cpu/tokens.h"

namespace pruneops {

// Tokens index[0..count), or begin..begin + count if index is null.
struct Rows {
  const int64_t* index;
  int64_t begin, count;

  int64_t operator[](int64_t r) const { return index ? index[r] : begin + r; }
};

class KcenterProducts {
 public:
  // Sizes of an implementation: tokens of a register tile and of one call of center_dots, centers stored together,
  // bytes of a stored center, floats of scratch for center_dots.
  struct Sizes {
    int64_t tile_rows, block_rows, center_group, center_bytes, scratch;
  };

  explicit KcenterProducts(Sizes sizes) : sizes(sizes) {}
  virtual ~KcenterProducts() = default;

  // Squared norm of a token.
  virtual float square(int64_t token) = 0;
  // Copies tokens into places at..at + count of the stored centers; at is a multiple of center_group.
  virtual void store_centers(const int64_t* tokens, int64_t count, int64_t at) = 0;
  // dots[r * stride + c] = rows[r] . center (first + c), first a multiple of center_group; squares[r] unless null.
  // dots and squares have room for a multiple of tile_rows rows, stride is one of kPad.
  virtual void center_dots(const Rows& rows, int64_t first, int64_t count, float* dots, int64_t stride, float* squares,
                           float* scratch) = 0;
  // Copies a token into place `slot` of the candidates.
  virtual void gather(int64_t slot, int64_t token) = 0;
  // Chooses the candidates that are the columns of column_dots.
  virtual void set_columns(const int64_t* slots, int64_t count) = 0;
  // dots[i * stride + c] = candidate i . column c, for candidates begin..end; begin is a multiple of tile_rows.
  virtual void column_dots(int64_t begin, int64_t end, float* dots, int64_t stride) = 0;

  const Sizes sizes;
};

// For bfloat16 tokens on the matrix or bfloat16 units of this machine; null if it has none.
std::unique_ptr<KcenterProducts> bf16_products(const Tokens& x, int64_t candidates);

}  // namespace pruneops
