#include "kernels_impl.h"

namespace clf {
const RowKernels kRowsAvx2 = kTable;
}  // namespace clf
