// Folding by 2048 bits with 512-bit carry-less multiplication (Gopal et al., "Fast CRC computation
// for generic polynomials using PCLMULQDQ", Intel 2009).
#include <immintrin.h>

#include "crc64.h"

namespace clf {
namespace {

inline __m512i spread(const uint64_t k[2]) {
  return _mm512_broadcast_i32x4(_mm_set_epi64x(int64_t(k[1]), int64_t(k[0])));
}
inline __m512i fold(__m512i x, __m512i k, __m512i next) {
  return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(x, k, 0x00),
                                   _mm512_clmulepi64_epi128(x, k, 0x11), next, 0x96);
}
inline __m128i fold(__m128i x, const uint64_t k[2], __m128i next) {
  const __m128i c = _mm_set_epi64x(int64_t(k[1]), int64_t(k[0]));
  return _mm_xor_si128(
      _mm_xor_si128(_mm_clmulepi64_si128(x, c, 0x00), _mm_clmulepi64_si128(x, c, 0x11)), next);
}

}  // namespace

void crc64_fold_clmul(uint64_t raw, const uint8_t* p, size_t n, const CrcConstants& k,
                      uint8_t rest[16]) {
  const __m512i k2048 = spread(k.by2048);
  __m512i a[4];
  for (int i = 0; i < 4; ++i) a[i] = _mm512_loadu_si512(p + 64 * i);
  a[0] = _mm512_xor_si512(
      a[0], _mm512_zextsi128_si512(_mm_cvtsi64_si128(static_cast<long long>(raw))));
  for (size_t o = 256; o < n; o += 256)
    for (int i = 0; i < 4; ++i) a[i] = fold(a[i], k2048, _mm512_loadu_si512(p + o + 64 * size_t(i)));
  __m512i s = fold(a[2], spread(k.by512), a[3]);
  s = fold(a[1], spread(k.by1024), s);
  s = fold(a[0], spread(k.by1536), s);
  __m128i r = _mm512_extracti32x4_epi32(s, 3);
  r = fold(_mm512_extracti32x4_epi32(s, 2), k.by128, r);
  r = fold(_mm512_extracti32x4_epi32(s, 1), k.by256, r);
  r = fold(_mm512_castsi512_si128(s), k.by384, r);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), r);
}

}  // namespace clf
