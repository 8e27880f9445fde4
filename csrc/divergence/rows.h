// Rows of logits: normalisers, divergences between two rows, log-probs, and their gradients.
//
// The twin of cl_fast/ops/vocabulary_rows.py, which has the formulas. A row is worked on in blocks
// that stay in cache, each widened to float32 first (float32 rows as they lie): once for the maximum,
// once for the sums of exponentials, and for the kinds that need a normalised row first once more.
// Rows are shared out over threads; a result does not depend on their number.
#pragma once

#include <cstdint>

#include "../core/dtypes.h"
#include "kernels.h"

namespace clf {

struct Rows {  // element j of row i is at data + (i * stride + j) * dtype_size(dtype)
  DType dtype;
  const uint8_t* data;
  int64_t stride;
  int64_t columns;
  RowValues how;
};

struct RowsOut {  // as many columns as the student; may be the student, row for row
  DType dtype;
  uint8_t* data;
  int64_t stride;
};

struct CrossEntropy {  // to add to a gradient; null: nothing
  const float* grad = nullptr;
  const float* normal = nullptr;  // [M, 2]
  const int64_t* ids = nullptr;
};

struct DivergenceCall {
  int64_t rows;
  Rows student, teacher;  // teacher.columns <= student.columns
  Divergence kind;
  float mix;
};

// [M, 2]: top, log.
void row_normalisers(int64_t rows, const Rows& x, float* out, int threads);
// [M, 2]: loss, K; normal_s and normal_t are [M, 2].
void divergence_sums(const DivergenceCall& call, const float* normal_s, const float* normal_t,
                     float* out, int threads);
// losses [M], stats [M, 5]: top_s, log_s, top_t, log_t, K.
void divergence_forward(const DivergenceCall& call, float* losses, float* stats, int threads);
void divergence_gradient(const DivergenceCall& call, const RowsOut& out, const float* grad,
                         const float* stats, const CrossEntropy& extra, int threads);
// [M, 4]: top, log, E, z of the id.
void logprob_forward(int64_t rows, const Rows& x, const int64_t* ids, float* out, int threads);
// entropy_grad may be null.
void logprob_gradient(int64_t rows, const Rows& x, const RowsOut& out, const float* grad,
                      const float* entropy_grad, const int64_t* ids, const float* stats,
                      int threads);

}  // namespace clf
