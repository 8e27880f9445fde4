// What is to be known of task vectors d_k = x_k - b, from one read of the base b and the models x_k.
//
// A tensor is worked on in pieces of at most kPiece elements: the base is widened to float32, each
// d_k is rounded to float32 once, and from these come
//   products    <v_i, v_j> for v = (b, d_1, ..., d_K), i <= j: lengths, cosines, lengths of models
//   absolute    sum |v_i|
//   largest     max |b|, |x_k|, |d_k|
//   changed     elements with d_k != 0; overlap and conflicts of two models: both changed, and with
//               different signs; shared and disputed: the same of any two models
//   bins        sampled |d_k| by the upper bits of their float32 codes
// Products of two float32 are exact in float64; they are summed in eight lanes, position mod 8 in
// the piece. Magnitudes are summed in sixteen float32 lanes for one piece, then in float64. An element that is not finite in the base or in a model counts as not changed.
#pragma once

#include <cstdint>

#include "../core/dtypes.h"

namespace clf {

constexpr int64_t kPiece = 1024;       // scratch of four vectors stays in L1
constexpr int64_t kPieceSigns = kPiece / 16;  // bits of sixteen elements in one number
constexpr int kSumLanes = 8;
constexpr int kBinShift = 20;          // eight bins per power of two
constexpr int kBins = 1 << (31 - kBinShift);
constexpr int64_t kSampleRun = 512;    // of each run sixteen neighbours are sampled
constexpr int64_t kSampleWidth = 16;

static constexpr int64_t pairs_of(int64_t n) { return n * (n + 1) / 2; }
// Of i <= j among n vectors, row by row.
static constexpr int64_t pair_index(int64_t i, int64_t j, int64_t n) {
  return i * n - i * (i - 1) / 2 + (j - i);
}
// Where in the run that starts at a flat index the sample lies, in sixteens: 0 to 31.
static inline int64_t sample_place(int64_t index) {
  return int64_t((uint64_t(index) * 0x9E3779B97F4A7C15ull) >> 59);
}

struct SurveySource {
  const uint8_t* x = nullptr;  // element 0 of the piece
  DType dtype = DType::F32;
};

// Sums of the pieces that were taken so far; the arrays belong to the caller.
struct SurveySums {
  double* products = nullptr;   // [pairs_of(K + 1)][kSumLanes]
  double* absolute = nullptr;   // [K + 1]
  double* squares = nullptr;    // [K + 1], of this piece alone
  uint32_t* largest = nullptr;  // [2 K + 1] codes of this piece: b, x_1 .. x_K, d_1 .. d_K
  int64_t* nonfinite = nullptr; // [K + 1]
  int64_t* changed = nullptr;   // [K]
  int64_t* overlap = nullptr;   // [K (K - 1) / 2]: (1, 2), (1, 3), ...
  int64_t* conflicts = nullptr; // likewise
  int64_t shared = 0, disputed = 0;
  uint64_t* bins = nullptr;     // [K][kBins]
  int64_t sampled = 0;          // elements, the same for each model
};

struct SurveyPiece {
  int64_t n = 0;
  int64_t index0 = 0;  // flat index of element 0 in the tensor
  int models = 0;
  const SurveySource* sources = nullptr;  // the base first
  bool sample_all = false;
  float* values = nullptr;     // scratch, [K + 1][kPiece]
  uint16_t* signs = nullptr;   // scratch, [2 K][kPieceSigns]: d > 0, d < 0
};

struct SurveyKernels {
  void (*take)(const SurveyPiece& piece, SurveySums& sums);
};

extern const SurveyKernels kSurveyPortable;
#ifdef CL_FAST_X86
extern const SurveyKernels kSurveyAvx2;
extern const SurveyKernels kSurveyAvx512;
#endif

}  // namespace clf
