#include "products_impl.h"

namespace clf {
const OrthogonalKernels kOrthogonalAvx512 = {products, apply};
}  // namespace clf
