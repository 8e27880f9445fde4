// Packed deltas: the kept values of a drop without the dropped ones.
//
// Which elements were kept follows from the random stream (core/philox.h), so only their values are
// held, in order of the flat index. A table of offsets, also a function of the stream alone, says
// where the values of each tile of kPackTile elements begin: tiles can be read in any order.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "../combine/kernels.h"

namespace clf {

constexpr int64_t kPackTile = 2048;

struct Stream {
  uint64_t key = 0;
  uint32_t threshold = 0;  // a draw below it keeps its element
};

struct Tensor {
  DType dtype = DType::F32;
  const uint8_t* data = nullptr;  // null: there is none
};

// Kept values and where those of each tile begin: offsets[0 .. tiles], the last one their number.
struct Packed {
  DType dtype = DType::F32;
  const uint8_t* values = nullptr;
  int64_t kept = 0;
  const int64_t* offsets = nullptr;
  Stream stream;
};

inline int64_t pack_tiles(int64_t n) { return (n + kPackTile - 1) / kPackTile; }

// offsets[t] = number of kept elements before tile t; pack_tiles(n) + 1 entries.
void pack_offsets(Stream stream, int64_t n, int64_t* offsets, int threads);

// The kept elements of x, or of float32(x) - float32(base), rounded once to the dtype of the
// values. All functions throw std::invalid_argument where the offsets are not those of the stream.
void pack_values(const Tensor& x, const Tensor& base, const Packed& to, uint8_t* values, int64_t n,
                 int threads);

// out_i = kept_i ? (float32(value) [- float32(base_i)]) * factor : 0, rounded once.
void unpack_values(const Packed& from, const Tensor& base, float factor, DType out_dtype,
                   uint8_t* out, int64_t n, int threads);

// sum |d| and sum |d kept| of d = x, or of x - base rounded to `held` (F32: not rounded), in the
// order of kernels().l1: what the l1 rescale factor is made of.
std::pair<double, double> drop_sums(const Tensor& x, const Tensor& base, DType held, Stream stream,
                                    int64_t n, int threads);

// A run of whole chunks of kStatChunk elements (the last one may be short) from element `first` on,
// for one that packs a tensor piece by piece: the kept elements of x go to `values` (room for n),
// their number in each chunk to `counts`, and sum |d| and sum |d kept| of d = x - base are added to
// sums[0] and sums[1] in the order of an l1 rescale. Returns how many were kept.
int64_t pack_run(const Tensor& x, const Tensor& base, Stream stream, int64_t first, int64_t n,
                 uint8_t* values, int64_t* counts, double* sums, int threads);

// Where the elements lie that a stream keeps: bits of `n` elements from `first`, a multiple of 256,
// none set beyond; returns their number.
int64_t draw_bits(Stream stream, int64_t first, int64_t n, uint64_t* bits);

// values[p] goes to the place of the p-th set bit of `dense`; the rest stays as it is.
void scatter_bits(int64_t item, const uint8_t* values, const uint64_t* bits, int64_t n,
                  uint8_t* dense);

struct PackedTerm {
  Packed packed;  // offsets null: `values` are dense, one per element
  bool delta = false;  // the base is not subtracted
  float weight = 1.0f, scale = 1.0f, rescale = 1.0f;  // as in TermView
};

struct PackedRow {
  int64_t n = 0;
  Tensor base;
  float denominator = 1.0f;
  std::vector<PackedTerm> terms;
  DType out_dtype = DType::F32;
  uint8_t* out = nullptr;
};

struct PackedPolicy {
  bool difference = false;
  Elect elect = Elect::None;
  bool vote_weighted = true;
  Reduce reduce = Reduce::Sum;
  bool divide_by_weights = true;
  float lambda = 1.0f;
};

// The fused pass of combine/ over rows of dense and packed terms; a block is expanded at a time, in
// scratch that stays in cache.
void combine_packed(const std::vector<PackedRow>& rows, const PackedPolicy& policy, int threads);

}  // namespace clf
