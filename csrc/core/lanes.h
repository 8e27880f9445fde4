// Reading a stored tensor sixteen elements at a time. Included after a simd_*.h; everything here
// has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dtypes.h"

namespace clf {
namespace {

// Loops work on whole groups of sixteen; a ragged end is copied into padded memory first.
struct Padded {
  alignas(64) uint8_t bytes[64 * 4];
};

// body(i, sixteen values as float32) for every group of sixteen; what a ragged end lacks is zero.
// What lies Ahead elements further on, which nearly always is read next, is fetched meanwhile.
template <DType T, int64_t Ahead, class Body>
inline void for_lanes(const uint8_t* x, int64_t n, Body&& body) {
  constexpr int64_t size = T == DType::F32 ? 4 : (T == DType::BF16 || T == DType::F16) ? 2 : 1;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    if ((i * size) % 64 == 0) prefetch(x + (i + Ahead) * size);
    body(i, load<T>(x + i * size));
  }
  if (i < n) {
    Padded tail;
    std::memset(tail.bytes, 0, sizeof tail.bytes);
    std::memcpy(tail.bytes, x + i * size, size_t((n - i) * size));
    body(i, load<T>(tail.bytes));
  }
}

// body(the type as a constant)
template <class Body>
inline void dispatch_dtype(DType t, Body&& body) {
  switch (t) {
    case DType::BF16:
      body(std::integral_constant<DType, DType::BF16>{});
      break;
    case DType::F16:
      body(std::integral_constant<DType, DType::F16>{});
      break;
    case DType::F32:
      body(std::integral_constant<DType, DType::F32>{});
      break;
    case DType::F8_E4M3:
      body(std::integral_constant<DType, DType::F8_E4M3>{});
      break;
    default:
      body(std::integral_constant<DType, DType::F8_E5M2>{});
      break;
  }
}

}  // namespace
}  // namespace clf
