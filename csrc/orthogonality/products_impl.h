// Compiled once per instruction set; everything here has internal linkage.
#include <cstring>

#include "products.h"

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#endif

namespace clf {
namespace {

constexpr int64_t kLanes = 16;
// Sums that a tile keeps in registers, in each direction.
#if defined(__AVX512F__)
constexpr int kTile = 4;
#else
constexpr int kTile = 2;
#endif
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = int(kLanes) / kWidth;
typedef float Part __attribute__((vector_size(kWidth * sizeof(float))));

// Sixteen lanes in registers of the width that there is.
struct Vector {
  Part part[kParts];
};

inline Vector operator+(const Vector& x, const Vector& y) {
  Vector z;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) z.part[i] = x.part[i] + y.part[i];
  return z;
}

inline Vector operator*(const Vector& x, const Vector& y) {
  Vector z;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) z.part[i] = x.part[i] * y.part[i];
  return z;
}

inline Vector operator*(const Vector& x, float y) {
  Vector z;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) z.part[i] = x.part[i] * y;
  return z;
}

inline Vector load(const float* p) {
  Vector v;
#pragma GCC unroll 4
  for (int i = 0; i < kParts; ++i) std::memcpy(&v.part[i], p + i * kWidth, sizeof(Part));
  return v;
}

inline Vector load_part(const float* p, int64_t n) {
  float lanes[kLanes] = {};
  std::memcpy(lanes, p, size_t(n) * sizeof(float));
  return load(lanes);
}

inline void store(float* p, const Vector& v, int64_t n = kLanes) {
  std::memcpy(p, &v, size_t(n) * sizeof(float));
}

inline float sum(const Vector& v) {
  float lanes[kLanes], total = 0.0f;
  store(lanes, v);
  for (const float lane : lanes) total = total + lane;
  return total;
}

// Kr rows of A against Kc rows of P.
template <int Kr, int Kc>
void products_tile(const OrthogonalPair& x, int64_t i, int64_t j, float* s) {
  const int64_t d = x.d, whole = d / kLanes * kLanes;
  const float* const a = x.a + i * d;
  const float* const p = x.p + j * d;
  Vector acc[Kr][Kc] = {};
  for (int64_t c = 0; c < whole; c += kLanes) {
    Vector right[Kc];
    for (int l = 0; l < Kc; ++l) right[l] = load(p + l * d + c);
    for (int k = 0; k < Kr; ++k) {
      const Vector left = load(a + k * d + c);
      for (int l = 0; l < Kc; ++l) acc[k][l] = acc[k][l] + left * right[l];
    }
  }
  if (whole < d) {
    for (int k = 0; k < Kr; ++k)
      for (int l = 0; l < Kc; ++l)
        acc[k][l] = acc[k][l] + load_part(a + k * d + whole, d - whole) *
                                    load_part(p + l * d + whole, d - whole);
  }
  for (int k = 0; k < Kr; ++k)
    for (int l = 0; l < Kc; ++l) s[(i + k) * x.past + j + l] = sum(acc[k][l]);
}

template <int Kr>
void products_rows(const OrthogonalPair& x, int64_t i, float* s) {
  int64_t j = 0;
  for (; j + kTile <= x.past; j += kTile) products_tile<Kr, kTile>(x, i, j, s);
  for (; j < x.past; ++j) products_tile<Kr, 1>(x, i, j, s);
}

void products(const OrthogonalPair& x, float* s) {
  int64_t i = 0;
  for (; i + kTile <= x.r; i += kTile) products_rows<kTile>(x, i, s);
  for (; i < x.r; ++i) products_rows<1>(x, i, s);
}

// Kr rows of the gradient, Kc runs of columns: neighbours, since rows a power of two apart would
// meet in the same places of the cache.
template <int Kr, int Kc>
void apply_tile(const OrthogonalPair& x, int64_t i, int64_t c, const float* f) {
  Vector acc[Kr][Kc] = {};
  if (!x.first)
    for (int k = 0; k < Kr; ++k)
      for (int l = 0; l < Kc; ++l) acc[k][l] = load(x.out + (i + k) * x.d + c + l * kLanes);
  for (int64_t j = 0; j < x.past; ++j) {
    Vector p[Kc];
    for (int l = 0; l < Kc; ++l) p[l] = load(x.p + j * x.d + c + l * kLanes);
    for (int k = 0; k < Kr; ++k) {
      const float factor = f[(i + k) * x.past + j];
      for (int l = 0; l < Kc; ++l) acc[k][l] = acc[k][l] + p[l] * factor;
    }
  }
  for (int k = 0; k < Kr; ++k)
    for (int l = 0; l < Kc; ++l)
      store(x.out + (i + k) * x.d + c + l * kLanes, acc[k][l]);
}

// The last columns of one row, fewer than a run.
void apply_rest(const OrthogonalPair& x, int64_t i, int64_t c, const float* f) {
  const int64_t n = x.d - c;
  Vector acc = {};
  if (!x.first) acc = load_part(x.out + i * x.d + c, n);
  for (int64_t j = 0; j < x.past; ++j)
    acc = acc + load_part(x.p + j * x.d + c, n) * f[i * x.past + j];
  store(x.out + i * x.d + c, acc, n);
}

template <int Kc>
void apply_columns(const OrthogonalPair& x, int64_t c, const float* f) {
  int64_t i = 0;
  for (; i + kTile <= x.r; i += kTile) apply_tile<kTile, Kc>(x, i, c, f);
  for (; i < x.r; ++i) apply_tile<1, Kc>(x, i, c, f);
}

void apply(const OrthogonalPair& x, const float* f) {
  if (x.out == nullptr) return;
  int64_t c = 0;
  for (; c + kTile * kLanes <= x.d; c += kTile * kLanes) apply_columns<kTile>(x, c, f);
  for (; c + kLanes <= x.d; c += kLanes) apply_columns<1>(x, c, f);
  if (c < x.d)
    for (int64_t i = 0; i < x.r; ++i) apply_rest(x, i, c, f);
}

}  // namespace
}  // namespace clf
