// Many tensors in one launch: what differs between them travels as the kernel's own argument.
//
// A row is one tensor of a model in its K versions (terms). The description of up to a few hundred
// rows fits the 32 KB that a kernel may take as an argument, so there is no table to copy to the
// device: nothing to allocate or to keep alive, no sync, and a CUDA graph keeps its own copy.
#pragma once

#include <cstdint>
#include <vector>

#include "../core/dtypes.h"
#include "launch.h"

namespace clf {

constexpr int kMaxTermsOnDevice = 32;  // versions of one row
constexpr int64_t kPackTile = 2048;    // elements per entry of a packed term's offsets

struct DeviceRow {
  const uint8_t* base;  // null without differences
  uint8_t* out;
  int64_t n;
  int64_t first;  // tiles or elements of the rows before, within the batch
  float denominator;
  uint8_t base_dtype, out_dtype;
  uint8_t aligned;  // every pointer is divisible by 16
  uint8_t unused;
};

enum TermFlags : uint8_t { kSparse = 1, kPacked = 2, kDelta = 4 };

struct DeviceTerm {
  const uint8_t* x;
  const int64_t* offsets;  // packed: kept elements before each tile
  int64_t values;          // packed: how many there are, never to be passed
  uint64_t key;
  uint32_t keep;   // drop: T below 2^32; kSparse is off where everything is kept
  float weight;    // for the divisor
  float scale;     // weight times rescale factor
  float rescale;   // for unweighted votes
  int32_t entry;   // number of this term over all rows of the call
  uint8_t dtype;
  uint8_t flags;
  uint16_t unused;
};

constexpr int kRowsPerBatch = 160;
constexpr int kTermsPerBatch = 448;

struct Batch {
  int32_t rows, models;
  int64_t total;  // tiles or elements of all rows
  DeviceRow row[kRowsPerBatch];
  DeviceTerm term[kTermsPerBatch];
};
static_assert(sizeof(DeviceRow) == 40 && sizeof(DeviceTerm) == 56, "no holes");
static_assert(sizeof(Batch) <= 32000, "a kernel takes at most 32764 bytes of arguments");

// What a call hands over; one entry per row, or per term in row-major order. Addresses are
// integers because they come from Python.
struct Rows {
  int models = 0;
  std::vector<int64_t> n;
  std::vector<uintptr_t> base;  // empty without differences
  std::vector<int> base_dtype;
  std::vector<uintptr_t> out;  // empty where nothing is written
  std::vector<int> out_dtype;
  std::vector<float> denominator;
  std::vector<uintptr_t> x;
  std::vector<int> dtype;
  std::vector<float> weight, scale, rescale;
  std::vector<uint64_t> key, keep;  // keep: T in [0, 2^32]
  std::vector<uintptr_t> offsets;   // 0: dense
  std::vector<int64_t> values;      // of packed terms
  std::vector<int> kind;            // packed: 1 if the values are deltas

  int64_t rows() const { return int64_t(n.size()); }
};

enum class Unit { Tiles, Elements };

// Cuts a call into batches; `first` counts tiles of `tile` elements (or elements) within a batch.
class Batches {
 public:
  Batches(const Rows& rows, Unit unit, int64_t tile) : rows_(rows), unit_(unit), tile_(tile) {
    const size_t r = rows.n.size(), e = r * size_t(rows.models);
    const auto fits = [](size_t have, size_t want) { return have == 0 || have == want; };
    if (rows.models < 1 || rows.models > kMaxTermsOnDevice || rows.x.size() != e ||
        rows.dtype.size() != e || !fits(rows.base.size(), r) ||
        rows.base_dtype.size() != rows.base.size() || !fits(rows.out.size(), r) ||
        rows.out_dtype.size() != rows.out.size() || !fits(rows.denominator.size(), r) ||
        !fits(rows.weight.size(), e) || !fits(rows.scale.size(), e) ||
        !fits(rows.rescale.size(), e) || !fits(rows.key.size(), e) ||
        rows.keep.size() != rows.key.size() || !fits(rows.offsets.size(), e) ||
        !fits(rows.kind.size(), e) || rows.values.size() != rows.offsets.size())
      throw std::invalid_argument("rows: lists of different lengths");
  }

  // The next batch, without empty rows; false at the end.
  bool next(Batch& b) {
    b.rows = 0;
    b.models = rows_.models;
    b.total = 0;
    for (; at_ < rows_.rows(); ++at_) {
      if (rows_.n[size_t(at_)] == 0) continue;
      if (b.rows == kRowsPerBatch || (b.rows + 1) * rows_.models > kTermsPerBatch) break;
      const int64_t units =
          unit_ == Unit::Elements ? rows_.n[size_t(at_)] : (rows_.n[size_t(at_)] + tile_ - 1) / tile_;
      if (b.rows > 0 && unit_ == Unit::Tiles && b.total + units > kMostTiles) break;
      fill(b, at_);
      b.row[b.rows].first = b.total;
      b.total += units;
      ++b.rows;
    }
    return b.rows > 0;
  }

 private:
  static constexpr int64_t kMostTiles = 0x7fffffff;

  void fill(Batch& b, int64_t index) const {
    const size_t i = size_t(index);
    DeviceRow& row = b.row[b.rows];
    row = DeviceRow{};
    row.n = rows_.n[i];
    uintptr_t bits = 0;
    if (!rows_.base.empty()) {
      row.base = reinterpret_cast<const uint8_t*>(rows_.base[i]);
      row.base_dtype = uint8_t(rows_.base_dtype[i]);
      bits |= rows_.base[i];
    }
    if (!rows_.out.empty()) {
      row.out = reinterpret_cast<uint8_t*>(rows_.out[i]);
      row.out_dtype = uint8_t(rows_.out_dtype[i]);
      bits |= rows_.out[i];
    }
    row.denominator = rows_.denominator.empty() ? 1.0f : rows_.denominator[i];
    for (int k = 0; k < rows_.models; ++k) {
      const size_t e = i * size_t(rows_.models) + size_t(k);
      DeviceTerm& t = b.term[b.rows * rows_.models + k];
      t = DeviceTerm{};
      t.x = reinterpret_cast<const uint8_t*>(rows_.x[e]);
      t.dtype = uint8_t(rows_.dtype[e]);
      t.weight = rows_.weight.empty() ? 1.0f : rows_.weight[e];
      t.scale = rows_.scale.empty() ? 1.0f : rows_.scale[e];
      t.rescale = rows_.rescale.empty() ? 1.0f : rows_.rescale[e];
      t.entry = int32_t(e);
      if (!rows_.key.empty() && rows_.keep[e] >> 32 == 0) {
        t.flags |= kSparse;
        t.key = rows_.key[e];
        t.keep = uint32_t(rows_.keep[e]);
      }
      if (!rows_.offsets.empty() && rows_.offsets[e] != 0) {
        t.flags |= kPacked;
        t.offsets = reinterpret_cast<const int64_t*>(rows_.offsets[e]);
        t.values = rows_.values[e];
        if (!rows_.kind.empty() && rows_.kind[e] == 1) t.flags |= kDelta;
      } else {
        bits |= rows_.x[e];
      }
    }
    row.aligned = bits % 16 == 0;
  }

  const Rows& rows_;
  const Unit unit_;
  const int64_t tile_;
  int64_t at_ = 0;
};

// The row that holds tile (or element) `at` of the batch.
__device__ __forceinline__ int find_row(const Batch& b, int64_t at) {
  int low = 0, high = b.rows - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (b.row[middle].first <= at)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// ---- eight elements at a time -------------------------------------------------------------------

struct Raw {  // as loaded: four words of two-byte elements, or all eight of float32
  uint32_t w[8];
};

__device__ __forceinline__ uint4 load16(const uint8_t* p) {
  return *reinterpret_cast<const uint4*>(p);
}

// Elements i .. i + 7 of a tensor of n; past the end zeros.
template <bool kWide>
__device__ __forceinline__ void load8(Raw& r, const uint8_t* p, int dtype, int64_t i, int64_t n,
                                      bool whole) {
  const bool wide = kWide && DType(dtype) == DType::F32;
  if (whole) {
    const uint4 a = load16(p + (wide ? 4 : 2) * i);
    r.w[0] = a.x, r.w[1] = a.y, r.w[2] = a.z, r.w[3] = a.w;
    if (kWide && wide) {
      const uint4 b = load16(p + 4 * i + 16);
      r.w[4] = b.x, r.w[5] = b.y, r.w[6] = b.z, r.w[7] = b.w;
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    if (kWide && wide) {
      r.w[j] = i + j < n ? reinterpret_cast<const uint32_t*>(p)[i + j] : 0u;
    } else {
      const uint32_t h = i + j < n ? reinterpret_cast<const uint16_t*>(p)[i + j] : 0u;
      if (j % 2 == 0)
        r.w[j / 2] = h;
      else
        r.w[j / 2] |= h << 16;
    }
  }
}

__device__ __forceinline__ float half_to_f32(uint32_t h) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(uint16_t(h)));
#else
  return f16_to_f32(uint16_t(h));
#endif
}

template <bool kWide>
__device__ __forceinline__ void widen8(const Raw& r, int dtype, float (&v)[8]) {
  if (DType(dtype) == DType::BF16) {
#pragma unroll
    for (int j = 0; j < 8; ++j)
      v[j] = bits_f32(j % 2 ? r.w[j / 2] & 0xffff0000u : r.w[j / 2] << 16);
  } else if (!kWide || DType(dtype) == DType::F16) {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = half_to_f32(r.w[j / 2] >> (j % 2 * 16) & 0xffffu);
  } else {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = bits_f32(r.w[j]);
  }
}

// One element, of any dtype.
__device__ __forceinline__ float element(const uint8_t* p, int dtype, int64_t i) {
  if (DType(dtype) == DType::F32) return reinterpret_cast<const float*>(p)[i];
  const uint16_t h = reinterpret_cast<const uint16_t*>(p)[i];
  return DType(dtype) == DType::BF16 ? bf16_to_f32(h) : half_to_f32(h);
}

// The bits of float32, with the one NaN that all backends store.
__device__ __forceinline__ uint32_t stored_f32(float x) { return x != x ? 0x7fc00000u : f32_bits(x); }

__device__ __forceinline__ uint16_t f32_to_half(float x) {
#ifdef __CUDA_ARCH__
  return x != x ? uint16_t(0x7e00u) : __half_as_ushort(__float2half_rn(x));
#else
  return f32_to_f16(x);
#endif
}

// Rounded once, to nearest even.
__device__ __forceinline__ void store8(uint8_t* p, int dtype, int64_t i, int64_t n, bool whole,
                                       const float (&v)[8]) {
  if (DType(dtype) == DType::F32) {
    uint32_t* out = reinterpret_cast<uint32_t*>(p) + i;
    if (whole) {
      uint4 a{stored_f32(v[0]), stored_f32(v[1]), stored_f32(v[2]), stored_f32(v[3])};
      uint4 b{stored_f32(v[4]), stored_f32(v[5]), stored_f32(v[6]), stored_f32(v[7])};
      reinterpret_cast<uint4*>(out)[0] = a;
      reinterpret_cast<uint4*>(out)[1] = b;
      return;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (i + j < n) out[j] = stored_f32(v[j]);
    return;
  }
  uint32_t w[4];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    const uint32_t h = DType(dtype) == DType::BF16 ? f32_to_bf16(v[j]) : f32_to_half(v[j]);
    if (j % 2 == 0)
      w[j / 2] = h;
    else
      w[j / 2] |= h << 16;
  }
  uint16_t* out = reinterpret_cast<uint16_t*>(p) + i;
  if (whole) {
    *reinterpret_cast<uint4*>(out) = uint4{w[0], w[1], w[2], w[3]};
    return;
  }
#pragma unroll
  for (int j = 0; j < 8; ++j)
    if (i + j < n) out[j] = uint16_t(w[j / 2] >> (j % 2 * 16));
}

}  // namespace clf
