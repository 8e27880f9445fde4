#include "dtypes.h"

namespace clf {
namespace {

struct F8Tables {
  float value[2][256];
  F8Tables() {
    for (int i = 0; i < 256; ++i) {
      value[0][i] = f8_e4m3_to_f32(uint8_t(i));
      value[1][i] = f8_e5m2_to_f32(uint8_t(i));
    }
  }
};
const F8Tables tables;

}  // namespace

const float (&kF8ToF32)[2][256] = tables.value;

}  // namespace clf
