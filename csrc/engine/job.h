// A job streams tensors, tile by tile, from files or memory through the fused combine kernel.
//
// Each tensor is a task of up to four phases: sample (bracket the trim threshold), scan (find it
// exactly), l1 (the sums of an l1 rescale) or gram (the products of the models, from which the
// caller makes the weights), combine (the fused pass, checksums, the write). Phases
// of neighbouring tasks overlap; a worker takes the next tile of the list, and waits only for work
// that was handed out before its own. Nothing in the result depends on threads or tile size.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "../combine/kernels.h"
#include "../combine/magprune.h"
#include "../pack/pack.h"
#include "files.h"

namespace clf {

enum class Ties { First, All, None };
enum class Rescale { None, KeepRate, L1 };
enum class NanPolicy { Refuse, Propagate, Zero };
// The weights of a task from the Gram matrix of its terms (packed as by gram_place); called by the
// threads of the job, never by two at a time.
using Blend = std::function<std::vector<double>(int task, const std::vector<double>& gram)>;
// What is asked of a task's Gram matrix: nothing, the weights, or only itself (nothing is written).
enum class Gram { None, Blend, Only };

struct PackedSource;

struct Source {
  DType dtype = DType::F32;
  const uint8_t* ptr = nullptr;  // in memory, or
  int file = -1;                 // an input file of the job, or, below -1, rows of the job
  int64_t offset = 0;
  std::shared_ptr<const PackedSource> packed;  // or made from this, a tile at a time
};

// A matrix whose rows lie elsewhere, in the order of another vocabulary: code k << 40 | r is row r
// of table k, code -1 - j row j of `made`.
struct RowsSource {
  struct Table {
    Source source;
    int64_t rows = 0;
  };
  int64_t row_bytes = 0;
  std::vector<int64_t> codes;
  std::vector<Table> tables;
  std::vector<uint8_t> made;
};

// What a packed delta stands for where all elements are asked for:
//   Parts  kept_i ? value_i : base_i, exactly, so that x - base is the delta without its factor,
//          which is the term's; where nothing selects by magnitude the dropped are masked instead
//   Model  base_i + (value_i - base_i) * factor in float32
//   Delta  (value_i - base_i) * factor, 0 where dropped, in float32
enum class PackedAs { Parts, Model, Delta };

// Kept values of a stream; blocks[c] of them come before element c * kStatChunk.
struct PackedSource {
  Source values;
  Stream stream;
  std::vector<int64_t> blocks;
  Source base;
  double factor = 1.0;
  PackedAs as = PackedAs::Parts;
};

struct TermSpec {
  Source x;
  double weight = 1.0;
  double density = 1.0;
  uint64_t key = 0;             // drop
  uint64_t keep_threshold = 0;  // drop, of 2^32
  int64_t keep_count = 0;       // trim and band
  int64_t drop_count = 0;       // band: the largest ones, which are not kept
  double epsilon = 0.0;         // magprune: half of the range of the keep probabilities
  int64_t fixed_code = -1;      // trim: threshold given by the caller
};

struct TaskSpec {
  int64_t n = 0;
  bool copy = false;  // bytes of the first source; the others must be equal
  DType out_dtype = DType::F32;
  uint8_t* out_ptr = nullptr;
  int out_file = -1;
  int64_t out_offset = 0;
  std::optional<Source> base;
  bool difference = false;
  Sparsify sparsify = Sparsify::None;
  int64_t row = 0;  // magprune: elements of a row; 0: all are one
  Ties ties = Ties::First;
  Rescale rescale = Rescale::None;
  Elect elect = Elect::None;
  bool vote_weighted = true;
  Reduce reduce = Reduce::Sum;
  bool divide_by_weights = true;
  double lambda = 1.0;
  Gram gram = Gram::None;
};

struct TaskResult {
  uint64_t crc_out = 0;
  std::vector<uint64_t> crc_in;  // base first, if any
  std::vector<int64_t> codes;    // trim thresholds as float32 bits, -1 where none
  std::vector<int64_t> kept;     // elements kept by trimming, -1 where none
  std::vector<double> rescale;
  std::vector<double> gram;        // packed by gram_place, empty where none was asked for
  std::vector<int64_t> nonfinite;  // base if any, terms, output
  std::vector<int> mismatch;       // copy: sources that differ from the first
};

class Job {
 public:
  Job(int threads, int64_t tile_elements, NanPolicy nan, bool checksums, int64_t memory);
  ~Job();
  int file(const std::string& path, IoMode mode);
  int output(const std::string& path);
  // The `file` of sources that are these rows.
  int rows(RowsSource rows);
  int add_task(const TaskSpec& spec);
  void add_term(int task, const TermSpec& term);
  void run(const Blend& blend = nullptr);
  // One threshold per term position over all tasks: the counts[j]-th largest |delta|.
  std::vector<int64_t> select_model(const std::vector<int64_t>& counts);
  // Per term position over all tasks: how many |delta| have each code of [lo, hi], in bins of
  // 2^shift codes. What select_model does on one machine, as sums that many can make a part of.
  struct CodeRange {
    int64_t lo = 0, hi = -1;  // hi < lo: this position is not read
    int shift = 0;
  };
  std::vector<std::vector<uint64_t>> count_codes(const std::vector<CodeRange>& ranges);
  void cancel() { stop_ = true; }
  bool cancelled() const { return stop_; }
  int64_t bytes_done() const { return bytes_done_; }
  int64_t bytes_total() const { return bytes_total_; }
  TaskResult result(int task) const;

 private:
  struct Selection;
  struct Task;
  struct Worker;
  enum class Phase { Sample, Scan, L1, Gram, Combine, Whole };
  struct Unit {
    int task;
    Phase phase;
    int64_t tiles;
  };

  Task& task_at(int index) const;
  int64_t tiles(const Task& t) const;
  void check(const Source& s, int64_t n) const;
  void prepare(Task& t);
  void schedule();
  void crew(const std::function<void(Worker&)>& work);
  bool next(Unit* unit, int64_t* tile);
  void execute(Worker& w, const Unit& unit, int64_t tile);
  void finish_phase(Task& t, int index, Phase phase, Worker& w);
  bool wait_for(Task& t, int phases);
  const uint8_t* fetch(Worker& w, const Source& s, int slot, int64_t first, int64_t n);
  const uint8_t* stored(Worker& w, const Source& s, int slot, int64_t first, int64_t bytes);
  const uint8_t* gather(Worker& w, const RowsSource& r, int slot, int64_t first, int64_t bytes);
  const uint8_t* expand(Worker& w, const PackedSource& p, DType to, int slot, int64_t first,
                        int64_t n);
  const uint8_t* packed_values(Worker& w, const PackedSource& p, int slot, int64_t from,
                               int64_t count);
  [[noreturn]] void wrong_blocks(const PackedSource& p) const;

  void sample(Task& t, Worker& w);
  void sample_into(const Task& t, const TermSpec& term, Worker& w, int64_t runs,
                   std::vector<uint32_t>* codes, std::vector<int64_t>* run_ends);
  void bracket(Selection& s, std::vector<uint32_t>& codes, const std::vector<int64_t>& run_ends,
               int64_t n, int terms);
  std::vector<Task*> model_tasks(size_t models);  // what a scan of whole models reads
  void scan_model(const std::vector<Task*>& tasks, std::deque<Selection>& selections);
  void scan_tile(Task& t, Selection& s, const TermSpec& term, int slot, int64_t tile, Worker& w);
  bool resolve(Selection& s);
  void settle(Task& t);
  void magprune_tile(Task& t, size_t k, int64_t first, int64_t n, Worker& w, uint64_t* bits,
                     float* factors);
  void select_whole(Task& t, Worker& w);
  void l1_tile(Task& t, int64_t tile, Worker& w);
  void finish_l1(Task& t);
  void gram_tile(Task& t, int64_t tile, Worker& w);
  void finish_gram(Task& t, int index);
  void combine_tile(Task& t, int64_t tile, Worker& w);
  void copy_tile(Task& t, int64_t tile, Worker& w);
  void store(Task& t, const uint8_t* data, int64_t first, int64_t n, int64_t item);

  int threads_;
  int64_t tile_;
  NanPolicy nan_;
  bool checksums_;
  int64_t memory_;
  std::vector<std::unique_ptr<InputFile>> files_;
  std::vector<RowsSource> rows_;
  std::vector<std::unique_ptr<OutputFile>> outputs_;
  std::deque<std::unique_ptr<Task>> tasks_;
  std::vector<Unit> units_;
  Blend blend_;
  std::mutex blend_mutex_;
  std::mutex mutex_;
  std::condition_variable changed_;
  size_t unit_ = 0;
  int64_t unit_tile_ = 0;
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> bytes_done_{0};
  int64_t bytes_total_ = 0;
};

}  // namespace clf
