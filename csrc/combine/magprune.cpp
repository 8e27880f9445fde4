#include "magprune.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "../core/philox.h"

namespace clf {
namespace {

constexpr int kMostDigits = 4;

struct Row {
  const uint32_t* codes;
  int64_t length;
  const KeepTable& table;
  uint64_t key;
  int64_t first, from, to;
  uint8_t* bytes;
  float* factors;
};

// The `width` bits from bit `low` on are sorted by, in so many passes over digits of so many bits.
struct Keys {
  int low, width, passes, digit, index_bits;
};

// The element `index` of the row is at `position`.
template <bool WHOLE, bool FACTORS>
inline void decide(const Row& row, int64_t index, uint32_t position) {
  if (!WHOLE && (index < row.from || index >= row.to)) return;
  const uint32_t lead = row.table.leading[position], byte = row.bytes[index];
  bool kept = byte < lead;
  if (__builtin_expect(byte == lead, 0))
    kept = stream_keep_from(row.key, uint64_t(row.first + index),
                            uint32_t(row.table.threshold[position]), 1);
  row.bytes[index] = uint8_t(kept);
  if (FACTORS) row.factors[index] = row.table.factor[position];
}

// A stable radix sort, least significant digit first, of the bits of the codes in which the row's
// elements differ. An entry is such a code, turned over so that large ones come first, above the
// index. The last digit's pass finds the final positions, and nothing is stored any more.
template <class Entry, bool WHOLE, bool FACTORS>
void sort_and_decide(const Row& row, const Keys& keys, RankScratch& scratch) {
  const int64_t n = row.length;
  const int low = keys.low, passes = keys.passes, digit = keys.digit, index_bits = keys.index_bits;
  const uint32_t top = (uint32_t(1) << keys.width) - 1u;
  const uint32_t mask = (uint32_t(1) << digit) - 1u;
  const auto key_of = [&](uint32_t code) { return top - ((code >> low) & top); };

  uint32_t counts[kMostDigits][1 << 11];
  for (int p = 0; p < passes; ++p) std::memset(counts[p], 0, (size_t(mask) + 1) * sizeof(uint32_t));
  for (int64_t i = 0; i < n; ++i) {
    uint32_t key = key_of(row.codes[i]);
    for (int p = 0; p < passes; ++p, key >>= digit) ++counts[p][key & mask];
  }
  for (int p = 0; p < passes; ++p) {
    uint32_t sum = 0;
    for (uint32_t d = 0; d <= mask; ++d) {
      const uint32_t here = counts[p][d];
      counts[p][d] = sum;
      sum += here;
    }
  }
  if (passes == 1) {
    for (int64_t i = 0; i < n; ++i)
      decide<WHOLE, FACTORS>(row, i, counts[0][key_of(row.codes[i])]++);
    return;
  }
  Entry* now = nullptr;
  Entry* next = nullptr;
  {
    const size_t words = (size_t(n) * sizeof(Entry) + 7) / 8;
    for (auto& half : scratch.entries)
      if (half.size() < words) half.resize(words);
    now = reinterpret_cast<Entry*>(scratch.entries[0].data());
    next = reinterpret_cast<Entry*>(scratch.entries[1].data());
  }
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t key = key_of(row.codes[i]);
    now[counts[0][key & mask]++] = Entry(Entry(key >> digit) << index_bits | Entry(i));
  }
  const Entry indices = Entry((Entry(1) << index_bits) - 1);
  for (int p = 1; p + 1 < passes; ++p) {
    for (int64_t j = 0; j < n; ++j) {
      const Entry e = now[j];
      const uint32_t key = uint32_t(e >> index_bits);
      next[counts[p][key & mask]++] =
          Entry(Entry(key >> digit) << index_bits | (e & indices));
    }
    std::swap(now, next);
  }
  for (int64_t j = 0; j < n; ++j) {
    const Entry e = now[j];
    decide<WHOLE, FACTORS>(row, int64_t(e & indices),
                           counts[passes - 1][uint32_t(e >> index_bits)]++);
  }
}

template <class Entry>
void choose(const Row& row, const Keys& keys, RankScratch& scratch) {
  const bool whole = row.from == 0 && row.to == row.length;
  if (whole) {
    if (row.factors) return sort_and_decide<Entry, true, true>(row, keys, scratch);
    return sort_and_decide<Entry, true, false>(row, keys, scratch);
  }
  if (row.factors) return sort_and_decide<Entry, false, true>(row, keys, scratch);
  return sort_and_decide<Entry, false, false>(row, keys, scratch);
}

}  // namespace

void KeepTable::make(int64_t n, double rho, double eps) {
  if (length == n && density == rho && epsilon == eps) return;
  length = n;
  density = rho;
  epsilon = eps;
  threshold.resize(size_t(n));
  leading.resize(size_t(n));
  factor.resize(size_t(n));
  for (int64_t j = 0; j < n; ++j) {
    double p = rho;
    if (n > 1) {
      const double share = double(n - 1 - j) / double(n - 1);
      const double rise = 2.0 * eps * share;
      p = (rho - eps) + rise;
    }
    const double t = std::min(4294967296.0, std::floor(p * 4294967296.0 + 0.5));
    threshold[size_t(j)] = uint64_t(t);
    leading[size_t(j)] = uint16_t(threshold[size_t(j)] >> 24);
    factor[size_t(j)] = float(4294967296.0 / t);
  }
}

void magprune_row(const uint32_t* codes, const KeepTable& table, uint64_t key, int64_t first,
                  int64_t from, int64_t to, uint8_t* bytes, float* factors, RankScratch& scratch) {
  const Row row{codes, table.length, table, key, first, from, to, bytes, factors};
  uint32_t all = 0xffffffffu, any = 0;
  for (int64_t i = 0; i < row.length; ++i) {
    all &= codes[i];
    any |= codes[i];
  }
  const uint32_t differ = all ^ any;  // the bits that are not the same in the whole row
  Keys keys{};
  keys.low = differ ? __builtin_ctz(differ) : 0;
  keys.width = differ ? 32 - __builtin_clz(differ) - keys.low : 1;
  const int most = row.length < 2048 ? 8 : 11;  // a short row must not drown in its counts
  keys.passes = (keys.width + most - 1) / most;
  keys.digit = (keys.width + keys.passes - 1) / keys.passes;
  keys.index_bits = 1;
  while ((int64_t(1) << keys.index_bits) < row.length) ++keys.index_bits;
  // the first digit needs no room, since it is used before anything is stored
  if (keys.width - keys.digit + keys.index_bits <= 32) {
    choose<uint32_t>(row, keys, scratch);
  } else {
    choose<uint64_t>(row, keys, scratch);
  }
}

void pack_bytes(const uint8_t* bytes, int64_t n, uint64_t* bits) {
  for (int64_t i = 0; i < n; i += 64) {
    uint64_t word = 0;
    const int64_t m = std::min<int64_t>(64, n - i);
    int64_t j = 0;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (; j + 8 <= m; j += 8) {
      uint64_t eight;
      std::memcpy(&eight, bytes + i + j, 8);
      word |= ((eight * 0x0102040810204080ull) >> 56) << j;
    }
#endif
    for (; j < m; ++j) word |= uint64_t(bytes[i + j]) << j;
    bits[i / 64] = word;
  }
}

}  // namespace clf
