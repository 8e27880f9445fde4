// combine on the GPU: launchers of combine.cu and sums.cu. Nothing here syncs or allocates.
#pragma once

#include "../cuda/batch.h"
#include "kernels.h"

namespace clf {

enum class DropForm { None, Trim, Drop, Packed };

struct CombineOnDevice {
  DropForm form = DropForm::None;
  bool difference = true;
  Elect elect = Elect::None;
  bool vote_weighted = true;
  Reduce reduce = Reduce::Sum;
  bool divide_by_weights = true;
  float lambda = 1.0f;
  // In device memory, one per entry, or null: what a selection or a sum on the device has found.
  const int32_t* codes = nullptr;
  const int64_t* cuts = nullptr;
  const float* scales = nullptr;
  const float* rescales = nullptr;
};

void combine_on_device(const Rows& rows, const CombineOnDevice& call, cudaStream_t stream);

// sum|d| and sum|d kept| of each entry, float64, in the one order that all backends follow. Kept is
// what the stream keeps, or, with codes, what lies above the code. `partial` has room for two
// numbers per 65536 elements of each entry, an entry of n elements rounded up.
void absolute_sums_on_device(const Rows& rows, bool difference, const int32_t* codes,
                             double* partial, double* totals, double* kept, cudaStream_t stream);
int64_t partial_sums(const Rows& rows);

}  // namespace clf
