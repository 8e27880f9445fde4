// Exact selection by magnitude on the GPU: launchers of select.cu. Nothing here syncs or allocates.
#pragma once

#include "../cuda/batch.h"

namespace clf {

struct SelectOnDevice {
  bool difference = true;
  bool whole_model = false;  // one threshold per model over all rows
  bool first_ties = true;    // else: all ties stay if `all_ties`, none if not
  bool all_ties = false;
  std::vector<int64_t> counts;  // per entry, or per model; -1 keeps everything
  uint8_t* work = nullptr;      // select_workspace bytes, divisible by 16
  int32_t* codes = nullptr;     // per entry, in device memory
  int64_t* cuts = nullptr;
  int64_t* at = nullptr;
};

int64_t select_workspace(const Rows& rows, const SelectOnDevice& call);
void select_on_device(const Rows& rows, const SelectOnDevice& call, cudaStream_t stream);

}  // namespace clf
