// The exact k-th largest magnitude of many tensors at once, or of a whole model, without a sort and
// without the host.
//
// A magnitude is compared by its code, the bits of |x - base| in float32. The codes of a few
// thousand sampled elements bracket the wanted one; one pass over the data counts what lies above
// the bracket and what falls into each of 512 bins of it. A bin whose smallest and largest code are
// equal is one value, and the search is over: so it is for the differences of 16-bit checkpoints,
// which take few values. Otherwise the bin becomes the next bracket. Passes are launched in any
// case, because only the device knows, and return at once where nothing is left to do:
//
//   sample, bracket      4096 codes of each segment, sorted in shared memory; a bracket five
//                        standard deviations wide
//   scan, descend   5x   a bracket that missed is replaced by the side it missed (1), then 31 bits
//                        of code by 9 bits per pass (4): five passes always suffice
//   finish               the threshold, and where its ties end
//
// A segment is one term of one row, or one model over all rows. Which ties stay is decided by the
// flat index: each block of a scan also leaves its own counts, so the one chunk of elements in
// which the last kept tie lies is known, and only that chunk is read again.
#include "select.h"

#include <vector>

namespace clf {
namespace {

using u64 = unsigned long long;

constexpr int kBins = 512, kBinBits = 9, kSamples = 4096, kPasses = 5;
constexpr int kThreads = 1024;
// Terms that share one read of the base: what a thread's share of the registers holds.
constexpr int kGroup = 4, kWideGroup = 2;
constexpr int64_t kStep = kThreads * 8;
constexpr int64_t kLeastChunk = 4 * kStep, kMostChunk = 64 * kStep;
constexpr uint32_t kCodes = 0x80000000u;  // codes are below this
constexpr uint32_t kNothing = 0x7fffffffu;

struct Segment {
  int64_t want;   // the rank that is looked for
  int64_t above;  // codes above the threshold, once it is found
  int64_t count;  // codes at the threshold
  uint32_t low;   // the bracket: kBins bins of 2^shift codes from here on
  int32_t shift;
  int32_t bin;
  int32_t done;
  int32_t code;
  int32_t unused;
};

struct Work {  // of all segments, in device memory
  Segment* segment;
  u64* counts;  // [segments][kBins]
  u64* above;   // [segments]
  uint32_t *smallest, *largest, *samples;
  int32_t* codes;
  int64_t *cuts, *at;
};

struct Shape {
  bool difference, whole_model, first_ties, all_ties;
  int64_t chunk;
  int64_t total;  // elements of all rows
};

__device__ __forceinline__ int segment_of(const Batch& b, const Shape& s, int row, int k) {
  return s.whole_model ? k : b.term[row * b.models + k].entry;
}

__device__ __forceinline__ uint32_t code_of(float d) { return f32_bits(d) & 0x7fffffffu; }

__device__ __forceinline__ uint32_t end_of(uint32_t low, int shift) {
  const uint64_t end = uint64_t(low) + (uint64_t(kBins) << shift);
  return end < kCodes ? uint32_t(end) : kCodes;
}

// The fewest bits to leave out so that `width` codes fit the bins.
__device__ __forceinline__ int shift_for(uint32_t width) {
  int shift = 0;
  while (((width - 1) >> shift) >= kBins) ++shift;
  return shift;
}

__global__ void __launch_bounds__(kThreads, 1)
    sample_kernel(CLF_ARGUMENT(Batch) b, const Work w, const Shape s, int64_t before) {
  const int blocks = kSamples / kThreads;
  const int slot = int(blockIdx.x) % blocks * kThreads + int(threadIdx.x);
  const int rest = int(blockIdx.x) / blocks;
  const int k = rest % b.models;
  int row = rest / b.models;
  const int64_t n = s.whole_model ? s.total : b.row[row].n;
  int64_t i = slot;
  if (n >= kSamples) {  // one from each of as many equal stretches
    const int64_t stretch = n / kSamples;
    const uint32_t hash = uint32_t(slot) * 2654435761u;
    i = slot * stretch + n % kSamples * slot / kSamples + int64_t((hash >> 7) % uint64_t(stretch));
  }
  if (s.whole_model) {
    i -= before;
    if (i < 0 || i >= b.total) return;
    row = find_row(b, i);
    i -= b.row[row].first;
  }
  uint32_t code = 0;  // sorts behind all others
  if (i < b.row[row].n) {
    const DeviceTerm& t = b.term[row * b.models + k];
    float d = element(t.x, t.dtype, i);
    if (s.difference) d = d - element(b.row[row].base, b.row[row].base_dtype, i);
    code = code_of(d);
  }
  w.samples[int64_t(segment_of(b, s, row, k)) * kSamples + slot] = code;
}

__device__ __forceinline__ void clear_bins(const Work& w, int segment) {
  for (int i = int(threadIdx.x); i < kBins; i += int(blockDim.x)) {
    const int64_t at = int64_t(segment) * kBins + i;
    w.counts[at] = 0;
    w.smallest[at] = 0xffffffffu;
    w.largest[at] = 0;
  }
  if (threadIdx.x == 0) w.above[segment] = 0;
}

__global__ void __launch_bounds__(kThreads, 1)
    bracket_kernel(CLF_ARGUMENT(Batch) b, const Work w, const Shape s) {
  __shared__ uint32_t code[kSamples];
  const int row = s.whole_model ? 0 : int(blockIdx.x) / b.models;
  const int k = int(blockIdx.x) % b.models;
  const int segment = segment_of(b, s, row, k);
  const int64_t n = s.whole_model ? s.total : b.row[row].n;
  const int64_t have = n < kSamples ? n : kSamples;
  for (int i = int(threadIdx.x); i < kSamples; i += kThreads)
    code[i] = i < have ? w.samples[int64_t(segment) * kSamples + i] : 0u;
  for (int size = 2; size <= kSamples; size *= 2) {  // bitonic, the largest first
    for (int stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int i = int(threadIdx.x); i < kSamples / 2; i += kThreads) {
        const int a = 2 * i - (i & (stride - 1)), c = a + stride;
        const bool down = (a & size) == 0;
        const uint32_t x = code[a], y = code[c];
        if ((x < y) == down) code[a] = y, code[c] = x;
      }
    }
  }
  __syncthreads();
  clear_bins(w, segment);
  if (threadIdx.x != 0) return;
  Segment g = {};
  g.want = int64_t(b.term[row * b.models + k].key);
  if (g.want <= 0) {  // everything is kept, or nothing
    g.done = 1;
    g.code = g.want < 0 ? -1 : int32_t(kNothing);
  } else if (n <= kSamples) {
    g.low = code[g.want - 1];
  } else {
    const double rank = double(g.want) / double(n) * kSamples;
    const double spread = 5.0 * sqrt(rank * (1.0 - rank / kSamples)) + 2.0;
    const int64_t top = int64_t(floor(rank - spread)) - 1, bottom = int64_t(ceil(rank + spread));
    const uint32_t high = top >= 0 ? code[top] : kCodes - 1;
    g.low = bottom < kSamples ? code[bottom] : 0u;
    g.shift = shift_for(high - g.low + 1);
  }
  w.segment[segment] = g;
}

// code[j], chosen so that the codes stay in registers.
__device__ __forceinline__ uint32_t one_of(const uint32_t (&code)[8], int j) {
  const bool one = j & 1, two = j & 2;
  const uint32_t a = one ? code[1] : code[0], b = one ? code[3] : code[2];
  const uint32_t c = one ? code[5] : code[4], d = one ? code[7] : code[6];
  return j & 4 ? (two ? d : c) : (two ? b : a);
}

template <bool kWide, int G>
__global__ void __launch_bounds__(kThreads, 1)
    scan_kernel(CLF_ARGUMENT(Batch) b, const Work w, const Shape s, int first_term, int terms) {
  __shared__ uint32_t count[G][kBins], smallest[G][kBins], largest[G][kBins];
  __shared__ uint32_t above_all[G], low_of[G], high_of[G];  // the brackets; registers are scarce
  __shared__ int shift_of[G];
  const int r = find_row(b, blockIdx.x);
  const DeviceRow& row = b.row[r];
  const int64_t chunk = int64_t(blockIdx.x) - row.first;
  const int64_t start = chunk * s.chunk;
  const int64_t end = start + s.chunk < row.n ? start + s.chunk : row.n;

  uint32_t above[G] = {}, active = 0;  // active: a bit per term
#pragma unroll
  for (int k = 0; k < G; ++k)
    if (k < terms) active |= uint32_t(!w.segment[segment_of(b, s, r, first_term + k)].done) << k;
  if (active == 0) return;
  for (int i = int(threadIdx.x); i < G * kBins; i += kThreads) {
    (&count[0][0])[i] = 0;
    (&smallest[0][0])[i] = 0xffffffffu;
    (&largest[0][0])[i] = 0;
  }
  if (int(threadIdx.x) < terms) {
    const int k = int(threadIdx.x);
    const Segment& g = w.segment[segment_of(b, s, r, first_term + k)];
    above_all[k] = 0;
    low_of[k] = g.low;
    high_of[k] = end_of(g.low, g.shift);
    shift_of[k] = g.shift;
  }
  __syncthreads();

  const int length = int(end - start);
  for (int o = int(threadIdx.x) * 8; o < length; o += int(kStep)) {
    const int64_t at = start + o;
    const int inside = length - o < 8 ? length - o : 8;
    const bool whole = row.aligned && inside == 8;
    Raw raw[G], from;
#pragma unroll
    for (int k = 0; k < G; ++k) {
      if (!(active >> k & 1u)) continue;
      const DeviceTerm& t = b.term[r * b.models + first_term + k];
      load8<kWide>(raw[k], t.x, t.dtype, at, row.n, whole);
    }
    float base[8];
    if (s.difference) {
      load8<kWide>(from, row.base, row.base_dtype, at, row.n, whole);
      widen8<kWide>(from, row.base_dtype, base);
    }
#pragma unroll
    for (int k = 0; k < G; ++k) {
      if (!(active >> k & 1u)) continue;
      float x[8];
      widen8<kWide>(raw[k], b.term[r * b.models + first_term + k].dtype, x);
      const uint32_t low = low_of[k], high = high_of[k];
      uint32_t code[8], hits = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        code[j] = code_of(s.difference ? x[j] - base[j] : x[j]);
        above[k] += j < inside && code[j] >= high;
        hits |= uint32_t(j < inside && code[j] - low < high - low) << j;
      }
      // Few fall into the bracket. Each lane walks its own, so that a warp takes as many turns as
      // one lane has hits at most, and not a turn for every element that some lane hits.
#pragma unroll 1
      for (; hits != 0; hits &= hits - 1) {
        const uint32_t c = one_of(code, __ffs(int(hits)) - 1);
        const uint32_t bin = (c - low) >> shift_of[k];
        // a glance first: after a few elements there is hardly anything left to change
        const uint32_t least = smallest[k][bin], most = largest[k][bin];
        atomicAdd(&count[k][bin], 1u);
        if (c < least) atomicMin(&smallest[k][bin], c);
        if (c > most) atomicMax(&largest[k][bin], c);
      }
    }
  }
#pragma unroll
  for (int k = 0; k < G; ++k)
    if ((active >> k & 1u) && above[k] != 0) atomicAdd(&above_all[k], above[k]);
  __syncthreads();

  const int64_t chunks = (row.n + s.chunk - 1) / s.chunk;
#pragma unroll
  for (int k = 0; k < G; ++k) {
    if (!(active >> k & 1u)) continue;
    const int segment = segment_of(b, s, r, first_term + k);
    uint32_t* const own = reinterpret_cast<uint32_t*>(row.out) +
                          ((first_term + k) * chunks + chunk) * kBins;
    for (int i = int(threadIdx.x); i < kBins; i += kThreads) {
      const uint32_t c = count[k][i];
      const int64_t to = int64_t(segment) * kBins + i;
      if (s.first_ties) own[i] = c;
      if (c == 0) continue;
      atomicAdd(&w.counts[to], u64(c));
      atomicMin(&w.smallest[to], smallest[k][i]);
      atomicMax(&w.largest[to], largest[k][i]);
    }
    if (threadIdx.x == 0 && above_all[k] != 0) atomicAdd(&w.above[segment], u64(above_all[k]));
  }
}

__global__ void __launch_bounds__(kBins)
    descend_kernel(CLF_ARGUMENT(Batch) b, const Work w, const Shape s) {
  __shared__ u64 from_top[kBins];  // codes in this bin and in those above it
  __shared__ Segment next;
  const int row = s.whole_model ? 0 : int(blockIdx.x) / b.models;
  const int segment = segment_of(b, s, row, int(blockIdx.x) % b.models);
  const int bin = int(threadIdx.x);
  const Segment g = w.segment[segment];
  if (g.done) return;
  const int64_t at = int64_t(segment) * kBins + bin;
  from_top[bin] = w.counts[at];
  __syncthreads();
  for (int by = 1; by < kBins; by *= 2) {
    const u64 more = bin + by < kBins ? from_top[bin + by] : 0;
    __syncthreads();
    from_top[bin] += more;
    __syncthreads();
  }
  const u64 above = w.above[segment], want = u64(g.want);
  if (bin == 0) {
    next = g;
    if (above >= want) {  // the bracket lies below the threshold
      next.low = end_of(g.low, g.shift);
      next.shift = shift_for(kCodes - next.low);
    } else if (above + from_top[0] < want) {  // it lies above
      next.low = 0;
      next.shift = shift_for(g.low);
    }
  }
  __syncthreads();
  const u64 higher = above + (bin + 1 < kBins ? from_top[bin + 1] : 0);
  if (higher < want && want <= above + from_top[bin]) {
    if (w.smallest[at] == w.largest[at]) {
      next.done = 1;
      next.code = int32_t(w.smallest[at]);
      next.above = int64_t(higher);
      next.count = int64_t(w.counts[at]);
      next.bin = bin;
    } else {
      next.low = g.low + (uint32_t(bin) << g.shift);
      next.shift = g.shift > kBinBits ? g.shift - kBinBits : 0;
    }
  }
  __syncthreads();
  clear_bins(w, segment);
  if (bin == 0) w.segment[segment] = next;
}

// Inclusive sums over the block; every thread must call it.
__device__ __forceinline__ int64_t block_scan(int64_t value, int64_t (&warps)[32]) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const long long other = __shfl_up_sync(0xffffffffu, (long long)(value), unsigned(by));
    if (lane >= by) value += other;
  }
  if (lane == 31) warps[warp] = value;
  __syncthreads();
  int64_t before = 0;
  for (int i = 0; i < warp; ++i) before += warps[i];
  __syncthreads();
  return before + value;
}

__global__ void __launch_bounds__(kThreads, 1)
    finish_kernel(CLF_ARGUMENT(Batch) b, const Work w, const Shape s) {
  __shared__ int64_t warps[32];
  __shared__ int64_t found, rank;
  const int r = int(blockIdx.x) / b.models, k = int(blockIdx.x) % b.models;
  const DeviceRow& row = b.row[r];
  const DeviceTerm& t = b.term[r * b.models + k];
  const Segment g = w.segment[segment_of(b, s, r, k)];
  int64_t keep = 0, cut = 0;  // what stays of the ties, and where they end
  if (g.want > 0) {
    keep = s.first_ties ? g.want - g.above : s.all_ties ? g.count : 0;
    if (keep == g.count) cut = row.n;
  }
  if (threadIdx.x == 0) {
    w.codes[t.entry] = g.code;
    w.at[t.entry] = keep;
    w.cuts[t.entry] = cut;
    found = -1;
  }
  if (keep == g.count || keep == 0) return;

  // The chunk in which the last kept tie lies, from the counts that each block of the scan left.
  const int64_t chunks = (row.n + s.chunk - 1) / s.chunk;
  const uint32_t* const counts = reinterpret_cast<const uint32_t*>(row.out) + k * chunks * kBins;
  int64_t before = 0;
  __syncthreads();
  for (int64_t first = 0; first < chunks; first += kThreads) {
    const int64_t chunk = first + threadIdx.x;
    const int64_t own = chunk < chunks ? int64_t(counts[chunk * kBins + g.bin]) : 0;
    const int64_t sum = before + block_scan(own, warps);
    if (sum >= keep && sum - own < keep) {
      found = chunk;
      rank = keep - (sum - own);
    }
    if (threadIdx.x == kThreads - 1) warps[0] = sum;
    __syncthreads();
    before = warps[0];
    __syncthreads();
    if (found >= 0) break;
  }
  const int64_t start = found * s.chunk;
  const int64_t end = start + s.chunk < row.n ? start + s.chunk : row.n;
  const int64_t wanted = rank;
  __syncthreads();
  if (threadIdx.x == 0) found = -1;
  before = 0;
  __syncthreads();
  for (int64_t first = start; first < end; first += kStep) {
    const int64_t at = first + int64_t(threadIdx.x) * 8;
    uint32_t ties = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (at + j >= end) continue;
      float d = element(t.x, t.dtype, at + j);
      if (s.difference) d = d - element(row.base, row.base_dtype, at + j);
      ties |= uint32_t(int32_t(code_of(d)) == g.code) << j;
    }
    const int64_t own = __popc(ties);
    const int64_t sum = before + block_scan(own, warps);
    if (sum >= wanted && sum - own < wanted) {
      for (int64_t skip = wanted - (sum - own) - 1; skip > 0; --skip) ties &= ties - 1;
      found = at + __ffs(int(ties)) - 1;
    }
    if (threadIdx.x == kThreads - 1) warps[0] = sum;
    __syncthreads();
    before = warps[0];
    __syncthreads();
    if (found >= 0) break;
  }
  if (threadIdx.x == 0) w.cuts[t.entry] = found + 1;
}

int64_t elements(const Rows& rows) {
  int64_t total = 0;
  for (const int64_t n : rows.n) total += n;
  return total;
}

// One chunk per multiprocessor of a large card, within bounds that keep the counts per chunk small.
int64_t chunk_for(int64_t total) {
  const int64_t even = (total / 132 + kStep - 1) / kStep * kStep;
  return even < kLeastChunk ? kLeastChunk : even > kMostChunk ? kMostChunk : even;
}

int64_t segments_of(const Rows& rows, const SelectOnDevice& call) {
  return call.whole_model ? rows.models : rows.rows() * rows.models;
}

template <class T>
T* take(uint8_t*& p, int64_t count) {
  T* const result = reinterpret_cast<T*>(p);
  p += (count * int64_t(sizeof(T)) + 15) / 16 * 16;
  return result;
}

Work lay_out(uint8_t*& p, int64_t segments) {
  Work w = {};
  w.segment = take<Segment>(p, segments);
  w.counts = take<u64>(p, segments * kBins);
  w.above = take<u64>(p, segments);
  w.smallest = take<uint32_t>(p, segments * kBins);
  w.largest = take<uint32_t>(p, segments * kBins);
  w.samples = take<uint32_t>(p, segments * kSamples);
  return w;
}

}  // namespace

int64_t select_workspace(const Rows& rows, const SelectOnDevice& call) {
  uint8_t* p = nullptr;
  lay_out(p, segments_of(rows, call));
  int64_t bytes = reinterpret_cast<intptr_t>(p);
  if (!call.first_ties) return bytes;
  const int64_t chunk = chunk_for(elements(rows));
  for (const int64_t n : rows.n) bytes += (n + chunk - 1) / chunk * kBins * 4 * rows.models;
  return bytes;
}

void select_on_device(const Rows& rows, const SelectOnDevice& call, cudaStream_t stream) {
  const int64_t total = elements(rows);
  const int64_t chunk = chunk_for(total);
  const Shape shape{call.difference, call.whole_model, call.first_ties, call.all_ties, chunk, total};
  if (call.counts.size() != size_t(segments_of(rows, call)) ||
      (call.whole_model && call.first_ties))
    throw std::invalid_argument("select: counts or ties do not fit the rows");
  if (total == 0) return;

  uint8_t* p = call.work;
  Work w = lay_out(p, segments_of(rows, call));
  w.codes = call.codes;
  w.cuts = call.cuts;
  w.at = call.at;
  Rows here = rows;
  here.key.clear();
  here.keep.assign(rows.x.size(), 0);
  for (size_t e = 0; e < rows.x.size(); ++e)
    here.key.push_back(uint64_t(call.counts[call.whole_model ? e % size_t(rows.models) : e]));
  here.out.clear();
  if (call.first_ties) {
    for (const int64_t n : rows.n) {
      here.out.push_back(reinterpret_cast<uintptr_t>(p));
      p += (n + chunk - 1) / chunk * kBins * 4 * rows.models;
    }
  }
  here.out_dtype.assign(here.out.size(), int(DType::F32));
  bool wide = false;
  for (const int dtype : rows.dtype) wide |= DType(dtype) == DType::F32;
  for (const int dtype : rows.base_dtype) wide |= DType(dtype) == DType::F32;

  const auto cut = [&](Unit unit) {
    std::vector<Batch> all;
    Batches batches(here, unit, chunk);
    for (Batch b; batches.next(b);) all.push_back(b);
    return all;
  };
  const std::vector<Batch> by_element = cut(Unit::Elements), by_chunk = cut(Unit::Tiles);

  int64_t before = 0;
  for (const Batch& b : by_element) {
    const int64_t blocks = int64_t(kSamples / kThreads) * b.models * (call.whole_model ? 1 : b.rows);
    CLF_LAUNCH(sample_kernel, blocks, kThreads, stream, b, w, shape, before);
    before += b.total;
  }
  const auto per_segment = [&](auto&& run) {
    for (const Batch& b : by_chunk) {
      run(b, call.whole_model ? b.models : b.rows * b.models);
      if (call.whole_model) break;
    }
  };
  per_segment([&](const Batch& b, int blocks) {
    CLF_LAUNCH(bracket_kernel, blocks, kThreads, stream, b, w, shape);
  });
  for (int pass = 0; pass < kPasses; ++pass) {
    for (const Batch& b : by_chunk) {
      const int group = wide ? kWideGroup : kGroup;
      for (int first = 0; first < b.models; first += group) {
        const int terms = b.models - first < group ? b.models - first : group;
        if (wide)
          CLF_LAUNCH((scan_kernel<true, kWideGroup>), b.total, kThreads, stream, b, w, shape, first,
                     terms);
        else
          CLF_LAUNCH((scan_kernel<false, kGroup>), b.total, kThreads, stream, b, w, shape, first,
                     terms);
      }
    }
    per_segment([&](const Batch& b, int blocks) {
      CLF_LAUNCH(descend_kernel, blocks, kBins, stream, b, w, shape);
    });
  }
  for (const Batch& b : by_chunk)
    CLF_LAUNCH(finish_kernel, b.rows * b.models, kThreads, stream, b, w, shape);
  check_launch("selection on the GPU");
}

}  // namespace clf
