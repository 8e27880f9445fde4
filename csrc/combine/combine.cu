// The fused pass of a merge on the GPU: base and up to 32 terms in, one tensor out, each read and
// written once. The formula and its order are those of cl_fast/ops/combining.py; arithmetic is
// float32 without fused multiply-add, so the bits are those of every other backend.
//
// A block of 256 threads takes a tile of 4096 elements of one row: 16 per thread, in two 16-byte
// runs. Up to KT terms are loaded before the first is used, so that enough bytes are in flight. An
// election adds up what both signs would give and chooses in the end: one sweep over the terms. More
// of them than KT are worked off in groups (kGroups).
#include "combine_device.h"

#include "../cuda/draw.h"

namespace clf {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32, kRun = 256;
constexpr int64_t kTile = 4096;

// Where the kept values of a packed term start for this lane: in its first and its second run.
template <int KT>
__device__ __forceinline__ void packed_ranks(const DeviceTerm* terms, int count, int64_t tile_start,
                                             int warp, int lane, const uint32_t (&keep)[KT],
                                             uint32_t (&totals)[KT][kWarps], int64_t (&rank)[KT],
                                             int64_t (&second)[KT]) {
  uint32_t before[KT];
#pragma unroll
  for (int k = 0; k < KT; ++k) {
    // both runs in one word: at most 256 kept elements in each
    const uint32_t mine = uint32_t(__popc(keep[k] & 0xffu)) | uint32_t(__popc(keep[k] >> 8)) << 16;
    uint32_t sum = mine;
#pragma unroll
    for (int by = 1; by < 32; by *= 2) {
      const uint32_t other = __shfl_up_sync(0xffffffffu, sum, by);
      if (lane >= by) sum += other;
    }
    before[k] = sum - mine;
    const uint32_t all = __shfl_sync(0xffffffffu, sum, 31);
    before[k] += (all & 0xffffu) << 16;  // the second run comes after the whole first one
    if (lane == 0) totals[k][warp] = (all & 0xffffu) + (all >> 16);
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < KT; ++k) {
    if (k >= count || !(terms[k].flags & kPacked)) continue;
    constexpr int kWarpsPerPackTile = int(kPackTile) / (2 * kRun);
    const int first = warp / kWarpsPerPackTile * kWarpsPerPackTile;
    // A tile of the tensor may end before its second half: no warp there keeps anything.
    int64_t start = terms[k].offsets[tile_start / kPackTile];
    if (first > 0)
      for (int w = 0; w < first; ++w) start += totals[k][w];
    for (int w = first; w < warp; ++w) start += totals[k][w];
    rank[k] = start + (before[k] & 0xffffu);
    second[k] = start + (before[k] >> 16);
  }
  __syncthreads();
}

// Whether eight elements from here on may be read and written 16 bytes at a time.
__device__ __forceinline__ bool is_whole(const DeviceRow& row, int64_t at) {
  return row.aligned && at + 8 <= row.n;
}

// Of reduce="max": the first of equals stays, and NaN, once met.
__device__ __forceinline__ float larger(float value, float known) {
  return fabsf(value) > fabsf(known) || (value != value && known == known) ? value : known;
}

// Two blocks per multiprocessor, so that one loads while the other computes; where that spills, one.
constexpr int blocks_for(int terms, bool wide, DropForm form, bool elects, bool groups) {
  const bool crowded = (wide && terms > 2) || (terms > 4 && form == DropForm::Drop);
  return groups || (elects && crowded) ? 1 : 2;
}

template <int KT, bool kWide, DropForm kForm, bool kElect, bool kGroups>
__global__ void __launch_bounds__(kThreads, blocks_for(KT, kWide, kForm, kElect, kGroups))
    combine_kernel(CLF_ARGUMENT(Batch) b, const CombineOnDevice c) {
  constexpr bool kDraws = kForm == DropForm::Drop || kForm == DropForm::Packed;
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  const int r = find_row(b, blockIdx.x);
  const DeviceRow& row = b.row[r];
  const DeviceTerm* const terms = b.term + r * b.models;
  const int models = b.models;
  const int64_t tile_start = (int64_t(blockIdx.x) - row.first) * kTile;
  const int64_t warp_start = tile_start + warp * (2 * kRun);

  const int64_t at[2] = {warp_start + lane * 8, warp_start + kRun + lane * 8};

  // An election works off one run after the other, which halves the registers it needs.
  constexpr int kRuns = kElect ? 1 : 2;
  // Groups come and go: of them only what is worked on is held. One group stays for both runs.
  constexpr int kHeld = kGroups ? kRuns : 2;
  Raw raw[KT][kHeld], raw_base[kHeld];
  uint32_t keep[KT];
  int64_t rank[KT], second[KT];  // where the kept values of the two runs start

#pragma unroll(kGroups ? 1 : 2)
  for (int run = 0; run < 2; run += kRuns) {
    if (row.base != nullptr && (kGroups || run == 0)) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const int64_t from = kRuns == 2 || !kGroups ? at[i] : at[0] + run * kRun;
        load8<kWide>(raw_base[i], row.base, row.base_dtype, from, row.n, is_whole(row, from));
      }
    }
    float base[kRuns][8], sum[kRuns][8];
    // Of an election: the votes, and besides sum and divisor, which are of plus, those of minus.
    float mass[8], minus[8], divisor[8], minus_divisor[8];
    const auto widen_base = [&] {
      if (row.base == nullptr) return;
#pragma unroll
      for (int i = 0; i < kRuns; ++i)
        widen8<kWide>(raw_base[kGroups ? i : run + i], row.base_dtype, base[i]);
    };
    if constexpr (kGroups) widen_base();
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[i][j] = 0.0f;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) mass[j] = minus[j] = divisor[j] = minus_divisor[j] = 0.0f;
    for (int first = 0; first < (kGroups ? models : 1); first += KT) {
      const int count = models - first < KT ? models - first : KT;
      if (kGroups || run == 0) {
#pragma unroll
        for (int k = 0; k < KT; ++k) {
          if (k >= count || (kForm == DropForm::Packed && (terms[first + k].flags & kPacked)))
            continue;
#pragma unroll
          for (int i = 0; i < kHeld; ++i) {
            const int64_t from = kRuns == 2 || !kGroups ? at[i] : at[0] + run * kRun;
            load8<kWide>(raw[k][i], terms[first + k].x, terms[first + k].dtype, from, row.n,
                         is_whole(row, from));
          }
        }
        if constexpr (kDraws) {
          __shared__ DrawScratch<KT> scratch[kWarps];
          draw<KT>(terms + first, count, warp_start, lane, scratch[warp], keep);
        }
        if constexpr (kForm == DropForm::Packed) {
          __shared__ uint32_t totals[KT][kWarps];
          uint32_t inside = 0;
#pragma unroll
          for (int v = 0; v < 2; ++v)
#pragma unroll
            for (int j = 0; j < 8; ++j)
              if (at[v] + j < row.n) inside |= 1u << (8 * v + j);
#pragma unroll
          for (int k = 0; k < KT; ++k) keep[k] &= inside;
          packed_ranks<KT>(terms + first, count, tile_start, warp, lane, keep, totals, rank,
                           second);
        }
      }
      // Only now, with all loads under way, wait for the base.
      if constexpr (!kGroups) widen_base();
#pragma unroll
      for (int k = 0; k < KT; ++k) {
        if (k >= count) continue;
        const DeviceTerm& t = terms[first + k];
        const bool packed = kForm == DropForm::Packed && (t.flags & kPacked);
        const bool subtract = c.difference && !(packed && (t.flags & kDelta));
        const float scale = c.scales != nullptr ? c.scales[t.entry] : t.scale;
        const float rescale = c.rescales != nullptr ? c.rescales[t.entry] : t.rescale;
        const int32_t code = kForm == DropForm::Trim ? c.codes[t.entry] : 0;
        const int64_t cut = kForm == DropForm::Trim ? c.cuts[t.entry] : 0;
#pragma unroll
        for (int i = 0; i < kRuns; ++i) {
          const int v = run + i;
          const int64_t here = kGroups ? at[0] + v * kRun : at[v];
          float x[8];
          if (packed) {
            int64_t from = v == 0 ? rank[k] : second[k];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
              x[j] = 0.0f;
              if (keep[k] >> (8 * v + j) & 1u) {
                if (uint64_t(from) < uint64_t(t.values)) x[j] = element(t.x, t.dtype, from);
                ++from;
              }
            }
          } else {
            widen8<kWide>(raw[k][kGroups ? i : v], t.dtype, x);
          }
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            float d = subtract ? x[j] - base[i][j] : x[j];
            if constexpr (kForm == DropForm::Trim) {
              const int32_t own = int32_t(f32_bits(d) & 0x7fffffffu);
              d = own > code || (own == code && here + j < cut) ? d : 0.0f;
            }
            if constexpr (kDraws) d = keep[k] >> (8 * v + j) & 1u ? d : 0.0f;
            const float value = d * scale;
            if constexpr (!kElect) {
              sum[i][j] = first + k == 0 ? value : sum[i][j] + value;
            } else {
              const float vote = c.vote_weighted ? value : d * rescale;
              mass[j] += c.elect == Elect::Frequency
                             ? (vote > 0.0f ? 1.0f : 0.0f) - (vote < 0.0f ? 1.0f : 0.0f)
                             : vote;
              // Said by what does not agree, so that NaN agrees and reaches the output.
              const bool for_plus = !(vote <= 0.0f), for_minus = !(vote >= 0.0f);
              if (c.reduce == Reduce::Max) {
                sum[0][j] = for_plus ? larger(value, sum[0][j]) : sum[0][j];
                minus[j] = for_minus ? larger(value, minus[j]) : minus[j];
              } else {
                sum[0][j] += for_plus ? value : 0.0f;
                minus[j] += for_minus ? value : 0.0f;
                if (c.reduce == Reduce::Mean) {
                  const float share = c.divide_by_weights ? t.weight : 1.0f;
                  divisor[j] += for_plus ? share : 0.0f;
                  minus_divisor[j] += for_minus ? share : 0.0f;
                }
              }
            }
          }
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const int64_t here = at[0] + (run + i) * kRun;
      float out[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        float total = sum[i][j], by = row.denominator;
        if constexpr (kElect) {
          const bool plus = mass[j] >= 0.0f;
          total = plus ? total : minus[j];
          by = plus ? divisor[j] : minus_divisor[j];
          by = by == 0.0f ? 1.0f : by;
        }
        if (c.reduce == Reduce::Mean) total = total / by;
        if (c.lambda != 1.0f) total = total * c.lambda;
        out[j] = c.difference ? base[i][j] + total : total;
      }
      if (here < row.n) store8(row.out, row.out_dtype, here, row.n, is_whole(row, here), out);
    }
  }
}

template <DropForm kForm, bool kElect>
void launch(const Batch& b, const CombineOnDevice& c, bool wide, cudaStream_t stream) {
  const int models = b.models;
  if constexpr (kForm == DropForm::Packed) {  // the values are gathered: few terms at a time
    if (models <= 2)
      CLF_LAUNCH((combine_kernel<2, true, kForm, kElect, false>), b.total, kThreads, stream, b, c);
    else
      CLF_LAUNCH((combine_kernel<2, true, kForm, kElect, true>), b.total, kThreads, stream, b, c);
  } else if (models > (wide ? 4 : 8)) {
    CLF_LAUNCH((combine_kernel<4, true, kForm, kElect, true>), b.total, kThreads, stream, b, c);
  } else if (wide) {
    CLF_LAUNCH((combine_kernel<4, true, kForm, kElect, false>), b.total, kThreads, stream, b, c);
  } else if (models <= 2) {
    CLF_LAUNCH((combine_kernel<2, false, kForm, kElect, false>), b.total, kThreads, stream, b, c);
  } else if (models <= 4) {
    CLF_LAUNCH((combine_kernel<4, false, kForm, kElect, false>), b.total, kThreads, stream, b, c);
  } else {
    CLF_LAUNCH((combine_kernel<8, false, kForm, kElect, false>), b.total, kThreads, stream, b, c);
  }
}

template <DropForm kForm>
void launch(const Batch& b, const CombineOnDevice& c, bool wide, cudaStream_t stream) {
  if (c.elect == Elect::None)
    launch<kForm, false>(b, c, wide, stream);
  else
    launch<kForm, true>(b, c, wide, stream);
}

}  // namespace

void combine_on_device(const Rows& rows, const CombineOnDevice& call, cudaStream_t stream) {
  bool wide = false;
  for (const int dtype : rows.dtype) wide |= DType(dtype) == DType::F32;
  for (const int dtype : rows.base_dtype) wide |= DType(dtype) == DType::F32;
  Batches batches(rows, Unit::Tiles, kTile);
  for (Batch b; batches.next(b);) {
    switch (call.form) {
      case DropForm::None:
        launch<DropForm::None>(b, call, wide, stream);
        break;
      case DropForm::Trim:
        launch<DropForm::Trim>(b, call, wide, stream);
        break;
      case DropForm::Drop:
        launch<DropForm::Drop>(b, call, wide, stream);
        break;
      case DropForm::Packed:
        launch<DropForm::Packed>(b, call, wide, stream);
        break;
    }
    check_launch("combine on the GPU");
  }
}

}  // namespace clf
