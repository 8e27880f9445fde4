// The Python face of the core: raw addresses and 64-bit sizes, no knowledge of torch or numpy.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <cstring>

#include "core/crc64.h"
#include "core/isa.h"
#include "core/philox.h"
#include "divergence/rows.h"
#include "engine/job.h"
#include "orthogonality/products.h"
#include "pack/pack.h"
#include "survey/survey.h"

namespace py = pybind11;
using namespace clf;

namespace {

template <class T>
T one_of(const std::string& argument, const std::string& value,
         std::initializer_list<std::pair<const char*, T>> choices) {
  std::string known;
  for (const auto& c : choices) {
    if (value == c.first) return c.second;
    known += (known.empty() ? "" : ", ") + std::string(c.first);
  }
  throw py::value_error(argument + " must be one of " + known + ", got '" + value + "'");
}

DType dtype_of(const std::string& name) {
  return one_of<DType>("dtype", name,
                       {{"BF16", DType::BF16},
                        {"F16", DType::F16},
                        {"F32", DType::F32},
                        {"F8_E4M3", DType::F8_E4M3},
                        {"F8_E5M2", DType::F8_E5M2},
                        {"BYTES", DType::BYTES}});
}

DType float_dtype(const std::string& name) {
  return one_of<DType>("destination dtype", name,
                       {{"BF16", DType::BF16}, {"F16", DType::F16}, {"F32", DType::F32}});
}

const uint8_t* pointer(uintptr_t p) { return reinterpret_cast<const uint8_t*>(p); }
uint8_t* writable(uintptr_t p) { return reinterpret_cast<uint8_t*>(p); }

using SourceTuple = std::tuple<std::string, uintptr_t, int, int64_t>;

Source source_of(const SourceTuple& s) {
  return Source{dtype_of(std::get<0>(s)), pointer(std::get<1>(s)), std::get<2>(s), std::get<3>(s),
                nullptr};
}

// dtype of the values, address, file, offset; key, threshold; block offsets and their number;
// factor; what it stands for; base
using PackedSourceTuple =
    std::tuple<SourceTuple, uint64_t, uint32_t, uintptr_t, int64_t, double, std::string,
               SourceTuple>;

Source packed_source_of(const PackedSourceTuple& t) {
  const auto& [values, key, threshold, blocks, count, factor, as, base] = t;
  auto packed = std::make_shared<PackedSource>();
  packed->values = source_of(values);
  packed->stream = Stream{key, threshold};
  const auto* from = reinterpret_cast<const int64_t*>(blocks);
  packed->blocks.assign(from, from + count);
  packed->base = source_of(base);
  packed->factor = factor;
  packed->as = one_of<PackedAs>(
      "as", as,
      {{"parts", PackedAs::Parts}, {"model", PackedAs::Model}, {"delta", PackedAs::Delta}});
  Source s;
  const bool exact = packed->as == PackedAs::Parts && packed->values.dtype == packed->base.dtype;
  s.dtype = exact ? packed->values.dtype : DType::F32;
  s.packed = std::move(packed);
  return s;
}

using MaybeTensor = std::optional<std::pair<std::string, uintptr_t>>;

Tensor tensor_of(const MaybeTensor& t) {
  return t ? Tensor{dtype_of(t->first), pointer(t->second)} : Tensor{};
}

// dtype, values, number of values, offsets (0: dense), key, threshold
using PackedTuple = std::tuple<std::string, uintptr_t, int64_t, uintptr_t, uint64_t, uint32_t>;

Packed packed_of(const PackedTuple& t) {
  return Packed{dtype_of(std::get<0>(t)), pointer(std::get<1>(t)), std::get<2>(t),
                reinterpret_cast<const int64_t*>(std::get<3>(t)),
                Stream{std::get<4>(t), std::get<5>(t)}};
}

// packed, whether a delta, weight, scale, rescale
using PackedTermTuple = std::tuple<PackedTuple, bool, float, float, float>;
// n, base, denominator, terms, output dtype, output
using PackedRowTuple = std::tuple<int64_t, MaybeTensor, float, std::vector<PackedTermTuple>,
                                  std::string, uintptr_t>;

py::dict result_dict(const TaskResult& r) {
  py::dict d;
  d["crc_out"] = r.crc_out;
  d["crc_in"] = r.crc_in;
  d["thresholds"] = r.codes;
  d["kept"] = r.kept;
  d["rescale"] = r.rescale;
  d["gram"] = r.gram;
  d["nonfinite"] = r.nonfinite;
  d["mismatch"] = r.mismatch;
  return d;
}

py::dict survey_dict(const SurveyResult& r) {
  py::dict d;
  d["products"] = r.products;
  d["absolute"] = r.absolute;
  d["largest"] = r.largest;
  d["largest_at"] = r.largest_at;
  d["nonfinite"] = r.nonfinite;
  d["changed"] = r.changed;
  d["overlap"] = r.overlap;
  d["conflicts"] = r.conflicts;
  d["shared"] = r.shared;
  d["disputed"] = r.disputed;
  d["sampled"] = r.sampled;
  py::list bins, rows;
  for (size_t k = 0; k < r.bins.size(); ++k)
    bins.append(py::make_tuple(r.first_bin[k], r.bins[k]));
  for (const auto& moved : r.rows) {
    py::list listed;
    for (const MovedRow& row : moved) listed.append(py::make_tuple(row.row, row.delta, row.base));
    rows.append(listed);
  }
  d["bins"] = bins;
  d["rows"] = rows;
  return d;
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "cl_fast's native core; use it through cl_fast.ops and cl_fast.merging.";

  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const FileError& e) {
      PyErr_SetObject(PyExc_OSError,
                      py::make_tuple(e.number, std::strerror(e.number), e.path).ptr());
    }
  });

  m.def("isa", [] { return std::string(kernels().name); });
  m.def("set_isa", &set_isa, py::arg("name"));
  m.def("supported_isas", &supported_isas);
  m.def("build_info", [] {
    py::dict d;
    d["compiler"] = __VERSION__;
    return d;
  });

  m.def(
      "crc64",
      [](const py::buffer& data, uint64_t crc) {
        const py::buffer_info info = data.request();
        if (!PyBuffer_IsContiguous(info.view(), 'C')) throw py::value_error("data must be contiguous");
        py::gil_scoped_release release;
        return crc64(crc, info.ptr, size_t(info.size * info.itemsize));
      },
      py::arg("data"), py::arg("crc") = 0,
      "CRC-64/NVME of a buffer, continuing from `crc`.");
  m.def(
      "crc64_combine",
      [](uint64_t a, uint64_t b, uint64_t n) { return crc64_combine(a, b, crc64_shift(n)); },
      py::arg("a"), py::arg("b"), py::arg("len_b"));

  m.def(
      "philox4x32_10",
      [](std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
        const Block b = philox4x32_10(c[0], c[1], c[2], c[3], k[0], k[1]);
        return std::array<uint32_t, 4>{b.w[0], b.w[1], b.w[2], b.w[3]};
      },
      py::arg("counter"), py::arg("key"));
  m.def(
      "keep_mask",
      [](uint64_t key, int64_t index0, int64_t n, uint64_t threshold, uintptr_t out) {
        if (index0 < 0 || n < 0) throw py::value_error("index0 and n must not be negative");
        py::gil_scoped_release release;
        uint8_t* to = writable(out);
        if (threshold >> 32) {
          std::memset(to, 1, size_t(n));
          return;
        }
        uint64_t bits[kBlock / 64];
        const int64_t start = index0 / 256 * 256;
        for (int64_t o = start; o < index0 + n; o += kBlock) {
          const int64_t m = std::min(kBlock, index0 + n - o);
          kernels().keep_bits(key, o, m, uint32_t(threshold), bits);
          for (int64_t i = std::max<int64_t>(0, index0 - o); i < m; ++i)
            to[o + i - index0] = uint8_t((bits[i >> 6] >> (i & 63)) & 1);
        }
      },
      py::arg("key"), py::arg("index0"), py::arg("n"), py::arg("threshold"), py::arg("out_ptr"),
      "One byte per element, 1 where the random stream keeps it.");
  m.def(
      "convert",
      [](const std::string& from, const std::string& to, uintptr_t src, uintptr_t dst, int64_t n) {
        const DType a = dtype_of(from), b = float_dtype(to);
        if (a == DType::BYTES) throw py::value_error("source dtype must be a floating type");
        py::gil_scoped_release release;
        DefaultFloatEnvironment environment;
        alignas(64) float block[kBlock];
        for (int64_t o = 0; o < n; o += kBlock) {
          const int64_t m = std::min(kBlock, n - o);
          kernels().to_f32(a, pointer(src) + o * dtype_size(a), m, block);
          kernels().from_f32(b, block, m, writable(dst) + o * dtype_size(b));
        }
      },
      py::arg("src_dtype"), py::arg("dst_dtype"), py::arg("src_ptr"), py::arg("dst_ptr"),
      py::arg("n"));

  // ---- orthogonality: (a, p, out, r, past, d, first) of each pair
  using PairTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t, bool>;
  const auto pairs_of = [](const std::vector<PairTuple>& tuples) {
    std::vector<OrthogonalPair> pairs;
    pairs.reserve(tuples.size());
    for (const auto& [a, p, out, r, past, d, first] : tuples)
      pairs.push_back({reinterpret_cast<const float*>(a), reinterpret_cast<const float*>(p),
                       reinterpret_cast<float*>(out), r, past, d, first});
    return pairs;
  };
  m.def(
      "orthogonal_products",
      [pairs_of](const std::vector<PairTuple>& tuples, uintptr_t s) {
        const auto pairs = pairs_of(tuples);
        py::gil_scoped_release release;
        orthogonal_products(pairs, reinterpret_cast<float*>(s));
      },
      py::arg("pairs"), py::arg("s_ptr"));
  m.def(
      "orthogonal_apply",
      [pairs_of](const std::vector<PairTuple>& tuples, uintptr_t f) {
        const auto pairs = pairs_of(tuples);
        py::gil_scoped_release release;
        orthogonal_apply(pairs, reinterpret_cast<const float*>(f));
      },
      py::arg("pairs"), py::arg("f_ptr"));

  // ---- rows of logits: (scale, softcap, temperature, probs); (dtype, address, stride, columns, how)
  using HowTuple = std::tuple<float, float, float, bool>;
  using RowsTuple = std::tuple<std::string, uintptr_t, int64_t, int64_t, HowTuple>;
  using RowsOutTuple = std::tuple<std::string, uintptr_t, int64_t>;
  const auto rows_of = [](const RowsTuple& t) {
    const auto& [dtype, data, stride, columns, how] = t;
    const auto& [scale, softcap, temperature, probs] = how;
    return Rows{float_dtype(dtype), pointer(data), stride, columns,
                RowValues{scale, softcap, temperature, probs}};
  };
  const auto rows_out_of = [](const RowsOutTuple& t) {
    return RowsOut{float_dtype(std::get<0>(t)), writable(std::get<1>(t)), std::get<2>(t)};
  };
  const auto divergence_of = [rows_of](int64_t rows, const RowsTuple& student,
                                       const RowsTuple& teacher, const std::string& kind,
                                       float mix) {
    return DivergenceCall{
        rows, rows_of(student), rows_of(teacher),
        one_of<Divergence>("kind", kind,
                           {{"forward_kl", Divergence::ForwardKl},
                            {"reverse_kl", Divergence::ReverseKl},
                            {"jsd", Divergence::Jsd},
                            {"skew_forward_kl", Divergence::SkewForwardKl},
                            {"skew_reverse_kl", Divergence::SkewReverseKl},
                            {"tvd", Divergence::Tvd}}),
        mix};
  };
  const auto floats = [](uintptr_t p) { return reinterpret_cast<float*>(p); };
  const auto integers = [](uintptr_t p) { return reinterpret_cast<const int64_t*>(p); };
  m.def(
      "row_normalisers",
      [=](int64_t rows, const RowsTuple& x, uintptr_t out, int threads) {
        const Rows from = rows_of(x);
        py::gil_scoped_release release;
        row_normalisers(rows, from, floats(out), threads);
      },
      py::arg("rows"), py::arg("x"), py::arg("out_ptr"), py::arg("threads"));
  m.def(
      "divergence_sums",
      [=](int64_t rows, const RowsTuple& student, const RowsTuple& teacher,
          const std::string& kind, float mix, uintptr_t normal_s, uintptr_t normal_t,
          uintptr_t out, int threads) {
        const DivergenceCall call = divergence_of(rows, student, teacher, kind, mix);
        py::gil_scoped_release release;
        divergence_sums(call, floats(normal_s), floats(normal_t), floats(out), threads);
      },
      py::arg("rows"), py::arg("student"), py::arg("teacher"), py::arg("kind"), py::arg("mix"),
      py::arg("normal_s_ptr"), py::arg("normal_t_ptr"), py::arg("out_ptr"), py::arg("threads"));
  m.def(
      "divergence_forward",
      [=](int64_t rows, const RowsTuple& student, const RowsTuple& teacher,
          const std::string& kind, float mix, uintptr_t losses, uintptr_t stats, int threads) {
        const DivergenceCall call = divergence_of(rows, student, teacher, kind, mix);
        py::gil_scoped_release release;
        divergence_forward(call, floats(losses), floats(stats), threads);
      },
      py::arg("rows"), py::arg("student"), py::arg("teacher"), py::arg("kind"), py::arg("mix"),
      py::arg("losses_ptr"), py::arg("stats_ptr"), py::arg("threads"));
  m.def(
      "divergence_gradient",
      [=](int64_t rows, const RowsTuple& student, const RowsTuple& teacher,
          const std::string& kind, float mix, const RowsOutTuple& out, uintptr_t grad,
          uintptr_t stats, uintptr_t extra_grad, uintptr_t extra_normal, uintptr_t extra_ids,
          int threads) {
        const DivergenceCall call = divergence_of(rows, student, teacher, kind, mix);
        const RowsOut to = rows_out_of(out);
        const CrossEntropy extra{floats(extra_grad), floats(extra_normal), integers(extra_ids)};
        py::gil_scoped_release release;
        divergence_gradient(call, to, floats(grad), floats(stats), extra, threads);
      },
      py::arg("rows"), py::arg("student"), py::arg("teacher"), py::arg("kind"), py::arg("mix"),
      py::arg("out"), py::arg("grad_ptr"), py::arg("stats_ptr"), py::arg("extra_grad_ptr"),
      py::arg("extra_normal_ptr"), py::arg("extra_ids_ptr"), py::arg("threads"));
  m.def(
      "logprob_forward",
      [=](int64_t rows, const RowsTuple& x, uintptr_t ids, uintptr_t out, int threads) {
        const Rows from = rows_of(x);
        py::gil_scoped_release release;
        logprob_forward(rows, from, integers(ids), floats(out), threads);
      },
      py::arg("rows"), py::arg("x"), py::arg("ids_ptr"), py::arg("out_ptr"), py::arg("threads"));
  m.def(
      "logprob_gradient",
      [=](int64_t rows, const RowsTuple& x, const RowsOutTuple& out, uintptr_t grad,
          uintptr_t entropy_grad, uintptr_t ids, uintptr_t stats, int threads) {
        const Rows from = rows_of(x);
        const RowsOut to = rows_out_of(out);
        py::gil_scoped_release release;
        logprob_gradient(rows, from, to, floats(grad), floats(entropy_grad), integers(ids),
                         floats(stats), threads);
      },
      py::arg("rows"), py::arg("x"), py::arg("out"), py::arg("grad_ptr"),
      py::arg("entropy_grad_ptr"), py::arg("ids_ptr"), py::arg("stats_ptr"), py::arg("threads"));

  // ---- packed deltas
  m.def(
      "pack_offsets",
      [](uint64_t key, uint32_t threshold, int64_t n, uintptr_t offsets, int threads) {
        py::gil_scoped_release release;
        pack_offsets(Stream{key, threshold}, n, reinterpret_cast<int64_t*>(offsets), threads);
      },
      py::arg("key"), py::arg("threshold"), py::arg("n"), py::arg("offsets_ptr"),
      py::arg("threads"));
  m.def(
      "pack_values",
      [](const MaybeTensor& x, const MaybeTensor& base, const PackedTuple& to, int64_t n,
         int threads) {
        const Tensor from = tensor_of(x), subtracted = tensor_of(base);
        const Packed packed = packed_of(to);
        py::gil_scoped_release release;
        pack_values(from, subtracted, packed, writable(std::get<1>(to)), n, threads);
      },
      py::arg("x"), py::arg("base"), py::arg("to"), py::arg("n"), py::arg("threads"));
  m.def(
      "pack_run",
      [](const MaybeTensor& x, const MaybeTensor& base, uint64_t key, uint32_t threshold,
         int64_t first, int64_t n, uintptr_t values, uintptr_t counts, double all, double kept,
         int threads) {
        const Tensor from = tensor_of(x), subtracted = tensor_of(base);
        double sums[2] = {all, kept};
        int64_t number = 0;
        {
          py::gil_scoped_release release;
          number = pack_run(from, subtracted, Stream{key, threshold}, first, n, writable(values),
                            reinterpret_cast<int64_t*>(counts), sums, threads);
        }
        return std::make_tuple(number, sums[0], sums[1]);
      },
      py::arg("x"), py::arg("base"), py::arg("key"), py::arg("threshold"), py::arg("first"),
      py::arg("n"), py::arg("values_ptr"), py::arg("counts_ptr"), py::arg("all"), py::arg("kept"),
      py::arg("threads"), "Kept values and counts of a run of chunks; the sums grow.");
  m.def(
      "unpack_values",
      [](const PackedTuple& from, const MaybeTensor& base, float factor,
         const std::string& out_dtype, uintptr_t out, int64_t n, int threads) {
        const Packed packed = packed_of(from);
        const Tensor subtracted = tensor_of(base);
        const DType dtype = float_dtype(out_dtype);
        py::gil_scoped_release release;
        unpack_values(packed, subtracted, factor, dtype, writable(out), n, threads);
      },
      py::arg("from"), py::arg("base"), py::arg("factor"), py::arg("out_dtype"),
      py::arg("out_ptr"), py::arg("n"), py::arg("threads"));
  m.def(
      "drop_sums",
      [](const MaybeTensor& x, const MaybeTensor& base, const std::string& held, uint64_t key,
         uint32_t threshold, int64_t n, int threads) {
        const Tensor from = tensor_of(x), subtracted = tensor_of(base);
        const DType dtype = float_dtype(held);
        py::gil_scoped_release release;
        return drop_sums(from, subtracted, dtype, Stream{key, threshold}, n, threads);
      },
      py::arg("x"), py::arg("base"), py::arg("held"), py::arg("key"), py::arg("threshold"),
      py::arg("n"), py::arg("threads"), "sum |d| and sum |d kept|, in the order of an l1 rescale.");
  m.def(
      "combine_packed",
      [](const std::vector<PackedRowTuple>& tuples, bool difference, const std::string& elect,
         bool vote_weighted, const std::string& reduce, bool divide_by_weights, float lambda,
         int threads) {
        std::vector<PackedRow> rows;
        for (const auto& [n, base, denominator, terms, out_dtype, out] : tuples) {
          PackedRow row;
          row.n = n;
          row.base = tensor_of(base);
          row.denominator = denominator;
          row.out_dtype = float_dtype(out_dtype);
          row.out = writable(out);
          for (const auto& [packed, delta, weight, scale, rescale] : terms)
            row.terms.push_back(PackedTerm{packed_of(packed), delta, weight, scale, rescale});
          rows.push_back(std::move(row));
        }
        PackedPolicy policy;
        policy.difference = difference;
        policy.elect = one_of<Elect>(
            "elect", elect,
            {{"none", Elect::None}, {"mass", Elect::Mass}, {"frequency", Elect::Frequency}});
        policy.vote_weighted = vote_weighted;
        policy.reduce =
            one_of<Reduce>("reduce", reduce,
                           {{"sum", Reduce::Sum}, {"mean", Reduce::Mean}, {"max", Reduce::Max}});
        policy.divide_by_weights = divide_by_weights;
        policy.lambda = lambda;
        py::gil_scoped_release release;
        combine_packed(rows, policy, threads);
      },
      py::arg("rows"), py::arg("difference"), py::arg("elect"), py::arg("vote_weighted"),
      py::arg("reduce"), py::arg("divide_by_weights"), py::arg("lam"), py::arg("threads"));

  py::class_<Survey>(m, "Survey")
      .def(py::init<int, int>(), py::arg("threads"), py::arg("top"))
      .def(
          "file",
          [](Survey& s, const std::string& path, const std::string& mode) {
            return s.file(path, one_of<IoMode>("mode", mode,
                                               {{"mmap", IoMode::Mmap},
                                                {"pread", IoMode::Pread},
                                                {"direct", IoMode::Direct}}));
          },
          py::arg("path"), py::arg("mode") = "mmap")
      .def(
          "add",
          [](Survey& s, int64_t n, int64_t row, const std::vector<SourceTuple>& sources) {
            std::vector<SurveyInput> inputs;
            for (const auto& [dtype, ptr, file, offset] : sources)
              inputs.push_back(SurveyInput{dtype_of(dtype), pointer(ptr), file, offset});
            return s.add(n, row, inputs);
          },
          py::arg("n"), py::arg("row"), py::arg("sources"))
      .def("run", &Survey::run, py::call_guard<py::gil_scoped_release>())
      .def("cancel", &Survey::cancel)
      .def("cancelled", &Survey::cancelled)
      .def("progress",
           [](const Survey& s) { return std::make_pair(s.bytes_done(), s.bytes_total()); })
      .def("result", [](const Survey& s, int tensor) { return survey_dict(s.result(tensor)); },
           py::arg("tensor"));

  py::class_<Job>(m, "Job")
      .def(py::init([](int threads, int64_t tile_elements, const std::string& nan, bool checksums,
                       int64_t memory) {
             return std::make_unique<Job>(threads, tile_elements,
                                          one_of<NanPolicy>("nan", nan,
                                                            {{"refuse", NanPolicy::Refuse},
                                                             {"propagate", NanPolicy::Propagate},
                                                             {"zero", NanPolicy::Zero}}),
                                          checksums, memory);
           }),
           py::arg("threads"), py::arg("tile_elements") = 0, py::arg("nan") = "refuse",
           py::arg("checksums") = true, py::arg("memory") = 0)
      .def(
          "file",
          [](Job& j, const std::string& path, const std::string& mode) {
            return j.file(path, one_of<IoMode>("mode", mode,
                                               {{"mmap", IoMode::Mmap},
                                                {"pread", IoMode::Pread},
                                                {"direct", IoMode::Direct}}));
          },
          py::arg("path"), py::arg("mode") = "mmap")
      .def("output", &Job::output, py::arg("path"))
      .def(
          "rows",
          [](Job& j, int64_t row_bytes, const py::bytes& codes,
             const std::vector<std::tuple<SourceTuple, int64_t>>& tables, const py::bytes& made) {
            RowsSource r;
            r.row_bytes = row_bytes;
            const std::string_view listed = codes, rows = made;
            r.codes.resize(listed.size() / 8);
            std::memcpy(r.codes.data(), listed.data(), r.codes.size() * 8);
            for (const auto& [source, count] : tables) r.tables.push_back({source_of(source), count});
            r.made.assign(rows.begin(), rows.end());
            return j.rows(std::move(r));
          },
          py::arg("row_bytes"), py::arg("codes"), py::arg("tables"), py::arg("made"))
      .def(
          "add_task",
          [](Job& j, int64_t n, const std::string& out_dtype, uintptr_t out_ptr, int out_file,
             int64_t out_offset, const std::optional<SourceTuple>& base, bool difference,
             const std::string& sparsify, const std::string& trim_ties, const std::string& rescale,
             const std::string& elect, const std::string& elect_on, const std::string& reduce,
             const std::string& divisor, double lam, const std::string& kind, int64_t row,
             const std::string& gram) {
            TaskSpec s;
            s.n = n;
            s.copy = one_of<bool>("kind", kind, {{"combine", false}, {"copy", true}});
            s.out_dtype = s.copy ? DType::BYTES : float_dtype(out_dtype);
            s.out_ptr = writable(out_ptr);
            s.out_file = out_file;
            s.out_offset = out_offset;
            if (base) s.base = source_of(*base);
            s.difference = difference;
            s.sparsify = one_of<Sparsify>(
                "sparsify", sparsify,
                {{"none", Sparsify::None},
                 {"trim", Sparsify::Trim},
                 {"drop", Sparsify::Drop},
                 {"band", Sparsify::Band},
                 {"magprune", Sparsify::Magprune}});
            s.row = row;
            s.ties = one_of<Ties>("trim_ties", trim_ties,
                                  {{"first", Ties::First}, {"all", Ties::All}, {"none", Ties::None}});
            s.rescale = one_of<Rescale>("rescale", rescale,
                                        {{"none", Rescale::None},
                                         {"keep_rate", Rescale::KeepRate},
                                         {"l1", Rescale::L1}});
            s.elect = one_of<Elect>(
                "elect", elect,
                {{"none", Elect::None}, {"mass", Elect::Mass}, {"frequency", Elect::Frequency}});
            s.vote_weighted =
                one_of<bool>("elect_on", elect_on, {{"weighted", true}, {"unweighted", false}});
            s.reduce = one_of<Reduce>(
                "reduce", reduce,
                {{"sum", Reduce::Sum}, {"mean", Reduce::Mean}, {"max", Reduce::Max}});
            s.divide_by_weights =
                one_of<bool>("divisor", divisor, {{"weights", true}, {"count", false}});
            s.lambda = lam;
            s.gram = one_of<Gram>(
                "gram", gram,
                {{"none", Gram::None}, {"blend", Gram::Blend}, {"only", Gram::Only}});
            return j.add_task(s);
          },
          py::arg("n"), py::arg("out_dtype"), py::arg("out_ptr") = 0, py::arg("out_file") = -1,
          py::arg("out_offset") = 0, py::arg("base") = std::nullopt, py::arg("difference") = false,
          py::arg("sparsify") = "none", py::arg("trim_ties") = "first", py::arg("rescale") = "none",
          py::arg("elect") = "none", py::arg("elect_on") = "weighted", py::arg("reduce") = "sum",
          py::arg("divisor") = "weights", py::arg("lam") = 1.0, py::arg("kind") = "combine",
          py::arg("row") = 0, py::arg("gram") = "none")
      .def(
          "add_term",
          [](Job& j, int task, const std::string& dtype, uintptr_t ptr, int file, int64_t offset,
             double weight, double density, uint64_t key, uint64_t keep_threshold,
             int64_t keep_count, int64_t fixed_code, int64_t drop_count, double epsilon,
             const std::optional<PackedSourceTuple>& packed) {
            TermSpec t;
            t.x = packed ? packed_source_of(*packed)
                         : source_of(SourceTuple{dtype, ptr, file, offset});
            t.weight = weight;
            t.density = density;
            t.key = key;
            t.keep_threshold = keep_threshold;
            t.keep_count = keep_count;
            t.fixed_code = fixed_code;
            t.drop_count = drop_count;
            t.epsilon = epsilon;
            j.add_term(task, t);
          },
          py::arg("task"), py::arg("dtype"), py::arg("ptr") = 0, py::arg("file") = -1,
          py::arg("offset") = 0, py::arg("weight") = 1.0, py::arg("density") = 1.0,
          py::arg("key") = 0, py::arg("keep_threshold") = 0, py::arg("keep_count") = 0,
          py::arg("fixed_code") = -1, py::arg("drop_count") = 0, py::arg("epsilon") = 0.0,
          py::arg("packed") = std::nullopt)
      .def(
          "run",
          // `blend(task, gram)` is asked for the weights of the tasks with gram="blend".
          [](Job& j, const py::object& blend) {
            if (blend.is_none()) {
              py::gil_scoped_release release;
              j.run();
              return;
            }
            const Blend ask = [&blend](int task, const std::vector<double>& gram) {
              py::gil_scoped_acquire acquire;
              return blend(task, gram).cast<std::vector<double>>();
            };
            py::gil_scoped_release release;
            j.run(ask);
          },
          py::arg("blend") = py::none())
      .def("select_model", &Job::select_model, py::arg("counts"),
           py::call_guard<py::gil_scoped_release>())
      .def(
          "count_codes",
          [](Job& j, const std::vector<std::tuple<int64_t, int64_t, int>>& ranges) {
            std::vector<Job::CodeRange> wanted;
            for (const auto& [lo, hi, shift] : ranges) wanted.push_back({lo, hi, shift});
            std::vector<std::vector<uint64_t>> counts;
            {
              py::gil_scoped_release nogil;
              counts = j.count_codes(wanted);
            }
            // As bytes of uint64 in the machine's order: lists of a hundred thousand ints are slow.
            py::list out;
            for (const auto& c : counts)
              out.append(py::bytes(reinterpret_cast<const char*>(c.data()), c.size() * 8));
            return out;
          },
          py::arg("ranges"))
      .def("cancel", &Job::cancel)
      .def("cancelled", &Job::cancelled)
      .def("progress",
           [](const Job& j) { return std::make_pair(j.bytes_done(), j.bytes_total()); })
      .def("result", [](const Job& j, int task) { return result_dict(j.result(task)); },
           py::arg("task"));
}
