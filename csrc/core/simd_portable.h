// Sixteen lanes in plain C++: the reference for the other instruction sets, and the path for
// machines that have none of them.
#pragma once

#include "dtypes.h"
#include "philox.h"

namespace clf {
namespace {

struct F {
  float v[16];
};
using M = uint16_t;  // one bit per lane

#define CLF_LANES for (int i = 0; i < 16; ++i)

inline F loadf(const float* p) {
  F r;
  std::memcpy(r.v, p, 64);
  return r;
}
inline void storef(float* p, F x) { std::memcpy(p, x.v, 64); }
inline F set1(float x) {
  F r;
  CLF_LANES r.v[i] = x;
  return r;
}
template <DType T>
inline F load(const uint8_t* p) {
  F r;
  CLF_LANES r.v[i] = load_f32(T, p, i);
  return r;
}
template <DType T>
inline void store(uint8_t* p, F x) {
  CLF_LANES {
    if (T == DType::F32) {
      const uint32_t u = x.v[i] != x.v[i] ? 0x7fc00000u : f32_bits(x.v[i]);
      std::memcpy(p + 4 * i, &u, 4);
    } else {
      const uint16_t h = T == DType::BF16 ? f32_to_bf16(x.v[i]) : f32_to_f16(x.v[i]);
      std::memcpy(p + 2 * i, &h, 2);
    }
  }
}
inline F add(F a, F b) {
  CLF_LANES a.v[i] = a.v[i] + b.v[i];
  return a;
}
inline F sub(F a, F b) {
  CLF_LANES a.v[i] = a.v[i] - b.v[i];
  return a;
}
inline F mul(F a, F b) {
  CLF_LANES a.v[i] = a.v[i] * b.v[i];
  return a;
}
inline F div(F a, F b) {
  CLF_LANES a.v[i] = a.v[i] / b.v[i];
  return a;
}
#define CLF_TEST(name, expression)                  \
  inline M name {                                   \
    M r = 0;                                        \
    CLF_LANES r = M(r | ((expression) ? 1u << i : 0u)); \
    return r;                                       \
  }
CLF_TEST(nonfinite(F x), (f32_bits(x.v[i]) & 0x7f800000u) == 0x7f800000u)
CLF_TEST(code_gt(F x, uint32_t t), (f32_bits(x.v[i]) & 0x7fffffffu) > t)
CLF_TEST(code_ge(F x, uint32_t t), (f32_bits(x.v[i]) & 0x7fffffffu) >= t)
CLF_TEST(code_eq(F x, uint32_t t), (f32_bits(x.v[i]) & 0x7fffffffu) == t)
CLF_TEST(lt0(F x), x.v[i] < 0.0f)
CLF_TEST(ge0(F x), x.v[i] >= 0.0f)
CLF_TEST(gt0(F x), x.v[i] > 0.0f)
CLF_TEST(abs_gt(F x, F y), (f32_bits(x.v[i]) & 0x7fffffffu) > (f32_bits(y.v[i]) & 0x7fffffffu))
#undef CLF_TEST
inline F flip(F x, F sign_of) {  // x with its sign flipped where sign_of is negative
  CLF_LANES x.v[i] = bits_f32(f32_bits(x.v[i]) ^ (f32_bits(sign_of.v[i]) & 0x80000000u));
  return x;
}
inline F add_if(M m, F s, F x) {
  CLF_LANES s.v[i] = (m >> i) & 1 ? s.v[i] + x.v[i] : s.v[i];
  return s;
}
inline M from_bits(uint32_t b) { return M(b); }
inline uint32_t to_bits(M m) { return m; }
inline M mask_and(M a, M b) { return M(a & b); }
inline M mask_or(M a, M b) { return M(a | b); }
inline M mask_not(M a) { return M(~a); }
inline bool any(M m) { return m != 0; }
inline int popcount(M m) { return __builtin_popcount(m); }
// Thirty-two elements. Wider instruction sets hold them in whatever order is cheap to unpack; only
// elementwise work is done on a pair. store2 may assume that the values are finite.
struct P {
  F a, b;
};
template <DType T>
inline P load2(const uint8_t* p) {
  return P{load<T>(p), load<T>(p + 16 * dtype_size(T))};
}
template <DType T>
inline void store2(uint8_t* p, P x) {
  store<T>(p, x.a);
  store<T>(p + 16 * dtype_size(T), x.b);
}
template <DType T>
inline void masks2(uint32_t bits, M* a, M* b) {
  *a = M(bits);
  *b = M(bits >> 16);
}
inline F keep(M m, F x) {
  CLF_LANES x.v[i] = (m >> i) & 1 ? x.v[i] : 0.0f;
  return x;
}
inline F select(M m, F yes, F no) {
  CLF_LANES no.v[i] = (m >> i) & 1 ? yes.v[i] : no.v[i];
  return no;
}
inline int64_t compress_codes(M m, F x, uint32_t* out) {
  int64_t n = 0;
  CLF_LANES if ((m >> i) & 1) out[n++] = f32_bits(x.v[i]) & 0x7fffffffu;
  return n;
}
// Sixteen float64 sums, lane = index mod 16: of |x|, and of |x| where the masks are set.
struct D {
  double v[16];
};
inline D dzero() {
  D r;
  CLF_LANES r.v[i] = 0.0;
  return r;
}
template <DType T>
inline void add_abs2(D* all, D* kept, P x, M a, M b) {
  CLF_LANES {
    const double y = bits_f32(f32_bits(x.a.v[i]) & 0x7fffffffu);
    all->v[i] += y;
    if ((a >> i) & 1) kept->v[i] += y;
  }
  CLF_LANES {
    const double y = bits_f32(f32_bits(x.b.v[i]) & 0x7fffffffu);
    all->v[i] += y;
    if ((b >> i) & 1) kept->v[i] += y;
  }
}
template <DType T>
inline void lanes(double* p, D s) {
  std::memcpy(p, s.v, 128);
}
// s + x y in every lane; the products of float32 values are exact in float64.
inline D widen(const float* p) {
  D r;
  CLF_LANES r.v[i] = double(p[i]);
  return r;
}
inline void add_product(D* s, D x, D y) { CLF_LANES s->v[i] += x.v[i] * y.v[i]; }
inline void prefetch(const void* p) { __builtin_prefetch(p); }

#undef CLF_LANES

// keep bits of 64 elements that start at a multiple of 64: below[0] and, undecided, equal[0]
inline void first_bytes(uint64_t key, uint64_t index, uint32_t want, uint64_t* below,
                        uint64_t* equal) {
  uint64_t lt = 0, eq = 0;
  for (int g = 0; g < 4; ++g) {
    const uint64_t group = (index >> 4) + uint64_t(g);
    const Block b = philox4x32_10(uint32_t(group), uint32_t(group >> 32), 0, 0, uint32_t(key),
                                  uint32_t(key >> 32));
    for (int j = 0; j < 16; ++j) {
      const uint32_t byte = (b.w[j >> 2] >> (8 * (j & 3))) & 255u;
      lt |= uint64_t(byte < want) << (16 * g + j);
      eq |= uint64_t(byte == want) << (16 * g + j);
    }
  }
  *below = lt;
  *equal = eq;
}
constexpr int64_t kFirstBytes = 64;  // elements per call of first_bytes
inline void store_first_bytes(uint64_t key, uint64_t index, uint8_t* out) {
  for (int g = 0; g < 4; ++g) {
    const uint64_t group = (index >> 4) + uint64_t(g);
    const Block b = philox4x32_10(uint32_t(group), uint32_t(group >> 32), 0, 0, uint32_t(key),
                                  uint32_t(key >> 32));
    for (int j = 0; j < 16; ++j) out[16 * g + j] = uint8_t(b.w[j >> 2] >> (8 * (j & 3)));
  }
}

// Byte `level` of the streams at eight positions.
inline void bytes_at(uint64_t key, const uint64_t* index, uint32_t level, uint32_t* bytes) {
  for (int i = 0; i < 8; ++i) bytes[i] = stream_byte(key, index[i], level);
}

}  // namespace
}  // namespace clf
