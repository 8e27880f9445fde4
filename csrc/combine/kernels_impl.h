// The kernels of kernels.h, written once over sixteen lanes and compiled once per instruction
// set: a translation unit includes one simd_*.h first. A block of kBlock elements is widened to
// float32 in scratch that stays in cache, each model is folded into it, and the result is stored.
//
// Per element, in float32, models in order (d: delta, w: weight, r: rescale factor, b: base):
//   d_k = keep_k ? x_k - b : 0          v_k = d_k * float(w_k r_k)
//   without election   s = v_0 + v_1 + ...,  s /= denominator
//   with election      majority = sign of sum(vote_k) or of sum(sign(vote_k)), zero counts as +,
//                      s = sum of v_k whose vote agrees, / their weights or count, or the largest
//   out = round(b + lambda s)
#pragma once

#include "../core/lanes.h"
#include "kernels.h"

namespace clf {
namespace {

inline const uint8_t* at(const uint8_t* p, DType t, int64_t i) { return p + i * dtype_size(t); }

// ---------------------------------------------------------------- random stream

void keep_bits(uint64_t key, int64_t index0, int64_t n, uint32_t threshold, uint64_t* bits) {
  const uint32_t want = threshold >> 24;
  const bool deeper = (threshold & 0xffffffu) != 0;
  uint64_t below[kFirstBytes / 64], equal[kFirstBytes / 64];
  uint64_t position[8];
  int64_t where[8];
  int pending = 0;
  const auto settle = [&] {
    uint32_t bytes[8];
    for (int i = pending; i < 8; ++i) position[i] = position[0];
    bytes_at(key, position, 1, bytes);
    const uint32_t next = (threshold >> 16) & 255u;
    for (int i = 0; i < pending; ++i) {
      const bool kept = bytes[i] < next ||
                        (bytes[i] == next && stream_keep_from(key, position[i], threshold, 2));
      bits[where[i] >> 6] |= uint64_t(kept) << (where[i] & 63);
    }
    pending = 0;
  };
  const int64_t words = (n + 63) / 64;
  for (int64_t w0 = 0; w0 < words; w0 += kFirstBytes / 64) {
    first_bytes(key, uint64_t(index0 + 64 * w0), want, below, equal);
    const int64_t m = words - w0 < kFirstBytes / 64 ? words - w0 : kFirstBytes / 64;
    for (int64_t w = 0; w < m; ++w) bits[w0 + w] = below[w];
    if (!deeper) continue;
    for (int64_t w = 0; w < m; ++w) {
      for (uint64_t e = equal[w]; e; e &= e - 1) {
        where[pending] = 64 * (w0 + w) + __builtin_ctzll(e);
        position[pending] = uint64_t(index0 + where[pending]);
        if (++pending == 8) settle();
      }
    }
  }
  if (pending) settle();
}

void stream_bytes(uint64_t key, int64_t index0, int64_t n, uint8_t* out) {
  for (int64_t o = 0; o < n; o += kFirstBytes)
    store_first_bytes(key, uint64_t(index0 + o), out + o);
}

// ---------------------------------------------------------------- deltas of one block

struct Scratch {
  float* base;
  float* sum;
  float* deltas;  // [term][kBlock]
};

// d for the block, with the non-finite ones counted and, when asked, replaced by "no change".
template <DType T, class Body>
inline void for_deltas(const uint8_t* x, const float* base, int64_t n, bool replace,
                       int64_t* nonfinite_count, Body&& body) {
  int64_t bad = 0;
  for_lanes<T, kBlock>(x, n, [&](int64_t i, F v) {
    F d = base ? sub(v, loadf(base + i)) : v;
    const M m = nonfinite(d);
    if (__builtin_expect(any(m), 0)) {
      bad += popcount(m);
      if (replace) d = keep(mask_not(m), d);
    }
    body(i, d);
  });
  *nonfinite_count += bad;
}

enum class Into { First, Add, Delta };

template <DType T, Sparsify S, Into I>
void fold_block(const TileView& t, TermView& term, int64_t offset, int64_t n, const float* base,
                float* into, const uint64_t* bits) {
  const F scale = set1(term.scale);
  const int64_t until = term.ties_until - offset;
  const float* factors = S == Sparsify::Magprune ? term.factors + offset : nullptr;
  for_deltas<T>(at(term.x, T, offset), base, n, t.replace_nonfinite, &term.nonfinite,
                [&](int64_t i, F d) {
                  if (S == Sparsify::Trim) {
                    M m = code_gt(d, term.code);
                    if (until > i) {
                      const M tied = code_eq(d, term.code);
                      m = mask_or(m, until - i >= 16
                                         ? tied
                                         : mask_and(tied, from_bits((1u << (until - i)) - 1u)));
                    }
                    d = keep(m, d);
                  } else if (S == Sparsify::Drop || S == Sparsify::Magprune) {
                    d = keep(from_bits(uint32_t(bits[i >> 6] >> (i & 63)) & 0xffffu), d);
                  }
                  if (S == Sparsify::Magprune) d = mul(d, loadf(factors + i));
                  if (I == Into::Delta) {
                    storef(into + i, d);
                  } else {
                    const F v = mul(d, scale);
                    storef(into + i, I == Into::First ? v : add(loadf(into + i), v));
                  }
                });
}

template <Into I>
void fold(const TileView& t, TermView& term, int64_t offset, int64_t n, const float* base,
          float* into) {
  uint64_t drawn[kBlock / 64];
  const uint64_t* bits = drawn;
  if (term.sparsify == Sparsify::Drop) {
    if (term.bits) {
      bits = term.bits + offset / 64;
    } else {
      keep_bits(term.key, t.index0 + offset, n, term.threshold, drawn);
    }
  }
  dispatch_dtype(term.dtype, [&](auto dtype) {
    constexpr DType T = decltype(dtype)::value;
    switch (term.sparsify) {
      case Sparsify::None:
        fold_block<T, Sparsify::None, I>(t, term, offset, n, base, into, bits);
        break;
      case Sparsify::Trim:
        fold_block<T, Sparsify::Trim, I>(t, term, offset, n, base, into, bits);
        break;
      default:
        if (term.factors) {
          fold_block<T, Sparsify::Magprune, I>(t, term, offset, n, base, into, bits);
        } else {
          fold_block<T, Sparsify::Drop, I>(t, term, offset, n, base, into, bits);
        }
    }
  });
}

// ---------------------------------------------------------------- election

template <bool WEIGHTED, Elect E, Reduce R>
void elect_block(const TileView& t, int64_t n, const float* deltas, float* sum) {
  const int K = t.n_terms;
  const F zero = set1(0.0f), one = set1(1.0f), minus = set1(-1.0f);
  for (int64_t i = 0; i < n; i += 16) {
    F total = zero;
    for (int k = 0; k < K; ++k) {
      const TermView& term = t.terms[k];
      const F d = loadf(deltas + k * kBlock + i);
      const F vote = mul(d, set1(WEIGHTED ? term.scale : term.rescale));
      if (E == Elect::Frequency) {
        total = add(total, select(gt0(vote), one, keep(lt0(vote), minus)));
      } else {
        total = add(total, vote);
      }
    }
    const M positive = ge0(total);
    F s = zero, divisor = zero;
    for (int k = 0; k < K; ++k) {
      const TermView& term = t.terms[k];
      const F d = loadf(deltas + k * kBlock + i);
      const F v = mul(d, set1(term.scale));
      const F vote = WEIGHTED ? v : mul(d, set1(term.rescale));
      M agrees = mask_or(mask_and(positive, gt0(vote)), mask_and(mask_not(positive), lt0(vote)));
      agrees = mask_or(agrees, code_gt(vote, 0x7f800000u));  // NaN always does, to be seen
      if (R == Reduce::Max) {
        s = select(mask_and(agrees, abs_gt(v, s)), v, s);
      } else {
        s = add(s, keep(agrees, v));
        if (R == Reduce::Mean)
          divisor = add(divisor, keep(agrees, t.divide_by_weights ? set1(term.weight) : one));
      }
    }
    if (R == Reduce::Mean) {
      const M nonzero = mask_or(gt0(divisor), lt0(divisor));
      s = div(s, select(nonzero, divisor, one));
    }
    storef(sum + i, s);
  }
}

template <bool WEIGHTED, Elect E>
void elect_reduce(const TileView& t, int64_t n, const float* deltas, float* sum) {
  switch (t.reduce) {
    case Reduce::Sum:
      return elect_block<WEIGHTED, E, Reduce::Sum>(t, n, deltas, sum);
    case Reduce::Mean:
      return elect_block<WEIGHTED, E, Reduce::Mean>(t, n, deltas, sum);
    default:
      return elect_block<WEIGHTED, E, Reduce::Max>(t, n, deltas, sum);
  }
}

void elect(const TileView& t, int64_t n, const float* deltas, float* sum) {
  if (t.elect == Elect::Mass) {
    return t.vote_weighted ? elect_reduce<true, Elect::Mass>(t, n, deltas, sum)
                           : elect_reduce<false, Elect::Mass>(t, n, deltas, sum);
  }
  return t.vote_weighted ? elect_reduce<true, Elect::Frequency>(t, n, deltas, sum)
                         : elect_reduce<false, Elect::Frequency>(t, n, deltas, sum);
}

// ---------------------------------------------------------------- the fused pass

void widen_base(const TileView& t, int64_t offset, int64_t n, float* out, int64_t* bad) {
  dispatch_dtype(t.base_dtype, [&](auto dtype) {
    constexpr DType T = decltype(dtype)::value;
    for_deltas<T>(at(t.base, T, offset), nullptr, n, t.replace_nonfinite, bad,
                  [&](int64_t i, F b) { storef(out + i, b); });
  });
}

template <DType T>
constexpr uint32_t finite_limit() {  // the largest float32 that does not round to an infinity
  return T == DType::F16 ? 0x477fefffu : T == DType::BF16 ? 0x7f7f7fffu : 0x7f7fffffu;
}

template <DType T>
void finish_block(TileView& t, int64_t offset, int64_t n, const float* base, const float* sum) {
  constexpr int64_t size = T == DType::F32 ? 4 : 2;
  const F denominator = set1(t.denominator), lambda = set1(t.lambda);
  const bool divide = t.denominator != 1.0f, scale = t.lambda != 1.0f;
  // what rounds to an infinity counts too, so the limit is that of the output type
  const uint32_t limit = finite_limit<T>();
  uint8_t* out = t.out + offset * size;
  Padded tail;
  for (int64_t i = 0; i < n; i += 16) {
    F s = loadf(sum + i);
    if (divide) s = div(s, denominator);
    if (scale) s = mul(s, lambda);
    if (base) s = add(loadf(base + i), s);
    const M bad = code_gt(s, limit);
    if (n - i >= 16) {
      if (__builtin_expect(any(bad), 0)) t.out_nonfinite += popcount(bad);
      store<T>(out + i * size, s);
    } else {
      const uint32_t valid = (1u << (n - i)) - 1u;
      t.out_nonfinite += __builtin_popcount(to_bits(bad) & valid);
      store<T>(tail.bytes, s);
      std::memcpy(out + i * size, tail.bytes, size_t((n - i) * size));
    }
  }
}

// ---------------------------------------------------------------- the fused pass in registers
//
// The common case, all tensors of one type and a plain or elected sum, without scratch: the same
// operations in the same order. A block that turns out to hold anything not finite, or the
// boundary of a tie, is done again by the general path, which counts and replaces.

// What keeps an element of a term in this block.
struct Gate {
  uint32_t at_least;  // trim
  const uint64_t* bits;
};

template <DType T, Sparsify S>
inline P gated_delta(const TermView& term, const Gate& gate, int64_t at, int64_t i, const P* base,
                     F* poison) {
  P x = load2<T>(term.x + at * dtype_size(T));
  prefetch(term.x + at * dtype_size(T) + 2048);
  if (base) {
    x.a = sub(x.a, base->a);
    x.b = sub(x.b, base->b);
  }
  if (S == Sparsify::Trim) {
    x.a = keep(code_ge(x.a, gate.at_least), x.a);
    x.b = keep(code_ge(x.b, gate.at_least), x.b);
  } else if (S == Sparsify::Drop) {
    // a dropped value leaves no trace in the sum: 0 times it does
    const F zero = set1(0.0f);
    *poison = add(*poison, add(mul(x.a, zero), mul(x.b, zero)));
    M a, b;
    masks2<T>(uint32_t(gate.bits[i >> 6] >> (i & 63)), &a, &b);
    x.a = keep(a, x.a);
    x.b = keep(b, x.b);
  }
  return x;
}

// The vote and what follows from it for one lane group; total is the sum of the votes.
template <bool WEIGHTED>
inline F agreed(const TileView& t, const float* deltas, F total) {
  const int K = t.n_terms;
  const F zero = set1(0.0f), one = set1(1.0f);
  // +0 and -0 both elect +; NaN does not get here
  const F majority = select(lt0(total), set1(-1.0f), one);
  F s = zero, divisor = zero;
  for (int k = 0; k < K; ++k) {
    const TermView& term = t.terms[k];
    const F d = loadf(deltas + 32 * k);
    const F v = mul(d, set1(term.scale));
    const M agrees = gt0(flip(WEIGHTED ? v : mul(d, set1(term.rescale)), majority));
    s = add_if(agrees, s, v);
    if (t.reduce == Reduce::Mean)
      divisor = add_if(agrees, divisor, t.divide_by_weights ? set1(term.weight) : one);
  }
  if (t.reduce == Reduce::Mean) {
    const M nonzero = mask_or(gt0(divisor), lt0(divisor));
    s = div(s, select(nonzero, divisor, one));
  }
  return s;
}

enum class Vote { No, Weighted, Unweighted };

template <DType T, Sparsify S, Vote V>
bool fused_block(const TileView& t, int64_t offset, int64_t n, const Gate* gates) {
  const int K = t.n_terms;
  const F denominator = set1(t.denominator), lambda = set1(t.lambda);
  const bool divide = V == Vote::No && t.denominator != 1.0f, scale = t.lambda != 1.0f;
  F poison = set1(0.0f);
  uint32_t bad = 0;
  alignas(64) float deltas[V == Vote::No ? 1 : 32 * 16];
  for (int64_t i = 0; i < n; i += 32) {
    P b{set1(0.0f), set1(0.0f)};
    const P* base = nullptr;
    if (t.difference) {
      b = load2<T>(t.base + (offset + i) * dtype_size(T));
      prefetch(t.base + (offset + i) * dtype_size(T) + 2048);
      base = &b;
    }
    P s{set1(0.0f), set1(0.0f)};
    if (V == Vote::No) {
      for (int k = 0; k < K; ++k) {
        const P d = gated_delta<T, S>(t.terms[k], gates[k], offset + i, i, base, &poison);
        const F c = set1(t.terms[k].scale);
        if (k == 0) {
          s = P{mul(d.a, c), mul(d.b, c)};
        } else {
          s = P{add(s.a, mul(d.a, c)), add(s.b, mul(d.b, c))};
        }
      }
    } else {
      P total{set1(0.0f), set1(0.0f)};
      for (int k = 0; k < K; ++k) {
        const P d = gated_delta<T, S>(t.terms[k], gates[k], offset + i, i, base, &poison);
        const F c = set1(V == Vote::Weighted ? t.terms[k].scale : t.terms[k].rescale);
        total = P{add(total.a, mul(d.a, c)), add(total.b, mul(d.b, c))};
        storef(deltas + 32 * k, d.a);
        storef(deltas + 32 * k + 16, d.b);
      }
      s = P{agreed<V == Vote::Weighted>(t, deltas, total.a),
            agreed<V == Vote::Weighted>(t, deltas + 16, total.b)};
      poison = add(poison, add(mul(total.a, set1(0.0f)), mul(total.b, set1(0.0f))));
    }
    if (divide) s = P{div(s.a, denominator), div(s.b, denominator)};
    if (scale) s = P{mul(s.a, lambda), mul(s.b, lambda)};
    if (base) s = P{add(b.a, s.a), add(b.b, s.b)};
    bad |= to_bits(mask_or(code_gt(s.a, finite_limit<T>()), code_gt(s.b, finite_limit<T>())));
    store2<T>(t.out + (offset + i) * dtype_size(T), s);
  }
  return !bad && !any(nonfinite(poison));
}

template <DType T, Sparsify S>
bool fused_vote(const TileView& t, int64_t offset, int64_t n, const Gate* gates) {
  if (t.elect == Elect::None) return fused_block<T, S, Vote::No>(t, offset, n, gates);
  return t.vote_weighted ? fused_block<T, S, Vote::Weighted>(t, offset, n, gates)
                         : fused_block<T, S, Vote::Unweighted>(t, offset, n, gates);
}

template <DType T>
bool fused_dtype(const TileView& t, Sparsify s, int64_t offset, int64_t n, const Gate* gates) {
  switch (s) {
    case Sparsify::None:
      return fused_vote<T, Sparsify::None>(t, offset, n, gates);
    case Sparsify::Trim:
      return fused_vote<T, Sparsify::Trim>(t, offset, n, gates);
    default:
      return fused_vote<T, Sparsify::Drop>(t, offset, n, gates);
  }
}

constexpr int kFusedTerms = 16;

// Whether the call as a whole qualifies, and how its terms are sparsified.
bool fusable(const TileView& t, Sparsify* s) {
  if (t.n_terms > kFusedTerms || t.elect == Elect::Frequency || t.reduce == Reduce::Max)
    return false;
  if (t.difference && t.base_dtype != t.out_dtype) return false;
  *s = Sparsify::None;
  for (int k = 0; k < t.n_terms; ++k) {
    if (t.terms[k].dtype != t.out_dtype || t.terms[k].factors) return false;
    if (t.terms[k].sparsify == Sparsify::None) continue;
    // a packed delta that keeps all it has may stand beside models that are trimmed
    if (*s != Sparsify::None && *s != t.terms[k].sparsify) return false;
    *s = t.terms[k].sparsify;
  }
  return true;
}

bool fused(const TileView& t, Sparsify s, int64_t offset, int64_t n) {
  if (n % 32) return false;
  Gate gates[kFusedTerms];
  uint64_t bits[kFusedTerms][kBlock / 64];
  for (int k = 0; k < t.n_terms; ++k) {
    const TermView& term = t.terms[k];
    gates[k] = Gate{0, bits[k]};
    if (term.sparsify == Sparsify::Trim) {
      const int64_t until = term.ties_until - offset;
      if (until > 0 && until < n) return false;
      gates[k].at_least = until > 0 ? term.code : term.code >= 0x7fffffffu ? 0x80000000u
                                                                           : term.code + 1u;
    } else if (term.sparsify == Sparsify::Drop) {
      if (term.bits) {
        gates[k].bits = term.bits + offset / 64;
      } else {
        keep_bits(term.key, t.index0 + offset, n, term.threshold, bits[k]);
      }
    } else if (s == Sparsify::Drop) {
      std::memset(bits[k], 0xff, sizeof bits[k]);
    }
  }
  switch (t.out_dtype) {
    case DType::BF16:
      return fused_dtype<DType::BF16>(t, s, offset, n, gates);
    case DType::F16:
      return fused_dtype<DType::F16>(t, s, offset, n, gates);
    default:
      return fused_dtype<DType::F32>(t, s, offset, n, gates);
  }
}

void combine(TileView& t) {
  Sparsify sparsify = Sparsify::None;
  const bool common = fusable(t, &sparsify);
  Scratch scratch{t.scratch, t.scratch + kBlock, t.scratch + 2 * kBlock};
  for (int64_t offset = 0; offset < t.n; offset += kBlock) {
    const int64_t n = t.n - offset < kBlock ? t.n - offset : kBlock;
    if (common) {
      // In place the block that turns out not to be common has overwritten its base.
      alignas(64) uint8_t before[4 * kBlock];
      const int64_t size = dtype_size(t.out_dtype);
      const bool in_place = t.difference && t.out == t.base;
      if (in_place) std::memcpy(before, t.base + offset * size, size_t(n * size));
      if (fused(t, sparsify, offset, n)) continue;
      if (in_place) std::memcpy(t.out + offset * size, before, size_t(n * size));
    }
    const float* base = nullptr;
    if (t.difference) {
      widen_base(t, offset, n, scratch.base, &t.base_nonfinite);
      base = scratch.base;
    }
    if (t.elect == Elect::None) {
      fold<Into::First>(t, t.terms[0], offset, n, base, scratch.sum);
      for (int k = 1; k < t.n_terms; ++k)
        fold<Into::Add>(t, t.terms[k], offset, n, base, scratch.sum);
    } else {
      for (int k = 0; k < t.n_terms; ++k)
        fold<Into::Delta>(t, t.terms[k], offset, n, base, scratch.deltas + k * kBlock);
      elect(t, n, scratch.deltas, scratch.sum);
    }
    switch (t.out_dtype) {
      case DType::BF16:
        finish_block<DType::BF16>(t, offset, n, base, scratch.sum);
        break;
      case DType::F16:
        finish_block<DType::F16>(t, offset, n, base, scratch.sum);
        break;
      default:
        finish_block<DType::F32>(t, offset, n, base, scratch.sum);
    }
  }
}

// ---------------------------------------------------------------- selection and statistics

// Calls body(i, lanes, d) over a whole run; base may be null. Deltas need no scratch here: both
// operands are read side by side.
template <class Body>
void for_run(DType tx, const uint8_t* x, DType tb, const uint8_t* base, int64_t n, bool replace,
             Body&& body) {
  dispatch_dtype(tx, [&](auto dx) {
    constexpr DType TX = decltype(dx)::value;
    constexpr int64_t sx = TX == DType::F32 ? 4 : (TX == DType::BF16 || TX == DType::F16) ? 2 : 1;
    const auto finish = [&](int64_t i, F d) {
      if (replace) {
        const M m = nonfinite(d);
        if (any(m)) d = keep(mask_not(m), d);
      }
      body(i, d);
    };
    if (!base) {
      for_lanes<TX, kBlock>(x, n, finish);
      return;
    }
    dispatch_dtype(tb, [&](auto db) {
      constexpr DType TB = decltype(db)::value;
      constexpr int64_t sb = TB == DType::F32 ? 4 : (TB == DType::BF16 || TB == DType::F16) ? 2 : 1;
      const auto widen = [&](const uint8_t* p) {
        const F b = load<TB>(p);
        return replace ? keep(mask_not(nonfinite(b)), b) : b;
      };
      int64_t i = 0;
      for (; i + 16 <= n; i += 16) finish(i, sub(load<TX>(x + i * sx), widen(base + i * sb)));
      if (i < n) {
        Padded px, pb;
        std::memset(px.bytes, 0, sizeof px.bytes);
        std::memset(pb.bytes, 0, sizeof pb.bytes);
        std::memcpy(px.bytes, x + i * sx, size_t((n - i) * sx));
        std::memcpy(pb.bytes, base + i * sb, size_t((n - i) * sb));
        finish(i, sub(load<TX>(px.bytes), widen(pb.bytes)));
      }
    });
  });
}

// Whether a code is inside is as good as random, so the pass has no branch on it.
template <DType T>
int64_t scan_pairs(const uint8_t* x, const uint8_t* base, int64_t n, bool replace, uint32_t lo,
                   uint32_t hi, uint32_t* out, int64_t* above) {
  int64_t found = 0, over = 0;
  const auto clean = [replace](F v) { return replace ? keep(mask_not(nonfinite(v)), v) : v; };
  const auto take = [&](F d) {
    d = clean(d);
    const M gt = code_gt(d, hi);
    over += popcount(gt);
    found += compress_codes(mask_and(mask_not(gt), code_ge(d, lo)), d, out + found);
  };
  for (int64_t i = 0; i < n; i += 32) {
    P d = load2<T>(x + i * dtype_size(T));
    prefetch(x + i * dtype_size(T) + 2048);
    if (base) {
      const P b = load2<T>(base + i * dtype_size(T));
      d = P{sub(d.a, clean(b.a)), sub(d.b, clean(b.b))};
    }
    take(d.a);
    take(d.b);
  }
  *above += over;
  return found;
}

int64_t scan(DType tx, const uint8_t* x, DType tb, const uint8_t* base, int64_t n, bool replace,
             uint32_t lo, uint32_t hi, uint32_t* out, int64_t* above) {
  int64_t found = 0, done = 0;
  if (!base || tb == tx) {
    done = n / 32 * 32;
    dispatch_dtype(tx, [&](auto dtype) {
      found = scan_pairs<decltype(dtype)::value>(x, base, done, replace, lo, hi, out, above);
    });
    if (done == n) return found;
    x += done * dtype_size(tx);
    if (base) base += done * dtype_size(tb);
    n -= done;
  }
  int64_t over = 0;
  for_run(tx, x, tb, base, n, replace, [&](int64_t i, F d) {
    const M gt = code_gt(d, hi);
    M in = mask_and(mask_not(gt), code_ge(d, lo));
    // the padding is zeros: it can only be inside
    if (n - i < 16) in = mask_and(in, from_bits((1u << (n - i)) - 1u));
    over += popcount(gt);
    found += compress_codes(in, d, out + found);
  });
  *above += over;
  return found;
}

int64_t count_equal(DType tx, const uint8_t* x, DType tb, const uint8_t* base, int64_t n,
                    bool replace, uint32_t code) {
  int64_t count = 0;
  for_run(tx, x, tb, base, n, replace, [&](int64_t i, F d) {
    uint32_t m = to_bits(code_eq(d, code));
    if (n - i < 16) m &= (1u << (n - i)) - 1u;
    count += __builtin_popcount(m);
  });
  return count;
}

void codes(DType tx, const uint8_t* x, DType tb, const uint8_t* base, int64_t n, bool replace,
           uint32_t* out) {
  for_run(tx, x, tb, base, n, replace, [&](int64_t i, F d) {
    storef(reinterpret_cast<float*>(out + i), flip(d, d));  // its sign taken away
  });
}

void band_bits(DType tx, const uint8_t* x, DType tb, const uint8_t* base, int64_t n, bool replace,
               const BandView& band, uint64_t* bits) {
  const auto until = [](int64_t from, int64_t to) {  // lanes whose position is below `to`
    return to - from >= 16 ? 0xffffu : to <= from ? 0u : (1u << (to - from)) - 1u;
  };
  uint64_t word = 0;
  for_run(tx, x, tb, base, n, replace, [&](int64_t i, F d) {
    uint32_t m = to_bits(code_gt(d, band.low)) |
                 (to_bits(code_eq(d, band.low)) & until(i, band.low_until));
    m &= ~to_bits(code_ge(d, band.high)) |
         (to_bits(code_eq(d, band.high)) & ~until(i, band.high_from));
    word |= uint64_t(m & 0xffffu) << (i & 63);
    if ((i & 63) == 48 || i + 16 >= n) {
      bits[i >> 6] = word;
      word = 0;
    }
  });
}

template <DType T, DType TB>
void l1_of(const TermView& term, const uint8_t* base, int64_t n, bool replace,
           const uint64_t* bits, double* all, double* kept) {
  D every = dzero(), some = dzero();
  const auto clean = [replace](F x) { return replace ? keep(mask_not(nonfinite(x)), x) : x; };
  const bool drop = term.sparsify == Sparsify::Drop;
  int64_t i = 0;
  // a pair is only comparable with a pair of the same layout
  if (T == TB) {
    for (; i + 32 <= n; i += 32) {
      P d = load2<T>(term.x + i * dtype_size(T));
      if (base) {
        const P b = load2<T>(base + i * dtype_size(T));
        d = P{sub(d.a, clean(b.a)), sub(d.b, clean(b.b))};
      }
      if (replace) d = P{clean(d.a), clean(d.b)};
      M a, b;
      if (drop) {
        masks2<T>(uint32_t(bits[i >> 6] >> (i & 63)), &a, &b);
      } else {
        a = code_gt(d.a, term.code);
        b = code_gt(d.b, term.code);
      }
      add_abs2<T>(&every, &some, d, a, b);
    }
  }
  double lane_all[16], lane_kept[16];
  lanes<T>(lane_all, every);
  lanes<T>(lane_kept, some);
  for (; i < n; ++i) {
    float d = load_f32(T, term.x, i);
    if (base) {
      const float b = load_f32(TB, base, i);
      const bool bad = replace && (f32_bits(b) & 0x7f800000u) == 0x7f800000u;
      d = d - (bad ? 0.0f : b);
    }
    uint32_t code = f32_bits(d) & 0x7fffffffu;
    if (replace && code >= 0x7f800000u) code = 0;
    const bool in = drop ? (bits[i >> 6] >> (i & 63)) & 1 : code > term.code;
    lane_all[i & 15] += double(bits_f32(code));
    if (in) lane_kept[i & 15] += double(bits_f32(code));
  }
  double total = 0.0, total_kept = 0.0;
  for (int j = 0; j < 16; ++j) {
    total += lane_all[j];
    total_kept += lane_kept[j];
  }
  *all = total;
  *kept = total_kept;
}

void l1(const TermView& term, DType tb, const uint8_t* base, int64_t n, int64_t index0,
        bool replace, uint64_t* bits, double* all, double* kept) {
  const uint64_t* kept_bits = term.bits ? term.bits : bits;
  if (term.sparsify == Sparsify::Drop && !term.bits)
    keep_bits(term.key, index0, n, term.threshold, bits);
  dispatch_dtype(term.dtype, [&](auto dx) {
    constexpr DType T = decltype(dx)::value;
    if (!base || tb == T) return l1_of<T, T>(term, base, n, replace, kept_bits, all, kept);
    dispatch_dtype(tb, [&](auto db) {
      l1_of<T, decltype(db)::value>(term, base, n, replace, kept_bits, all, kept);
    });
  });
}

// ---------------------------------------------------------------- Gram matrix
//
// Lane j sums the products of the elements whose index in the chunk is j mod 16, in their order;
// the lanes are added one after the other. The padding of a ragged end is zeros.

// Products of up to two vectors with up to two others, held in registers over a block.
template <int A, int B, bool SAME>
inline void gram_tile(const float* a, const float* b, int64_t n, D* sums) {
  D s[A][B];
  for (int i = 0; i < A; ++i)
    for (int j = 0; j < B; ++j) s[i][j] = sums[i * B + j];
  for (int64_t e = 0; e < n; e += 16) {
    D x[A], y[B];
    for (int i = 0; i < A; ++i) x[i] = widen(a + i * kBlock + e);
    for (int j = 0; j < B; ++j) y[j] = SAME ? x[j] : widen(b + j * kBlock + e);
    for (int i = 0; i < A; ++i)
      for (int j = SAME ? i : 0; j < B; ++j) add_product(&s[i][j], x[i], y[j]);
  }
  for (int i = 0; i < A; ++i)
    for (int j = 0; j < B; ++j) sums[i * B + j] = s[i][j];
}

void gram(const TermView* terms, int n_terms, DType tb, const uint8_t* base, int64_t n,
          float* scratch, double* sums) {
  float* wide_base = scratch;
  float* deltas = scratch + kBlock;
  const int pairs = (n_terms + 1) / 2;
  static_assert(sizeof(D) == 128, "sixteen float64");
  D* lane_sums = reinterpret_cast<D*>(deltas + n_terms * kBlock);
  for (int i = 0; i < pairs * pairs * 4; ++i) lane_sums[i] = dzero();
  int64_t ignored = 0;
  for (int64_t o = 0; o < n; o += kBlock) {
    const int64_t m = n - o < kBlock ? n - o : kBlock;
    if (base) {
      dispatch_dtype(tb, [&](auto dtype) {
        constexpr DType T = decltype(dtype)::value;
        for_deltas<T>(at(base, T, o), nullptr, m, true, &ignored,
                      [&](int64_t i, F b) { storef(wide_base + i, b); });
      });
    }
    for (int k = 0; k < n_terms; ++k) {
      float* d = deltas + k * kBlock;
      dispatch_dtype(terms[k].dtype, [&](auto dtype) {
        constexpr DType T = decltype(dtype)::value;
        for_deltas<T>(at(terms[k].x, T, o), base ? wide_base : nullptr, m, true, &ignored,
                      [&](int64_t i, F v) { storef(d + i, v); });
      });
    }
    for (int p = 0; p < pairs; ++p) {
      for (int q = p; q < pairs; ++q) {
        const bool one = 2 * p + 1 == n_terms, other = 2 * q + 1 == n_terms;
        const float *a = deltas + 2 * p * kBlock, *b = deltas + 2 * q * kBlock;
        D* s = lane_sums + (p * pairs + q) * 4;
        if (p == q) {
          one ? gram_tile<1, 1, true>(a, b, m, s) : gram_tile<2, 2, true>(a, b, m, s);
        } else {
          other ? gram_tile<2, 1, false>(a, b, m, s) : gram_tile<2, 2, false>(a, b, m, s);
        }
      }
    }
  }
  for (int i = 0; i < n_terms; ++i) {
    for (int j = i; j < n_terms; ++j) {
      const int p = i / 2, q = j / 2, width = 2 * q + 1 == n_terms ? 1 : 2;
      double lane[16];
      lanes<DType::F32>(lane, lane_sums[(p * pairs + q) * 4 + i % 2 * width + j % 2]);
      double total = 0.0;
      for (double v : lane) total += v;
      sums[gram_place(n_terms, i, j)] = total;
    }
  }
}

void to_f32(DType t, const uint8_t* x, int64_t n, float* out) {
  dispatch_dtype(t, [&](auto dtype) {
    for_lanes<decltype(dtype)::value, kBlock>(x, n, [&](int64_t i, F v) {
      if (n - i >= 16) {
        storef(out + i, v);
      } else {
        float tail[16];
        storef(tail, v);
        std::memcpy(out + i, tail, size_t(n - i) * 4);
      }
    });
  });
}

template <DType T>
void from_f32_to(const float* x, int64_t n, uint8_t* out) {
  constexpr int64_t size = T == DType::F32 ? 4 : 2;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) store<T>(out + i * size, loadf(x + i));
  if (i < n) {
    float last[16] = {};
    std::memcpy(last, x + i, size_t(n - i) * 4);
    Padded tail;
    store<T>(tail.bytes, loadf(last));
    std::memcpy(out + i * size, tail.bytes, size_t((n - i) * size));
  }
}

void from_f32(DType t, const float* x, int64_t n, uint8_t* out) {
  switch (t) {
    case DType::BF16:
      return from_f32_to<DType::BF16>(x, n, out);
    case DType::F16:
      return from_f32_to<DType::F16>(x, n, out);
    default:
      return from_f32_to<DType::F32>(x, n, out);
  }
}

}  // namespace
}  // namespace clf

#define CLF_KERNEL_TABLE(symbol, name)                                                          \
  namespace clf {                                                                               \
  const Kernels symbol = {name, combine, scan, count_equal, l1, gram, keep_bits,          \
                          stream_bytes, codes, band_bits, to_f32, from_f32};                    \
  }
