// MAGPRUNE (DELLA-Merging, Deep et al. 2024): an element of a row is kept with a probability that
// grows linearly with the rank of its magnitude in the row.
//
// Position j of an element: how many of its row come before it, by falling magnitude code and, of
// equal codes, by rising index. Of a row of L elements position j is kept with probability
//   p_j = (density - epsilon) + 2 epsilon (L - 1 - j) / (L - 1)      in float64; L = 1: density
//   T_j = min(2^32, floor(p_j 2^32 + 1/2)),   kept iff the draw of its flat index is below T_j
#pragma once

#include <cstdint>
#include <vector>

namespace clf {

// The thresholds of every position of a row.
struct KeepTable {
  int64_t length = 0;
  double density = 0.0, epsilon = 0.0;
  std::vector<uint64_t> threshold;
  std::vector<uint16_t> leading;  // threshold >> 24: 256 where all draws are below
  std::vector<float> factor;      // 1 / keep rate

  // Makes it the table of a row of n elements, unless it is that already.
  void make(int64_t n, double density, double epsilon);
};

// Memory that a worker keeps from row to row.
struct RankScratch {
  std::vector<uint64_t> entries[2];
};

// Decides one row. `codes` are its magnitudes, `first` is the flat index of its first element;
// `bytes` points at where element 0 of the row would be, and holds, for the elements [from, to),
// the leading byte of their draws; these become 1 where kept and 0 where not. `factors`, if any,
// is laid out likewise and gets 1 / keep rate of these elements.
void magprune_row(const uint32_t* codes, const KeepTable& table, uint64_t key, int64_t first,
                  int64_t from, int64_t to, uint8_t* bytes, float* factors, RankScratch& scratch);

// One bit for each of n bytes that are 0 or 1.
void pack_bytes(const uint8_t* bytes, int64_t n, uint64_t* bits);

}  // namespace clf
