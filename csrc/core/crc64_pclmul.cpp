// Folding by 512 bits with 128-bit carry-less multiplication; see crc64_clmul.cpp.
#include <emmintrin.h>
#include <wmmintrin.h>

#include "crc64.h"

namespace clf {
namespace {

inline __m128i fold(__m128i x, const uint64_t k[2], __m128i next) {
  const __m128i c = _mm_set_epi64x(int64_t(k[1]), int64_t(k[0]));
  return _mm_xor_si128(
      _mm_xor_si128(_mm_clmulepi64_si128(x, c, 0x00), _mm_clmulepi64_si128(x, c, 0x11)), next);
}
inline __m128i load(const uint8_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}

}  // namespace

void crc64_fold_pclmul(uint64_t raw, const uint8_t* p, size_t n, const CrcConstants& k,
                       uint8_t rest[16]) {
  __m128i a[4];
  for (int i = 0; i < 4; ++i) a[i] = load(p + 16 * i);
  a[0] = _mm_xor_si128(a[0], _mm_cvtsi64_si128(static_cast<long long>(raw)));
  for (size_t o = 64; o < n; o += 64)
    for (int i = 0; i < 4; ++i) a[i] = fold(a[i], k.by512, load(p + o + 16 * size_t(i)));
  __m128i r = fold(a[2], k.by128, a[3]);
  r = fold(a[1], k.by256, r);
  r = fold(a[0], k.by384, r);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(rest), r);
}

}  // namespace clf
