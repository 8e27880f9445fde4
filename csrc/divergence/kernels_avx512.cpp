#include "kernels_impl.h"

namespace clf {
const RowKernels kRowsAvx512 = kTable;
}  // namespace clf
