#include "pack.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <stdexcept>

#include "../core/in_parallel.h"
#include "../core/isa.h"

namespace clf {
namespace {

constexpr int64_t kUnit = 32 * kPackTile;  // elements that a thread takes at a time
static_assert(kUnit == kStatChunk, "sums are taken by chunk");
static_assert(kPackTile == kBlock, "a tile is a block of the kernels");

struct Bits {
  uint64_t word[kPackTile / 64];
  int64_t words;
  int64_t count = 0;

  // The keep bits of the m elements from `first`, a multiple of kPackTile; none beyond.
  Bits(Stream stream, int64_t first, int64_t m) : words((m + 63) / 64) {
    kernels().keep_bits(stream.key, first, m, stream.threshold, word);
    if (m & 63) word[words - 1] &= (uint64_t(1) << (m & 63)) - 1;
    for (int64_t w = 0; w < words; ++w) count += __builtin_popcountll(word[w]);
  }

  // body(i): the kept positions of the tile, in order.
  template <class Body>
  void each(Body&& body) const {
    for (int64_t w = 0; w < words; ++w)
      for (uint64_t left = word[w]; left; left &= left - 1) body(64 * w + __builtin_ctzll(left));
  }
};

void check(const Packed& packed, int64_t tile, const Bits& bits) {
  const int64_t first = packed.offsets[tile];
  if (first < 0 || packed.offsets[tile + 1] - first != bits.count ||
      packed.offsets[tile + 1] > packed.kept)
    throw std::invalid_argument("offsets must be those of the stream of key and threshold");
}

template <int64_t SIZE>
void gather(const uint8_t* x, const Bits& bits, uint8_t* out) {
  bits.each([&](int64_t i) {
    std::memcpy(out, x + SIZE * i, SIZE);
    out += SIZE;
  });
}

template <int64_t SIZE>
void scatter(const uint8_t* x, const Bits& bits, uint8_t* out) {
  bits.each([&](int64_t i) {
    std::memcpy(out + SIZE * i, x, SIZE);
    x += SIZE;
  });
}

// The kept elements of a tile, packed.
void gather(DType t, const uint8_t* x, const Bits& bits, uint8_t* out) {
  switch (dtype_size(t)) {
    case 4:
      return gather<4>(x, bits, out);
    case 2:
      return gather<2>(x, bits, out);
    default:
      return gather<1>(x, bits, out);
  }
}

const uint8_t* at(const Tensor& x, int64_t i) { return x.data + i * dtype_size(x.dtype); }

// Floats of the kept elements of tile `tile` of x.
struct Gathered {
  alignas(64) uint8_t raw[4 * kPackTile];
  alignas(64) float value[kPackTile];

  void read(const Tensor& x, int64_t first, const Bits& bits) {
    gather(x.dtype, at(x, first), bits, raw);
    kernels().to_f32(x.dtype, raw, bits.count, value);
  }
};

void subtract(float* x, const float* base, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] -= base[i];
}

template <class Body>
void each_tile(int64_t n, int threads, Body&& body) {
  const auto each = [&](int64_t unit) {
    for (int64_t first = unit * kUnit; first < std::min(n, (unit + 1) * kUnit);
         first += kPackTile)
      body(first / kPackTile, first, std::min(kPackTile, n - first));
  };
  in_parallel((n + kUnit - 1) / kUnit, threads, [&] { return each; });
}

}  // namespace

void pack_offsets(Stream stream, int64_t n, int64_t* offsets, int threads) {
  offsets[0] = 0;
  each_tile(n, threads, [&](int64_t tile, int64_t first, int64_t m) {
    offsets[tile + 1] = Bits(stream, first, m).count;
  });
  for (int64_t tile = 0; tile < pack_tiles(n); ++tile) offsets[tile + 1] += offsets[tile];
}

void pack_values(const Tensor& x, const Tensor& base, const Packed& to, uint8_t* values, int64_t n,
                 int threads) {
  each_tile(n, threads, [&](int64_t tile, int64_t first, int64_t m) {
    const Bits bits(to.stream, first, m);
    check(to, tile, bits);
    uint8_t* out = values + to.offsets[tile] * dtype_size(to.dtype);
    if (!base.data && x.dtype == to.dtype) return gather(x.dtype, at(x, first), bits, out);
    Gathered mine, theirs;
    mine.read(x, first, bits);
    if (base.data) {
      theirs.read(base, first, bits);
      subtract(mine.value, theirs.value, bits.count);
    }
    kernels().from_f32(to.dtype, mine.value, bits.count, out);
  });
}

void unpack_values(const Packed& from, const Tensor& base, float factor, DType out_dtype,
                   uint8_t* out, int64_t n, int threads) {
  const int64_t size = dtype_size(out_dtype);
  const Tensor values{from.dtype, from.values};
  each_tile(n, threads, [&](int64_t tile, int64_t first, int64_t m) {
    const Bits bits(from.stream, first, m);
    check(from, tile, bits);
    Gathered theirs;
    alignas(64) float value[kPackTile];
    alignas(64) uint8_t rounded[4 * kPackTile];
    kernels().to_f32(from.dtype, at(values, from.offsets[tile]), bits.count, value);
    if (base.data) {
      theirs.read(base, first, bits);
      subtract(value, theirs.value, bits.count);
    }
    for (int64_t i = 0; i < bits.count; ++i) value[i] *= factor;
    kernels().from_f32(out_dtype, value, bits.count, rounded);
    uint8_t* to = out + first * size;
    std::memset(to, 0, size_t(m * size));
    if (size == 4) {
      scatter<4>(rounded, bits, to);
    } else {
      scatter<2>(rounded, bits, to);
    }
  });
}

int64_t draw_bits(Stream stream, int64_t first, int64_t n, uint64_t* bits) {
  const int64_t words = (n + 63) / 64;
  if (stream.threshold == 0) {
    std::memset(bits, 0, size_t(words) * sizeof(uint64_t));
    return 0;
  }
  kernels().keep_bits(stream.key, first, n, stream.threshold, bits);
  if (n & 63) bits[words - 1] &= (uint64_t(1) << (n & 63)) - 1;
  int64_t count = 0;
  for (int64_t w = 0; w < words; ++w) count += __builtin_popcountll(bits[w]);
  return count;
}

namespace {

template <int64_t SIZE>
void scatter_words(const uint8_t* values, const uint64_t* bits, int64_t n, uint8_t* dense) {
  for (int64_t w = 0; w < (n + 63) / 64; ++w)
    for (uint64_t left = bits[w]; left; left &= left - 1) {
      std::memcpy(dense + SIZE * (64 * w + __builtin_ctzll(left)), values, SIZE);
      values += SIZE;
    }
}

template <int64_t SIZE>
void gather_words(const uint8_t* x, const uint64_t* bits, int64_t n, uint8_t* out) {
  for (int64_t w = 0; w < (n + 63) / 64; ++w)
    for (uint64_t left = bits[w]; left; left &= left - 1) {
      std::memcpy(out, x + SIZE * (64 * w + __builtin_ctzll(left)), SIZE);
      out += SIZE;
    }
}

}  // namespace

void scatter_bits(int64_t item, const uint8_t* values, const uint64_t* bits, int64_t n,
                  uint8_t* dense) {
  if (item == 4) return scatter_words<4>(values, bits, n, dense);
  if (item == 2) return scatter_words<2>(values, bits, n, dense);
  scatter_words<1>(values, bits, n, dense);
}

int64_t pack_run(const Tensor& x, const Tensor& base, Stream stream, int64_t first, int64_t n,
                 uint8_t* values, int64_t* counts, double* sums, int threads) {
  if (first % kStatChunk) throw std::invalid_argument("a run begins at a chunk");
  const int64_t chunks = (n + kStatChunk - 1) / kStatChunk, item = dtype_size(x.dtype);
  const size_t words = size_t(kStatChunk / 64);
  std::vector<uint64_t> bits(size_t(chunks) * words);
  std::vector<double> all(static_cast<size_t>(chunks)), kept(static_cast<size_t>(chunks));
  const auto draw = [&](int64_t chunk) {
    const int64_t at_chunk = chunk * kStatChunk, m = std::min(kStatChunk, n - at_chunk);
    uint64_t* mine = &bits[size_t(chunk) * words];
    TermView term;
    term.x = at(x, at_chunk);
    term.dtype = x.dtype;
    term.sparsify = Sparsify::Drop;
    term.key = stream.key;
    term.threshold = stream.threshold;
    kernels().l1(term, base.dtype, at(base, at_chunk), m, first + at_chunk, false, mine,
                 &all[size_t(chunk)], &kept[size_t(chunk)]);
    if (m & 63) mine[(m + 63) / 64 - 1] &= (uint64_t(1) << (m & 63)) - 1;
    int64_t count = 0;
    for (int64_t w = 0; w < (m + 63) / 64; ++w) count += __builtin_popcountll(mine[w]);
    counts[chunk] = count;
  };
  in_parallel(chunks, threads, [&] { return draw; });
  std::vector<int64_t> before(size_t(chunks) + 1, 0);
  for (int64_t c = 0; c < chunks; ++c) {
    before[size_t(c) + 1] = before[size_t(c)] + counts[c];
    sums[0] += all[size_t(c)];
    sums[1] += kept[size_t(c)];
  }
  const auto take = [&](int64_t chunk) {
    const int64_t at_chunk = chunk * kStatChunk, m = std::min(kStatChunk, n - at_chunk);
    const uint64_t* mine = &bits[size_t(chunk) * words];
    uint8_t* out = values + before[size_t(chunk)] * item;
    if (item == 4) return gather_words<4>(at(x, at_chunk), mine, m, out);
    if (item == 2) return gather_words<2>(at(x, at_chunk), mine, m, out);
    gather_words<1>(at(x, at_chunk), mine, m, out);
  };
  in_parallel(chunks, threads, [&] { return take; });
  return before.back();
}

std::pair<double, double> drop_sums(const Tensor& x, const Tensor& base, DType held, Stream stream,
                                    int64_t n, int threads) {
  const int64_t chunks = (n + kStatChunk - 1) / kStatChunk;
  std::vector<double> all(static_cast<size_t>(chunks)), kept(static_cast<size_t>(chunks));
  const auto sum = [&](int64_t chunk) {
    const int64_t first = chunk * kStatChunk, m = std::min(kStatChunk, n - first);
    TermView term;
    term.x = at(x, first);
    term.dtype = x.dtype;
    term.sparsify = Sparsify::Drop;
    term.key = stream.key;
    term.threshold = stream.threshold;
    const uint8_t* subtracted = base.data ? at(base, first) : nullptr;
    std::vector<uint8_t> rounded;
    if (subtracted && held != DType::F32) {
      rounded.resize(size_t(m * dtype_size(held)));
      alignas(64) float value[kBlock], theirs[kBlock];
      for (int64_t o = 0; o < m; o += kBlock) {
        const int64_t k = std::min(kBlock, m - o);
        kernels().to_f32(x.dtype, at(x, first + o), k, value);
        kernels().to_f32(base.dtype, at(base, first + o), k, theirs);
        subtract(value, theirs, k);
        kernels().from_f32(held, value, k, rounded.data() + o * dtype_size(held));
      }
      term.x = rounded.data();
      term.dtype = held;
      subtracted = nullptr;
    }
    std::vector<uint64_t> bits(kStatChunk / 64);
    kernels().l1(term, subtracted ? base.dtype : DType::F32, subtracted, m, first, false,
                 bits.data(), &all[size_t(chunk)], &kept[size_t(chunk)]);
  };
  in_parallel(chunks, threads, [&] { return sum; });
  double total = 0.0, total_kept = 0.0;
  for (size_t chunk = 0; chunk < all.size(); ++chunk) {
    total += all[chunk];
    total_kept += kept[chunk];
  }
  return {total, total_kept};
}

namespace {

// What one thread needs for a block of a row.
struct Scratch {
  std::unique_ptr<float[]> floats;
  std::vector<TermView> views;
  std::vector<uint64_t> bits;
  float *base, *sum, *deltas, *inner;

  explicit Scratch(size_t terms) : views(terms), bits(terms * (kPackTile / 64)) {
    const int64_t k = int64_t(terms), line = 16;  // the kernels are fastest on whole cache lines
    floats.reset(new float[size_t(scratch_floats(k) + (k + 2) * kBlock + line)]);
    const auto off = int64_t(reinterpret_cast<uintptr_t>(floats.get()) / sizeof(float)) % line;
    base = floats.get() + (line - off) % line;
    sum = base + kBlock;
    deltas = sum + kBlock;
    inner = deltas + k * kBlock;
  }
};

void expand(const PackedTerm& term, int64_t first, int64_t m, const float* base, float* delta) {
  const Packed& packed = term.packed;
  const Tensor values{packed.dtype, packed.values};
  if (!packed.offsets) {
    kernels().to_f32(packed.dtype, at(values, first), m, delta);
    if (base) subtract(delta, base, m);
    return;
  }
  const int64_t tile = first / kPackTile;
  const Bits bits(packed.stream, first, m);
  check(packed, tile, bits);
  alignas(64) float value[kPackTile];
  kernels().to_f32(packed.dtype, at(values, packed.offsets[tile]), bits.count, value);
  std::memset(delta, 0, size_t(m) * sizeof(float));
  const float* from = value;
  if (base) {
    bits.each([&](int64_t i) { delta[i] = *from++ - base[i]; });
  } else {
    bits.each([&](int64_t i) { delta[i] = *from++; });
  }
}

// Packed values back in their places, in their own dtype; the kernel masks what is between them.
void place(const PackedTerm& term, int64_t first, int64_t m, uint8_t* dense, uint64_t* keep,
           TermView& to) {
  const Packed& packed = term.packed;
  const int64_t tile = first / kPackTile, size = dtype_size(packed.dtype);
  const Bits bits(packed.stream, first, m);
  check(packed, tile, bits);
  std::memset(dense, 0, size_t(m * size));
  const uint8_t* values = packed.values + packed.offsets[tile] * size;
  if (size == 4) {
    scatter<4>(values, bits, dense);
  } else {
    scatter<2>(values, bits, dense);
  }
  std::memcpy(keep, bits.word, size_t(bits.words) * sizeof(uint64_t));
  to.x = dense;
  to.sparsify = Sparsify::Drop;
  to.bits = keep;
}

// Where every term is the same kind of thing, the kernel takes base and differences itself.
void combine_alike(const PackedRow& row, int64_t first, int64_t m, Scratch& scratch,
                   TileView& view) {
  view.base = row.base.data ? at(row.base, first) : nullptr;
  view.base_dtype = row.base.dtype;
  view.out = row.out + first * dtype_size(row.out_dtype);
  view.out_dtype = row.out_dtype;
  for (size_t k = 0; k < row.terms.size(); ++k) {
    const PackedTerm& term = row.terms[k];
    TermView& to = scratch.views[k];
    to.dtype = term.packed.dtype;
    if (term.packed.offsets) {
      place(term, first, m, reinterpret_cast<uint8_t*>(scratch.deltas + int64_t(k) * kBlock),
            scratch.bits.data() + k * (kPackTile / 64), to);
    } else {
      to.x = at(Tensor{term.packed.dtype, term.packed.values}, first);
    }
  }
  kernels().combine(view);
}

// Deltas beside finetuned values: all become float32 deltas first, and the base is added last.
void combine_unlike(const PackedRow& row, int64_t first, int64_t m, Scratch& scratch,
                    TileView& view) {
  kernels().to_f32(row.base.dtype, at(row.base, first), m, scratch.base);
  view.difference = false;
  view.out = reinterpret_cast<uint8_t*>(scratch.sum);
  for (size_t k = 0; k < row.terms.size(); ++k) {
    const PackedTerm& term = row.terms[k];
    float* delta = scratch.deltas + int64_t(k) * kBlock;
    expand(term, first, m, term.delta ? nullptr : scratch.base, delta);
    scratch.views[k].x = reinterpret_cast<const uint8_t*>(delta);
  }
  kernels().combine(view);
  for (int64_t i = 0; i < m; ++i) scratch.sum[i] = scratch.base[i] + scratch.sum[i];
  kernels().from_f32(row.out_dtype, scratch.sum, m, row.out + first * dtype_size(row.out_dtype));
}

void combine_block(const PackedRow& row, const PackedPolicy& policy, int64_t first, int64_t m,
                   Scratch& scratch) {
  TileView view;
  view.n = m;
  view.difference = policy.difference;
  view.elect = policy.elect;
  view.vote_weighted = policy.vote_weighted;
  view.reduce = policy.reduce;
  view.divide_by_weights = policy.divide_by_weights;
  view.denominator = row.denominator;
  view.lambda = policy.lambda;
  view.n_terms = int(row.terms.size());
  view.terms = scratch.views.data();
  view.scratch = scratch.inner;
  bool alike = true;
  for (size_t k = 0; k < row.terms.size(); ++k) {
    const PackedTerm& term = row.terms[k];
    alike = alike && term.delta != policy.difference;
    TermView& to = scratch.views[k] = TermView{};
    to.weight = term.weight;
    to.scale = term.scale;
    to.rescale = term.rescale;
  }
  if (alike) {
    combine_alike(row, first, m, scratch, view);
  } else {
    combine_unlike(row, first, m, scratch, view);
  }
}

}  // namespace

void combine_packed(const std::vector<PackedRow>& rows, const PackedPolicy& policy, int threads) {
  std::vector<int64_t> ends;  // of the rows, in units
  int64_t units = 0;
  size_t terms = 0;
  for (const PackedRow& row : rows) {
    ends.push_back(units += (row.n + kUnit - 1) / kUnit);
    terms = std::max(terms, row.terms.size());
  }
  if (int64_t(terms) > kMaxTerms) throw std::invalid_argument("too many terms");
  in_parallel(units, threads, [&] {
    return [&, scratch = Scratch(terms)](int64_t unit) mutable {
      const size_t r = size_t(std::upper_bound(ends.begin(), ends.end(), unit) - ends.begin());
      const PackedRow& row = rows[r];
      const int64_t start = (unit - (r ? ends[r - 1] : 0)) * kUnit;
      for (int64_t first = start; first < std::min(row.n, start + kUnit); first += kPackTile)
        combine_block(row, policy, first, std::min(kPackTile, row.n - first), scratch);
    };
  });
}

}  // namespace clf
