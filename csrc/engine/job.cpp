#include "job.h"

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <exception>
#include <functional>
#include <stdexcept>
#include <thread>

#include "../core/crc64.h"
#include "../core/isa.h"

namespace clf {
namespace {

constexpr int64_t kDefaultTile = 131072;  // a tile's inputs and output together fit an L2 cache
constexpr int64_t kSubTile = 16384;       // combine and checksum alternate while data is in L1/L2
constexpr int64_t kRun = 256;             // consecutive elements of one sample
constexpr int64_t kRuns = 64;             // samples per tensor
constexpr int64_t kModelRuns = 4096;      // samples per model
constexpr int64_t kMaxBins = int64_t(1) << 19;
constexpr uint32_t kLargestCode = 0x7fffffffu;
constexpr int64_t kReadAhead = int64_t(8) << 20;
constexpr int64_t kRowElements = 32768;  // rows are ranked so many elements at a time, or one by one
constexpr int64_t kLongestRow = int64_t(1) << 31;

int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// What n elements from `first` on, a multiple of kStatChunk, take where they are stored.
int64_t stored_bytes(const Source& s, int64_t first, int64_t n) {
  if (!s.packed) return n * dtype_size(s.dtype);
  const std::vector<int64_t>& blocks = s.packed->blocks;
  return (blocks[size_t((first + n + kStatChunk - 1) / kStatChunk)] -
          blocks[size_t(first / kStatChunk)]) *
         dtype_size(s.packed->values.dtype);
}

}  // namespace

// The k-th largest code of a set that is read in tiles: codes in [lo, hi] are counted exactly (or
// in bins of 2^shift codes), those above hi only in number.
struct Job::Selection {
  bool active = false;
  bool done = false;
  int64_t k = 0;
  uint32_t lo = 0, hi = kLargestCode;
  int shift = 0;
  std::vector<std::vector<uint64_t>> histograms;  // one per worker, made when first needed
  std::atomic<int64_t> above{0};
  std::atomic<uint32_t> low_bits{0};  // of the codes inside: whether a bin is a single code
  int64_t max_bins = kMaxBins;
  // the answer
  uint32_t code = 0;
  int64_t greater = 0, equal = 0;

  int64_t bins() const { return int64_t(hi >> shift) - int64_t(lo >> shift) + 1; }

  void range(uint32_t from, uint32_t to, int zero_bits) {
    lo = from;
    hi = to;
    shift = 0;
    while (bins() > max_bins) ++shift;
    shift = std::max(shift, zero_bits);  // all sampled codes are multiples of 2^zero_bits
    above = 0;
    low_bits = 0;
    for (auto& h : histograms) h.assign(h.empty() ? 0 : size_t(bins()), 0);
  }
  void count(size_t worker, const uint32_t* codes, int64_t n) {
    std::vector<uint64_t>& h = histograms[worker];
    if (h.empty()) h.assign(size_t(bins()), 0);
    const uint32_t first = lo >> shift;
    uint32_t low = 0;
    for (int64_t i = 0; i < n; ++i) {
      ++h[(codes[i] >> shift) - first];
      low |= codes[i];
    }
    low_bits |= low & ((uint32_t(1) << shift) - 1u);
  }
};

struct Job::Task {
  TaskSpec spec;
  std::vector<TermSpec> terms;
  std::deque<Selection> selections;  // one per term; band: then the upper ends, one per term
  std::vector<Phase> phases;
  std::atomic<int64_t> remaining{0};  // tiles of the current phase
  int completed = 0;                  // phases, guarded by the job's mutex
  float denominator = 1.0f;
  std::vector<TermView> views;         // templates for the kernels
  std::vector<BandView> bands;         // likewise, for a band
  std::vector<int64_t> ties_kept;      // per selection: how many of the tied are taken; -1 all
  std::deque<std::atomic<int64_t>> tied_until;  // [selection][tile] inclusive prefix, -1 unknown
  std::vector<double> l1_all, l1_kept;  // [term][chunk]
  bool keep_bits = false;      // whether the bits drawn for the sums are small enough to keep
  std::vector<uint64_t> bits;  // [term][chunk], while the task is worked on
  std::vector<double> rescale;
  std::vector<double> gram_chunks;  // [chunk][place], while they are summed
  std::vector<double> gram;
  std::vector<uint64_t> crc;  // [base?, terms..., out][tile]
  std::vector<int64_t> nonfinite;
  std::vector<char> mismatch;
  std::mutex mutex;

  int sources() const { return int(terms.size()) + (spec.base ? 1 : 0); }
  const TermSpec& term_of(size_t selection) const { return terms[selection % terms.size()]; }
  // What a packed delta was rescaled by, which multiplies what the method itself does.
  double factor(size_t k) const {
    const auto& packed = terms[k].x.packed;
    return packed && packed->as == PackedAs::Parts ? packed->factor : 1.0;
  }
  // Whether the kept values of a packed delta meet the kernel as they are, the rest masked.
  bool direct(size_t k) const {
    const auto& packed = terms[k].x.packed;
    return packed && packed->as == PackedAs::Parts && spec.difference &&
           views[k].sparsify == Sparsify::None;
  }
  bool has_phase(Phase p) const { return std::find(phases.begin(), phases.end(), p) != phases.end(); }
};

struct Job::Worker {
  size_t id = 0;
  std::vector<AlignedBuffer> inputs;
  AlignedBuffer output, scratch, codes;
  AlignedBuffer row_codes, row_bytes, keep_bits, factors;  // magprune, and the bits of a band
  RankScratch ranks;
  std::vector<KeepTable> tables;  // per term
  std::vector<AlignedBuffer> expanded;  // dense tiles of packed sources, one per slot
  AlignedBuffer packed, packed_base, bits;
  std::vector<TermView> views;
};

Job::Job(int threads, int64_t tile_elements, NanPolicy nan, bool checksums, int64_t memory)
    : threads_(threads < 1 ? 1 : threads),
      tile_(round_up(tile_elements > 0 ? tile_elements : kDefaultTile, kStatChunk)),
      nan_(nan),
      checksums_(checksums),
      memory_(memory > 0 ? memory : int64_t(256) << 20) {}

Job::~Job() = default;

int Job::file(const std::string& path, IoMode mode) {
  files_.push_back(std::make_unique<InputFile>(path, mode));
  return int(files_.size()) - 1;
}

int Job::output(const std::string& path) {
  outputs_.push_back(std::make_unique<OutputFile>(path));
  return int(outputs_.size()) - 1;
}

int Job::rows(RowsSource rows) {
  constexpr int64_t kNoRow = (int64_t(1) << 40) - 1;
  if (rows.row_bytes <= 0) throw std::invalid_argument("row_bytes must be positive");
  for (const RowsSource::Table& table : rows.tables) {
    if (table.source.packed || table.source.file < -1)
      throw std::invalid_argument("the tables of rows are plain ones");
    check(Source{DType::BYTES, table.source.ptr, table.source.file, table.source.offset, nullptr},
          table.rows * rows.row_bytes);
  }
  const int64_t made = int64_t(rows.made.size()) / rows.row_bytes;
  for (int64_t code : rows.codes) {
    const bool good = code < 0 ? -1 - code < made
                               : (code >> 40) < int64_t(rows.tables.size()) &&
                                     (code & kNoRow) < rows.tables[size_t(code >> 40)].rows;
    if (!good) throw std::invalid_argument("a row lies outside its table");
  }
  rows_.push_back(std::move(rows));
  return -1 - int(rows_.size());
}

void Job::check(const Source& s, int64_t n) const {
  if (s.packed) {
    const PackedSource& p = *s.packed;
    if (int64_t(p.blocks.size()) != (n + kStatChunk - 1) / kStatChunk + 1 || p.blocks[0] != 0)
      throw std::invalid_argument("a packed source needs one entry per block, and one more");
    for (size_t c = 0; c + 1 < p.blocks.size(); ++c)
      if (p.blocks[c + 1] < p.blocks[c] || p.blocks[c + 1] - p.blocks[c] > kStatChunk)
        throw std::invalid_argument("the entries of a packed source run backwards or too far");
    if (p.values.packed || p.base.packed)
      throw std::invalid_argument("values and base of a packed source are plain ones");
    check(p.values, p.blocks.back());
    check(p.base, n);
    return;
  }
  const int64_t bytes = n * dtype_size(s.dtype);
  if (s.ptr) return;
  if (s.file < -1 && size_t(-2 - s.file) < rows_.size()) {
    const RowsSource& r = rows_[size_t(-2 - s.file)];
    if (int64_t(r.codes.size()) * r.row_bytes != bytes)
      throw std::invalid_argument("there are not as many rows as the tensor has");
    return;
  }
  if (s.file < 0 || s.file >= int(files_.size())) {
    if (bytes == 0) return;
    throw std::invalid_argument("a source has neither memory nor a file of this job");
  }
  const InputFile& f = *files_[size_t(s.file)];
  if (s.offset < 0 || s.offset + bytes > f.size())
    throw std::invalid_argument(f.path() + ": a tensor lies outside the file");
}

int Job::add_task(const TaskSpec& spec) {
  if (spec.n < 0) throw std::invalid_argument("n must not be negative");
  if (spec.gram != Gram::None && (spec.copy || spec.elect != Elect::None ||
                                  spec.sparsify != Sparsify::None || spec.reduce != Reduce::Sum))
    throw std::invalid_argument("gram is for plain sums");
  if (spec.gram != Gram::Only && !spec.out_ptr && spec.n > 0 && (spec.out_file < 0 || spec.out_file >= int(outputs_.size())))
    throw std::invalid_argument("a task has neither memory nor an output file of this job");
  if (!spec.copy && spec.out_dtype != DType::BF16 && spec.out_dtype != DType::F16 &&
      spec.out_dtype != DType::F32)
    throw std::invalid_argument("out_dtype must be BF16, F16 or F32");
  if (spec.difference && !spec.base) throw std::invalid_argument("difference needs a base");
  if (spec.elect == Elect::None && spec.reduce == Reduce::Max)
    throw std::invalid_argument("reduce max needs an election");
  if (spec.sparsify == Sparsify::Magprune) {
    const int64_t row = spec.row > 0 ? spec.row : spec.n;
    if (row >= kLongestRow) throw std::invalid_argument("a row of magprune is 2^31 elements or more");
    if (row > 0 && spec.n % row) throw std::invalid_argument("n must be whole rows");
  }
  if (spec.base) check(*spec.base, spec.n);
  auto t = std::make_unique<Task>();
  t->spec = spec;
  tasks_.push_back(std::move(t));
  return int(tasks_.size()) - 1;
}

Job::Task& Job::task_at(int index) const {
  if (index < 0 || index >= int(tasks_.size())) throw std::out_of_range("no such task");
  return *tasks_[size_t(index)];
}

void Job::add_term(int task, const TermSpec& term) {
  Task& t = task_at(task);
  if (int64_t(t.terms.size()) >= kMaxTerms)
    throw std::invalid_argument("more than 256 models in one combine");
  check(term.x, t.spec.n);
  t.terms.push_back(term);
}

int64_t Job::tiles(const Task& t) const { return (t.spec.n + tile_ - 1) / tile_; }

// ---------------------------------------------------------------- reading and writing

const uint8_t* Job::fetch(Worker& w, const Source& s, int slot, int64_t first, int64_t n) {
  while (int(w.inputs.size()) <= slot) w.inputs.emplace_back();
  if (s.packed) return expand(w, *s.packed, s.dtype, slot, first, n);
  const int64_t size = dtype_size(s.dtype);
  if (s.file < -1) return gather(w, rows_[size_t(-2 - s.file)], slot, first * size, n * size);
  return stored(w, s, slot, first * size, n * size);
}

const uint8_t* Job::stored(Worker& w, const Source& s, int slot, int64_t first, int64_t bytes) {
  if (s.ptr) return s.ptr + first;
  const InputFile& f = *files_[size_t(s.file)];
  const int64_t at = s.offset + first;
  // once per read-ahead window, ask for the next one
  if (at / kReadAhead != (at + bytes) / kReadAhead)
    f.prefetch((at / kReadAhead + 2) * kReadAhead, kReadAhead);
  return f.bytes(at, bytes, w.inputs[size_t(slot)]);
}

// Rows that follow each other in a table are one piece; a tile that is one piece is not copied.
const uint8_t* Job::gather(Worker& w, const RowsSource& r, int slot, int64_t first,
                           int64_t bytes) {
  constexpr int64_t kRow = (int64_t(1) << 40) - 1;
  while (int(w.expanded.size()) <= slot) w.expanded.emplace_back();
  uint8_t* out = nullptr;
  for (int64_t done = 0; done < bytes;) {
    const int64_t row = (first + done) / r.row_bytes, inside = (first + done) % r.row_bytes;
    const int64_t code = r.codes[size_t(row)];
    int64_t length = r.row_bytes - inside;
    for (int64_t i = 1; code >= 0 && length < bytes - done; ++i, length += r.row_bytes)
      if (r.codes[size_t(row + i)] != code + i) break;
    length = std::min(length, bytes - done);
    const uint8_t* piece =
        code < 0 ? r.made.data() + (-1 - code) * r.row_bytes + inside
                 : stored(w, r.tables[size_t(code >> 40)].source, slot,
                          (code & kRow) * r.row_bytes + inside, length);
    if (length == bytes) return piece;
    if (!out) out = w.expanded[size_t(slot)].reserve(bytes);
    std::memcpy(out + done, piece, size_t(length));
    done += length;
  }
  return out;
}

void Job::wrong_blocks(const PackedSource& p) const {
  const std::string path = p.values.file < 0 ? "memory" : files_[size_t(p.values.file)]->path();
  throw FileError(EIO, path + " (block offsets that are not those of its random stream)");
}

// `count` values from the `from`-th on.
const uint8_t* Job::packed_values(Worker& w, const PackedSource& p, int slot, int64_t from,
                                  int64_t count) {
  static const uint8_t nothing[8] = {};
  return count ? fetch(w, p.values, slot, from, count) : nothing;
}

// A packed source as what it stands for, in `to`: its own type or float32.
const uint8_t* Job::expand(Worker& w, const PackedSource& p, DType to, int slot, int64_t first,
                           int64_t n) {
  const int64_t block = first / kStatChunk, start = block * kStatChunk;
  auto* bits = reinterpret_cast<uint64_t*>(w.bits.reserve((first - start + n + 63) / 64 * 8 + 8));
  draw_bits(p.stream, start, first - start + n, bits);
  const auto count = [bits](int64_t from, int64_t until) {  // set bits in [from, until)
    int64_t sum = 0;
    for (int64_t i = from / 64; i * 64 < until; ++i) {
      uint64_t word = bits[i];
      if (i * 64 < from) word &= ~uint64_t(0) << (from - i * 64);
      if (until - i * 64 < 64) word &= (uint64_t(1) << (until - i * 64)) - 1;
      sum += __builtin_popcountll(word);
    }
    return sum;
  };
  const int64_t end = first - start + n;
  for (int64_t at = 0; at + kStatChunk <= end; at += kStatChunk) {
    const size_t c = size_t(block + at / kStatChunk);
    if (count(at, at + kStatChunk) != p.blocks[c + 1] - p.blocks[c]) wrong_blocks(p);
  }
  const int64_t from = p.blocks[size_t(block)] + count(0, first - start);
  const int64_t kept = count(first - start, end);
  if (from + kept > p.blocks.back()) wrong_blocks(p);
  const uint8_t* values = packed_values(w, p, slot, from, kept);
  while (int(w.expanded.size()) <= slot) w.expanded.emplace_back();
  const int64_t size = dtype_size(to);
  uint8_t* dense = w.expanded[size_t(slot)].reserve(n * size);
  const uint8_t* base = nullptr;
  if (p.base.ptr) {
    base = p.base.ptr + first * dtype_size(p.base.dtype);
  } else {
    base = files_[size_t(p.base.file)]->bytes(p.base.offset + first * dtype_size(p.base.dtype),
                                              n * dtype_size(p.base.dtype), w.packed_base);
  }
  const auto kept_at = [bits, start, first](int64_t i) {
    const int64_t at = first - start + i;
    return (bits[at >> 6] >> (at & 63)) & 1;
  };
  if (p.as == PackedAs::Parts && to == p.values.dtype && to == p.base.dtype) {
    std::memcpy(dense, base, size_t(n * size));
    for (int64_t i = 0; i < n; ++i)
      if (kept_at(i)) {
        std::memcpy(dense + i * size, values, size_t(size));
        values += size;
      }
    return dense;
  }
  auto* out = reinterpret_cast<float*>(dense);
  auto* wide = reinterpret_cast<float*>(w.packed.reserve((kept + 1) * 4));
  kernels().to_f32(p.values.dtype, values, kept, wide);
  kernels().to_f32(p.base.dtype, base, n, out);
  const float factor = float(p.factor);
  for (int64_t i = 0; i < n; ++i) {
    if (p.as == PackedAs::Parts) {
      if (kept_at(i)) out[i] = *wide++;
    } else if (p.as == PackedAs::Model) {
      const float delta = kept_at(i) ? (*wide++ - out[i]) * factor : 0.0f;
      out[i] = out[i] + delta;  // also where it is +0, which makes +0 of a -0
    } else {
      out[i] = kept_at(i) ? (*wide++ - out[i]) * factor : 0.0f;
    }
  }
  return dense;
}

void Job::store(Task& t, const uint8_t* data, int64_t first, int64_t n, int64_t item) {
  if (t.spec.out_ptr) return;  // written in place
  outputs_[size_t(t.spec.out_file)]->write(data, n * item, t.spec.out_offset + first * item);
}

// ---------------------------------------------------------------- selection

// Codes of `runs` evenly spaced runs of the tensor; a short tensor is taken whole.
void Job::sample_into(const Task& t, const TermSpec& term, Worker& w, int64_t runs,
                      std::vector<uint32_t>* codes, std::vector<int64_t>* run_ends) {
  const int64_t n = t.spec.n;
  const bool whole = n <= runs * kRun;
  const int64_t length = whole ? n : kRun;
  const bool replace = nan_ == NanPolicy::Zero;
  for (int64_t r = 0; r < (whole ? 1 : runs); ++r) {
    const int64_t first = whole ? 0 : (n - kRun) / (runs > 1 ? runs - 1 : 1) * r;
    const uint8_t* x = fetch(w, term.x, 0, first, length);
    const uint8_t* base = t.spec.difference ? fetch(w, *t.spec.base, 1, first, length) : nullptr;
    const size_t before = codes->size();
    codes->resize(before + size_t(length) + 16);
    int64_t above = 0;
    const int64_t found =
        kernels().scan(term.x.dtype, x, base ? t.spec.base->dtype : DType::F32, base, length,
                       replace, 0, kLargestCode, codes->data() + before, &above);
    codes->resize(before + size_t(found));
    run_ends->push_back(int64_t(codes->size()));
  }
}

// A range that holds the k-th largest code almost surely: the sample's quantile, five standard
// errors to both sides. Runs differ among themselves (rows of a matrix have their own scale), so
// the error is the larger of the binomial one and the one seen between runs.
void Job::bracket(Selection& s, std::vector<uint32_t>& codes, const std::vector<int64_t>& run_ends,
                  int64_t n, int terms) {
  s.max_bins = std::clamp<int64_t>(memory_ / 4 / (int64_t(threads_) * terms * 8), 4096, kMaxBins);
  s.histograms.resize(size_t(threads_));
  const int64_t m = int64_t(codes.size());
  if (m == 0 || m >= n) {
    s.range(0, kLargestCode, 0);
    return;
  }
  uint32_t any = 0;
  for (uint32_t c : codes) any |= c;
  const int zero_bits = any ? std::min(__builtin_ctz(any), 22) : 0;
  const double q = double(s.k) / double(n);
  const int64_t rank = std::clamp<int64_t>(int64_t(q * double(m)), 0, m - 1);
  std::vector<uint32_t> sorted(codes);
  const auto at_rank = [&](int64_t r) {
    std::nth_element(sorted.begin(), sorted.begin() + r, sorted.end(), std::greater<uint32_t>());
    return sorted[size_t(r)];
  };
  const uint32_t pivot = at_rank(rank);
  double spread = 0.0;
  int64_t begin = 0;
  for (int64_t end : run_ends) {
    int64_t over = 0;
    for (int64_t i = begin; i < end; ++i) over += codes[size_t(i)] > pivot;
    const double share = double(over) / double(std::max<int64_t>(end - begin, 1)) - q;
    spread += share * share;
    begin = end;
  }
  const double runs = double(run_ends.size());
  const double error = std::max(std::sqrt(q * (1.0 - q) / double(m)), std::sqrt(spread) / runs);
  const int64_t margin = int64_t(5.0 * error * double(m)) + 8;
  const uint32_t hi = rank - margin < 0 ? kLargestCode : at_rank(rank - margin);
  const uint32_t lo = rank + margin >= m ? 0 : at_rank(rank + margin);
  s.range(lo, hi, zero_bits);
}

// After a complete scan: true when the code is known; otherwise the range to scan next is set.
bool Job::resolve(Selection& s) {
  const int64_t bins = s.bins();
  std::vector<uint64_t> total(size_t(bins), 0);
  int64_t inside = 0;
  for (const auto& h : s.histograms)
    for (size_t i = 0; i < h.size(); ++i) {
      total[i] += h[i];
      inside += int64_t(h[i]);
    }
  const int64_t above = s.above;
  if (above >= s.k) {  // the range was too low
    s.range(s.hi + 1, kLargestCode, 0);
    return false;
  }
  if (above + inside < s.k) {  // too high
    s.range(0, s.lo - 1, 0);
    return false;
  }
  int64_t greater = above;
  int64_t bin = bins - 1;
  while (greater + int64_t(total[size_t(bin)]) < s.k) greater += int64_t(total[size_t(bin--)]);
  const uint32_t first = uint32_t(((s.lo >> s.shift) + uint64_t(bin)) << s.shift);
  if (s.shift > 0 && s.low_bits != 0) {  // several codes share the bin
    const uint32_t last = first + ((uint32_t(1) << s.shift) - 1u);
    s.range(std::max(first, s.lo), std::min(last, s.hi), 0);
    return false;
  }
  s.code = first;
  s.greater = greater;
  s.equal = int64_t(total[size_t(bin)]);
  s.done = true;
  s.histograms.clear();
  return true;
}

void Job::scan_tile(Task& t, Selection& s, const TermSpec& term, int slot, int64_t tile,
                    Worker& w) {
  const int64_t first = tile * tile_, n = std::min(tile_, t.spec.n - first);
  const uint8_t* base = t.spec.difference ? fetch(w, *t.spec.base, 0, first, n) : nullptr;
  const uint8_t* x = fetch(w, term.x, slot, first, n);
  auto* codes = reinterpret_cast<uint32_t*>(w.codes.reserve((kSubTile + 16) * 4));
  int64_t above = 0;
  for (int64_t o = 0; o < n; o += kSubTile) {
    const int64_t m = std::min(kSubTile, n - o);
    const int64_t found = kernels().scan(
        term.x.dtype, x + o * dtype_size(term.x.dtype), base ? t.spec.base->dtype : DType::F32,
        base ? base + o * dtype_size(t.spec.base->dtype) : nullptr, m, nan_ == NanPolicy::Zero,
        s.lo, s.hi, codes, &above);
    s.count(w.id, codes, found);
  }
  s.above += above;
}

void Job::sample(Task& t, Worker& w) {
  for (size_t k = 0; k < t.selections.size(); ++k) {
    if (!t.selections[k].active || t.selections[k].done) continue;
    std::vector<uint32_t> codes;
    std::vector<int64_t> run_ends;
    sample_into(t, t.term_of(k), w, kRuns, &codes, &run_ends);
    bracket(t.selections[k], codes, run_ends, t.spec.n, int(t.selections.size()));
  }
}

// The thresholds are known: how many of the tied elements stay, and the kernels' templates.
void Job::settle(Task& t) {
  const size_t K = t.terms.size();
  for (size_t k = 0; k < t.selections.size(); ++k) {
    const Selection& s = t.selections[k];
    if (!s.active) continue;
    if (t.spec.sparsify == Sparsify::Band) {
      (k < K ? t.bands[k].low : t.bands[k - K].high) = s.code;
    } else {
      t.views[k].code = s.code;
    }
    if (t.spec.ties == Ties::None) {
      t.ties_kept[k] = 0;
    } else if (t.spec.ties == Ties::First && s.k - s.greater < s.equal) {
      t.ties_kept[k] = s.k - s.greater;
    } else {
      t.ties_kept[k] = -1;
    }
  }
}

void Job::select_whole(Task& t, Worker& w) {
  const int64_t n = t.spec.n;
  auto* codes = reinterpret_cast<uint32_t*>(w.codes.reserve((n + 16) * 4));
  const uint8_t* base = t.spec.difference ? fetch(w, *t.spec.base, 0, 0, n) : nullptr;
  const DType tb = base ? t.spec.base->dtype : DType::F32;
  const bool replace = nan_ == NanPolicy::Zero;
  for (size_t k = 0; k < t.selections.size(); ++k) {
    Selection& s = t.selections[k];
    if (!s.active || s.done) continue;
    const TermSpec& term = t.term_of(k);
    std::vector<uint32_t> sampled;
    std::vector<int64_t> run_ends;
    if (n > 4 * kRuns * kRun) {
      sample_into(t, term, w, kRuns, &sampled, &run_ends);
      base = t.spec.difference ? fetch(w, *t.spec.base, 0, 0, n) : nullptr;
    }
    bracket(s, sampled, run_ends, n, int(t.selections.size()));
    const uint8_t* x = fetch(w, term.x, int(k % t.terms.size()) + 1, 0, n);
    int64_t above = 0;
    int64_t found =
        kernels().scan(term.x.dtype, x, tb, base, n, replace, s.lo, s.hi, codes, &above);
    if (above >= s.k || above + found < s.k) {  // missed: take everything
      above = 0;
      found = kernels().scan(term.x.dtype, x, tb, base, n, replace, 0, kLargestCode, codes, &above);
    }
    uint32_t* nth = codes + (s.k - above - 1);
    std::nth_element(codes, nth, codes + found, std::greater<uint32_t>());
    s.code = *nth;
    s.greater = above;
    s.equal = 0;
    for (int64_t i = 0; i < found; ++i) {
      s.greater += codes[i] > s.code;
      s.equal += codes[i] == s.code;
    }
    s.done = true;
    s.histograms.clear();
  }
}

std::vector<Job::Task*> Job::model_tasks(size_t models) {
  std::vector<Task*> found;
  bytes_total_ = 0;
  for (const auto& t : tasks_) {
    if (t->spec.copy || t->spec.n == 0) continue;
    if (t->terms.size() != models)
      throw std::invalid_argument("model scope needs the same models for every tensor");
    found.push_back(t.get());
    for (const TermSpec& term : t->terms)
      bytes_total_ += t->spec.n * (dtype_size(term.x.dtype) +
                                   (t->spec.difference ? dtype_size(t->spec.base->dtype) : 0));
  }
  return found;
}

void Job::scan_model(const std::vector<Task*>& tasks, std::deque<Selection>& selections) {
  units_.clear();
  for (size_t i = 0; i < tasks.size(); ++i)
    units_.push_back(Unit{int(i), Phase::Scan, tiles(*tasks[i])});
  unit_ = 0;
  unit_tile_ = 0;
  crew([&](Worker& w) {
    Unit unit;
    int64_t tile;
    while (!stop_ && next(&unit, &tile)) {
      Task& t = *tasks[size_t(unit.task)];
      for (size_t k = 0; k < selections.size(); ++k) {
        if (selections[k].done) continue;
        scan_tile(t, selections[k], t.terms[k], int(k) + 1, tile, w);
        bytes_done_ += std::min(tile_, t.spec.n - tile * tile_) *
                       (dtype_size(t.terms[k].x.dtype) +
                        (t.spec.difference ? dtype_size(t.spec.base->dtype) : 0));
      }
    }
  });
}

std::vector<int64_t> Job::select_model(const std::vector<int64_t>& counts) {
  const size_t K = counts.size();
  const std::vector<Task*> trimmed = model_tasks(K);
  int64_t n = 0;
  for (const Task* t : trimmed) n += t->spec.n;
  std::deque<Selection> selections(K);
  std::vector<int64_t> codes(K, 0);
  if (n == 0) return codes;
  {
    Worker w;
    for (size_t k = 0; k < K; ++k) {
      Selection& s = selections[k];
      s.k = counts[k];
      if (s.k < 1 || s.k > n) throw std::invalid_argument("count outside 1..n");
      std::vector<uint32_t> sampled;
      std::vector<int64_t> run_ends;
      for (const Task* t : trimmed) {
        const double share = double(t->spec.n) / double(n);
        sample_into(*t, t->terms[k], w, std::max<int64_t>(1, int64_t(share * kModelRuns)), &sampled,
                    &run_ends);
      }
      bracket(s, sampled, run_ends, n, int(K));
    }
  }
  for (bool again = true; again && !stop_;) {
    scan_model(trimmed, selections);
    if (stop_) break;
    again = false;
    for (size_t k = 0; k < K; ++k)
      if (!selections[k].done && !resolve(selections[k])) again = true;
  }
  for (size_t k = 0; k < K; ++k) codes[k] = int64_t(selections[k].code);
  return codes;
}

std::vector<std::vector<uint64_t>> Job::count_codes(const std::vector<CodeRange>& ranges) {
  const size_t K = ranges.size();
  std::deque<Selection> selections(K);
  for (size_t k = 0; k < K; ++k) {
    const CodeRange& range = ranges[k];
    Selection& s = selections[k];
    s.done = range.hi < range.lo;
    if (s.done) continue;
    if (range.lo < 0 || range.hi > int64_t(kLargestCode) || range.shift < 0 || range.shift > 31)
      throw std::invalid_argument("codes have 31 bits");
    s.lo = uint32_t(range.lo);
    s.hi = uint32_t(range.hi);
    s.shift = range.shift;
    if (s.bins() > kMaxBins) throw std::invalid_argument("more bins than one histogram may have");
    s.histograms.resize(size_t(threads_));
  }
  scan_model(model_tasks(K), selections);
  std::vector<std::vector<uint64_t>> totals(K);
  for (size_t k = 0; k < K; ++k) {
    if (selections[k].done) continue;
    totals[k].assign(size_t(selections[k].bins()), 0);
    for (const auto& h : selections[k].histograms)
      for (size_t i = 0; i < h.size(); ++i) totals[k][i] += h[i];
  }
  return totals;
}

// ---------------------------------------------------------------- magprune

// Keep bits, and factors if wanted, of the elements [first, first + n) of a term. A row that the
// tile cuts is ranked whole, by both its tiles.
void Job::magprune_tile(Task& t, size_t k, int64_t first, int64_t n, Worker& w, uint64_t* bits,
                        float* factors) {
  const TermSpec& term = t.terms[k];
  const int64_t length = t.spec.row > 0 ? t.spec.row : t.spec.n;
  if (w.tables.size() < t.terms.size()) w.tables.resize(t.terms.size());
  KeepTable& table = w.tables[k];
  table.make(length, term.density, term.epsilon);
  uint8_t* bytes = w.row_bytes.reserve(n + 256);
  kernels().stream_bytes(term.key, first, n, bytes);
  const int slot = int(t.terms.size()) + 1;  // the tile itself stays in the slots before
  const int64_t group = std::max<int64_t>(1, kRowElements / length) * length;
  for (int64_t at = first / length * length; at < first + n; at += group) {
    const int64_t m = std::min(group, (first + n - at + length - 1) / length * length);
    const uint8_t* x = fetch(w, term.x, slot, at, m);
    const uint8_t* base = t.spec.difference ? fetch(w, *t.spec.base, slot + 1, at, m) : nullptr;
    auto* codes = reinterpret_cast<uint32_t*>(w.row_codes.reserve((m + 16) * 4));
    kernels().codes(term.x.dtype, x, base ? t.spec.base->dtype : DType::F32, base, m,
                    nan_ == NanPolicy::Zero, codes);
    for (int64_t row = at; row < at + m; row += length)
      magprune_row(codes + (row - at), table, term.key, row, std::max<int64_t>(0, first - row),
                   std::min(length, first + n - row), bytes + (row - first),
                   factors ? factors + (row - first) : nullptr, w.ranks);
  }
  pack_bytes(bytes, n, bits);
}

// ---------------------------------------------------------------- l1 sums

void Job::l1_tile(Task& t, int64_t tile, Worker& w) {
  const int64_t first = tile * tile_, n = std::min(tile_, t.spec.n - first);
  const int64_t chunks = (t.spec.n + kStatChunk - 1) / kStatChunk;
  if (t.keep_bits) {
    std::lock_guard<std::mutex> lock(t.mutex);
    t.bits.resize(t.l1_all.size() * size_t(kStatChunk / 64));
  }
  const uint8_t* base = t.spec.difference ? fetch(w, *t.spec.base, 0, first, n) : nullptr;
  const DType tb = base ? t.spec.base->dtype : DType::F32;
  for (size_t k = 0; k < t.terms.size(); ++k) {
    TermView view = t.views[k];
    if (view.sparsify == Sparsify::None) continue;
    const uint8_t* x = fetch(w, t.terms[k].x, int(k) + 1, first, n);
    uint64_t* given = nullptr;  // the keep bits of the tile, unless they are drawn chunk by chunk
    if (t.spec.sparsify == Sparsify::Band) {
      given = reinterpret_cast<uint64_t*>(w.keep_bits.reserve((n + 64) / 8 + 8));
      BandView inside = t.bands[k];  // without those at its ends
      inside.low_until = 0;
      inside.high_from = n;
      kernels().band_bits(view.dtype, x, tb, base, n, nan_ == NanPolicy::Zero, inside, given);
    } else if (t.spec.sparsify == Sparsify::Magprune) {
      given = t.bits.empty()
                  ? reinterpret_cast<uint64_t*>(w.keep_bits.reserve((n + 64) / 8 + 8))
                  : &t.bits[(k * size_t(chunks) + size_t(first / kStatChunk)) * (kStatChunk / 64)];
      magprune_tile(t, k, first, n, w, given, nullptr);
    }
    for (int64_t o = 0; o < n; o += kStatChunk) {
      const size_t at = k * size_t(chunks) + size_t((first + o) / kStatChunk);
      view.x = x + o * dtype_size(view.dtype);
      view.bits = given ? given + o / 64 : nullptr;
      uint64_t* bits = t.bits.empty() ? reinterpret_cast<uint64_t*>(w.codes.reserve(kStatChunk / 8))
                                      : &t.bits[at * (kStatChunk / 64)];
      kernels().l1(view, tb, base ? base + o * dtype_size(tb) : nullptr,
                   std::min(kStatChunk, n - o), first + o, nan_ == NanPolicy::Zero, bits,
                   &t.l1_all[at], &t.l1_kept[at]);
    }
  }
}

void Job::finish_l1(Task& t) {
  const size_t chunks = size_t((t.spec.n + kStatChunk - 1) / kStatChunk);
  for (size_t k = 0; k < t.terms.size(); ++k) {
    if (t.views[k].sparsify == Sparsify::None) continue;
    double all = 0.0, kept = 0.0;
    for (size_t c = 0; c < chunks; ++c) {
      all += t.l1_all[k * chunks + c];
      kept += t.l1_kept[k * chunks + c];
    }
    if (t.spec.sparsify == Sparsify::Trim) {
      const Selection& s = t.selections[k];
      const int64_t tied = t.ties_kept[k] < 0 ? s.equal : t.ties_kept[k];
      kept += double(bits_f32(s.code)) * double(tied);
    } else if (t.spec.sparsify == Sparsify::Band && t.terms[k].keep_count > 0) {
      // What is kept at both ends, which may be one.
      const Selection &low = t.selections[k], &high = t.selections[k + t.terms.size()];
      double at_low = 0.0;
      if (low.active) at_low = double(t.ties_kept[k] < 0 ? low.equal : t.ties_kept[k]);
      if (high.active) {
        const int64_t cut = t.ties_kept[k + t.terms.size()];
        const double dropped = double(cut < 0 ? high.equal : cut);
        if (low.active && low.code == high.code) {
          at_low -= dropped;
        } else {
          kept += double(bits_f32(high.code)) * (double(high.equal) - dropped);
        }
      }
      if (low.active) kept += double(bits_f32(low.code)) * at_low;
    }
    const double own = all < 1e-7 || kept < 1e-7 ? 1.0 : all / kept;
    const double r = t.factor(k) * own;
    t.rescale[k] = r;
    t.views[k].rescale = float(r);
    t.views[k].scale = float(t.terms[k].weight * r);
  }
}

// ---------------------------------------------------------------- Gram matrices

void Job::gram_tile(Task& t, int64_t tile, Worker& w) {
  const int64_t first = tile * tile_, n = std::min(tile_, t.spec.n - first);
  const int64_t K = int64_t(t.terms.size());
  const uint8_t* base = t.spec.difference ? fetch(w, *t.spec.base, 0, first, n) : nullptr;
  const DType tb = base ? t.spec.base->dtype : DType::F32;
  std::vector<TermView> terms(t.views);
  std::vector<const uint8_t*> x;
  for (int64_t k = 0; k < K; ++k)
    x.push_back(fetch(w, t.terms[size_t(k)].x, int(k) + 1, first, n));
  auto* scratch = reinterpret_cast<float*>(w.scratch.reserve(gram_scratch_floats(K) * 4));
  for (int64_t o = 0; o < n; o += kStatChunk) {
    for (size_t k = 0; k < terms.size(); ++k) terms[k].x = x[k] + o * dtype_size(terms[k].dtype);
    kernels().gram(terms.data(), int(K), tb, base ? base + o * dtype_size(tb) : nullptr,
                   std::min(kStatChunk, n - o), scratch,
                   &t.gram_chunks[size_t((first + o) / kStatChunk * gram_size(K))]);
  }
}

void Job::finish_gram(Task& t, int index) {
  const size_t places = size_t(gram_size(int64_t(t.terms.size())));
  t.gram.assign(places, 0.0);
  for (size_t c = 0; c < t.gram_chunks.size(); c += places)
    for (size_t i = 0; i < places; ++i) t.gram[i] += t.gram_chunks[c + i];
  std::vector<double>().swap(t.gram_chunks);
  // A packed delta meets the sums without its factor.
  const int64_t K = int64_t(t.terms.size());
  for (int64_t i = 0; i < K; ++i)
    for (int64_t j = i; j < K; ++j)
      t.gram[size_t(gram_place(K, i, j))] *= t.factor(size_t(i)) * t.factor(size_t(j));
  if (t.spec.gram != Gram::Blend) return;
  std::vector<double> weights;
  {
    std::lock_guard<std::mutex> lock(blend_mutex_);
    weights = blend_(index, t.gram);
  }
  if (weights.size() != t.terms.size())
    throw std::invalid_argument("a blend must give one weight for each model");
  for (size_t k = 0; k < weights.size(); ++k) {
    t.views[k].weight = float(weights[k]);
    t.views[k].scale = float(weights[k] * t.rescale[k]);
  }
}

// ---------------------------------------------------------------- the fused pass

namespace {

// The values of a packed term that a tile has still to place.
struct Cursor {
  const uint8_t* values = nullptr;
  int64_t position = 0, end = 0, item = 0, scratch = 0;
  uint64_t crc = 0;
};

}  // namespace

void Job::combine_tile(Task& t, int64_t tile, Worker& w) {
  const TaskSpec& spec = t.spec;
  const int64_t first = tile * tile_, n = std::min(tile_, spec.n - first);
  const size_t K = t.terms.size();
  const int64_t n_tiles = tiles(t);
  const int64_t item = dtype_size(spec.out_dtype);
  w.views.assign(t.views.begin(), t.views.end());
  const uint8_t* base = spec.difference ? fetch(w, *spec.base, 0, first, n) : nullptr;
  const DType tb = base ? spec.base->dtype : DType::F32;
  const bool replace = nan_ == NanPolicy::Zero;
  const auto bounds = [&](size_t k, int64_t end) {  // of the packed values of this tile
    return t.terms[k].x.packed->blocks[size_t((end + kStatChunk - 1) / kStatChunk)];
  };
  std::vector<Cursor> cursors(K);
  int64_t packed_bytes = 0;
  for (size_t k = 0; k < K; ++k) {
    const PackedSource* p = t.terms[k].x.packed.get();
    if (p) {
      Cursor& c = cursors[k];
      c.position = bounds(k, first);
      c.end = bounds(k, first + n);
      c.item = dtype_size(p->values.dtype);
      c.values = packed_values(w, *p, int(k) + 1, c.position, c.end - c.position);
      if (checksums_) c.crc = crc64(0, c.values, size_t((c.end - c.position) * c.item));
      if (t.direct(k)) {
        w.views[k].dtype = p->values.dtype;
        w.views[k].sparsify = Sparsify::Drop;
        c.scratch = packed_bytes;
        packed_bytes += kSubTile * c.item + kSubTile / 8;
        continue;
      }
    }
    w.views[k].x = fetch(w, t.terms[k].x, int(k) + 1, first, n);
  }

  // Which of the elements tied at a threshold stay: the first ones of the tensor. Each tile counts
  // its own and adds the total before it, which the owner of the tile before publishes.
  // Returns the position in the tile before which the tied elements are taken; -1 when stopped.
  const auto ties_before = [&](const TermView& v, uint32_t code, size_t selection) -> int64_t {
    const int64_t kept = t.ties_kept[selection];
    if (kept <= 0) return kept < 0 ? n : 0;
    const auto equal = [&](int64_t from, int64_t count) {
      return kernels().count_equal(v.dtype, v.x + from * dtype_size(v.dtype), tb,
                                   base ? base + from * dtype_size(tb) : nullptr, count, replace,
                                   code);
    };
    const int64_t here = equal(0, n);
    const size_t at = selection * size_t(n_tiles) + size_t(tile);
    int64_t before = 0;
    if (tile > 0) {
      while ((before = t.tied_until[at - 1].load(std::memory_order_acquire)) < 0) {
        if (stop_) return -1;
        std::this_thread::yield();
      }
    }
    t.tied_until[at].store(before + here, std::memory_order_release);
    if (before + here <= kept) return n;
    if (before >= kept) return 0;
    // the boundary is in this tile: halve until it is found
    int64_t need = kept - before, from = 0, length = n;
    while (length > 1) {
      const int64_t half = (length + 1) / 2;
      const int64_t in_half = equal(from, half);
      if (in_half >= need) {
        length = half;
      } else {
        need -= in_half;
        from += half;
        length -= half;
      }
    }
    return from + 1;
  };
  const int64_t words = (n + 63) / 64;
  for (size_t k = 0; k < K; ++k) {
    TermView& v = w.views[k];
    if (t.direct(k)) continue;  // its bits are drawn beside its values
    if (v.sparsify == Sparsify::Trim) {
      if ((v.ties_until = ties_before(v, v.code, k)) < 0) return;
    } else if (v.sparsify == Sparsify::Drop && spec.sparsify == Sparsify::Band) {
      BandView band = t.bands[k];
      if ((band.low_until = ties_before(v, band.low, k)) < 0) return;
      if ((band.high_from = ties_before(v, band.high, k + K)) < 0) return;
      uint64_t* bits =
          reinterpret_cast<uint64_t*>(w.keep_bits.reserve(int64_t(K) * words * 8)) + k * words;
      kernels().band_bits(v.dtype, v.x, tb, base, n, replace, band, bits);
      v.bits = bits;
    } else if (v.sparsify == Sparsify::Drop && spec.sparsify == Sparsify::Magprune &&
               t.bits.empty()) {
      uint64_t* bits =
          reinterpret_cast<uint64_t*>(w.keep_bits.reserve(int64_t(K) * words * 8)) + k * words;
      float* factors = nullptr;
      if (spec.rescale == Rescale::KeepRate) {
        const int64_t room = (n + 15) / 16 * 16;
        factors = reinterpret_cast<float*>(w.factors.reserve(int64_t(K) * room * 4)) + k * room;
      }
      magprune_tile(t, k, first, n, w, bits, factors);
      v.bits = bits;
      v.factors = factors;
    }
  }

  // after all that expands packed sources, which takes this memory too
  uint8_t* placed = packed_bytes ? w.packed.reserve(packed_bytes) : nullptr;
  uint8_t* out = spec.out_ptr ? spec.out_ptr + first * item : w.output.reserve(n * item);
  TileView view;
  view.base_dtype = tb;
  view.difference = spec.difference;
  view.replace_nonfinite = replace;
  view.elect = spec.elect;
  view.vote_weighted = spec.vote_weighted;
  view.reduce = spec.reduce;
  view.divide_by_weights = spec.divide_by_weights;
  view.denominator = t.denominator;
  view.lambda = float(spec.lambda);
  view.n_terms = int(K);
  view.out_dtype = spec.out_dtype;
  view.scratch = reinterpret_cast<float*>(w.scratch.reserve(scratch_floats(int64_t(K)) * 4));
  std::vector<TermView> terms(w.views);
  view.terms = terms.data();
  const int sources = t.sources();
  const int b = spec.base ? 1 : 0;
  const int64_t chunks = (spec.n + kStatChunk - 1) / kStatChunk;
  uint64_t crc[kMaxTerms + 2] = {};
  for (int64_t o = 0; o < n; o += kSubTile) {
    const int64_t m = std::min(kSubTile, n - o);
    view.n = m;
    view.index0 = first + o;
    view.base = base ? base + o * dtype_size(tb) : nullptr;
    view.out = out + o * item;
    for (size_t k = 0; k < K; ++k) {
      if (t.direct(k)) {
        Cursor& c = cursors[k];
        uint8_t* dense = placed + c.scratch;
        auto* bits = reinterpret_cast<uint64_t*>(dense + kSubTile * c.item);
        const int64_t kept = draw_bits(t.terms[k].x.packed->stream, first + o, m, bits);
        const bool ends = (first + o + m) % kStatChunk == 0 || o + m == n;
        if (c.position + kept > c.end ||
            (ends && c.position + kept != bounds(k, first + o + m)))
          wrong_blocks(*t.terms[k].x.packed);
        std::memset(dense, 0, size_t(m * c.item));
        scatter_bits(c.item, c.values, bits, m, dense);
        c.values += kept * c.item;
        c.position += kept;
        terms[k].x = dense;
        terms[k].bits = bits;
        continue;
      }
      terms[k].x = w.views[k].x + o * dtype_size(terms[k].dtype);
      terms[k].ties_until = w.views[k].ties_until - o;
      if (!t.bits.empty() && terms[k].sparsify == Sparsify::Drop) {
        terms[k].bits = &t.bits[(k * size_t(chunks) * kStatChunk + size_t(first + o)) / 64];
      } else if (w.views[k].bits) {
        terms[k].bits = w.views[k].bits + o / 64;
        if (w.views[k].factors) terms[k].factors = w.views[k].factors + o;
      }
    }
    kernels().combine(view);
    if (checksums_) {
      if (base) crc[0] = crc64(crc[0], view.base, size_t(m * dtype_size(tb)));
      for (size_t k = 0; k < K; ++k)
        crc[size_t(b) + k] =
            t.terms[k].x.packed
                ? cursors[k].crc
                : crc64(crc[size_t(b) + k], terms[k].x, size_t(m * dtype_size(terms[k].dtype)));
      crc[sources] = crc64(crc[sources], view.out, size_t(m * item));
    }
  }
  store(t, out, first, n, item);
  if (checksums_)
    for (int s = 0; s <= sources; ++s) t.crc[size_t(s) * size_t(n_tiles) + size_t(tile)] = crc[s];
  bool bad = view.base_nonfinite || view.out_nonfinite;
  for (const TermView& v : terms) bad = bad || v.nonfinite;
  if (bad) {
    std::lock_guard<std::mutex> lock(t.mutex);
    if (b) t.nonfinite[0] += view.base_nonfinite;
    for (size_t k = 0; k < K; ++k) t.nonfinite[size_t(b) + k] += terms[k].nonfinite;
    t.nonfinite[size_t(sources)] += view.out_nonfinite;
    if (nan_ == NanPolicy::Refuse) stop_ = true;
  }
}

void Job::copy_tile(Task& t, int64_t tile, Worker& w) {
  const int64_t first = tile * tile_, n = std::min(tile_, t.spec.n - first);
  const int64_t n_tiles = tiles(t);
  const auto sum = [&](int source, const uint8_t* p) {
    if (checksums_)
      t.crc[size_t(source) * size_t(n_tiles) + size_t(tile)] = crc64(0, p, size_t(n));
  };
  const int b = t.spec.base ? 1 : 0;
  const uint8_t* from = fetch(w, b ? *t.spec.base : t.terms[0].x, 0, first, n);
  sum(0, from);
  for (size_t k = b ? 0 : 1; k < t.terms.size(); ++k) {
    const uint8_t* other = fetch(w, t.terms[k].x, 1, first, n);
    sum(b + int(k), other);
    if (std::memcmp(from, other, size_t(n)) != 0) {
      std::lock_guard<std::mutex> lock(t.mutex);
      t.mismatch[size_t(b) + k] = 1;
    }
  }
  sum(t.sources(), from);
  if (t.spec.out_ptr) {
    std::memcpy(t.spec.out_ptr + first, from, size_t(n));
  } else {
    store(t, from, first, n, 1);
  }
}

// ---------------------------------------------------------------- scheduling

void Job::prepare(Task& t) {
  const TaskSpec& spec = t.spec;
  const size_t K = t.terms.size();
  if (K == 0 && !(spec.copy && spec.base))
    throw std::invalid_argument("a task has no model");
  const int64_t n_tiles = tiles(t);
  t.nonfinite.assign(size_t(t.sources()) + 1, 0);
  t.mismatch.assign(size_t(t.sources()), 0);
  t.crc.assign(checksums_ ? size_t(t.sources() + 1) * size_t(n_tiles) : 0, 0);
  t.phases.clear();
  t.completed = 0;
  if (spec.copy) {
    t.phases = {Phase::Combine};
    return;
  }
  const bool band = spec.sparsify == Sparsify::Band, magprune = spec.sparsify == Sparsify::Magprune;
  t.selections.resize(band ? 2 * K : K);
  t.views.assign(K, TermView());
  t.bands.assign(band ? K : 0, BandView());
  t.ties_kept.assign(t.selections.size(), -1);
  t.rescale.assign(K, 1.0);
  bool select = false, sums = false, ordered = false;
  double weights = 0.0;
  for (size_t k = 0; k < K; ++k) {
    const TermSpec& term = t.terms[k];
    TermView& v = t.views[k];
    Selection& s = t.selections[k];
    weights += term.weight;
    v.dtype = term.x.dtype;
    v.weight = float(term.weight);
    t.rescale[k] = t.factor(k);
    if (term.density < 1.0) v.sparsify = spec.sparsify;
    if (v.sparsify == Sparsify::Band) {
      v.sparsify = Sparsify::Drop;
      const int64_t top = std::clamp<int64_t>(term.drop_count, 0, spec.n);
      const int64_t end = std::min(top + std::max<int64_t>(term.keep_count, 0), spec.n);
      Selection& upper = t.selections[K + k];
      if (end <= top) {  // nothing stays
        t.bands[k].low = 0xffffffffu;
        t.ties_kept[k] = 0;
      } else {
        const auto want = [&](Selection& one, int64_t count) {
          one.active = true;
          one.k = count;
          select = ordered = true;
        };
        if (end < spec.n) want(s, end);  // else everything down to zero, and all that is zero
        if (top > 0) want(upper, top);
      }
      if (!upper.active) t.ties_kept[K + k] = 0;
    }
    if (v.sparsify == Sparsify::Magprune) {
      v.sparsify = Sparsify::Drop;
      if (!(term.density - term.epsilon > 0.0) || !(term.density + term.epsilon <= 1.0) ||
          !(term.epsilon >= 0.0))
        throw std::invalid_argument("keep probabilities of magprune outside of (0, 1]");
    }
    if (v.sparsify == Sparsify::Drop && spec.sparsify == Sparsify::Drop) {
      v.key = term.key;
      v.threshold = uint32_t(term.keep_threshold);
      if (term.keep_threshold >> 32) v.sparsify = Sparsify::None;
    }
    if (v.sparsify == Sparsify::Trim) {
      s.active = true;
      s.k = std::min(term.keep_count, spec.n);
      if (term.fixed_code >= 0) {
        s.code = uint32_t(term.fixed_code);
        s.done = true;
        if (spec.ties == Ties::First || spec.rescale == Rescale::L1)
          throw std::invalid_argument("a given threshold keeps all or none of its ties, unscaled");
      } else if (s.k <= 0) {  // nothing stays
        s.code = 0xffffffffu;
        s.done = true;
      } else {
        select = true;
        ordered = ordered || spec.ties == Ties::First;
      }
    }
    if (v.sparsify != Sparsify::None) {
      if (spec.rescale == Rescale::KeepRate)
        t.rescale[k] *= magprune ? 1.0  // each element has a factor of its own
                       : v.sparsify == Sparsify::Drop && !band
                           ? 4294967296.0 / double(std::max<uint64_t>(term.keep_threshold, 1))
                           : 1.0 / term.density;
      sums = sums || spec.rescale == Rescale::L1;
    }
    v.rescale = float(t.rescale[k]);
    v.scale = float(term.weight * t.rescale[k]);
  }
  if (spec.elect == Elect::None && spec.reduce == Reduce::Mean) {
    t.denominator = spec.divide_by_weights ? float(weights) : float(K);
    if (std::fabs(weights) < 1e-8 && spec.divide_by_weights) t.denominator = 1.0f;
  }
  if (sums) {
    const size_t chunks = size_t((spec.n + kStatChunk - 1) / kStatChunk);
    t.l1_all.assign(K * chunks, 0.0);
    t.l1_kept.assign(K * chunks, 0.0);
    t.keep_bits = (spec.sparsify == Sparsify::Drop || magprune) &&
                  int64_t(K * chunks) * (kStatChunk / 8) <= memory_ / 4;
  }
  if (spec.gram != Gram::None) {
    const int64_t chunks = (spec.n + kStatChunk - 1) / kStatChunk;
    t.gram_chunks.assign(size_t(chunks * gram_size(int64_t(K))), 0.0);
    t.gram.assign(size_t(gram_size(int64_t(K))), 0.0);
  }
  if (spec.gram == Gram::Only) {
    t.phases = {Phase::Gram};
    return;
  }
  if (n_tiles == 1 && (select || sums || spec.gram != Gram::None)) {
    t.phases = {Phase::Whole};
  } else {
    if (select) {
      t.phases.push_back(Phase::Sample);
      t.phases.push_back(Phase::Scan);
    }
    if (sums) t.phases.push_back(Phase::L1);
    if (spec.gram != Gram::None) t.phases.push_back(Phase::Gram);
    t.phases.push_back(Phase::Combine);
  }
  if (ordered) {
    t.tied_until.clear();
    for (size_t i = 0; i < t.selections.size() * size_t(n_tiles); ++i)
      t.tied_until.emplace_back(-1);
  }
  settle(t);
}

// Units in the order in which they are handed out: one task's scan runs beside the combine of the
// task before it, so that nobody idles at a phase's end.
void Job::schedule() {
  units_.clear();
  unit_ = 0;
  unit_tile_ = 0;
  size_t longest = 0;
  for (const auto& t : tasks_) longest = std::max(longest, t->phases.size());
  for (size_t slot = 0; slot + 1 < tasks_.size() + longest; ++slot) {
    for (size_t p = longest; p-- > 0;) {
      if (slot < p || slot - p >= tasks_.size()) continue;
      const Task& t = *tasks_[slot - p];
      if (p >= t.phases.size() || t.spec.n == 0) continue;
      const int64_t n = t.phases[p] == Phase::Sample ? 1 : tiles(t);
      units_.push_back(Unit{int(slot - p), t.phases[p], n});
    }
  }
}

bool Job::next(Unit* unit, int64_t* tile) {
  std::lock_guard<std::mutex> lock(mutex_);
  while (unit_ < units_.size() && unit_tile_ >= units_[unit_].tiles) {
    ++unit_;
    unit_tile_ = 0;
  }
  if (unit_ >= units_.size()) return false;
  *unit = units_[unit_];
  *tile = unit_tile_++;
  return true;
}

bool Job::wait_for(Task& t, int phases) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return t.completed >= phases || stop_; });
  return !stop_;
}

void Job::finish_phase(Task& t, int index, Phase phase, Worker& w) {
  if (phase == Phase::Scan) {
    for (size_t k = 0; k < t.selections.size(); ++k) {
      Selection& s = t.selections[k];
      if (!s.active || s.done) continue;
      // nearly always one scan is enough; a range that was missed is scanned again right here
      while (!resolve(s)) {
        for (int64_t tile = 0; tile < tiles(t) && !stop_; ++tile)
          scan_tile(t, s, t.term_of(k), int(k % t.terms.size()) + 1, tile, w);
        if (stop_) return;
      }
    }
    settle(t);
  } else if (phase == Phase::L1) {
    finish_l1(t);
  } else if (phase == Phase::Gram) {
    finish_gram(t, index);
  }
  if (size_t(t.completed) + 1 == t.phases.size()) std::vector<uint64_t>().swap(t.bits);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    ++t.completed;
    if (size_t(t.completed) < t.phases.size())
      t.remaining = t.phases[size_t(t.completed)] == Phase::Sample ? 1 : tiles(t);
  }
  changed_.notify_all();
}

void Job::execute(Worker& w, const Unit& unit, int64_t tile) {
  Task& t = *tasks_[size_t(unit.task)];
  const int position = int(std::find(t.phases.begin(), t.phases.end(), unit.phase) -
                           t.phases.begin());
  if (position > 0 && !wait_for(t, position)) return;
  const int64_t n = std::min(tile_, t.spec.n - tile * tile_);
  int64_t bytes = 0;
  if (unit.phase != Phase::Sample) {
    if (t.spec.base) bytes += n * dtype_size(t.spec.base->dtype);
    for (const TermSpec& term : t.terms) bytes += stored_bytes(term.x, tile * tile_, n);
  }
  switch (unit.phase) {
    case Phase::Sample:
      sample(t, w);
      break;
    case Phase::Scan:
      for (size_t k = 0; k < t.selections.size(); ++k)
        if (t.selections[k].active && !t.selections[k].done)
          scan_tile(t, t.selections[k], t.term_of(k), int(k % t.terms.size()) + 1, tile, w);
      break;
    case Phase::L1:
      l1_tile(t, tile, w);
      break;
    case Phase::Gram:
      gram_tile(t, tile, w);
      break;
    case Phase::Whole:
      if (t.spec.sparsify == Sparsify::Trim || t.spec.sparsify == Sparsify::Band) {
        select_whole(t, w);
        settle(t);
      }
      if (!t.l1_all.empty()) {
        l1_tile(t, tile, w);
        finish_l1(t);
      }
      if (t.spec.gram != Gram::None) {
        gram_tile(t, tile, w);
        finish_gram(t, unit.task);
      }
      combine_tile(t, tile, w);
      bytes += n * dtype_size(t.spec.out_dtype);
      break;
    case Phase::Combine:
      if (t.spec.copy) {
        copy_tile(t, tile, w);
      } else {
        combine_tile(t, tile, w);
      }
      bytes += n * (t.spec.copy ? 1 : dtype_size(t.spec.out_dtype));
      break;
  }
  bytes_done_ += bytes;
  if (t.remaining.fetch_sub(1) == 1) finish_phase(t, unit.task, unit.phase, w);
}

void Job::crew(const std::function<void(Worker&)>& work) {
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto body = [&](size_t id) {
    DefaultFloatEnvironment environment;
    try {
      Worker w;
      w.id = id;
      work(w);
    } catch (...) {
      {
        std::lock_guard<std::mutex> lock(failure_mutex);
        if (!failure) failure = std::current_exception();
      }
      {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
      }
      changed_.notify_all();
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads_; ++i) others.emplace_back(body, size_t(i));
  body(0);
  for (std::thread& t : others) t.join();
  if (failure) std::rethrow_exception(failure);
}

void Job::run(const Blend& blend) {
  blend_ = blend;
  for (const auto& t : tasks_)
    if (t->spec.gram == Gram::Blend && !blend_)
      throw std::invalid_argument("a task has no blend to ask for its weights");
  bytes_done_ = 0;
  bytes_total_ = 0;
  int64_t sources = 1, elements = 0;
  for (const auto& t : tasks_)
    sources = std::max<int64_t>(sources, t->sources());
  // all buffers of all workers together stay within half of the allowance
  while (tile_ > kStatChunk && int64_t(threads_) * (sources + 2) * tile_ * 4 > memory_ / 2)
    tile_ = round_up(tile_ / 2, kStatChunk);
  for (const auto& t : tasks_) {
    prepare(*t);
    t->remaining = t->phases.empty() || t->phases[0] == Phase::Sample ? 1 : tiles(*t);
    int64_t per_pass = 0;
    if (t->spec.base) per_pass += dtype_size(t->spec.base->dtype);
    per_pass *= t->spec.n;
    for (const TermSpec& term : t->terms) per_pass += stored_bytes(term.x, 0, t->spec.n);
    for (Phase p : t->phases)
      if (p != Phase::Sample) bytes_total_ += per_pass;
    if (t->spec.gram != Gram::Only)
      bytes_total_ += t->spec.n * (t->spec.copy ? 1 : dtype_size(t->spec.out_dtype));
    elements += t->spec.n;
  }
  schedule();
  const int wanted = threads_;
  if (elements < 2 * kStatChunk) threads_ = 1;  // starting threads would cost more than the work
  const auto restore = [&] {
    threads_ = wanted;
    blend_ = nullptr;
  };
  try {
    crew([&](Worker& w) {
      Unit unit;
      int64_t tile;
      while (!stop_ && next(&unit, &tile)) execute(w, unit, tile);
      changed_.notify_all();
      // a page that another worker still reads is mapped again when it does
      for (const auto& f : files_) f->release(int64_t(w.id), threads_);
    });
  } catch (...) {
    restore();
    throw;
  }
  restore();
}

TaskResult Job::result(int task) const {
  const Task& t = task_at(task);
  TaskResult r;
  r.nonfinite = t.nonfinite;
  r.gram = t.gram;
  for (size_t i = 0; i < t.mismatch.size(); ++i)
    if (t.mismatch[i]) r.mismatch.push_back(int(i));
  if (checksums_) {
    const int64_t n_tiles = tiles(t);
    const auto joined = [&](int source, int64_t item, const Source* packed = nullptr) {
      const uint64_t shift = crc64_shift(uint64_t(tile_ * item));
      uint64_t crc = 0;
      if (packed) {
        for (int64_t i = 0; i < n_tiles; ++i) {
          const int64_t n = std::min(tile_, t.spec.n - i * tile_);
          const uint64_t part = t.crc[size_t(source) * size_t(n_tiles) + size_t(i)];
          crc = crc64_combine(crc, part,
                              crc64_shift(uint64_t(stored_bytes(*packed, i * tile_, n))));
        }
        return crc;
      }
      for (int64_t i = 0; i < n_tiles; ++i) {
        const uint64_t part = t.crc[size_t(source) * size_t(n_tiles) + size_t(i)];
        const int64_t n = std::min(tile_, t.spec.n - i * tile_);
        crc = crc64_combine(crc, part, n == tile_ ? shift : crc64_shift(uint64_t(n * item)));
      }
      return crc;
    };
    const int b = t.spec.base ? 1 : 0;
    if (b) r.crc_in.push_back(joined(0, dtype_size(t.spec.base->dtype)));
    for (size_t k = 0; k < t.terms.size(); ++k) {
      const Source& x = t.terms[k].x;
      r.crc_in.push_back(joined(b + int(k), dtype_size(x.dtype), x.packed ? &x : nullptr));
    }
    r.crc_out = joined(t.sources(), t.spec.copy ? 1 : dtype_size(t.spec.out_dtype));
  }
  for (size_t k = 0; k < t.terms.size() && !t.spec.copy && !t.views.empty(); ++k) {
    const Selection& s = t.selections[k];
    r.codes.push_back(s.active ? int64_t(s.code) : -1);
    if (t.spec.sparsify == Sparsify::Band) {
      const int64_t room = t.spec.n - std::min(t.terms[k].drop_count, t.spec.n);
      r.kept.push_back(t.terms[k].density < 1.0 ? std::min(t.terms[k].keep_count, room) : -1);
      r.rescale.push_back(t.rescale[k]);
      continue;
    }
    r.kept.push_back(!s.active || t.terms[k].fixed_code >= 0
                         ? -1
                         : s.greater + (t.ties_kept[k] < 0 ? s.equal : t.ties_kept[k]));
    r.rescale.push_back(t.rescale[k]);
  }
  return r;
}

}  // namespace clf
