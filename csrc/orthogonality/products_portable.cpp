#include "products_impl.h"

namespace clf {
const OrthogonalKernels kOrthogonalPortable = {products, apply};
}  // namespace clf
