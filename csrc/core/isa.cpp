#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "../combine/kernels.h"
#ifdef CL_FAST_X86
#include <xmmintrin.h>
#endif

namespace clf {
namespace {

struct Choice {
  const Kernels* kernels;
  CrcPath crc;
};

std::vector<Choice> available() {
  std::vector<Choice> list;
#ifdef CL_FAST_X86
  __builtin_cpu_init();
  const bool clmul = __builtin_cpu_supports("pclmul");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("bmi2")) {
    const bool wide = clmul && __builtin_cpu_supports("vpclmulqdq");
    list.push_back({&kKernelsAvx512, wide    ? CrcPath::Clmul512
                                     : clmul ? CrcPath::Clmul128
                                             : CrcPath::Table});
  }
  // every processor with AVX2 that was made has F16C too
  if (__builtin_cpu_supports("avx2"))
    list.push_back({&kKernelsAvx2, clmul ? CrcPath::Clmul128 : CrcPath::Table});
#endif
  list.push_back({&kKernelsPortable, CrcPath::Table});
  return list;
}

const std::vector<Choice>& choices() {
  static const std::vector<Choice> list = available();
  return list;
}

std::atomic<size_t>& current() {
  static std::atomic<size_t> index{0};
  return index;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Choice& c : choices()) names.emplace_back(c.kernels->name);
  return names;
}

const Kernels& kernels() { return *choices()[current()].kernels; }

CrcPath crc_path() { return choices()[current()].crc; }

void set_isa(const std::string& name) {
  for (size_t i = 0; i < choices().size(); ++i) {
    if (name == choices()[i].kernels->name) {
      current() = i;
      return;
    }
  }
  std::string known;
  for (const std::string& s : supported_isas()) known += (known.empty() ? "" : ", ") + s;
  throw std::invalid_argument("isa '" + name + "' is not available here; choose one of " + known);
}

DefaultFloatEnvironment::DefaultFloatEnvironment() {
#ifdef CL_FAST_X86
  saved_ = _mm_getcsr();
  _mm_setcsr(0x1f80);
#endif
}

DefaultFloatEnvironment::~DefaultFloatEnvironment() {
#ifdef CL_FAST_X86
  _mm_setcsr(saved_);
#endif
}

}  // namespace clf
