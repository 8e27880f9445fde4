// Which instruction set runs: the widest that the processor has, or the one asked for.
#pragma once

#include <string>
#include <vector>

namespace clf {

struct Kernels;

enum class CrcPath { Table, Clmul128, Clmul512 };

std::vector<std::string> supported_isas();  // widest first; "portable" is always there
const Kernels& kernels();                   // the current choice
void set_isa(const std::string& name);      // throws std::invalid_argument
CrcPath crc_path();                         // follows the choice

// Restores the default floating-point environment while alive: callers may have set flush to zero,
// under which results would depend on the thread.
class DefaultFloatEnvironment {
 public:
  DefaultFloatEnvironment();
  ~DefaultFloatEnvironment();
  DefaultFloatEnvironment(const DefaultFloatEnvironment&) = delete;
  DefaultFloatEnvironment& operator=(const DefaultFloatEnvironment&) = delete;

 private:
  unsigned saved_ = 0;
};

}  // namespace clf
