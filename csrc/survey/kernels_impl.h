// Compiled once per instruction set, after a simd_*.h; everything here has internal linkage.
#pragma once

#include "../core/lanes.h"
#include "kernels.h"

namespace clf {
namespace {

// ---------------------------------------------------------------- eight float64 lanes

#if defined(__AVX512F__)
constexpr int kGroup = 4;  // vectors whose products are summed in registers at a time
struct D8 {
  __m512d v;
};
inline D8 zero8() { return D8{_mm512_setzero_pd()}; }
inline D8 widen8(const float* p) { return D8{_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
inline D8 load8(const double* p) { return D8{_mm512_loadu_pd(p)}; }
inline void store8(double* p, D8 x) { _mm512_storeu_pd(p, x.v); }
inline D8 add8(D8 x, D8 y) { return D8{_mm512_add_pd(x.v, y.v)}; }
// The product is exact, so that fusing it with the sum changes nothing.
inline D8 add_product8(D8 s, D8 x, D8 y) { return D8{_mm512_fmadd_pd(x.v, y.v, s.v)}; }
#elif defined(__AVX2__)
constexpr int kGroup = 2;
struct D8 {
  __m256d a, b;
};
inline D8 zero8() { return D8{_mm256_setzero_pd(), _mm256_setzero_pd()}; }
inline D8 widen8(const float* p) {
  return D8{_mm256_cvtps_pd(_mm_loadu_ps(p)), _mm256_cvtps_pd(_mm_loadu_ps(p + 4))};
}
inline D8 load8(const double* p) { return D8{_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
inline void store8(double* p, D8 x) {
  _mm256_storeu_pd(p, x.a);
  _mm256_storeu_pd(p + 4, x.b);
}
inline D8 add8(D8 x, D8 y) { return D8{_mm256_add_pd(x.a, y.a), _mm256_add_pd(x.b, y.b)}; }
inline D8 add_product8(D8 s, D8 x, D8 y) {
  return D8{_mm256_add_pd(s.a, _mm256_mul_pd(x.a, y.a)),
            _mm256_add_pd(s.b, _mm256_mul_pd(x.b, y.b))};
}
#else
constexpr int kGroup = 2;
struct D8 {
  double v[8];
};
#define CLF_LANES8 for (int i = 0; i < 8; ++i)
inline D8 zero8() { return D8{{0, 0, 0, 0, 0, 0, 0, 0}}; }
inline D8 widen8(const float* p) {
  D8 x;
  CLF_LANES8 x.v[i] = p[i];
  return x;
}
inline D8 load8(const double* p) {
  D8 x;
  CLF_LANES8 x.v[i] = p[i];
  return x;
}
inline void store8(double* p, D8 x) { CLF_LANES8 p[i] = x.v[i]; }
inline D8 add8(D8 x, D8 y) {
  CLF_LANES8 x.v[i] += y.v[i];
  return x;
}
inline D8 add_product8(D8 s, D8 x, D8 y) {
  CLF_LANES8 s.v[i] += x.v[i] * y.v[i];
  return s;
}
#undef CLF_LANES8
#endif

inline double sum8(D8 x) {
  double v[8], s = 0.0;
  store8(v, x);
  for (const double y : v) s += y;
  return s;
}

// ---------------------------------------------------------------- magnitudes

#if defined(__AVX512F__)
inline F magnitude(F x) { return _mm512_abs_ps(x); }
#elif defined(__AVX2__)
inline F magnitude(F x) { return F{cf(code1(x.a)), cf(code1(x.b))}; }
#else
inline F magnitude(F x) {
  for (int i = 0; i < 16; ++i) x.v[i] = bits_f32(f32_bits(x.v[i]) & 0x7fffffffu);
  return x;
}
#endif

struct Largest {
#if defined(__AVX512F__)
  __m512i v = _mm512_setzero_si512();
  void take(F x) { v = _mm512_max_epu32(v, clf::code(x)); }
#elif defined(__AVX2__)
  __m256i v = _mm256_setzero_si256();
  void take(F x) { v = _mm256_max_epu32(v, _mm256_max_epu32(code1(x.a), code1(x.b))); }
#else
  uint32_t v[16] = {};
  void take(F x) {
    for (int i = 0; i < 16; ++i) {
      const uint32_t c = f32_bits(x.v[i]) & 0x7fffffffu;
      if (c > v[i]) v[i] = c;
    }
  }
#endif
  uint32_t code() const {
    uint32_t codes[sizeof v / 4], largest = 0;
    std::memcpy(codes, &v, sizeof v);
    for (const uint32_t c : codes)
      if (c > largest) largest = c;
    return largest;
  }
};

// ---------------------------------------------------------------- reading

// Sixteen sums of magnitudes of one piece, in float32: at most kPiece / 16 of them each.
struct Magnitudes {
  F v = set1(0.0f);
  void take(F x) { v = add(v, magnitude(x)); }
  double sum() const {
    float lanes[16];
    double s = 0.0;
    storef(lanes, v);
    for (const float x : lanes) s += double(x);
    return s;
  }
};

constexpr uint32_t kInfinity = 0x7f800000u;

// The base as float32. What is not finite stays so, until the models were taken.
template <DType T, bool Finite>
bool take_base(const uint8_t* x, int64_t n, float* out, uint32_t* largest, int64_t* nonfinites,
               double* absolute) {
  Largest most;
  Magnitudes sum;
  int64_t bad = 0;
  for_lanes<T, kPiece>(x, n, [&](int64_t i, F v) {
    storef(out + i, v);
    if (!Finite) {
      const M m = nonfinite(v);
      bad += popcount(m);
      v = keep(mask_not(m), v);
    }
    most.take(v);
    sum.take(v);
  });
  *largest = most.code();
  if (Finite && *largest >= kInfinity) return false;
  *nonfinites += bad;
  *absolute += sum.sum();
  return true;
}

struct ModelSums {
  uint16_t *up, *down;
  uint32_t *largest, *largest_delta;
  int64_t* nonfinites;
  double* absolute;
};

// False, with nothing counted, if all was said to be finite and is not.
template <DType T, bool Finite>
bool take_model(const uint8_t* x, const float* base, int64_t n, float* out, const ModelSums& s) {
  Largest most, most_delta;
  Magnitudes sum;
  int64_t bad = 0;
  for_lanes<T, kPiece>(x, n, [&](int64_t i, F v) {
    const F b = loadf(base + i);
    F d = sub(v, b);
    if (!Finite) {
      // the model's own, and differences that overflow; not those of the base
      const M m = nonfinite(d), own = nonfinite(v);
      bad += popcount(mask_or(own, mask_and(m, mask_not(nonfinite(b)))));
      v = keep(mask_not(own), v);
      d = keep(mask_not(m), d);
    }
    most.take(v);
    most_delta.take(d);
    sum.take(d);
    storef(out + i, d);
    s.up[i / 16] = uint16_t(to_bits(gt0(d)));
    s.down[i / 16] = uint16_t(to_bits(lt0(d)));
  });
  *s.largest = most.code();
  *s.largest_delta = most_delta.code();
  if (Finite && (*s.largest >= kInfinity || *s.largest_delta >= kInfinity)) return false;
  *s.nonfinites += bad;
  *s.absolute += sum.sum();
  return true;
}

// ---------------------------------------------------------------- products

// Products of R vectors from `i` on with C vectors from `j` on; a triangle where they are the same.
template <int R, int C, bool Triangle>
inline void products_of(const float* values, int64_t padded, int i, int j, int n, SurveySums& s) {
  D8 sums[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[r][c] = zero8();
  }
  const float* const left = values + i * kPiece;
  const float* const right = values + j * kPiece;
  for (int64_t e = 0; e < padded; e += 8) {
    D8 x[R], y[C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = widen8(left + r * kPiece + e);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) y[c] = Triangle ? x[c < R ? c : 0] : widen8(right + c * kPiece + e);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = Triangle ? r : 0; c < C; ++c) sums[r][c] = add_product8(sums[r][c], x[r], y[c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    if (Triangle) s.squares[i + r] = sum8(sums[r][r]);
#pragma GCC unroll 4
    for (int c = Triangle ? r : 0; c < C; ++c) {
      double* const p = s.products + pair_index(i + r, j + c, n) * kSumLanes;
      store8(p, add8(load8(p), sums[r][c]));
    }
  }
}

template <int R>
void products_row(const float* values, int64_t padded, int i, int n, SurveySums& s) {
  products_of<R, R, true>(values, padded, i, i, n, s);
  int j = i + R;
  for (; j + kGroup <= n; j += kGroup)
    products_of<R, kGroup, false>(values, padded, i, j, n, s);
  for (; j < n; ++j) products_of<R, 1, false>(values, padded, i, j, n, s);
}

void products(const float* values, int64_t padded, int n, SurveySums& s) {
  int i = 0;
  for (; i + kGroup <= n; i += kGroup) products_row<kGroup>(values, padded, i, n, s);
  switch (n - i) {
    case 3:
      products_row<3>(values, padded, i, n, s);
      break;
    case 2:
      products_row<2>(values, padded, i, n, s);
      break;
    case 1:
      products_row<1>(values, padded, i, n, s);
      break;
    default:
      break;
  }
}

// ---------------------------------------------------------------- signs and magnitudes

inline uint64_t word(const uint16_t* bits) {
  uint64_t w;
  std::memcpy(&w, bits, 8);
  return w;
}

// K: the number of models where it is known, so that the counts stay in registers; 0: any.
template <int K>
void count_signs(const uint16_t* signs, int64_t words, int any, SurveySums& s) {
  const int models = K ? K : any;
  constexpr int kPairs = K * (K - 1) / 2;
  int64_t changed[K ? K : 1] = {}, both[kPairs ? kPairs : 1] = {}, unlike[kPairs ? kPairs : 1] = {};
  int64_t* const to_changed = K ? changed : s.changed;
  int64_t* const to_both = K ? both : s.overlap;
  int64_t* const to_unlike = K ? unlike : s.conflicts;
  int64_t shared = 0, disputed = 0;
  for (int64_t w = 0; w < words; ++w) {
    const uint16_t* const at = signs + 4 * w;
    uint64_t once = 0, twice = 0, ups = 0, downs = 0;
    int pair = 0;
#pragma GCC unroll 4
    for (int k = 0; k < models; ++k) {
      const uint64_t up = word(at + 2 * k * kPieceSigns);
      const uint64_t down = word(at + (2 * k + 1) * kPieceSigns);
      const uint64_t moved = up | down;
      to_changed[k] += __builtin_popcountll(moved);
      twice |= once & moved;
      once |= moved;
      ups |= up;
      downs |= down;
#pragma GCC unroll 4
      for (int l = k + 1; l < models; ++l, ++pair) {
        const uint64_t u = word(at + 2 * l * kPieceSigns);
        const uint64_t v = word(at + (2 * l + 1) * kPieceSigns);
        to_both[pair] += __builtin_popcountll(moved & (u | v));
        to_unlike[pair] += __builtin_popcountll((up & v) | (down & u));
      }
    }
    shared += __builtin_popcountll(twice);
    disputed += __builtin_popcountll(ups & downs);
  }
  s.shared += shared;
  s.disputed += disputed;
  for (int k = 0; k < K; ++k) s.changed[k] += changed[k];
  for (int i = 0; i < kPairs; ++i) {
    s.overlap[i] += both[i];
    s.conflicts[i] += unlike[i];
  }
}

void count_signs_of(const uint16_t* signs, int64_t words, int models, SurveySums& s) {
  switch (models) {
    case 1:
      return count_signs<1>(signs, words, models, s);
    case 2:
      return count_signs<2>(signs, words, models, s);
    case 3:
      return count_signs<3>(signs, words, models, s);
    case 4:
      return count_signs<4>(signs, words, models, s);
    default:
      return count_signs<0>(signs, words, models, s);
  }
}

inline void count_bins(const float* x, int64_t n, uint64_t* bins) {
  for (int64_t i = 0; i < n; ++i) ++bins[(f32_bits(x[i]) & 0x7fffffffu) >> kBinShift];
}

void sample(const SurveyPiece& p, SurveySums& s) {
  for (int64_t run = 0; run < p.n; run += kSampleRun) {
    const int64_t rest = p.n - run < kSampleRun ? p.n - run : kSampleRun;
    int64_t first = 0, n = rest;
    if (!p.sample_all) {
      first = kSampleWidth * sample_place(p.index0 + run);
      n = rest - first < kSampleWidth ? rest - first : kSampleWidth;
      if (n <= 0) continue;
    }
    s.sampled += n;
    for (int k = 0; k < p.models; ++k)
      count_bins(p.values + (k + 1) * kPiece + run + first, n, s.bins + k * kBins);
  }
}

void take(const SurveyPiece& p, SurveySums& s) {
  const int models = p.models;
  const int64_t words = (p.n + 63) / 64, padded = (p.n + 15) / 16 * 16;
  const int64_t bad = s.nonfinite[0];
  dispatch_dtype(p.sources[0].dtype, [&](auto t) {
    constexpr DType T = decltype(t)::value;
    const uint8_t* const x = p.sources[0].x;
    if (!take_base<T, true>(x, p.n, p.values, s.largest, s.nonfinite, s.absolute))
      take_base<T, false>(x, p.n, p.values, s.largest, s.nonfinite, s.absolute);
  });
  for (int k = 0; k < models; ++k) {
    uint16_t* const up = p.signs + 2 * k * kPieceSigns;
    uint16_t* const down = up + kPieceSigns;
    for (int64_t i = padded / 16; i < 4 * words; ++i) up[i] = down[i] = 0;
    const ModelSums into{up, down, s.largest + 1 + k, s.largest + 1 + models + k,
                         s.nonfinite + 1 + k, s.absolute + 1 + k};
    dispatch_dtype(p.sources[k + 1].dtype, [&](auto t) {
      constexpr DType T = decltype(t)::value;
      const uint8_t* const x = p.sources[k + 1].x;
      float* const out = p.values + (k + 1) * kPiece;
      if (!take_model<T, true>(x, p.values, p.n, out, into))
        take_model<T, false>(x, p.values, p.n, out, into);
    });
  }
  if (s.nonfinite[0] != bad)
    for (int64_t i = 0; i < padded; i += 16) {
      const F b = loadf(p.values + i);
      storef(p.values + i, keep(mask_not(nonfinite(b)), b));
    }
  products(p.values, padded, models + 1, s);
  count_signs_of(p.signs, words, models, s);
  sample(p, s);
}

}  // namespace
}  // namespace clf
