// The random stream on the GPU: which of the sixteen elements of a thread several terms keep.
//
// A warp works on 512 elements in two runs of 256; a lane has eight neighbours of each run, so two
// lanes share a Philox block. Each of the two draws one block whole and they exchange the halves:
// one block per lane and term, and the loads stay 16 bytes wide and coalesced.
//
// The first byte decides 255 of 256 elements. The others, a handful per warp, go into a queue that
// the lanes empty together: a level below costs one more block per 32 of them, not one per lane.
#pragma once

#include "../core/philox.h"
#include "batch.h"

namespace clf {

constexpr int kQueue = 128;

template <int KT>
struct DrawScratch {  // of one warp, in shared memory
  uint32_t queue[kQueue];
  uint32_t deep[KT][32];
  uint32_t length;
};

// One bit per byte of w, the lowest first: whether the byte is below (equal to) that of y.
__device__ __forceinline__ uint32_t nibble(uint32_t high_bits) {
  return ((high_bits >> 7 & 0x01010101u) * 0x10204080u) >> 28;
}
__device__ __forceinline__ uint32_t bytes_below(uint32_t w, uint32_t y) {
  const uint32_t h = 0x80808080u;
  const uint32_t t = (w | h) - (y & ~h);
  return nibble(((~w & y) | (~(w ^ y) & ~t)) & h);
}
__device__ __forceinline__ uint32_t bytes_equal(uint32_t w, uint32_t y) {
  const uint32_t z = w ^ y, low = 0x7f7f7f7fu;
  return nibble(~(((z & low) + low) | z) & 0x80808080u);
}

__device__ __forceinline__ int64_t element_of(int64_t warp_start, int lane, int j) {
  return warp_start + (j >> 3) * 256 + lane * 8 + (j & 7);
}

// keep[k] bits 0..7: the first run, 8..15: the second. All lanes of the warp must call it.
template <int KT>
__device__ __forceinline__ void draw(const DeviceTerm* terms, int count, int64_t warp_start,
                                     int lane, DrawScratch<KT>& s, uint32_t (&keep)[KT]) {
  const bool odd = lane & 1;
  const uint64_t group = uint64_t(warp_start + (odd ? 256 : 0) + lane * 8) >> 4;
  if (lane == 0) s.length = 0;
#pragma unroll
  for (int k = 0; k < KT; ++k) s.deep[k][lane] = 0;
  __syncwarp();
#pragma unroll
  for (int k = 0; k < KT; ++k) {
    keep[k] = 0xffffu;
    if (k >= count || !(terms[k].flags & kSparse)) continue;
    const uint64_t key = terms[k].key;
    const uint32_t threshold = terms[k].keep;
    const Block b = philox4x32_10(uint32_t(group), uint32_t(group >> 32), 0, 0, uint32_t(key),
                                  uint32_t(key >> 32));
    const uint32_t r0 = __shfl_xor_sync(0xffffffffu, odd ? b.w[0] : b.w[2], 1);
    const uint32_t r1 = __shfl_xor_sync(0xffffffffu, odd ? b.w[1] : b.w[3], 1);
    const uint32_t w[4] = {odd ? r0 : b.w[0], odd ? r1 : b.w[1], odd ? b.w[2] : r0,
                           odd ? b.w[3] : r1};
    const uint32_t lead = (threshold >> 24) * 0x01010101u;
    uint32_t below = 0, equal = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      below |= bytes_below(w[i], lead) << (4 * i);
      equal |= bytes_equal(w[i], lead) << (4 * i);
    }
    keep[k] = below;
    if ((threshold & 0xffffffu) == 0) equal = 0;
    if (equal != 0) {
      uint32_t at = atomicAdd(&s.length, uint32_t(__popc(equal)));
      for (; equal != 0; equal &= equal - 1, ++at) {
        const int j = __ffs(int(equal)) - 1;
        if (at < kQueue)
          s.queue[at] = uint32_t(k << 16 | lane << 8 | j);
        else if (stream_keep_from(key, uint64_t(element_of(warp_start, lane, j)), threshold, 1))
          keep[k] |= 1u << j;
      }
    }
  }
  __syncwarp();
  const uint32_t length = s.length < kQueue ? s.length : kQueue;
  for (uint32_t i = uint32_t(lane); i < length; i += 32) {
    const uint32_t entry = s.queue[i];
    const int k = int(entry >> 16), from = int(entry >> 8 & 255u), j = int(entry & 255u);
    if (stream_keep_from(terms[k].key, uint64_t(element_of(warp_start, from, j)), terms[k].keep, 1))
      atomicOr(&s.deep[k][from], 1u << j);
  }
  __syncwarp();
#pragma unroll
  for (int k = 0; k < KT; ++k) keep[k] |= s.deep[k][lane];
}

}  // namespace clf
