// Philox4x32-10, the counter-based generator of every mask (Salmon et al., "Parallel random
// numbers: as easy as 1, 2, 3", SC 2011), and the byte stream that cl_fast draws from it.
//
// Element i of a tensor owns byte (i & 15) of the 16-byte blocks with counter
// (i >> 4, level, 0), level 0..3. Its 32-bit uniform is byte_0 byte_1 byte_2 byte_3, most
// significant first, and it is kept iff the uniform is below the threshold. A comparison looks
// at a deeper byte only when all the leading ones are equal: once in 256 elements per level.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace clf {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;

struct Block {
  uint32_t w[4];
};

CLF_HD static inline Block philox4x32_10(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0,
                                  uint32_t k1) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(kPhiloxM0) * c0, p1 = uint64_t(kPhiloxM1) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(p1);
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(p0);
    k0 += kPhiloxW0;
    k1 += kPhiloxW1;
  }
  return Block{{c0, c1, c2, c3}};
}

CLF_HD static inline uint32_t stream_byte(uint64_t key, uint64_t index, uint32_t level) {
  const uint64_t group = index >> 4;
  const Block b = philox4x32_10(uint32_t(group), uint32_t(group >> 32), level, 0, uint32_t(key),
                                uint32_t(key >> 32));
  const uint32_t j = uint32_t(index & 15);
  // Chosen, not indexed: an index would put the block into memory on some cards.
  const uint32_t word = j < 8 ? (j < 4 ? b.w[0] : b.w[1]) : (j < 12 ? b.w[2] : b.w[3]);
  return (word >> (8 * (j & 3))) & 255u;
}

// Whether element `index` is kept given that its bytes before `level` equal the threshold's.
CLF_HD static inline bool stream_keep_from(uint64_t key, uint64_t index, uint32_t threshold,
                                    uint32_t level) {
  for (; level < 4; ++level) {
    const uint32_t want = (threshold >> (24 - 8 * level)) & 255u;
    const uint32_t got = stream_byte(key, index, level);
    if (got != want) return got < want;
  }
  return false;
}

}  // namespace clf
