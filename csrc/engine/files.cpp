#include "files.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__) && !defined(MADV_POPULATE_READ)
#define MADV_POPULATE_READ 22
#endif

namespace clf {
namespace {

constexpr int64_t kPage = 4096;  // alignment of direct reads; a multiple of every sector size

constexpr int64_t kWindow = int64_t(1) << 20;

int64_t down(int64_t x) { return x / kPage * kPage; }
int64_t up(int64_t x) { return (x + kPage - 1) / kPage * kPage; }

void read_fully(int fd, uint8_t* to, int64_t n, int64_t offset, int64_t needed,
                const std::string& path) {
  int64_t got = 0;
  while (got < needed) {
    const ssize_t r = pread(fd, to + got, size_t(n - got), off_t(offset + got));
    if (r < 0 && errno == EINTR) continue;
    if (r < 0) throw FileError(errno, path);
    if (r == 0) throw FileError(EIO, path + " (shorter than its header says)");
    got += r;
  }
}

}  // namespace

FileError::FileError(int error_number, std::string file)
    : std::runtime_error(file + ": " + std::strerror(error_number)),
      number(error_number),
      path(std::move(file)) {}

AlignedBuffer::~AlignedBuffer() { std::free(data_); }

AlignedBuffer::AlignedBuffer(AlignedBuffer&& other) noexcept
    : data_(other.data_), size_(other.size_) {
  other.data_ = nullptr;
  other.size_ = 0;
}

uint8_t* AlignedBuffer::reserve(int64_t bytes) {
  if (bytes > size_) {
    std::free(data_);
    size_ = 0;
    data_ = static_cast<uint8_t*>(std::aligned_alloc(size_t(kPage), size_t(up(bytes))));
    if (!data_) throw std::bad_alloc();
    size_ = up(bytes);
  }
  return data_;
}

InputFile::InputFile(const std::string& path, IoMode mode) : path_(path), mode_(mode) {
  int flags = O_RDONLY | O_CLOEXEC;
#ifdef O_DIRECT
  if (mode == IoMode::Direct) fd_ = open(path.c_str(), flags | O_DIRECT);
#endif
  if (fd_ < 0) {  // some filesystems (tmpfs) have no direct reads: read through the cache
    if (mode_ == IoMode::Direct) mode_ = IoMode::Pread;
    fd_ = open(path.c_str(), flags);
  }
  if (fd_ < 0) throw FileError(errno, path);
  struct stat s;
  if (fstat(fd_, &s) != 0) {
    const int e = errno;
    close(fd_);
    throw FileError(e, path);
  }
  size_ = int64_t(s.st_size);
  if (mode_ == IoMode::Mmap && size_ > 0) {
    void* m = mmap(nullptr, size_t(size_), PROT_READ, MAP_SHARED, fd_, 0);
    if (m == MAP_FAILED) {
      mode_ = IoMode::Pread;  // a filesystem without mappings
    } else {
      map_ = static_cast<const uint8_t*>(m);
      const size_t windows = size_t(size_ / kWindow + 1);
      populated_ = std::make_unique<std::atomic<bool>[]>(windows);
      for (size_t i = 0; i < windows; ++i) populated_[i] = false;
    }
  }
}

InputFile::~InputFile() {
  if (map_) munmap(const_cast<uint8_t*>(map_), size_t(size_));
  if (fd_ >= 0) close(fd_);
}

const uint8_t* InputFile::bytes(int64_t offset, int64_t n, AlignedBuffer& buffer) const {
  if (offset < 0 || n < 0 || offset + n > size_)
    throw FileError(EIO, path_ + " (shorter than its header says)");
  if (map_) {
#ifdef MADV_POPULATE_READ
    // map a whole window at once instead of one page fault after the other; a kernel that does not
    // know the call faults the pages in one by one, with the same result
    for (int64_t w = offset / kWindow; w * kWindow < offset + n; ++w) {
      if (populated_[size_t(w)].exchange(true, std::memory_order_relaxed)) continue;
      const int64_t end = up(size_) < (w + 1) * kWindow ? up(size_) : (w + 1) * kWindow;
      madvise(const_cast<uint8_t*>(map_) + w * kWindow, size_t(end - w * kWindow),
              MADV_POPULATE_READ);
    }
#endif
    return map_ + offset;
  }
  if (mode_ == IoMode::Direct) {
    const int64_t from = down(offset);
    const int64_t span = up(offset + n) - from;
    uint8_t* to = buffer.reserve(span);
    read_fully(fd_, to, span, from, offset + n - from, path_);
    return to + (offset - from);
  }
  uint8_t* to = buffer.reserve(n);
  read_fully(fd_, to, n, offset, n, path_);
  return to;
}

void InputFile::release(int64_t part, int64_t parts) const {
  if (!map_) return;
  const int64_t from = down(size_ / parts * part);
  const int64_t to = part + 1 == parts ? up(size_) : down(size_ / parts * (part + 1));
  madvise(const_cast<uint8_t*>(map_) + from, size_t(to - from), MADV_DONTNEED);
}

void InputFile::forget(int64_t offset, int64_t n) const {
  if (!map_) return;
  const int64_t from = up(offset), to = down(offset + n);
  if (from < to) madvise(const_cast<uint8_t*>(map_) + from, size_t(to - from), MADV_DONTNEED);
}

void InputFile::prefetch(int64_t offset, int64_t n) const {
#ifdef POSIX_FADV_WILLNEED
  if (mode_ == IoMode::Direct || offset >= size_) return;
#ifdef RWF_NOWAIT
  uint8_t byte;
  iovec v{&byte, 1};
  if (preadv2(fd_, &v, 1, off_t(offset), RWF_NOWAIT) == 1) return;  // cached: asking costs time
#endif
  posix_fadvise(fd_, off_t(offset), off_t(n), POSIX_FADV_WILLNEED);
#else
  (void)offset;
  (void)n;
#endif
}

OutputFile::OutputFile(const std::string& path) : path_(path) {
  fd_ = open(path.c_str(), O_WRONLY | O_CLOEXEC);
  if (fd_ < 0) throw FileError(errno, path);
}

OutputFile::~OutputFile() {
  if (fd_ >= 0) close(fd_);
}

void OutputFile::write(const uint8_t* data, int64_t n, int64_t offset) const {
  for (int64_t done = 0; done < n;) {
    const ssize_t r = pwrite(fd_, data + done, size_t(n - done), off_t(offset + done));
    if (r < 0 && errno == EINTR) continue;
    if (r < 0) throw FileError(errno, path_);
    if (r == 0) throw FileError(ENOSPC, path_);
    done += r;
  }
}

}  // namespace clf
