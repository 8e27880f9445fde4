#include "../core/simd_portable.h"
#include "kernels_impl.h"

namespace clf {
const SurveyKernels kSurveyPortable = {take};
}  // namespace clf
