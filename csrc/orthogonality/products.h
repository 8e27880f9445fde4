// The small products of the O-LoRA penalty, for all modules of a model in one call: float32.
//
//   S = A P^T          A [r, d] new, P [R, d] past; r and R are ranks, d a width
//   G = sum_p F_p P_p  F_p [r, R] the factor of each past task: sign(S) or 2 S, times the upstream
//
// A matrix library is called once per module and spends its time on being called; here the rows of
// a module are read once, in the order they lie. Sums run over sixteen lanes (column mod 16) in
// order, then over the lanes in order, on every instruction set.
#pragma once

#include <cstdint>
#include <vector>

namespace clf {

struct OrthogonalPair {  // one past task of one module; pairs of a module follow one another
  const float* a;  // read by the products
  const float* p;
  float* out;      // written by the applied factors: the gradient of the module, or null
  int64_t r, past, d;
  bool first;      // of its module
};

struct OrthogonalKernels {
  void (*products)(const OrthogonalPair& pair, float* s);
  void (*apply)(const OrthogonalPair& pair, const float* f);
};

extern const OrthogonalKernels kOrthogonalPortable;
#ifdef CL_FAST_X86
extern const OrthogonalKernels kOrthogonalAvx2;
extern const OrthogonalKernels kOrthogonalAvx512;
#endif

// S, block after block; F likewise.
void orthogonal_products(const std::vector<OrthogonalPair>& pairs, float* s);
void orthogonal_apply(const std::vector<OrthogonalPair>& pairs, const float* f);

}  // namespace clf
