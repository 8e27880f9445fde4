// CRC-64/NVME (reflected polynomial 0x9A6C9329AC4BC9B5, initial value and final xor all ones):
// detects corruption at the speed of a read, and the checksums of neighbouring runs combine, so a
// tensor has one value for any tile size, thread count and shard layout. It is not a signature.
#pragma once

#include <cstddef>
#include <cstdint>

namespace clf {

constexpr uint64_t kCrcPoly = 0x9A6C9329AC4BC9B5ull;

// The checksum of A followed by `data`, where `crc` is that of A (0 for nothing).
uint64_t crc64(uint64_t crc, const void* data, size_t n);

// x^(8 n) modulo the polynomial: appending n bytes multiplies a checksum by it.
uint64_t crc64_shift(uint64_t n);
uint64_t crc64_multiply(uint64_t a, uint64_t b);
inline uint64_t crc64_combine(uint64_t a, uint64_t b, uint64_t shift_of_b) {
  return crc64_multiply(a, shift_of_b) ^ b;
}

// Folding reduces n bytes (a multiple of 64 or 256), with the raw register xored into the first
// eight, to sixteen bytes of the same remainder. Powers of x are for the two halves of a lane.
struct CrcConstants {
  uint64_t by128[2], by256[2], by384[2], by512[2], by1024[2], by1536[2], by2048[2];
};
void crc64_fold_pclmul(uint64_t raw, const uint8_t* p, size_t n, const CrcConstants& k,
                       uint8_t rest[16]);
void crc64_fold_clmul(uint64_t raw, const uint8_t* p, size_t n, const CrcConstants& k,
                      uint8_t rest[16]);

}  // namespace clf
