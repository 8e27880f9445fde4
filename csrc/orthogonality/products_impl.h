// Compiled once per instruction set; everything here has internal linkage.
#include <cstring>

#include "products.h"

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#endif

namespace clf {
namespace {

constexpr int64_t kLanes = 16;
typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

inline Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vector load_part(const float* p, int64_t n) {
  Vector v = {};
  std::memcpy(&v, p, size_t(n) * sizeof(float));
  return v;
}

inline float sum(const Vector& v) {
  float total = 0.0f;
  for (int64_t i = 0; i < kLanes; ++i) total = total + v[i];
  return total;
}

// Kr rows of A against Kc rows of P.
template <int Kr, int Kc>
void products_tile(const OrthogonalPair& x, int64_t i, int64_t j, float* s) {
  Vector acc[Kr][Kc] = {};
  const auto step = [&](int64_t c, auto&& read) {
    Vector a[Kr], p[Kc];
    for (int k = 0; k < Kr; ++k) a[k] = read(x.a + (i + k) * x.d + c);
    for (int k = 0; k < Kc; ++k) p[k] = read(x.p + (j + k) * x.d + c);
    for (int k = 0; k < Kr; ++k)
      for (int l = 0; l < Kc; ++l) acc[k][l] = acc[k][l] + a[k] * p[l];
  };
  int64_t c = 0;
  for (; c + kLanes <= x.d; c += kLanes) step(c, load);
  if (c < x.d) step(c, [&](const float* p) { return load_part(p, x.d - c); });
  for (int k = 0; k < Kr; ++k)
    for (int l = 0; l < Kc; ++l) s[(i + k) * x.past + j + l] = sum(acc[k][l]);
}

template <int Kr>
void products_rows(const OrthogonalPair& x, int64_t i, float* s) {
  int64_t j = 0;
  for (; j + 4 <= x.past; j += 4) products_tile<Kr, 4>(x, i, j, s);
  for (; j < x.past; ++j) products_tile<Kr, 1>(x, i, j, s);
}

void products(const OrthogonalPair& x, float* s) {
  int64_t i = 0;
  for (; i + 2 <= x.r; i += 2) products_rows<2>(x, i, s);
  for (; i < x.r; ++i) products_rows<1>(x, i, s);
}

// Kr rows of the gradient, one run of columns.
template <int Kr>
void apply_tile(const OrthogonalPair& x, int64_t i, int64_t c, int64_t n, const float* f) {
  Vector acc[Kr] = {};
  if (!x.first)
    for (int k = 0; k < Kr; ++k) acc[k] = load_part(x.out + (i + k) * x.d + c, n);
  for (int64_t j = 0; j < x.past; ++j) {
    const float* from = x.p + j * x.d + c;
    const Vector p = n == kLanes ? load(from) : load_part(from, n);
    for (int k = 0; k < Kr; ++k) acc[k] = acc[k] + p * f[(i + k) * x.past + j];
  }
  for (int k = 0; k < Kr; ++k)
    std::memcpy(x.out + (i + k) * x.d + c, &acc[k], size_t(n) * sizeof(float));
}

void apply(const OrthogonalPair& x, const float* f) {
  if (x.out == nullptr) return;
  for (int64_t c = 0; c < x.d; c += kLanes) {
    const int64_t n = x.d - c < kLanes ? x.d - c : kLanes;
    int64_t i = 0;
    for (; i + 8 <= x.r; i += 8) apply_tile<8>(x, i, c, n, f);
    for (; i < x.r; ++i) apply_tile<1>(x, i, c, n, f);
  }
}

}  // namespace
}  // namespace clf
