#include "products.h"

#include "../combine/kernels.h"
#include "../core/isa.h"

namespace clf {
namespace {

const OrthogonalKernels& chosen() {
#ifdef CL_FAST_X86
  if (&kernels() == &kKernelsAvx512) return kOrthogonalAvx512;
  if (&kernels() == &kKernelsAvx2) return kOrthogonalAvx2;
#endif
  return kOrthogonalPortable;
}

}  // namespace

void orthogonal_products(const std::vector<OrthogonalPair>& pairs, float* s) {
  DefaultFloatEnvironment environment;
  for (const OrthogonalPair& pair : pairs) {
    chosen().products(pair, s);
    s += pair.r * pair.past;
  }
}

void orthogonal_apply(const std::vector<OrthogonalPair>& pairs, const float* f) {
  DefaultFloatEnvironment environment;
  for (const OrthogonalPair& pair : pairs) {
    chosen().apply(pair, f);
    f += pair.r * pair.past;
  }
}

}  // namespace clf
