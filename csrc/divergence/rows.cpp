#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

#include "../combine/kernels.h"
#include "../core/in_parallel.h"

namespace clf {
namespace {

constexpr int64_t kRowBlock = 1024;     // columns worked on at a time
constexpr int64_t kUnit = 1 << 16;          // elements that a thread takes at a time
// Elements for which another thread is worth it. The threads of a matrix product spin for some
// milliseconds after it, and a thread of ours that must wait for one of their cores holds all up.
constexpr int64_t kPerThread = 1 << 22;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
static_assert(kRowBlock <= kBlock, "a block is converted in one go");

const RowKernels& chosen() {
#ifdef CL_FAST_X86
  if (&kernels() == &kKernelsAvx512) return kRowsAvx512;
  if (&kernels() == &kKernelsAvx2) return kRowsAvx2;
#endif
  return kRowsPortable;
}

int64_t up16(int64_t n) { return (n + 15) / 16 * 16; }

const uint8_t* at(const Rows& x, int64_t row, int64_t column) {
  return x.data + (row * x.stride + column) * dtype_size(x.dtype);
}

// What a thread needs beside the rows.
struct Scratch {
  alignas(64) float student[kRowBlock];
  alignas(64) float teacher[kRowBlock];
  alignas(64) float one[kRowBlock];   // the student at temperature 1
  alignas(64) float bend[kRowBlock];  // 1 - tanh^2
  alignas(64) float out[kRowBlock];
};

class Worker {
 public:
  Worker() : f_(chosen()), g_(kernels()) {}

  // z of n columns (a multiple of sixteen) of a row from `column` on: in place if they lie so.
  const float* block(const Rows& x, const RowValues& how, int64_t row, int64_t column, int64_t n,
                     float* to, float* bend = nullptr) const {
    const int64_t m = std::clamp<int64_t>(x.columns - column, 0, n);
    const bool lies = x.dtype == DType::F32 && m == n;
    const float* from = lies ? reinterpret_cast<const float*>(at(x, row, column)) : to;
    if (lies && how.plain()) return from;
    if (!lies && m > 0) g_.to_f32(x.dtype, at(x, row, column), m, to);
    if (!how.plain()) {
      std::fill(to + (lies ? n : m), to + n, 0.0f);
      f_.values(how, from, n, to, bend);
    }
    std::fill(to + m, to + n, -kInfinity);
    return to;
  }
  const float* student(const Rows& x, int64_t row, int64_t c, int64_t n, bool bent = false) {
    return block(x, x.how, row, c, n, s_.student, bent ? s_.bend : nullptr);
  }
  const float* teacher(const Rows& x, int64_t row, int64_t c, int64_t n) {
    return block(x, x.how, row, c, n, s_.teacher);
  }

  // The greatest z of a row: values rise with the numbers, or fall where the scale is negative.
  float top(const Rows& x, int64_t row) {
    const bool falls = !x.how.probs && x.how.scale < 0.0f;
    const auto extreme = falls ? f_.least : f_.greatest;
    float found;
    if (x.dtype == DType::F32) {
      found = extreme(reinterpret_cast<const float*>(at(x, row, 0)), x.columns);
    } else {
      found = falls ? kInfinity : -kInfinity;
      for (int64_t c = 0; c < x.columns; c += kRowBlock) {
        const int64_t n = std::min(kRowBlock, x.columns - c);
        g_.to_f32(x.dtype, at(x, row, c), n, s_.student);
        const float here = extreme(s_.student, n);
        found = falls ? std::min(found, here) : std::max(found, here);
      }
    }
    return value(x.how, found);
  }

  float value(const RowValues& how, float number) const {
    if (how.plain()) return number;
    alignas(64) float lanes[16];
    std::fill(lanes, lanes + 16, number);
    f_.values(how, lanes, 16, lanes, nullptr);
    return lanes[0];
  }

  // Calls body(column, n) for the blocks of a row, n a multiple of sixteen.
  template <class Body>
  void blocks(int64_t columns, Body&& body) const {
    for (int64_t c = 0; c < columns; c += kRowBlock)
      body(c, up16(std::min(kRowBlock, columns - c)));
  }

  Normal normal(const Rows& x, int64_t row) {
    const float most = top(x, row);
    double sum = 0.0;
    blocks(x.columns, [&](int64_t c, int64_t n) { f_.sum(student(x, row, c, n), n, most, &sum); });
    return {most, float(std::log(sum))};
  }

  void forward(const DivergenceCall& call, int64_t row, float* loss, float* stats) {
    const Rows &s = call.student, &t = call.teacher;
    Normal ns{top(s, row), 0.0f}, nt{top(t, row), 0.0f};
    double k = 0.0;
    const bool forward_kl = call.kind == Divergence::ForwardKl;
    if (forward_kl || call.kind == Divergence::ReverseKl) {
      double sums[3] = {0.0, 0.0, 0.0};
      blocks(s.columns, [&](int64_t c, int64_t n) {
        const float* zs = student(s, row, c, n);
        const float* zt = teacher(t, row, c, n);
        if (forward_kl)
          f_.sums(zs, zt, n, ns.top, nt.top, sums);
        else
          f_.sums(zt, zs, n, nt.top, ns.top, sums);
      });
      // sum e^b (b - a) / sum e^b - (log_b - log_a) is KL(b, a)
      const double log_a = std::log(sums[0]), log_b = std::log(sums[1]);
      const double mean = sums[2] / sums[1];
      *loss = float(mean - (log_b - log_a));
      (forward_kl ? ns : nt).log = float(log_a);
      (forward_kl ? nt : ns).log = float(log_b);
      // The gradient takes the logarithms as they are rounded, and so K must.
      if (!forward_kl) k = mean + double(nt.log - ns.log);
    } else {
      double sum_s = 0.0, sum_t = 0.0;
      blocks(s.columns, [&](int64_t c, int64_t n) {
        f_.sum(student(s, row, c, n), n, ns.top, &sum_s);
        f_.sum(teacher(t, row, c, n), n, nt.top, &sum_t);
      });
      const double log_s = std::log(sum_s), log_t = std::log(sum_t);
      ns.log = float(log_s);
      nt.log = float(log_t);
      // What rounding the logarithms does to p and q, which are summed with it, is taken back.
      *loss = float(terms(call, row, ns, nt, float(log_t - log_s), std::exp(ns.log - log_s),
                          std::exp(nt.log - log_t), &k));
    }
    stats[0] = ns.top;
    stats[1] = ns.log;
    stats[2] = nt.top;
    stats[3] = nt.log;
    stats[4] = float(k);
  }

  // The loss, and K, of a row whose normalisers are known; p and q are `more_p` and `more_q` times
  // what the normalisers say.
  double terms(const DivergenceCall& call, int64_t row, Normal s, Normal t, float shift,
               double more_p, double more_q, double* k) {
    const auto f = f_.terms[int(call.kind)];
    double sums[3] = {0.0, 0.0, 0.0};
    blocks(call.student.columns, [&](int64_t c, int64_t n) {
      const float* zs = student(call.student, row, c, n);
      f(zs, teacher(call.teacher, row, c, n), n, s, t, shift, call.mix, sums);
    });
    *k = sums[2];
    const bool both = call.kind == Divergence::Jsd;
    const double w = call.mix;
    return (both ? 1.0 - w : 1.0) * more_p * sums[0] + (both ? w : 1.0) * more_q * sums[1];
  }

  // Where a block of the gradient is written: where it belongs, if it fits there as it is.
  float* place(const RowsOut& out, int64_t row, int64_t column, int64_t n, int64_t m) {
    if (out.dtype != DType::F32 || m != n) return s_.out;
    return reinterpret_cast<float*>(out.data) + row * out.stride + column;
  }
  void finish(const RowsOut& out, int64_t row, int64_t column, int64_t n, int64_t m, bool bent,
              float* written) {
    if (bent) f_.times(s_.bend, n, written);
    if (written == s_.out)
      g_.from_f32(out.dtype, written, m,
                  out.data + (row * out.stride + column) * dtype_size(out.dtype));
  }
  static void clear(const RowsOut& out, int64_t row, int64_t columns) {
    std::memset(out.data + row * out.stride * dtype_size(out.dtype), 0,
                size_t(columns * dtype_size(out.dtype)));
  }

  void gradient(const DivergenceCall& call, const RowsOut& out, int64_t row, float grad,
                const float* stats, const CrossEntropy& extra) {
    const Rows& s = call.student;
    const float added = extra.grad ? extra.grad[row] : 0.0f;
    if (grad == 0.0f && added == 0.0f) return clear(out, row, s.columns);
    const bool bent = !s.how.probs && s.how.softcap != 0.0f;
    const float scale = s.how.probs ? 1.0f : s.how.scale;
    RowValues plain = s.how;
    plain.temperature = 1.0f;

    GradientView v;
    v.s = {stats[0], stats[1]};
    v.t = {stats[2], stats[3]};
    v.k = stats[4];
    v.g = grad / s.how.temperature * scale;
    v.mix = call.mix;
    v.one = {0.0f, 0.0f};
    v.extra = added * scale;
    int64_t id = -1;
    if (added != 0.0f) {
      v.one = {extra.normal[2 * row], extra.normal[2 * row + 1]};
      id = extra.ids[row];
    }
    const int kind = int(call.kind);
    const auto f = grad == 0.0f    ? f_.extra
                   : added == 0.0f ? f_.gradient[kind]
                                   : f_.gradient_extra[kind];
    blocks(s.columns, [&](int64_t c, int64_t n) {
      const int64_t m = std::min(n, s.columns - c);
      v.n = n;
      v.zs = v.z1 = student(s, row, c, n, bent);
      if (added != 0.0f && s.how.temperature != 1.0f) v.z1 = block(s, plain, row, c, n, s_.one);
      v.zt = grad == 0.0f ? nullptr : teacher(call.teacher, row, c, n);
      v.out = place(out, row, c, n, m);
      f(v);
      if (id >= c && id < c + m) v.out[id - c] -= v.extra;
      finish(out, row, c, n, m, bent, v.out);
    });
  }

  void logprob(const Rows& x, int64_t row, int64_t id, float* stats) {
    const float most = top(x, row);
    double sums[2] = {0.0, 0.0};
    blocks(x.columns,
           [&](int64_t c, int64_t n) { f_.moments(student(x, row, c, n), n, most, sums); });
    stats[0] = most;
    stats[1] = float(std::log(sums[0]));
    stats[2] = float(sums[1] / sums[0]);
    stats[3] = id < 0 ? 0.0f : value(x.how, load_f32(x.dtype, at(x, row, 0), id));
  }

  void logprob_gradient(const Rows& x, const RowsOut& out, int64_t row, float grad, float entropy,
                        int64_t id, const float* stats) {
    if (grad == 0.0f && entropy == 0.0f) return clear(out, row, x.columns);
    const bool bent = !x.how.probs && x.how.softcap != 0.0f;
    const float scale = x.how.probs ? 1.0f : x.how.scale;
    GradientView v = {};
    v.s = {stats[0], stats[1]};
    v.k = stats[1] - stats[2];
    v.g = grad / x.how.temperature * scale;
    v.extra = entropy / x.how.temperature * scale;
    blocks(x.columns, [&](int64_t c, int64_t n) {
      const int64_t m = std::min(n, x.columns - c);
      v.n = n;
      v.zs = student(x, row, c, n, bent);
      v.out = place(out, row, c, n, m);
      f_.logprob(v);
      if (id >= c && id < c + m) v.out[id - c] += v.g;
      finish(out, row, c, n, m, bent, v.out);
    });
  }

 private:
  const RowKernels& f_;
  const Kernels& g_;
  Scratch s_;
};

// body(worker, row) for each row.
template <class Body>
void each_row(int64_t rows, int64_t columns, int threads, Body&& body) {
  const int64_t several = std::max<int64_t>(1, kUnit / std::max<int64_t>(1, columns));
  const int64_t worth = std::max<int64_t>(1, rows * columns / kPerThread);
  in_parallel((rows + several - 1) / several, int(std::min<int64_t>(threads, worth)), [&] {
    return [&, worker = std::make_unique<Worker>()](int64_t unit) {
      const int64_t end = std::min(rows, (unit + 1) * several);
      for (int64_t row = unit * several; row < end; ++row) body(*worker, row);
    };
  });
}

void check_ids(const int64_t* ids, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i)
    if (ids[i] >= columns)
      throw std::out_of_range("ids[" + std::to_string(i) + "] is " + std::to_string(ids[i]) +
                              ", but the rows have " + std::to_string(columns) + " columns");
}

}  // namespace

void row_normalisers(int64_t rows, const Rows& x, float* out, int threads) {
  each_row(rows, x.columns, threads, [&](Worker& w, int64_t row) {
    const Normal normal = w.normal(x, row);
    out[2 * row] = normal.top;
    out[2 * row + 1] = normal.log;
  });
}

void divergence_sums(const DivergenceCall& call, const float* normal_s, const float* normal_t,
                     float* out, int threads) {
  each_row(call.rows, call.student.columns, threads, [&](Worker& w, int64_t row) {
    const Normal s{normal_s[2 * row], normal_s[2 * row + 1]};
    const Normal t{normal_t[2 * row], normal_t[2 * row + 1]};
    double k;
    out[2 * row] = float(w.terms(call, row, s, t, t.log - s.log, 1.0, 1.0, &k));
    out[2 * row + 1] = float(k);
  });
}

void divergence_forward(const DivergenceCall& call, float* losses, float* stats, int threads) {
  each_row(call.rows, call.student.columns, threads, [&](Worker& w, int64_t row) {
    w.forward(call, row, losses + row, stats + 5 * row);
  });
}

void divergence_gradient(const DivergenceCall& call, const RowsOut& out, const float* grad,
                         const float* stats, const CrossEntropy& extra, int threads) {
  if (extra.grad) check_ids(extra.ids, call.rows, call.student.columns);
  each_row(call.rows, call.student.columns, threads, [&](Worker& w, int64_t row) {
    w.gradient(call, out, row, grad[row], stats + 5 * row, extra);
  });
}

void logprob_forward(int64_t rows, const Rows& x, const int64_t* ids, float* out, int threads) {
  check_ids(ids, rows, x.columns);
  each_row(rows, x.columns, threads,
           [&](Worker& w, int64_t row) { w.logprob(x, row, ids[row], out + 4 * row); });
}

void logprob_gradient(int64_t rows, const Rows& x, const RowsOut& out, const float* grad,
                      const float* entropy_grad, const int64_t* ids, const float* stats,
                      int threads) {
  check_ids(ids, rows, x.columns);
  each_row(rows, x.columns, threads, [&](Worker& w, int64_t row) {
    w.logprob_gradient(x, out, row, grad[row], entropy_grad ? entropy_grad[row] : 0.0f, ids[row],
                       stats + 4 * row);
  });
}

}  // namespace clf
