// Input files (mapped, read, or read past the page cache) and output files.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace clf {

// An operating-system error with the file it concerns; becomes Python's OSError.
struct FileError : std::runtime_error {
  FileError(int error_number, std::string file);
  int number;
  std::string path;
};

enum class IoMode { Mmap, Pread, Direct };

// Page-aligned memory that grows to the largest size asked for.
class AlignedBuffer {
 public:
  ~AlignedBuffer();
  AlignedBuffer() = default;
  AlignedBuffer(AlignedBuffer&& other) noexcept;
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  uint8_t* reserve(int64_t bytes);

 private:
  uint8_t* data_ = nullptr;
  int64_t size_ = 0;
};

class InputFile {
 public:
  InputFile(const std::string& path, IoMode mode);
  ~InputFile();
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;
  // The bytes [offset, offset + n): in place, or copied into `buffer`.
  const uint8_t* bytes(int64_t offset, int64_t n, AlignedBuffer& buffer) const;
  // Starts reading a run that is not in the page cache yet.
  void prefetch(int64_t offset, int64_t n) const;
  // Unmaps one of `parts` pieces, so that several threads can share what one would do slowly.
  void release(int64_t part, int64_t parts) const;
  // Unmaps the pages that lie wholly in [offset, offset + n): nobody reads them again.
  void forget(int64_t offset, int64_t n) const;
  int64_t size() const { return size_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  IoMode mode_;
  int fd_ = -1;
  int64_t size_ = 0;
  const uint8_t* map_ = nullptr;
  // one flag per window of the mapping: whether its pages were mapped in already
  mutable std::unique_ptr<std::atomic<bool>[]> populated_;
};

class OutputFile {
 public:
  explicit OutputFile(const std::string& path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  void write(const uint8_t* data, int64_t n, int64_t offset) const;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  int fd_ = -1;
};

}  // namespace clf
