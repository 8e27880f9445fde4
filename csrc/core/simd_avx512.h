// Sixteen lanes as one AVX-512 register (F, BW, DQ, VL; BMI2 for mask layouts).
#pragma once

#include <immintrin.h>

#include "dtypes.h"
#include "philox.h"

namespace clf {
namespace {

using F = __m512;
using M = __mmask16;

inline F loadf(const float* p) { return _mm512_loadu_ps(p); }
inline void storef(float* p, F x) { _mm512_storeu_ps(p, x); }
inline F set1(float x) { return _mm512_set1_ps(x); }
inline __m512i bits(F x) { return _mm512_castps_si512(x); }
inline __m512i code(F x) { return _mm512_and_si512(bits(x), _mm512_set1_epi32(0x7fffffff)); }

inline F load_f8(const float* table, const uint8_t* p) {
  const __m512i i = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm512_i32gather_ps(i, table, 4);
}
template <DType T>
inline F load(const uint8_t* p) {
  const auto* q = reinterpret_cast<const __m256i*>(p);
  if (T == DType::BF16)
    return _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(q)), 16));
  if (T == DType::F16) return _mm512_cvtph_ps(_mm256_loadu_si256(q));
  if (T == DType::F32) return _mm512_loadu_ps(p);
  return load_f8(kF8ToF32[T == DType::F8_E4M3 ? 0 : 1], p);
}
inline F canonical(F x) {
  return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                            _mm512_castsi512_ps(_mm512_set1_epi32(0x7fc00000)));
}
template <DType T>
inline void store(uint8_t* p, F x) {
  if (T == DType::F32) {
    _mm512_storeu_ps(p, canonical(x));
  } else if (T == DType::F16) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_cvtps_ph(canonical(x), _MM_FROUND_TO_NEAREST_INT));
  } else {
    const __m512i u = bits(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
    r = _mm512_mask_mov_epi32(_mm512_srli_epi32(r, 16), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q),
                              _mm512_set1_epi32(0x7fc0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
  }
}
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F div(F a, F b) { return _mm512_div_ps(a, b); }
inline M nonfinite(F x) {
  return _mm512_cmpge_epu32_mask(code(x), _mm512_set1_epi32(0x7f800000));
}
inline M code_gt(F x, uint32_t t) {
  return _mm512_cmpgt_epu32_mask(code(x), _mm512_set1_epi32(int(t)));
}
inline M code_ge(F x, uint32_t t) {
  return _mm512_cmpge_epu32_mask(code(x), _mm512_set1_epi32(int(t)));
}
inline M code_eq(F x, uint32_t t) {
  return _mm512_cmpeq_epu32_mask(code(x), _mm512_set1_epi32(int(t)));
}
inline M lt0(F x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ); }
inline M ge0(F x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GE_OQ); }
inline M gt0(F x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ); }
inline M abs_gt(F x, F y) { return _mm512_cmpgt_epu32_mask(code(x), code(y)); }
inline F flip(F x, F sign_of) {
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(
      bits(x), bits(sign_of), _mm512_set1_epi32(int(0x80000000u)), 0x78));  // x ^ (s & mask)
}
inline F add_if(M m, F s, F x) { return _mm512_mask_add_ps(s, m, s, x); }

// Thirty-two elements: bfloat16 as its even and its odd elements, which costs one operation each
// way; the other types as two halves.
struct P {
  F a, b;
};
template <DType T>
inline P load2(const uint8_t* p) {
  if (T == DType::BF16) {
    const __m512i u = _mm512_loadu_si512(p);
    return P{_mm512_castsi512_ps(_mm512_slli_epi32(u, 16)),
             _mm512_castsi512_ps(_mm512_and_si512(u, _mm512_set1_epi32(int(0xffff0000u))))};
  }
  return P{load<T>(p), load<T>(p + 16 * dtype_size(T))};
}
inline __m512i round_bf16(F x) {  // the upper half of each lane is the rounded value
  const __m512i u = bits(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
}
template <DType T>
inline void store2(uint8_t* p, P x) {
  if (T == DType::BF16) {
    _mm512_storeu_si512(p, _mm512_mask_mov_epi16(_mm512_srli_epi32(round_bf16(x.a), 16),
                                                 0xAAAAAAAAu, round_bf16(x.b)));
  } else {
    store<T>(p, x.a);
    store<T>(p + 16 * dtype_size(T), x.b);
  }
}
template <DType T>
inline void masks2(uint32_t bits, M* a, M* b) {
  *a = M(T == DType::BF16 ? _pext_u32(bits, 0x55555555u) : bits);
  *b = M(T == DType::BF16 ? _pext_u32(bits, 0xAAAAAAAAu) : bits >> 16);
}
inline M from_bits(uint32_t b) { return M(b); }
inline uint32_t to_bits(M m) { return m; }
inline M mask_and(M a, M b) { return M(a & b); }
inline M mask_or(M a, M b) { return M(a | b); }
inline M mask_not(M a) { return M(~a); }
inline bool any(M m) { return m != 0; }
inline int popcount(M m) { return __builtin_popcount(m); }
inline F keep(M m, F x) { return _mm512_maskz_mov_ps(m, x); }
inline F select(M m, F yes, F no) { return _mm512_mask_mov_ps(no, m, yes); }
inline int64_t compress_codes(M m, F x, uint32_t* out) {
  // compress in a register, then store: compressing to memory is microcoded on some cores
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(m, code(x)));
  return popcount(m);
}
// Sixteen float64 sums; a pair of bfloat16 layout has its even lanes in `a`, the odd ones in `b`.
struct D {
  __m512d a, b;
};
inline D dzero() { return D{_mm512_setzero_pd(), _mm512_setzero_pd()}; }
inline void add_abs(__m512d* all, __m512d* kept, __m256 x, __mmask8 m) {
  const __m512d y = _mm512_cvtps_pd(x);
  *all = _mm512_add_pd(*all, y);
  *kept = _mm512_mask_add_pd(*kept, m, *kept, y);
}
template <DType T>
inline void add_abs2(D* all, D* kept, P x, M a, M b) {
  const F xa = _mm512_castsi512_ps(code(x.a)), xb = _mm512_castsi512_ps(code(x.b));
  constexpr bool split = T == DType::BF16;
  add_abs(&all->a, &kept->a, _mm512_castps512_ps256(xa), __mmask8(a));
  add_abs(split ? &all->a : &all->b, split ? &kept->a : &kept->b, _mm512_extractf32x8_ps(xa, 1),
          __mmask8(a >> 8));
  add_abs(split ? &all->b : &all->a, split ? &kept->b : &kept->a, _mm512_castps512_ps256(xb),
          __mmask8(b));
  add_abs(&all->b, &kept->b, _mm512_extractf32x8_ps(xb, 1), __mmask8(b >> 8));
}
template <DType T>
inline void lanes(double* p, D s) {
  alignas(64) double v[16];
  _mm512_store_pd(v, s.a);
  _mm512_store_pd(v + 8, s.b);
  for (int i = 0; i < 16; ++i) p[i] = T == DType::BF16 ? v[(i >> 1) + 8 * (i & 1)] : v[i];
}
// s + x y in every lane. The products of float32 values are exact in float64, so that a fused and an
// unfused sum are the same bits.
inline D widen(const float* p) {
  return D{_mm512_cvtps_pd(_mm256_loadu_ps(p)), _mm512_cvtps_pd(_mm256_loadu_ps(p + 8))};
}
inline void add_product(D* s, D x, D y) {
  s->a = _mm512_fmadd_pd(x.a, y.a, s->a);
  s->b = _mm512_fmadd_pd(x.b, y.b, s->b);
}
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// Eight Philox blocks per register, one 32-bit word in each 64-bit lane; the upper halves carry
// garbage that the 32x32->64 multiply ignores.
struct Philox8 {
  __m512i c0, c1, c2, c3;
};
template <int CHAINS>
inline void philox_rounds(Philox8* s, uint64_t key) {
  const __m512i m0 = _mm512_set1_epi64(kPhiloxM0), m1 = _mm512_set1_epi64(kPhiloxM1);
  uint32_t k0 = uint32_t(key), k1 = uint32_t(key >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const __m512i r0 = _mm512_set1_epi64(k0), r1 = _mm512_set1_epi64(k1);
#pragma GCC unroll 4
    for (int c = 0; c < CHAINS; ++c) {
      const __m512i p0 = _mm512_mul_epu32(s[c].c0, m0), p1 = _mm512_mul_epu32(s[c].c2, m1);
      s[c].c0 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p1, 32), s[c].c1, r0, 0x96);
      s[c].c2 = _mm512_ternarylogic_epi64(_mm512_srli_epi64(p0, 32), s[c].c3, r1, 0x96);
      s[c].c1 = p1;
      s[c].c3 = p0;
    }
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
}

constexpr int64_t kFirstBytes = 256;
// The level-0 bytes of 256 elements from a multiple of 256 on, 64 to a register.
inline void level0_bytes(uint64_t key, uint64_t index, __m512i* bytes) {
  // lane order such that the unpacks below leave the groups in sequence
  const __m512i lane = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const uint64_t group = index >> 4;
  Philox8 s[2];
#pragma GCC unroll 4
  for (int c = 0; c < 2; ++c) {
    const __m512i g = _mm512_add_epi64(_mm512_set1_epi64(int64_t(group) + 8 * c), lane);
    s[c] = Philox8{g, _mm512_srli_epi64(g, 32), _mm512_setzero_si512(), _mm512_setzero_si512()};
  }
  philox_rounds<2>(s, key);
#pragma GCC unroll 4
  for (int c = 0; c < 2; ++c) {
    const __m512i lo = _mm512_mask_mov_epi32(s[c].c0, 0xAAAA, _mm512_slli_epi64(s[c].c1, 32));
    const __m512i hi = _mm512_mask_mov_epi32(s[c].c2, 0xAAAA, _mm512_slli_epi64(s[c].c3, 32));
    bytes[2 * c] = _mm512_unpacklo_epi64(lo, hi);
    bytes[2 * c + 1] = _mm512_unpackhi_epi64(lo, hi);
  }
}
inline void first_bytes(uint64_t key, uint64_t index, uint32_t want, uint64_t* below,
                        uint64_t* equal) {
  __m512i bytes[4];
  level0_bytes(key, index, bytes);
  const __m512i t = _mm512_set1_epi8(char(want));
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    below[c] = _mm512_cmplt_epu8_mask(bytes[c], t);
    equal[c] = _mm512_cmpeq_epu8_mask(bytes[c], t);
  }
}
inline void store_first_bytes(uint64_t key, uint64_t index, uint8_t* out) {
  __m512i bytes[4];
  level0_bytes(key, index, bytes);
  for (int c = 0; c < 4; ++c) _mm512_storeu_si512(out + 64 * c, bytes[c]);
}

inline void bytes_at(uint64_t key, const uint64_t* index, uint32_t level, uint32_t* bytes) {
  const __m512i i = _mm512_loadu_si512(index);
  const __m512i g = _mm512_srli_epi64(i, 4);
  Philox8 s{g, _mm512_srli_epi64(g, 32), _mm512_set1_epi64(level), _mm512_setzero_si512()};
  philox_rounds<1>(&s, key);
  alignas(64) uint64_t w[4][8];
  _mm512_store_si512(w[0], s.c0);
  _mm512_store_si512(w[1], s.c1);
  _mm512_store_si512(w[2], s.c2);
  _mm512_store_si512(w[3], s.c3);
  for (int k = 0; k < 8; ++k) {
    const uint32_t j = uint32_t(index[k] & 15);
    bytes[k] = (uint32_t(w[j >> 2][k]) >> (8 * (j & 3))) & 255u;
  }
}

}  // namespace
}  // namespace clf
