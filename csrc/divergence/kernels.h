// Blocks of a row of logits in float32: exponentials, divergences, log-probs and their gradients.
//
//   z    values whose softmax is taken; what a row lacks up to a multiple of sixteen is -inf
//   a = z - top (student), b (teacher); lp = a - log, lq; p = e^lp, q = e^lq
//   d = lq - lp, taken as (b - a) - (log_t - log_s)
//
// Sums run over sixteen lanes (column mod 16), in float32 over sixteen columns of a lane, from there
// in float64, so that rows of any length keep the accuracy of short ones. All tables give the same
// bytes: IEEE add, sub, mul and div in a fixed order. Exponentials, logarithms and tanh are within
// about 1 ulp; an exponential below 2^-126 is 0.
#pragma once

#include <cstdint>

namespace clf {

enum class Divergence : int {
  ForwardKl = 0,
  ReverseKl = 1,
  Jsd = 2,
  SkewForwardKl = 3,
  SkewReverseKl = 4,
  Tvd = 5
};
constexpr int kDivergences = 6;

// What turns stored numbers into z: softcap tanh(scale x / softcap) / T, or log(x) / T.
struct RowValues {
  float scale = 1.0f;
  float softcap = 0.0f;  // 0: none
  float temperature = 1.0f;
  bool probs = false;

  bool plain() const {
    return scale == 1.0f && softcap == 0.0f && temperature == 1.0f && !probs;
  }
};

struct Normal {  // of a row
  float top, log;
};

// The gradient of a block:
//   divergence   dz = g (dL/dz), dL/dz = p - q or p (slope - K)
//   + extra      dz + e exp(z1 - normal1), the cross-entropy without what its id adds
struct GradientView {
  int64_t n;  // a multiple of sixteen
  const float* zs;
  const float* zt;
  Normal s, t;
  float k, g;
  float mix;
  const float* z1;
  Normal one;
  float extra;
  float* out;  // may be zs, zt or z1
};

struct RowKernels {
  // The greatest value, or the least, of n >= 0 numbers; NaN does not count.
  float (*greatest)(const float* x, int64_t n);
  float (*least)(const float* x, int64_t n);
  // z from x, in place or not, n a multiple of sixteen; with a softcap, `bend` gets 1 - tanh^2.
  void (*values)(const RowValues& how, const float* x, int64_t n, float* z, float* bend);
  // Adds sum e^a.
  void (*sum)(const float* z, int64_t n, float top, double* sum);
  // Adds sum e^a, sum e^b and sum e^b (b - a), the summands of KL(teacher, student).
  void (*sums)(const float* a, const float* b, int64_t n, float top_a, float top_b, double* sums);
  // Adds sum e^a and sum e^a a.
  void (*moments)(const float* z, int64_t n, float top, double* sums);
  // Adds the summands of the loss that hold p, those that hold q, and K; those of `jsd` without
  // their weights. `shift` is log_t - log_s.
  void (*terms[kDivergences])(const float* zs, const float* zt, int64_t n, Normal s, Normal t,
                              float shift, float mix, double* sums);
  void (*gradient[kDivergences])(const GradientView& view);
  void (*gradient_extra[kDivergences])(const GradientView& view);
  // out = e exp(z1 - normal1) alone
  void (*extra)(const GradientView& view);
  // out = p (-g - e (lp + H)), where e is `extra`, H is k, and normal s; z is zs
  void (*logprob)(const GradientView& view);
  void (*times)(const float* x, int64_t n, float* out);  // out *= x
};

extern const RowKernels kRowsPortable;
#ifdef CL_FAST_X86
extern const RowKernels kRowsAvx2;
extern const RowKernels kRowsAvx512;
#endif

}  // namespace clf
