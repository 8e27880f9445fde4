#include "../core/simd_avx2.h"
#include "kernels_impl.h"

namespace clf {
const SurveyKernels kSurveyAvx2 = {take};
}  // namespace clf
