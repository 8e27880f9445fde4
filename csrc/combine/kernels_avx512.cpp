#include <type_traits>

#include "../core/simd_avx512.h"
#include "kernels_impl.h"

CLF_KERNEL_TABLE(kKernelsAvx512, "avx512")
