#include <type_traits>

#include "../core/simd_avx2.h"
#include "kernels_impl.h"

CLF_KERNEL_TABLE(kKernelsAvx2, "avx2")
