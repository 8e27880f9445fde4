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

#include "kernels.h"

namespace clf {
namespace {

inline const uint8_t* at(const uint8_t* p, DType t, int64_t i) { return p + i * dtype_size(t); }

// Blocks work on whole groups of sixteen; a ragged end is copied into padded memory first.
struct Padded {
  alignas(64) uint8_t bytes[64 * 4];
};

template <DType T, class Body>
inline void for_lanes(const uint8_t* x, int64_t n, Body&& body) {
  constexpr int64_t size = T == DType::F32 ? 4 : (T == DType::BF16 || T == DType::F16) ? 2 : 1;
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    if ((i * size) % 64 == 0) prefetch(x + i * size + kBlock * size);
    body(i, load<T>(x + i * size));
  }
  if (i < n) {
    Padded tail;
    std::memset(tail.bytes, 0, sizeof tail.bytes);
    std::memcpy(tail.bytes, x + i * size, size_t((n - i) * size));
    body(i, load<T>(tail.bytes));
  }
}

template <class Body>
inline void dispatch_dtype(DType t, Body&& body) {
  switch (t) {
    case DType::BF16:
      body(std::integral_constant<DType, DType::BF16>{});
      break;
    case DType::F16:
      body(std::integral_constant<DType, DType::F16>{});
      break;
    case DType::F32:
      body(std::integral_constant<DType, DType::F32>{});
      break;
    case DType::F8_E4M3:
      body(std::integral_constant<DType, DType::F8_E4M3>{});
      break;
    default:
      body(std::integral_constant<DType, DType::F8_E5M2>{});
      break;
  }
}

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
  for_lanes<T>(x, n, [&](int64_t i, F v) {
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
                  } else if (S == Sparsify::Drop) {
                    d = keep(from_bits(uint32_t(bits[i >> 6] >> (i & 63)) & 0xffffu), d);
                  }
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
  uint64_t bits[kBlock / 64];
  if (term.sparsify == Sparsify::Drop)
    keep_bits(term.key, t.index0 + offset, n, term.threshold, bits);
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
        fold_block<T, Sparsify::Drop, I>(t, term, offset, n, base, into, bits);
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
      const M agrees = mask_or(mask_and(positive, gt0(vote)),
                               mask_and(mask_not(positive), lt0(vote)));
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

template <DType T>
inline F load_base(const TileView& t, const uint8_t* p) {
  const F b = load<T>(p);
  return t.replace_nonfinite ? keep(mask_not(nonfinite(b)), b) : b;
}

void widen_base(const TileView& t, int64_t offset, int64_t n, float* out, int64_t* bad) {
  dispatch_dtype(t.base_dtype, [&](auto dtype) {
    constexpr DType T = decltype(dtype)::value;
    for_deltas<T>(at(t.base, T, offset), nullptr, n, t.replace_nonfinite, bad,
                  [&](int64_t i, F b) { storef(out + i, b); });
  });
}

template <DType T>
void finish_block(TileView& t, int64_t offset, int64_t n, const float* base, const float* sum) {
  constexpr int64_t size = T == DType::F32 ? 4 : 2;
  const F denominator = set1(t.denominator), lambda = set1(t.lambda);
  const bool divide = t.denominator != 1.0f, scale = t.lambda != 1.0f;
  // what rounds to an infinity counts too, so the limit is that of the output type
  const uint32_t limit = T == DType::F16    ? 0x477fefffu
                         : T == DType::BF16 ? 0x7f7f7fffu
                                            : 0x7f7fffffu;
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

void combine(TileView& t) {
  Scratch scratch{t.scratch, t.scratch + kBlock, t.scratch + 2 * kBlock};
  for (int64_t offset = 0; offset < t.n; offset += kBlock) {
    const int64_t n = t.n - offset < kBlock ? t.n - offset : kBlock;
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
      for_lanes<TX>(x, n, finish);
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

int64_t scan(DType tx, const uint8_t* x, DType tb, const uint8_t* base, int64_t n, bool replace,
             uint32_t lo, uint32_t hi, uint32_t* out, int64_t* above) {
  int64_t found = 0, over = 0;
  for_run(tx, x, tb, base, n, replace, [&](int64_t i, F d) {
    const M gt = code_gt(d, hi);
    M in = mask_not(gt);
    if (lo) in = mask_and(in, code_gt(d, lo - 1));
    if (n - i < 16) {  // the padding is zeros: it can only be inside
      in = mask_and(in, from_bits((1u << (n - i)) - 1u));
    }
    over += popcount(gt);
    if (any(in)) found += compress_codes(in, d, out + found);
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

double lanes_in_order(D s) {
  double v[16], total = 0.0;
  dstore(v, s);
  for (int i = 0; i < 16; ++i) total += v[i];
  return total;
}

void l1(const TermView& term, DType tb, const uint8_t* base, int64_t n, int64_t index0,
        bool replace, double* all, double* kept) {
  uint64_t bits[kStatChunk / 64];
  if (term.sparsify == Sparsify::Drop) keep_bits(term.key, index0, n, term.threshold, bits);
  D a = dzero(), k = dzero();
  const bool drop = term.sparsify == Sparsify::Drop;
  for_run(term.dtype, term.x, tb, base, n, replace, [&](int64_t i, F d) {
    a = dadd_abs(a, d);
    k = dadd_abs(k, keep(drop ? from_bits(uint32_t(bits[i >> 6] >> (i & 63)) & 0xffffu)
                              : code_gt(d, term.code),
                         d));
  });
  *all = lanes_in_order(a);
  *kept = lanes_in_order(k);
}

void to_f32(DType t, const uint8_t* x, int64_t n, float* out) {
  dispatch_dtype(t, [&](auto dtype) {
    for_lanes<decltype(dtype)::value>(x, n, [&](int64_t i, F v) {
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

void from_f32(DType t, const float* x, int64_t n, uint8_t* out) {
  TileView view;
  view.out = out;
  float padded[16];
  for (int64_t i = 0; i < n; i += 16) {
    const int64_t m = n - i < 16 ? n - i : 16;
    std::memset(padded, 0, sizeof padded);
    std::memcpy(padded, x + i, size_t(m) * 4);
    switch (t) {
      case DType::BF16:
        finish_block<DType::BF16>(view, i, m, nullptr, padded);
        break;
      case DType::F16:
        finish_block<DType::F16>(view, i, m, nullptr, padded);
        break;
      default:
        finish_block<DType::F32>(view, i, m, nullptr, padded);
    }
  }
}

}  // namespace
}  // namespace clf

#define CLF_KERNEL_TABLE(symbol, name)                                                     \
  namespace clf {                                                                          \
  const Kernels symbol = {name,      combine, scan,   count_equal, l1, keep_bits, to_f32, \
                          from_f32};                                                       \
  }
