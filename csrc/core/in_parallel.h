// Work in units on a few threads. For baseline code only: what it needs of the standard library
// has external linkage.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "isa.h"

namespace clf {

// Units 0 .. units - 1, each once, on up to `threads` threads; begin() makes what a thread calls.
template <class Begin>
void in_parallel(int64_t units, int threads, Begin&& begin) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex mutex;
  const auto work = [&] {
    DefaultFloatEnvironment environment;
    try {
      auto body = begin();
      for (int64_t unit; (unit = next++) < units;) body(unit);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!failure) failure = std::current_exception();
      next = units;
    }
  };
  std::vector<std::thread> others;
  const int64_t crew = std::min<int64_t>(threads, units);
  try {
    for (int64_t i = 1; i < crew; ++i) others.emplace_back(work);
  } catch (const std::system_error&) {
    // No more threads to be had: those that there are do all of it.
  }
  work();
  for (std::thread& t : others) t.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace clf
