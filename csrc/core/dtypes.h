// Storage types of a checkpoint and their exact conversion to and from float32.
//
// Every stored value converts to float32 exactly. Stores round to nearest, ties to even; NaN
// becomes the positive quiet NaN, so that all instruction sets give the same bytes. Everything here
// has internal linkage: the header is compiled into translation units with different instruction
// sets, and the linker must never merge them.
#pragma once

#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace clf {

enum class DType : int { BF16 = 0, F16 = 1, F32 = 2, F8_E4M3 = 3, F8_E5M2 = 4, BYTES = 5 };

CLF_HD static inline int64_t dtype_size(DType t) {
  switch (t) {
    case DType::BF16:
    case DType::F16:
      return 2;
    case DType::F32:
      return 4;
    default:
      return 1;
  }
}

CLF_HD static inline uint32_t f32_bits(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  return u;
}

CLF_HD static inline float bits_f32(uint32_t u) {
  float x;
  std::memcpy(&x, &u, 4);
  return x;
}

CLF_HD static inline float bf16_to_f32(uint16_t h) { return bits_f32(uint32_t(h) << 16); }

CLF_HD static inline uint16_t f32_to_bf16(float x) {
  const uint32_t u = f32_bits(x);
  if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0u;
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

CLF_HD static inline float f16_to_f32(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 0x1fu;
  const uint32_t mantissa = h & 0x3ffu;
  if (exponent == 31) {
    return bits_f32(sign | 0x7f800000u | (mantissa ? 0x400000u | (mantissa << 13) : 0u));
  }
  if (exponent == 0) {  // subnormal: an exact multiple of 2^-24
    const float magnitude = float(mantissa) * 5.9604644775390625e-8f;
    return bits_f32(sign | f32_bits(magnitude));
  }
  return bits_f32(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

CLF_HD static inline uint16_t f32_to_f16(float x) {
  const uint32_t u = f32_bits(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return 0x7e00u;
  if (a >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 65536 or is infinite
  if (a >= 0x38800000u) {                                 // normal in half precision
    const uint32_t r = a + 0xfffu + ((a >> 13) & 1u);
    return uint16_t(sign | ((r - 0x38000000u) >> 13));
  }
  if (a < 0x33000000u) return uint16_t(sign);  // below half of the smallest subnormal
  const uint32_t shift = 126u - (a >> 23);     // 14 .. 24
  const uint32_t m = (a & 0x7fffffu) | 0x800000u;
  const uint32_t q = m >> shift;
  const uint32_t rest = m & ((1u << shift) - 1u);
  const uint32_t half = 1u << (shift - 1u);
  return uint16_t(sign | (q + ((rest > half || (rest == half && (q & 1u))) ? 1u : 0u)));
}

// OCP 8-bit floats. E4M3 has no infinity: 0x7f and 0xff are NaN. E5M2 is the upper byte of a half.
CLF_HD static inline float f8_e4m3_to_f32(uint8_t h) {
  const uint32_t sign = uint32_t(h & 0x80u) << 24;
  const uint32_t exponent = (h >> 3) & 0xfu;
  const uint32_t mantissa = h & 7u;
  if (exponent == 15 && mantissa == 7) return bits_f32(sign | 0x7fc00000u);
  if (exponent == 0) return bits_f32(sign | f32_bits(float(mantissa) * 0.001953125f));
  return bits_f32(sign | ((exponent + 120u) << 23) | (mantissa << 20));
}

CLF_HD static inline float f8_e5m2_to_f32(uint8_t h) { return f16_to_f32(uint16_t(h) << 8); }

// The two conversions above for every byte, E4M3 first.
extern const float (&kF8ToF32)[2][256];

CLF_HD static inline float load_f32(DType t, const uint8_t* p, int64_t i) {
  switch (t) {
    case DType::BF16: {
      uint16_t h;
      std::memcpy(&h, p + 2 * i, 2);
      return bf16_to_f32(h);
    }
    case DType::F16: {
      uint16_t h;
      std::memcpy(&h, p + 2 * i, 2);
      return f16_to_f32(h);
    }
    case DType::F32: {
      float x;
      std::memcpy(&x, p + 4 * i, 4);
      return x;
    }
    case DType::F8_E4M3:
      return f8_e4m3_to_f32(p[i]);
    default:
      return f8_e5m2_to_f32(p[i]);
  }
}

}  // namespace clf
