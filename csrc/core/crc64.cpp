#include "crc64.h"

#include <cstring>

#include "isa.h"

namespace clf {
namespace {

// Polynomials are reflected: bit 63 is x^0.
uint64_t times_x(uint64_t a) { return (a >> 1) ^ ((a & 1) ? kCrcPoly : 0); }

struct Tables {
  uint64_t byte[8][256];
  uint64_t power[64];  // x^(8 * 2^i)
  CrcConstants fold;

  static void constant(uint64_t k[2], int bits) {
    // a carry-less product of reflected words carries one extra factor x, hence the - 1
    uint64_t a = uint64_t(1) << 63;
    for (int i = 0; i < bits - 1; ++i) a = times_x(a);
    k[1] = a;
    for (int i = 0; i < 64; ++i) a = times_x(a);
    k[0] = a;
  }

  Tables() {
    for (int i = 0; i < 256; ++i) {
      uint64_t a = uint64_t(i);
      for (int j = 0; j < 8; ++j) a = times_x(a);
      byte[0][i] = a;
    }
    for (int t = 1; t < 8; ++t)
      for (int i = 0; i < 256; ++i)
        byte[t][i] = (byte[t - 1][i] >> 8) ^ byte[0][byte[t - 1][i] & 255];
    uint64_t a = uint64_t(1) << 63;
    for (int i = 0; i < 8; ++i) a = times_x(a);
    for (int i = 0; i < 64; ++i) {
      power[i] = a;
      a = crc64_multiply(a, a);
    }
    constant(fold.by128, 128);
    constant(fold.by256, 256);
    constant(fold.by384, 384);
    constant(fold.by512, 512);
    constant(fold.by1024, 1024);
    constant(fold.by1536, 1536);
    constant(fold.by2048, 2048);
  }
};

const Tables& tables() {
  static const Tables t;
  return t;
}

uint64_t bytewise(const Tables& t, uint64_t raw, const uint8_t* p, size_t n) {
  for (; n >= 8; p += 8, n -= 8) {
    uint64_t w = 0;
    for (int i = 0; i < 8; ++i) w |= uint64_t(p[i]) << (8 * i);
    w ^= raw;
    raw = 0;
    for (int i = 0; i < 8; ++i) raw ^= t.byte[7 - i][(w >> (8 * i)) & 255];
  }
  for (; n; ++p, --n) raw = (raw >> 8) ^ t.byte[0][(raw ^ *p) & 255];
  return raw;
}

}  // namespace

uint64_t crc64_multiply(uint64_t a, uint64_t b) {
  uint64_t r = 0;
  for (uint64_t bit = uint64_t(1) << 63; bit; bit >>= 1) {
    if (a & bit) r ^= b;
    b = times_x(b);
  }
  return r;
}

uint64_t crc64_shift(uint64_t n) {
  const Tables& t = tables();
  uint64_t r = uint64_t(1) << 63;
  for (int i = 0; n; ++i, n >>= 1)
    if (n & 1) r = crc64_multiply(r, t.power[i]);
  return r;
}

uint64_t crc64(uint64_t crc, const void* data, size_t n) {
  const Tables& t = tables();
  const auto* p = static_cast<const uint8_t*>(data);
  uint64_t raw = ~crc;
#ifdef CL_FAST_X86
  const CrcPath path = crc_path();
  const size_t run = path == CrcPath::Clmul512 ? 256 : path == CrcPath::Clmul128 ? 64 : 0;
  if (run && n >= 2 * run) {
    const size_t m = n / run * run;
    uint8_t rest[16];
    if (path == CrcPath::Clmul512) {
      crc64_fold_clmul(raw, p, m, t.fold, rest);
    } else {
      crc64_fold_pclmul(raw, p, m, t.fold, rest);
    }
    raw = bytewise(t, 0, rest, 16);
    p += m;
    n -= m;
  }
#endif
  return ~bytewise(t, raw, p, n);
}

}  // namespace clf
