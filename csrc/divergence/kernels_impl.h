// Compiled once per instruction set; everything here has internal linkage.
//
// Polynomials: Moshier's Cephes (expf, logf).
#include <cstdint>
#include <cstring>

#include "kernels.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are passed between inlined functions only
#endif

namespace clf {
namespace {

constexpr int64_t kLanes = 16;
#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
constexpr int kParts = int(kLanes) / kWidth;
constexpr int64_t kGroup = 16 * kLanes;  // columns whose sums stay in float32

typedef float V __attribute__((vector_size(kWidth * sizeof(float))));
typedef uint32_t U __attribute__((vector_size(kWidth * sizeof(float))));
typedef int32_t I __attribute__((vector_size(kWidth * sizeof(float))));

#define CLF_INLINE inline __attribute__((always_inline))

CLF_INLINE V all(float x) {
  V v;
  for (int i = 0; i < kWidth; ++i) v[i] = x;
  return v;
}
CLF_INLINE V load(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
CLF_INLINE void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
CLF_INLINE U bits(V x) { return (U)x; }
CLF_INLINE V from_bits(U x) { return (V)x; }
CLF_INLINE V magnitude(V x) { return from_bits(bits(x) & 0x7fffffffu); }
CLF_INLINE V with_sign_of(V x, V sign) { return from_bits(bits(x) | (bits(sign) & 0x80000000u)); }

constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2High = 0.693359375f;  // its products with exponents are exact
constexpr float kLn2Low = -2.12194440e-4f;

// x = n ln 2 + r; the integer n is in the low bits of `shifted`.
CLF_INLINE V reduced(V x, V* shifted) {
  *shifted = x * kLog2e + kRound;
  const V n = *shifted - kRound;
  return (x - n * kLn2High) - n * kLn2Low;
}

// e^r - 1 - r
CLF_INLINE V exp_tail(V r) {
  V y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  return y * (r * r);
}

constexpr float kLeast = 1.17549435e-38f;  // 2^-126
constexpr float kLogLeast = -87.3365447505f;

// 2^n, from what `reduced` shifted
CLF_INLINE V power_of(V shifted) { return from_bits((bits(shifted) << 23) + 0x3f800000u); }

// e^x and e^x - 1 from e^r - 1. Times a power and not an integer added to the bits, which would
// take the payload of a NaN for an exponent.
CLF_INLINE V exp_of(V x, V tail, V shifted) {
  const V y = (tail + 1.0f) * power_of(shifted);
  return x < kLogLeast ? V{} : y;
}
CLF_INLINE V expm1_of(V x, V tail, V shifted) {
  const V power = power_of(shifted);
  const V y = tail * power + (power - 1.0f);
  return x < -18.0f ? all(-1.0f) : y;
}

// e^x for x <= 88 and NaN; 0 where it is below 2^-126.
CLF_INLINE V exp(V x) {
  V shifted;
  const V r = reduced(x, &shifted);
  return exp_of(x, exp_tail(r) + r, shifted);
}

// e^x - 1, -0 and 0 as they are; beyond 88 as at 88.
CLF_INLINE V expm1(V x) {
  x = x > 88.0f ? all(88.0f) : x;
  V shifted;
  const V r = reduced(x, &shifted);
  return expm1_of(x, exp_tail(r) + r, shifted);
}

// log(u + c), c a correction far smaller than u > 0.
CLF_INLINE V log_of(V u, V c, V exponent) {
  // u = 2^n m, m in [sqrt(1/2), sqrt(2))
  const U shifted = bits(u) - 0x3f3504f3u;
  const U n = (U)((I)shifted >> 23);
  const V m = from_bits(bits(u) - (n << 23));
  // the integer n, from the bits of kRound + n
  const V e = (from_bits(n + 0x4b400000u) - kRound) + exponent;
  const V f = (m - 1.0f) + c * from_bits(0x3f800000u - (n << 23));
  const V z = f * f;
  V y = f * 7.0376836292e-2f - 1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f - 1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f - 1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f - 2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * z;
  y = y + e * kLn2Low;
  y = y - z * 0.5f;
  return (f + y) + e * kLn2High;
}

constexpr float kInf = __builtin_inff();

// log x of any x: -inf at 0, NaN below it.
CLF_INLINE V log(V x) {
  const V zero = V{};
  const V small = x < kLeast ? all(1.0f) : zero;
  V y = log_of(x * (small * 8388607.0f + 1.0f), zero, small * -23.0f);
  y = x == 0.0f ? all(-kInf) : y;
  y = x < 0.0f ? all(__builtin_nanf("")) : y;
  return (x != x) | (x == kInf) ? x : y;
}

// log(1 + x) for -1 <= x <= 0, 0 as it is.
CLF_INLINE V log1p(V x) {
  const V u = x + 1.0f;
  V y = log_of(u, x - (u - 1.0f), V{});
  y = u == 0.0f ? all(-kInf) : y;
  return x != x ? x : y;
}

// tanh x and 1 - tanh^2 x, from e^(-2|x|) where that is small and from e^(-2|x|) - 1 elsewhere.
CLF_INLINE V tanh(V x, V* bend) {
  const V y = magnitude(x) * -2.0f;
  V shifted;
  const V r = reduced(y, &shifted);
  const V tail = exp_tail(r) + r;
  const V e = exp_of(y, tail, shifted), e1 = expm1_of(y, tail, shifted);
  const V above = e + 1.0f;
  *bend = (e * 4.0f) / (above * above);
  const V part = (y < -1.1f ? e + e : magnitude(e1)) / (y < -1.1f ? above : e1 + 2.0f);
  return with_sign_of(y < -1.1f ? 1.0f - part : part, x);
}

// Sixteen lanes in float32, and what has been added up before in float64.
struct Sum {
  V part[kParts];
  double wide[kLanes];

  CLF_INLINE Sum() : part{}, wide{} {}
  CLF_INLINE void widen() {
    float lanes[kLanes];
    std::memcpy(lanes, part, sizeof lanes);
    for (int i = 0; i < kLanes; ++i) wide[i] = wide[i] + double(lanes[i]);
    for (int i = 0; i < kParts; ++i) part[i] = V{};
  }
  CLF_INLINE double total() const {
    double all = 0.0;
    for (int i = 0; i < kLanes; ++i) all = all + wide[i];
    return all;
  }
};

// body(column, part) for each vector, widen() after each group.
template <class Body, class Widen>
CLF_INLINE void summed(int64_t n, Body body, Widen widen) {
  for (int64_t first = 0; first < n; first += kGroup) {
    const int64_t end = n - first < kGroup ? n : first + kGroup;
    for (int64_t c = first; c < end; c += kLanes)
      for (int i = 0; i < kParts; ++i) body(c + i * kWidth, i);
    widen();
  }
}

template <bool Greatest>
float extreme(const float* x, int64_t n) {
  constexpr float none = Greatest ? -kInf : kInf;
  const auto better = [](V a, V b) {
    if (Greatest) return b > a ? b : a;
    return b < a ? b : a;
  };
  constexpr int kUnroll = 4 * int(kLanes) / kWidth;
  V best[kUnroll];
  for (int i = 0; i < kUnroll; ++i) best[i] = all(none);
  int64_t c = 0;
  for (; c + kUnroll * kWidth <= n; c += kUnroll * kWidth)
    for (int i = 0; i < kUnroll; ++i) best[i] = better(best[i], load(x + c + i * kWidth));
  for (int i = 1; i < kUnroll; ++i) best[0] = better(best[0], best[i]);
  float result = none;
  for (int i = 0; i < kWidth; ++i)
    if (Greatest ? best[0][i] > result : best[0][i] < result) result = best[0][i];
  for (; c < n; ++c)
    if (Greatest ? x[c] > result : x[c] < result) result = x[c];
  return result;
}

template <bool Divide>
CLF_INLINE void values_as(const RowValues& how, const float* x, int64_t n, float* z, float* bend) {
  // A division by a power of two is a multiplication; others are not, to the last bit.
  const float t = how.temperature, inverse = 1.0f / t;
  const auto heat = [&](V v) { return Divide ? v / t : v * inverse; };
  if (how.probs) {
    for (int64_t c = 0; c < n; c += kWidth) store(z + c, heat(log(load(x + c))));
  } else if (how.softcap != 0.0f) {
    const float scale = how.scale, cap = how.softcap;
    for (int64_t c = 0; c < n; c += kWidth) {
      V slope;
      const V v = tanh((load(x + c) * scale) / cap, &slope) * cap;
      store(z + c, heat(v));
      if (bend) store(bend + c, slope);
    }
  } else {
    const float scale = how.scale;
    for (int64_t c = 0; c < n; c += kWidth) store(z + c, heat(load(x + c) * scale));
  }
}

void values(const RowValues& how, const float* x, int64_t n, float* z, float* bend) {
  uint32_t t;
  std::memcpy(&t, &how.temperature, 4);
  // a power of two whose inverse is one too, not subnormal
  const bool power = (t & 0x007fffffu) == 0 && t >= 0x00800000u && t < 0x7e800000u;
  if (power)
    values_as<false>(how, x, n, z, bend);
  else
    values_as<true>(how, x, n, z, bend);
}

// p x, and 0 where z, of which p is the exponential, is -inf: where x is infinite and p > 0 has
// underflowed, the product is still infinite.
CLF_INLINE V counted(V p, V z, V x) {
  const V product = (p < kLeast ? all(kLeast) : p) * x;
  return z == -kInf ? V{} : product;
}

void sum(const float* z, int64_t n, float top, double* to) {
  Sum s;
  summed(
      n, [&](int64_t c, int i) { s.part[i] = s.part[i] + exp(load(z + c) - top); },
      [&] { s.widen(); });
  *to += s.total();
}

void sums(const float* za, const float* zb, int64_t n, float top_a, float top_b, double* to) {
  Sum sa, sb, sd;
  summed(
      n,
      [&](int64_t c, int i) {
        const V a = load(za + c) - top_a, b = load(zb + c) - top_b;
        const V eb = exp(b);
        sa.part[i] = sa.part[i] + exp(a);
        sb.part[i] = sb.part[i] + eb;
        sd.part[i] = sd.part[i] + counted(eb, b, b - a);
      },
      [&] {
        sa.widen();
        sb.widen();
        sd.widen();
      });
  to[0] += sa.total();
  to[1] += sb.total();
  to[2] += sd.total();
}

void moments(const float* z, int64_t n, float top, double* to) {
  Sum s, m;
  summed(
      n,
      [&](int64_t c, int i) {
        const V a = load(z + c) - top;
        const V e = exp(a);
        const V term = e * a;
        s.part[i] = s.part[i] + e;
        m.part[i] = m.part[i] + (e == 0.0f ? V{} : term);
      },
      [&] {
        s.widen();
        m.widen();
      });
  to[0] += s.total();
  to[1] += m.total();
}

// r = log m - log p and d - r = log q - log m: exactly 0 at d = 0, without overflow.
struct Mixture {
  V r, away;
};
CLF_INLINE Mixture mixture(V d, float w) {
  const V shrink = expm1(from_bits(bits(d) | 0x80000000u));
  const V factor = d > 0.0f ? all(1.0f - w) : all(w);
  const V tail = log1p(factor * shrink);
  return {(d > 0.0f ? d : V{}) + tail, (d > 0.0f ? V{} : d) - tail};
}

// Slopes g of a summand: dL/dz = p (g - K).
template <Divergence Kind>
CLF_INLINE V mixture_slope(const Mixture& m, float w) {
  if (Kind == Divergence::SkewReverseKl) return -m.r - expm1(-m.r) * w;
  if (Kind == Divergence::SkewForwardKl) return expm1(m.away) * (w - 1.0f);
  return m.r * (w - 1.0f);
}
CLF_INLINE V sign_slope(V p, V q) {
  const V s = p > q ? all(0.5f) : (p < q ? all(-0.5f) : V{});
  return (p != p) | (q != q) ? p + q : s;
}

template <Divergence Kind>
void terms(const float* zs, const float* zt, int64_t n, Normal s, Normal t, float shift, float w,
           double* to) {
  constexpr bool has_near = Kind != Divergence::ForwardKl && Kind != Divergence::SkewForwardKl;
  constexpr bool has_far =
      Kind == Divergence::ForwardKl || Kind == Divergence::SkewForwardKl || Kind == Divergence::Jsd;
  constexpr bool has_k = Kind != Divergence::ForwardKl && Kind != Divergence::ReverseKl;
  Sum near, far, k;
  summed(
      n,
      [&](int64_t c, int i) {
        const V a = load(zs + c) - s.top, b = load(zt + c) - t.top;
        const V lp = a - s.log, lq = b - t.log, d = (b - a) - shift;
        const V p = exp(lp), q = exp(lq), zero = V{};
        V by_p = zero, by_q = zero, slope = zero;
        if (Kind == Divergence::ForwardKl) {
          by_q = counted(q, b, d);
        } else if (Kind == Divergence::ReverseKl) {
          by_p = counted(p, a, -d);
        } else if (Kind == Divergence::Tvd) {
          by_p = magnitude(p - q) * 0.5f;
          slope = sign_slope(p, q);
        } else {
          const Mixture m = mixture(d, Kind == Divergence::SkewReverseKl ? 1.0f - w : w);
          by_p = p * -m.r;
          by_p = p == 0.0f ? zero : by_p;
          by_q = q * m.away;
          by_q = q == 0.0f ? zero : by_q;
          slope = mixture_slope<Kind>(m, w);
        }
        slope = p * slope;
        if (has_near) near.part[i] = near.part[i] + by_p;
        if (has_far) far.part[i] = far.part[i] + by_q;
        if (has_k) k.part[i] = k.part[i] + (p == 0.0f ? zero : slope);
      },
      [&] {
        if (has_near) near.widen();
        if (has_far) far.widen();
        if (has_k) k.widen();
      });
  to[0] += near.total();
  to[1] += far.total();
  to[2] += Kind == Divergence::ReverseKl ? near.total() : k.total();
}

template <Divergence Kind, bool Extra>
void gradient(const GradientView& v) {
  const GradientView x = v;  // its numbers do not change while `out` is written
  const float shift = x.t.log - x.s.log;
  for (int64_t c = 0; c < x.n; c += kWidth) {
    const V a = load(x.zs + c) - x.s.top, b = load(x.zt + c) - x.t.top;
    const V d = (b - a) - shift, p = exp(a - x.s.log);
    V dz;
    if (Kind == Divergence::ForwardKl) {
      dz = p - exp(b - x.t.log);
    } else {
      V slope;
      if (Kind == Divergence::ReverseKl)
        slope = -d;
      else if (Kind == Divergence::Tvd)
        slope = sign_slope(p, exp(b - x.t.log));
      else
        slope = mixture_slope<Kind>(
            mixture(d, Kind == Divergence::SkewReverseKl ? 1.0f - x.mix : x.mix), x.mix);
      dz = p * (slope - x.k);
      dz = p == 0.0f ? V{} : dz;
    }
    dz = dz * x.g;
    if (Extra) dz = dz + exp((load(x.z1 + c) - x.one.top) - x.one.log) * x.extra;
    store(x.out + c, dz);
  }
}

void extra(const GradientView& v) {
  const GradientView x = v;
  for (int64_t c = 0; c < x.n; c += kWidth)
    store(x.out + c, exp((load(x.z1 + c) - x.one.top) - x.one.log) * x.extra);
}

void logprob(const GradientView& v) {
  const GradientView x = v;
  for (int64_t c = 0; c < x.n; c += kWidth) {
    const V lp = (load(x.zs + c) - x.s.top) - x.s.log;
    const V p = exp(lp);
    const V dz = p * (-x.g - (lp + x.k) * x.extra);
    store(x.out + c, p == 0.0f ? V{} : dz);
  }
}

void times(const float* factors, int64_t n, float* out) {
  for (int64_t c = 0; c < n; c += kWidth) store(out + c, load(out + c) * load(factors + c));
}

#define CLF_EACH(f, ...)                                                                  \
  {f<Divergence::ForwardKl __VA_ARGS__>,     f<Divergence::ReverseKl __VA_ARGS__>,        \
   f<Divergence::Jsd __VA_ARGS__>,           f<Divergence::SkewForwardKl __VA_ARGS__>,    \
   f<Divergence::SkewReverseKl __VA_ARGS__>, f<Divergence::Tvd __VA_ARGS__>}
#define CLF_COMMA ,

constexpr RowKernels kTable = {extreme<true>,
                               extreme<false>,
                               values,
                               sum,
                               sums,
                               moments,
                               CLF_EACH(terms),
                               CLF_EACH(gradient, CLF_COMMA false),
                               CLF_EACH(gradient, CLF_COMMA true),
                               extra,
                               logprob,
                               times};

}  // namespace
}  // namespace clf
