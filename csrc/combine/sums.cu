// sum|d| and sum|d kept| on the GPU, in float64 and in the one order of every backend: chunks of
// 65536 elements, in a chunk 16 lanes (index mod 16) each summed in order, then the lanes in order,
// then the chunks in order.
//
// Sixteen threads take a chunk, 256 elements at a time: each loads 16 elements in 16-byte runs and
// draws the mask of one group of sixteen; through shared memory each then meets the elements of its
// own lane in order.
#include "../core/philox.h"
#include "combine_device.h"

namespace clf {
namespace {

constexpr int kLanes = 16, kChunksPerBlock = 4, kSumThreads = kLanes * kChunksPerBlock;
constexpr int kStep = kLanes * kLanes;
constexpr int kOrderThreads = 256;

int64_t chunks_of(int64_t n) { return (n + kStatChunk - 1) / kStatChunk; }

template <bool kWide>
__global__ void __launch_bounds__(kSumThreads)
    sums_kernel(CLF_ARGUMENT(Batch) b, bool difference, const int32_t* codes) {
  __shared__ float size[kChunksPerBlock][kStep];
  __shared__ uint32_t mask[kChunksPerBlock][kLanes];
  __shared__ double lanes[kChunksPerBlock][2][kLanes];
  const int lane = int(threadIdx.x) % kLanes, slot = int(threadIdx.x) / kLanes;
  const int k = int(blockIdx.x) % b.models;
  const int64_t tile = int64_t(blockIdx.x) / b.models;
  const int r = find_row(b, tile);
  const DeviceRow& row = b.row[r];
  const DeviceTerm& t = b.term[r * b.models + k];
  const int64_t chunk = (tile - row.first) * kChunksPerBlock + slot;
  const int64_t start = chunk * kStatChunk;
  const int64_t end = start + kStatChunk < row.n ? start + kStatChunk : row.n;
  // Threads of a slot without a chunk stay for the barriers.
  const int64_t longest = row.n - (tile - row.first) * kChunksPerBlock * kStatChunk;
  const int64_t length = longest < kStatChunk ? longest : kStatChunk;
  const int32_t code = codes != nullptr ? codes[t.entry] : 0;
  const bool drops = codes == nullptr && (t.flags & kSparse);

  double all = 0.0, kept = 0.0;
  for (int64_t o = 0; o < length; o += kStep) {
    const int64_t first = start + o;
    const bool work = first < end;
    if (work) {
#pragma unroll
      for (int v = 0; v < 2; ++v) {
        const int64_t at = first + v * 128 + lane * 8;
        const bool whole = row.aligned && at + 8 <= row.n;
        Raw raw;
        float x[8], y[8];
        load8<kWide>(raw, t.x, t.dtype, at, row.n, whole);
        widen8<kWide>(raw, t.dtype, x);
        if (difference) {
          load8<true>(raw, row.base, row.base_dtype, at, row.n, whole);
          widen8<true>(raw, row.base_dtype, y);
        }
#pragma unroll
        for (int j = 0; j < 8; ++j)
          size[slot][v * 128 + lane * 8 + j] =
              at + j < end ? fabsf(difference ? x[j] - y[j] : x[j]) : 0.0f;
      }
      if (drops) {
        uint32_t bits = 0;
        const uint64_t group = uint64_t(first) / 16 + uint64_t(lane);
        const Block block = philox4x32_10(uint32_t(group), uint32_t(group >> 32), 0, 0,
                                          uint32_t(t.key), uint32_t(t.key >> 32));
        const uint32_t lead = t.keep >> 24;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          const uint32_t byte = block.w[j / 4] >> (8 * (j % 4)) & 255u;
          bool keep = byte < lead;
          if (byte == lead && (t.keep & 0xffffffu) != 0)
            keep = stream_keep_from(t.key, group * 16 + uint64_t(j), t.keep, 1);
          bits |= uint32_t(keep) << j;
        }
        mask[slot][lane] = bits;
      }
    }
    __syncthreads();
    if (work) {
#pragma unroll 8
      for (int i = 0; i < kLanes; ++i) {
        const float d = size[slot][i * kLanes + lane];
        all = all + double(d);
        bool keep = true;
        if (drops) keep = mask[slot][i] >> lane & 1u;
        if (codes != nullptr) keep = int32_t(f32_bits(d) & 0x7fffffffu) > code;
        kept = kept + (keep ? double(d) : 0.0);
      }
    }
    __syncthreads();
  }
  lanes[slot][0][lane] = all;
  lanes[slot][1][lane] = kept;
  __syncthreads();
  if (lane < 2 && start < row.n) {
    double sum = 0.0;
    for (int i = 0; i < kLanes; ++i) sum = sum + lanes[slot][lane][i];
    const int64_t chunks = (row.n + kStatChunk - 1) / kStatChunk;
    reinterpret_cast<double*>(row.out)[2 * (k * chunks + chunk) + lane] = sum;
  }
}

// Adds the chunks of one entry in order: one thread all, one the kept ones; the others fetch.
__global__ void __launch_bounds__(kOrderThreads)
    order_kernel(CLF_ARGUMENT(Batch) b, double* totals, double* kept) {
  __shared__ double part[2 * kOrderThreads];
  const int r = int(blockIdx.x) / b.models, k = int(blockIdx.x) % b.models;
  const DeviceRow& row = b.row[r];
  const int64_t chunks = (row.n + kStatChunk - 1) / kStatChunk;
  const double* from = reinterpret_cast<const double*>(row.out) + 2 * k * chunks;
  double sum = 0.0;
  for (int64_t first = 0; first < chunks; first += kOrderThreads) {
    const int64_t count = chunks - first < kOrderThreads ? chunks - first : kOrderThreads;
    for (int64_t i = threadIdx.x; i < 2 * count; i += kOrderThreads) part[i] = from[2 * first + i];
    __syncthreads();
    if (threadIdx.x < 2)
      for (int64_t i = 0; i < count; ++i) sum = sum + part[2 * i + threadIdx.x];
    __syncthreads();
  }
  if (threadIdx.x < 2) {
    double* to = threadIdx.x == 0 ? totals : kept;
    to[b.term[r * b.models + k].entry] = sum;
  }
}

}  // namespace

int64_t partial_sums(const Rows& rows) {
  int64_t chunks = 0;
  for (const int64_t n : rows.n) chunks += chunks_of(n);
  return 2 * chunks * rows.models;
}

void absolute_sums_on_device(const Rows& rows, bool difference, const int32_t* codes,
                             double* partial, double* totals, double* kept, cudaStream_t stream) {
  Rows here = rows;
  bool wide = false;
  for (const int dtype : rows.dtype) wide |= DType(dtype) == DType::F32;
  here.out.clear();
  for (const int64_t n : rows.n) {
    here.out.push_back(reinterpret_cast<uintptr_t>(partial));
    partial += 2 * chunks_of(n) * rows.models;
  }
  here.out_dtype.assign(here.n.size(), int(DType::F32));
  Batches batches(here, Unit::Tiles, kChunksPerBlock * kStatChunk);
  for (Batch b; batches.next(b);) {
    if (wide)
      CLF_LAUNCH(sums_kernel<true>, b.total * b.models, kSumThreads, stream, b, difference, codes);
    else
      CLF_LAUNCH(sums_kernel<false>, b.total * b.models, kSumThreads, stream, b, difference, codes);
    CLF_LAUNCH(order_kernel, b.rows * b.models, kOrderThreads, stream, b, totals, kept);
    check_launch("absolute sums on the GPU");
  }
}

}  // namespace clf
