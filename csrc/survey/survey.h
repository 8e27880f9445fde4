// A survey reads a base and its models once, tile by tile, and tells what kernels.h lists for each
// tensor, and which rows moved most. Tiles are folded in their order, and their size depends on the
// tensor alone: the result is the same for any number of threads.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../engine/files.h"
#include "kernels.h"

namespace clf {

constexpr int kSurveyModels = 64;  // most models of a survey

struct SurveyInput {
  DType dtype = DType::F32;
  const uint8_t* ptr = nullptr;  // in memory, or
  int file = -1;                 // a file of the survey
  int64_t offset = 0;
};

struct MovedRow {
  int64_t row = 0;
  double delta = 0.0, base = 0.0;  // sums of squares
};

struct SurveyResult {
  std::vector<double> products, absolute;     // as in kernels.h, without lanes
  std::vector<double> largest;                // |b|, |x_k|, |d_k|
  std::vector<int64_t> largest_at;            // flat index of |b|, |x_k|; -1 where all is zero
  std::vector<int64_t> nonfinite, changed, overlap, conflicts;
  int64_t shared = 0, disputed = 0, sampled = 0;
  std::vector<std::vector<uint64_t>> bins;    // per model, from bin `first_bin` on; without bin 0
  std::vector<int> first_bin;
  std::vector<std::vector<MovedRow>> rows;    // per model, the largest delta first
};

class Survey {
 public:
  // `top` rows are told per model and tensor.
  Survey(int threads, int top);
  ~Survey();
  int file(const std::string& path, IoMode mode);
  // A tensor of n elements in rows of `row` (0: of no rows); the base first.
  int add(int64_t n, int64_t row, const std::vector<SurveyInput>& sources);
  void run();
  void cancel() { stop_ = true; }
  bool cancelled() const { return stop_; }
  int64_t bytes_done() const { return bytes_done_; }
  int64_t bytes_total() const { return bytes_total_; }
  const SurveyResult& result(int tensor) const;

 private:
  struct Tensor;
  struct Worker;
  bool next(size_t* tensor, int64_t* tile);
  void take(Worker& w, Tensor& t, int64_t tile);

  int threads_, top_;
  std::vector<std::unique_ptr<InputFile>> files_;
  std::vector<std::unique_ptr<Tensor>> tensors_;
  std::mutex mutex_;
  size_t tensor_ = 0;
  int64_t tile_ = 0;
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> bytes_done_{0};
  int64_t bytes_total_ = 0;
};

}  // namespace clf
