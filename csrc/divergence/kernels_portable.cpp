#include "kernels_impl.h"

namespace clf {
const RowKernels kRowsPortable = kTable;
}  // namespace clf
