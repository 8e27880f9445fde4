// The inner loops of a merge, one table of functions per instruction set.
//
// All tables give the same bytes: only IEEE float32 add, sub, mul and div in a fixed order, no
// fused multiply-add, no reassociation, and statistics in float64 over fixed lanes.
#pragma once

#include <cstdint>

#include "../core/dtypes.h"

namespace clf {

// A band and magprune reach the kernels as a drop whose keep bits are given.
enum class Sparsify : int { None = 0, Trim = 1, Drop = 2, Band = 3, Magprune = 4 };
enum class Elect : int { None = 0, Mass = 1, Frequency = 2 };
enum class Reduce : int { Sum = 0, Mean = 1, Max = 2 };

constexpr int64_t kMaxTerms = 256;
constexpr int64_t kBlock = 2048;       // elements worked on at a time; scratch stays in L1/L2
constexpr int64_t kStatChunk = 65536;  // elements per float64 partial sum; tiles are multiples

struct TermView {
  const uint8_t* x = nullptr;  // element 0 of this call
  DType dtype = DType::F32;
  Sparsify sparsify = Sparsify::None;
  uint32_t code = 0;       // trim: keep |d| bits above this ...
  int64_t ties_until = 0;  // ... and equal ones at positions below this, relative to this call
  uint64_t key = 0;        // drop: random stream and threshold, position relative to `index0`
  uint32_t threshold = 0;
  const uint64_t* bits = nullptr;  // drop: the keep bits from element 0 on, where already drawn
  const float* factors = nullptr;  // drop: a factor for each kept delta, beside bits
  float weight = 1.0f;   // for the divisor
  float scale = 1.0f;    // weight times rescale factor
  float rescale = 1.0f;  // for unweighted votes
  int64_t nonfinite = 0; // out: how many values were not finite
};

struct TileView {
  int64_t n = 0;
  int64_t index0 = 0;  // flat index of element 0, a multiple of 256
  const uint8_t* base = nullptr;
  DType base_dtype = DType::F32;
  bool difference = false;
  bool replace_nonfinite = false;
  Elect elect = Elect::None;
  bool vote_weighted = true;
  Reduce reduce = Reduce::Sum;
  bool divide_by_weights = true;
  float denominator = 1.0f;  // without election
  float lambda = 1.0f;
  int n_terms = 0;
  TermView* terms = nullptr;
  uint8_t* out = nullptr;
  DType out_dtype = DType::F32;
  int64_t base_nonfinite = 0, out_nonfinite = 0;  // out
  float* scratch = nullptr;  // scratch_floats(n_terms)
};

constexpr int64_t scratch_floats(int64_t n_terms) { return (n_terms + 3) * kBlock; }

// A band of magnitudes: |d| codes above `low` and below `high`; of those equal to `low` the ones at
// positions below low_until, of those equal to `high` the ones from high_from on.
struct BandView {
  uint32_t low = 0, high = 0xffffffffu;
  int64_t low_until = 0, high_from = 0;  // relative to the call
};

// Places of the products of K vectors in a packed Gram matrix: row i holds the products with
// j = i .. K - 1.
constexpr int64_t gram_size(int64_t n_terms) { return n_terms * (n_terms + 1) / 2; }
constexpr int64_t gram_place(int64_t n_terms, int64_t i, int64_t j) {
  return i * n_terms - i * (i - 1) / 2 + j - i;
}
// A base, the deltas, and sixteen float64 sums for each product of two, two vectors by two.
constexpr int64_t gram_scratch_floats(int64_t n_terms) {
  return (n_terms + 1) * kBlock + (n_terms + 1) / 2 * ((n_terms + 1) / 2) * 4 * 32;
}

struct Kernels {
  const char* name;
  void (*combine)(TileView& t);
  // Codes |x - base| of the elements with lo <= code <= hi, in any order; returns their number and
  // adds the number of codes above hi to *above. `out` has room for n + 16.
  int64_t (*scan)(DType tx, const uint8_t* x, DType tb, const uint8_t* base, int64_t n,
                  bool replace_nonfinite, uint32_t lo, uint32_t hi, uint32_t* out, int64_t* above);
  int64_t (*count_equal)(DType tx, const uint8_t* x, DType tb, const uint8_t* base, int64_t n,
                         bool replace_nonfinite, uint32_t code);
  // Sums of |d| over one statistics chunk (n <= kStatChunk): all, and those kept by the term (for
  // trimming: those above the threshold). Keep bits are the term's own, or drawn into `bits`, room
  // for kStatChunk.
  void (*l1)(const TermView& term, DType tb, const uint8_t* base, int64_t n, int64_t index0,
             bool replace_nonfinite, uint64_t* bits, double* all, double* kept);
  // Sums of d_i d_j for i <= j over one statistics chunk (n <= kStatChunk), d = x or x - base of the
  // terms' `x` and `dtype`, packed by gram_place. What is not finite counts as 0, in the base too.
  // `scratch` has gram_scratch_floats(n_terms), on a boundary of 64 bytes.
  void (*gram)(const TermView* terms, int n_terms, DType tb, const uint8_t* base, int64_t n,
               float* scratch, double* sums);
  // One bit per element, n rounded up to 64 bits; index0 a multiple of 256.
  void (*keep_bits)(uint64_t key, int64_t index0, int64_t n, uint32_t threshold, uint64_t* bits);
  // The leading byte of each element's draw; room for n rounded up to 256, index0 a multiple of 256.
  void (*stream_bytes)(uint64_t key, int64_t index0, int64_t n, uint8_t* out);
  // The codes |x - base| in order; room for n + 16.
  void (*codes)(DType tx, const uint8_t* x, DType tb, const uint8_t* base, int64_t n,
                bool replace_nonfinite, uint32_t* out);
  // One bit per element: whether it is in the band.
  void (*band_bits)(DType tx, const uint8_t* x, DType tb, const uint8_t* base, int64_t n,
                    bool replace_nonfinite, const BandView& band, uint64_t* bits);
  void (*to_f32)(DType t, const uint8_t* x, int64_t n, float* out);
  void (*from_f32)(DType t, const float* x, int64_t n, uint8_t* out);
};

extern const Kernels kKernelsPortable;
#ifdef CL_FAST_X86
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
#endif

}  // namespace clf
