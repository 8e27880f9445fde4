#include "survey.h"

#include <algorithm>
#include <exception>
#include <map>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "../combine/kernels.h"
#include "../core/isa.h"

namespace clf {
namespace {

constexpr int64_t kTileElements = int64_t(1) << 18;  // of all sources together: they fit an L2 cache
constexpr int64_t kTileLeast = int64_t(1) << 13;
constexpr int64_t kSampleAll = 65536;  // tensors up to this size are not sampled
constexpr int64_t kWindow = int64_t(1) << 25;  // elements of all sources that stay mapped
constexpr int64_t kReadAhead = int64_t(8) << 20;

const SurveyKernels& chosen() {
#ifdef CL_FAST_X86
  if (&kernels() == &kKernelsAvx512) return kSurveyAvx512;
  if (&kernels() == &kKernelsAvx2) return kSurveyAvx2;
#endif
  return kSurveyPortable;
}

// Moved farther, or as far and earlier.
bool before(const MovedRow& x, const MovedRow& y) {
  return x.delta != y.delta ? x.delta > y.delta : x.row < y.row;
}

void insert(std::vector<MovedRow>& rows, const MovedRow& row, size_t top) {
  if (row.delta <= 0.0 || top == 0) return;
  if (rows.size() == top) {
    if (!before(row, rows.back())) return;
    rows.pop_back();
  }
  rows.insert(std::upper_bound(rows.begin(), rows.end(), row, before), row);
}

}  // namespace

struct Survey::Tensor {
  int64_t n = 0, row = 0;
  int64_t tile = 0;  // elements, whole rows
  std::vector<SurveyInput> sources;
  SurveyResult sum;
  std::mutex mutex;
  int64_t folded = 0;                       // tiles
  std::map<int64_t, SurveyResult> waiting;  // for tiles before them; no more than there are threads

  int models() const { return int(sources.size()) - 1; }
  int64_t tiles() const { return (n + tile - 1) / tile; }
  int64_t bytes(int64_t count) const {
    int64_t b = 0;
    for (const SurveyInput& s : sources) b += count * dtype_size(s.dtype);
    return b;
  }
  // Only the filled bins stay: there may be many tensors.
  void close() {
    for (size_t k = 0; k < sum.bins.size(); ++k) {
      std::vector<uint64_t>& all = sum.bins[k];
      size_t first = 1, last = all.size();
      while (first < last && all[first] == 0) ++first;
      while (last > first && all[last - 1] == 0) --last;
      std::vector<uint64_t> filled(all.begin() + long(first), all.begin() + long(last));
      sum.first_bin[k] = filled.empty() ? 0 : int(first);
      all.swap(filled);
    }
  }
  void fold(const SurveyResult& part, size_t top) {
    const auto add = [](auto& to, const auto& from) {
      for (size_t i = 0; i < to.size(); ++i) to[i] += from[i];
    };
    add(sum.products, part.products);
    add(sum.absolute, part.absolute);
    add(sum.nonfinite, part.nonfinite);
    add(sum.changed, part.changed);
    add(sum.overlap, part.overlap);
    add(sum.conflicts, part.conflicts);
    sum.shared += part.shared;
    sum.disputed += part.disputed;
    sum.sampled += part.sampled;
    for (size_t i = 0; i < sum.largest.size(); ++i) {
      if (!(part.largest[i] > sum.largest[i])) continue;
      sum.largest[i] = part.largest[i];
      if (i < sum.largest_at.size()) sum.largest_at[i] = part.largest_at[i];
    }
    for (size_t k = 0; k < sum.rows.size(); ++k)
      for (const MovedRow& r : part.rows[k]) insert(sum.rows[k], r, top);
  }
};

struct Survey::Worker {
  std::vector<AlignedBuffer> buffers;
  std::vector<const uint8_t*> at;
  std::vector<SurveySource> sources;
  std::vector<float> values;
  std::vector<uint16_t> signs;
  std::vector<double> products, squares, row_squares;
  std::vector<uint32_t> largest, most;
  std::vector<int64_t> most_at;
  std::vector<uint64_t> bins;
};

Survey::Survey(int threads, int top) : threads_(threads < 1 ? 1 : threads), top_(top) {
  if (top < 0) throw std::invalid_argument("top must not be negative");
}

Survey::~Survey() = default;

int Survey::file(const std::string& path, IoMode mode) {
  files_.push_back(std::make_unique<InputFile>(path, mode));
  return int(files_.size()) - 1;
}

int Survey::add(int64_t n, int64_t row, const std::vector<SurveyInput>& sources) {
  if (n < 0) throw std::invalid_argument("n must not be negative");
  if (row < 0 || (row > 0 && n % row != 0))
    throw std::invalid_argument("n must be whole rows");
  if (sources.size() < 2 || sources.size() > size_t(kSurveyModels) + 1)
    throw std::invalid_argument("a survey has a base and 1 to 64 models");
  for (const SurveyInput& s : sources) {
    if (s.dtype == DType::BYTES) throw std::invalid_argument("a survey is of floating tensors");
    if (s.ptr || n == 0) continue;
    if (s.file < 0 || s.file >= int(files_.size()))
      throw std::invalid_argument("a source has neither memory nor a file of this survey");
    const InputFile& f = *files_[size_t(s.file)];
    if (s.offset < 0 || s.offset + n * dtype_size(s.dtype) > f.size())
      throw std::invalid_argument(f.path() + ": a tensor lies outside the file");
  }
  auto t = std::make_unique<Tensor>();
  t->n = n;
  t->row = row;
  t->sources = sources;
  const int64_t wanted = std::max(kTileLeast, kTileElements / int64_t(sources.size()));
  t->tile = row > 0 ? std::max<int64_t>(1, wanted / row) * row : wanted / kPiece * kPiece;
  const size_t models = sources.size() - 1;
  SurveyResult& r = t->sum;
  r.products.assign(size_t(pairs_of(int64_t(models) + 1)), 0.0);
  r.absolute.assign(models + 1, 0.0);
  r.largest.assign(2 * models + 1, 0.0);
  r.largest_at.assign(models + 1, -1);
  r.nonfinite.assign(models + 1, 0);
  r.changed.assign(models, 0);
  r.overlap.assign(models * (models - 1) / 2, 0);
  r.conflicts = r.overlap;
  r.bins.resize(models);
  r.first_bin.assign(models, 0);
  r.rows.resize(models);
  bytes_total_ += t->bytes(n);
  tensors_.push_back(std::move(t));
  return int(tensors_.size()) - 1;
}

const SurveyResult& Survey::result(int tensor) const {
  if (tensor < 0 || tensor >= int(tensors_.size())) throw std::out_of_range("no such tensor");
  return tensors_[size_t(tensor)]->sum;
}

bool Survey::next(size_t* tensor, int64_t* tile) {
  std::lock_guard<std::mutex> lock(mutex_);
  while (tensor_ < tensors_.size() && tile_ >= tensors_[tensor_]->tiles()) {
    ++tensor_;
    tile_ = 0;
  }
  if (tensor_ >= tensors_.size()) return false;
  *tensor = tensor_;
  *tile = tile_++;
  return true;
}

void Survey::take(Worker& w, Tensor& t, int64_t tile) {
  const int models = t.models();
  const size_t n_sources = t.sources.size(), m = size_t(models);
  const int64_t first = tile * t.tile, n = std::min(t.tile, t.n - first);
  w.buffers.resize(std::max(w.buffers.size(), n_sources));
  w.at.resize(n_sources);
  w.sources.resize(n_sources);
  w.values.resize(n_sources * size_t(kPiece));
  w.signs.resize(2 * m * size_t(kPieceSigns));
  w.products.assign(t.sum.products.size() * kSumLanes, 0.0);
  w.squares.assign(n_sources, 0.0);
  w.row_squares.assign(n_sources, 0.0);
  w.largest.assign(2 * m + 1, 0);
  w.most.assign(2 * m + 1, 0);
  w.most_at.assign(n_sources, -1);
  w.bins.assign(m * size_t(kBins), 0);
  for (size_t i = 0; i < n_sources; ++i) {
    const SurveyInput& s = t.sources[i];
    const int64_t size = dtype_size(s.dtype), at = s.offset + first * size, bytes = n * size;
    if (s.ptr) {
      w.at[i] = s.ptr + first * size;
    } else {
      const InputFile& f = *files_[size_t(s.file)];
      // once per read-ahead window, ask for the next one
      if (at / kReadAhead != (at + bytes) / kReadAhead)
        f.prefetch((at / kReadAhead + 2) * kReadAhead, kReadAhead);
      w.at[i] = f.bytes(at, bytes, w.buffers[i]);
    }
    w.sources[i].dtype = s.dtype;
  }

  SurveyResult part;
  part.absolute.assign(n_sources, 0.0);
  part.nonfinite.assign(n_sources, 0);
  part.changed.assign(m, 0);
  part.overlap.assign(t.sum.overlap.size(), 0);
  part.conflicts.assign(t.sum.overlap.size(), 0);
  part.rows.resize(m);
  SurveySums sums;
  sums.products = w.products.data();
  sums.absolute = part.absolute.data();
  sums.squares = w.squares.data();
  sums.largest = w.largest.data();
  sums.nonfinite = part.nonfinite.data();
  sums.changed = part.changed.data();
  sums.overlap = part.overlap.data();
  sums.conflicts = part.conflicts.data();
  sums.bins = w.bins.data();
  SurveyPiece piece;
  piece.models = models;
  piece.sources = w.sources.data();
  piece.sample_all = t.n <= kSampleAll;
  piece.values = w.values.data();
  piece.signs = w.signs.data();
  const SurveyKernels& kernel = chosen();
  const int64_t row = t.row > 0 ? t.row : n;
  for (int64_t start = 0; start < n; start += row) {
    for (int64_t o = start; o < start + row; o += kPiece) {
      piece.n = std::min(kPiece, start + row - o);
      piece.index0 = first + o;
      for (size_t i = 0; i < n_sources; ++i)
        w.sources[i].x = w.at[i] + o * dtype_size(w.sources[i].dtype);
      kernel.take(piece, sums);
      for (size_t i = 0; i < w.largest.size(); ++i) {
        if (w.largest[i] <= w.most[i]) continue;
        w.most[i] = w.largest[i];
        if (i < n_sources) w.most_at[i] = o;
      }
      for (size_t i = 0; i < n_sources; ++i)
        w.row_squares[i] = (o == start ? 0.0 : w.row_squares[i]) + w.squares[i];
    }
    if (t.row > 0)
      for (size_t k = 0; k < m; ++k)
        insert(part.rows[k],
               MovedRow{(first + start) / row, w.row_squares[k + 1], w.row_squares[0]},
               size_t(top_));
  }
  part.products.assign(t.sum.products.size(), 0.0);
  for (size_t i = 0; i < w.products.size(); ++i) part.products[i / kSumLanes] += w.products[i];
  part.shared = sums.shared;
  part.disputed = sums.disputed;
  part.sampled = sums.sampled;
  part.largest_at.assign(n_sources, -1);
  for (size_t i = 0; i < w.most.size(); ++i) part.largest.push_back(double(bits_f32(w.most[i])));
  for (size_t i = 0; i < n_sources; ++i) {  // the place inside the piece
    if (w.most_at[i] < 0) continue;
    const DType dtype = t.sources[i].dtype;
    for (int64_t o = w.most_at[i];; ++o) {
      if ((f32_bits(load_f32(dtype, w.at[i], o)) & 0x7fffffffu) != w.most[i]) continue;
      part.largest_at[i] = first + o;
      break;
    }
  }
  // Mapped pages count as memory of the process: they go when enough of them are read.
  const int64_t window = kWindow / int64_t(n_sources), end = first + n;
  if (end / window != first / window || end == t.n) {
    const int64_t from = std::max<int64_t>(0, (first / window - 1) * window);
    const int64_t until = end == t.n ? end : first / window * window;
    for (const SurveyInput& s : t.sources) {
      if (s.ptr) continue;
      const int64_t size = dtype_size(s.dtype);
      files_[size_t(s.file)]->forget(s.offset + from * size, (until - from) * size);
    }
  }
  bytes_done_ += t.bytes(n);

  std::lock_guard<std::mutex> lock(t.mutex);
  for (size_t k = 0; k < m; ++k) {  // whole numbers: their order does not matter
    t.sum.bins[k].resize(size_t(kBins));
    for (size_t b = 0; b < size_t(kBins); ++b) t.sum.bins[k][b] += w.bins[k * size_t(kBins) + b];
  }
  t.waiting.emplace(tile, std::move(part));
  for (auto it = t.waiting.begin(); it != t.waiting.end() && it->first == t.folded;
       it = t.waiting.erase(it), ++t.folded)
    t.fold(it->second, size_t(top_));
  if (t.folded == t.tiles()) t.close();
}

void Survey::run() {
  std::exception_ptr failure;
  std::mutex failure_mutex;
  std::atomic<int> ids{0};
  const auto work = [&] {
    const int id = ids++;
    DefaultFloatEnvironment environment;
    try {
      Worker w;
      size_t tensor;
      int64_t tile;
      while (!stop_ && next(&tensor, &tile)) take(w, *tensors_[tensor], tile);
      for (const auto& f : files_) f->release(id, threads_);
    } catch (...) {
      std::lock_guard<std::mutex> lock(failure_mutex);
      if (!failure) failure = std::current_exception();
      stop_ = true;
    }
  };
  std::vector<std::thread> others;
  try {
    for (int i = 1; i < threads_; ++i) others.emplace_back(work);
  } catch (const std::system_error&) {
    // no more threads to be had: those that there are do all of it
  }
  work();
  for (std::thread& t : others) t.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace clf
