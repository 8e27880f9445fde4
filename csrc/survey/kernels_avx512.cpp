#include "../core/simd_avx512.h"
#include "kernels_impl.h"

namespace clf {
const SurveyKernels kSurveyAvx512 = {take};
}  // namespace clf
