// Sixteen lanes as two AVX2 registers (AVX2 and F16C).
#pragma once

#include <immintrin.h>

#include "dtypes.h"
#include "philox.h"

namespace clf {
namespace {

struct F {
  __m256 a, b;
};
struct M {  // all ones or all zeros per lane
  __m256 a, b;
};

inline F loadf(const float* p) { return F{_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void storef(float* p, F x) {
  _mm256_storeu_ps(p, x.a);
  _mm256_storeu_ps(p + 8, x.b);
}
inline F set1(float x) { return F{_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline __m256i ci(__m256 x) { return _mm256_castps_si256(x); }
inline __m256 cf(__m256i x) { return _mm256_castsi256_ps(x); }
inline __m256i code1(__m256 x) { return _mm256_and_si256(ci(x), _mm256_set1_epi32(0x7fffffff)); }

inline __m256 load_f8(const float* table, const uint8_t* p) {
  const __m256i i = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return _mm256_i32gather_ps(table, i, 4);
}
template <DType T>
inline F load(const uint8_t* p) {
  const auto* q = reinterpret_cast<const __m128i*>(p);
  if (T == DType::BF16)
    return F{cf(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q)), 16)),
             cf(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(q + 1)), 16))};
  if (T == DType::F16)
    return F{_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
  if (T == DType::F32) return loadf(reinterpret_cast<const float*>(p));
  const float* table = kF8ToF32[T == DType::F8_E4M3 ? 0 : 1];
  return F{load_f8(table, p), load_f8(table, p + 8)};
}
inline __m256 nan1(__m256 x) { return _mm256_cmp_ps(x, x, _CMP_UNORD_Q); }
inline __m256 canonical(__m256 x) {
  return _mm256_blendv_ps(x, cf(_mm256_set1_epi32(0x7fc00000)), nan1(x));
}
inline __m256i bf16_bits(__m256 x) {
  const __m256i u = ci(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  return ci(_mm256_blendv_ps(cf(_mm256_srli_epi32(r, 16)), cf(_mm256_set1_epi32(0x7fc0)), nan1(x)));
}
template <DType T>
inline void store(uint8_t* p, F x) {
  if (T == DType::F32) {
    storef(reinterpret_cast<float*>(p), F{canonical(x.a), canonical(x.b)});
  } else if (T == DType::F16) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm256_cvtps_ph(canonical(x.a), _MM_FROUND_TO_NEAREST_INT));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p) + 1,
                     _mm256_cvtps_ph(canonical(x.b), _MM_FROUND_TO_NEAREST_INT));
  } else {
    const __m256i packed = _mm256_packus_epi32(bf16_bits(x.a), bf16_bits(x.b));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xD8));
  }
}
inline F add(F x, F y) { return F{_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline F sub(F x, F y) { return F{_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline F mul(F x, F y) { return F{_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline F div(F x, F y) { return F{_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
// codes are below 2^31, so signed comparisons order them; a threshold may be 0xffffffff (nothing)
inline __m256 gt1(__m256i x, uint32_t t) {
  if (t > 0x7fffffffu) return _mm256_setzero_ps();
  return cf(_mm256_cmpgt_epi32(x, _mm256_set1_epi32(int(t))));
}
inline M code_gt(F x, uint32_t t) { return M{gt1(code1(x.a), t), gt1(code1(x.b), t)}; }
inline M nonfinite(F x) { return code_gt(x, 0x7f7fffffu); }
inline M code_eq(F x, uint32_t t) {
  const __m256i v = _mm256_set1_epi32(int(t));
  return M{cf(_mm256_cmpeq_epi32(code1(x.a), v)), cf(_mm256_cmpeq_epi32(code1(x.b), v))};
}
inline M code_ge(F x, uint32_t t) {
  if (t > 0x7fffffffu) t = 0x80000000u;  // t - 1 below is compared as a signed number
  const __m256i v = _mm256_set1_epi32(int(t - 1u));
  return M{cf(_mm256_cmpgt_epi32(code1(x.a), v)), cf(_mm256_cmpgt_epi32(code1(x.b), v))};
}
template <int OP>
inline M compare0(F x) {
  return M{_mm256_cmp_ps(x.a, _mm256_setzero_ps(), OP),
           _mm256_cmp_ps(x.b, _mm256_setzero_ps(), OP)};
}
inline M lt0(F x) { return compare0<_CMP_LT_OQ>(x); }
inline M ge0(F x) { return compare0<_CMP_GE_OQ>(x); }
inline M gt0(F x) { return compare0<_CMP_GT_OQ>(x); }
inline M abs_gt(F x, F y) {
  return M{cf(_mm256_cmpgt_epi32(code1(x.a), code1(y.a))),
           cf(_mm256_cmpgt_epi32(code1(x.b), code1(y.b)))};
}
inline F flip(F x, F sign_of) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return F{_mm256_xor_ps(x.a, _mm256_and_ps(sign_of.a, sign)),
           _mm256_xor_ps(x.b, _mm256_and_ps(sign_of.b, sign))};
}
inline F add_if(M m, F s, F x) {  // s never is -0, so that adding +0 changes nothing
  return F{_mm256_add_ps(s.a, _mm256_and_ps(m.a, x.a)),
           _mm256_add_ps(s.b, _mm256_and_ps(m.b, x.b))};
}

// Thirty-two elements: bfloat16 as its even and its odd elements, the other types as two halves.
struct P {
  F a, b;
};
template <DType T>
inline P load2(const uint8_t* p) {
  if (T == DType::BF16) {
    const __m256i u = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32));
    const __m256i upper = _mm256_set1_epi32(int(0xffff0000u));
    return P{F{cf(_mm256_slli_epi32(u, 16)), cf(_mm256_slli_epi32(v, 16))},
             F{cf(_mm256_and_si256(u, upper)), cf(_mm256_and_si256(v, upper))}};
  }
  return P{load<T>(p), load<T>(p + 16 * dtype_size(T))};
}
inline __m256i round_bf16(__m256 x) {
  const __m256i u = ci(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
}
template <DType T>
inline void store2(uint8_t* p, P x) {
  if (T == DType::BF16) {
    const auto join = [](__m256 even, __m256 odd) {
      return _mm256_blend_epi16(_mm256_srli_epi32(round_bf16(even), 16), round_bf16(odd), 0xAA);
    };
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), join(x.a.a, x.b.a));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), join(x.a.b, x.b.b));
  } else {
    store<T>(p, x.a);
    store<T>(p + 16 * dtype_size(T), x.b);
  }
}
inline __m256 lanes_at(uint32_t b, __m256i bit) {
  return cf(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(b)), bit), bit));
}
inline __m256 lanes_of(uint32_t b) {
  return lanes_at(b, _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128));
}
inline M from_bits(uint32_t b) { return M{lanes_of(b & 255u), lanes_of((b >> 8) & 255u)}; }
template <DType T>
inline void masks2(uint32_t bits, M* a, M* b) {
  if (T == DType::BF16) {
    const __m256i even = _mm256_setr_epi32(1, 4, 16, 64, 256, 1024, 4096, 16384);
    const __m256i odd = _mm256_slli_epi32(even, 1);
    *a = M{lanes_at(bits, even), lanes_at(bits >> 16, even)};
    *b = M{lanes_at(bits, odd), lanes_at(bits >> 16, odd)};
  } else {
    *a = from_bits(bits & 0xffffu);
    *b = from_bits(bits >> 16);
  }
}
inline uint32_t to_bits(M m) {
  return uint32_t(_mm256_movemask_ps(m.a)) | (uint32_t(_mm256_movemask_ps(m.b)) << 8);
}
inline M mask_and(M x, M y) { return M{_mm256_and_ps(x.a, y.a), _mm256_and_ps(x.b, y.b)}; }
inline M mask_or(M x, M y) { return M{_mm256_or_ps(x.a, y.a), _mm256_or_ps(x.b, y.b)}; }
inline M mask_not(M x) {
  const __m256 ones = cf(_mm256_set1_epi32(-1));
  return M{_mm256_xor_ps(x.a, ones), _mm256_xor_ps(x.b, ones)};
}
inline bool any(M m) { return to_bits(m) != 0; }
inline int popcount(M m) { return __builtin_popcount(to_bits(m)); }
inline F keep(M m, F x) { return F{_mm256_and_ps(m.a, x.a), _mm256_and_ps(m.b, x.b)}; }
inline F select(M m, F yes, F no) {
  return F{_mm256_blendv_ps(no.a, yes.a, m.a), _mm256_blendv_ps(no.b, yes.b, m.b)};
}
inline int64_t compress_codes(M m, F x, uint32_t* out) {
  alignas(32) uint32_t c[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(c), code1(x.a));
  _mm256_store_si256(reinterpret_cast<__m256i*>(c + 8), code1(x.b));
  int64_t n = 0;
  for (uint32_t b = to_bits(m); b; b &= b - 1) out[n++] = c[__builtin_ctz(b)];
  return n;
}
// Sixteen float64 sums; a pair of bfloat16 layout has its even lanes in v[0..1], the odd in v[2..3].
struct D {
  __m256d v[4];
};
inline D dzero() {
  const __m256d z = _mm256_setzero_pd();
  return D{{z, z, z, z}};
}
inline void add_abs(__m256d* all, __m256d* kept, __m256 x, __m256 m) {  // eight lanes
  const __m256 y = cf(code1(x));
  const __m256 z = _mm256_and_ps(m, y);  // sums of magnitudes never are -0: +0 changes nothing
  all[0] = _mm256_add_pd(all[0], _mm256_cvtps_pd(_mm256_castps256_ps128(y)));
  all[1] = _mm256_add_pd(all[1], _mm256_cvtps_pd(_mm256_extractf128_ps(y, 1)));
  kept[0] = _mm256_add_pd(kept[0], _mm256_cvtps_pd(_mm256_castps256_ps128(z)));
  kept[1] = _mm256_add_pd(kept[1], _mm256_cvtps_pd(_mm256_extractf128_ps(z, 1)));
}
template <DType T>
inline void add_abs2(D* all, D* kept, P x, M a, M b) {
  constexpr int second = T == DType::BF16 ? 0 : 2, third = T == DType::BF16 ? 2 : 0;
  add_abs(all->v, kept->v, x.a.a, a.a);
  add_abs(all->v + second, kept->v + second, x.a.b, a.b);
  add_abs(all->v + third, kept->v + third, x.b.a, b.a);
  add_abs(all->v + 2, kept->v + 2, x.b.b, b.b);
}
template <DType T>
inline void lanes(double* p, D s) {
  double v[16];
  for (int i = 0; i < 4; ++i) _mm256_storeu_pd(v + 4 * i, s.v[i]);
  for (int i = 0; i < 16; ++i) p[i] = T == DType::BF16 ? v[(i >> 1) + 8 * (i & 1)] : v[i];
}
// s + x y in every lane; the products of float32 values are exact in float64.
inline D widen(const float* p) {
  D r;
  for (int i = 0; i < 4; ++i) r.v[i] = _mm256_cvtps_pd(_mm_loadu_ps(p + 4 * i));
  return r;
}
inline void add_product(D* s, D x, D y) {
  for (int i = 0; i < 4; ++i) s->v[i] = _mm256_add_pd(s->v[i], _mm256_mul_pd(x.v[i], y.v[i]));
}
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

struct Philox4 {
  __m256i c0, c1, c2, c3;
};
template <int CHAINS>
inline void philox_rounds(Philox4* s, uint64_t key) {
  const __m256i m0 = _mm256_set1_epi64x(kPhiloxM0), m1 = _mm256_set1_epi64x(kPhiloxM1);
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const __m256i r0 = _mm256_set1_epi64x(k0), r1 = _mm256_set1_epi64x(k1);
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) {
      const __m256i p0 = _mm256_mul_epu32(s[c].c0, m0), p1 = _mm256_mul_epu32(s[c].c2, m1);
      s[c].c0 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p1, 32), s[c].c1), r0);
      s[c].c2 = _mm256_xor_si256(_mm256_xor_si256(_mm256_srli_epi64(p0, 32), s[c].c3), r1);
      s[c].c1 = p1;
      s[c].c3 = p0;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

constexpr int64_t kFirstBytes = 128;
// The level-0 bytes of 128 elements from a multiple of 128 on, 32 to a register.
inline void level0_bytes(uint64_t key, uint64_t index, __m256i* bytes) {
  const __m256i lane = _mm256_setr_epi64x(0, 2, 1, 3);
  const uint64_t group = index >> 4;
  Philox4 s[2];
  for (int c = 0; c < 2; ++c) {
    const __m256i g = _mm256_add_epi64(_mm256_set1_epi64x(int64_t(group) + 4 * c), lane);
    s[c] = Philox4{g, _mm256_srli_epi64(g, 32), _mm256_setzero_si256(), _mm256_setzero_si256()};
  }
  philox_rounds<2>(s, key);
  for (int c = 0; c < 2; ++c) {
    const __m256i lo = _mm256_blend_epi32(s[c].c0, _mm256_slli_epi64(s[c].c1, 32), 0xAA);
    const __m256i hi = _mm256_blend_epi32(s[c].c2, _mm256_slli_epi64(s[c].c3, 32), 0xAA);
    bytes[2 * c] = _mm256_unpacklo_epi64(lo, hi);
    bytes[2 * c + 1] = _mm256_unpackhi_epi64(lo, hi);
  }
}
inline void store_first_bytes(uint64_t key, uint64_t index, uint8_t* out) {
  __m256i bytes[4];
  level0_bytes(key, index, bytes);
  for (int c = 0; c < 4; ++c)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 32 * c), bytes[c]);
}
inline void first_bytes(uint64_t key, uint64_t index, uint32_t want, uint64_t* below,
                        uint64_t* equal) {
  __m256i bytes[4];
  level0_bytes(key, index, bytes);
  const __m256i t = _mm256_set1_epi8(char(want));
  for (int c = 0; c < 2; ++c) {
    const __m256i a = bytes[2 * c], b = bytes[2 * c + 1];
    const __m256i ea = _mm256_cmpeq_epi8(a, t), eb = _mm256_cmpeq_epi8(b, t);
    const __m256i ga = _mm256_cmpeq_epi8(_mm256_max_epu8(a, t), a);  // a >= t
    const __m256i gb = _mm256_cmpeq_epi8(_mm256_max_epu8(b, t), b);
    const auto bits32 = [](__m256i v) { return uint64_t(uint32_t(_mm256_movemask_epi8(v))); };
    below[c] = ~(bits32(ga) | (bits32(gb) << 32));
    equal[c] = bits32(ea) | (bits32(eb) << 32);
  }
}

inline void bytes_at(uint64_t key, const uint64_t* index, uint32_t level, uint32_t* bytes) {
  Philox4 s[2];
  for (int c = 0; c < 2; ++c) {
    const __m256i i = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index + 4 * c));
    const __m256i g = _mm256_srli_epi64(i, 4);
    s[c] = Philox4{g, _mm256_srli_epi64(g, 32), _mm256_set1_epi64x(level), _mm256_setzero_si256()};
  }
  philox_rounds<2>(s, key);
  alignas(32) uint64_t w[4][8];
  for (int c = 0; c < 2; ++c) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(w[0] + 4 * c), s[c].c0);
    _mm256_store_si256(reinterpret_cast<__m256i*>(w[1] + 4 * c), s[c].c1);
    _mm256_store_si256(reinterpret_cast<__m256i*>(w[2] + 4 * c), s[c].c2);
    _mm256_store_si256(reinterpret_cast<__m256i*>(w[3] + 4 * c), s[c].c3);
  }
  for (int k = 0; k < 8; ++k) {
    const uint32_t j = uint32_t(index[k] & 15);
    bytes[k] = (uint32_t(w[j >> 2][k]) >> (8 * (j & 3))) & 255u;
  }
}

}  // namespace
}  // namespace clf
