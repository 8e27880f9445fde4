#include <type_traits>

#include "../core/simd_portable.h"
#include "kernels_impl.h"

CLF_KERNEL_TABLE(kKernelsPortable, "portable")
