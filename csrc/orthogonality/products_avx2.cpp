#include "products_impl.h"

namespace clf {
const OrthogonalKernels kOrthogonalAvx2 = {products, apply};
}  // namespace clf
