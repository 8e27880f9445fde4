// The Python face of the CUDA kernels: addresses of device memory, 64-bit sizes, a stream. A module
// of its own, so that the core neither needs CUDA nor changes with it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../combine/combine_device.h"
#include "../select/select.h"

namespace py = pybind11;
using namespace clf;

namespace {

template <class T>
T one_of(const std::string& argument, const std::string& value,
         std::initializer_list<std::pair<const char*, T>> choices) {
  for (const auto& c : choices)
    if (value == c.first) return c.second;
  throw py::value_error("unknown " + argument + " '" + value + "'");
}

template <class T>
T* at(uintptr_t p) {
  return reinterpret_cast<T*>(p);
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "cl_fast's CUDA kernels; use them through cl_fast.ops and cl_fast.merging.";

  m.def("build_info", [] {
    py::dict d;
#ifdef CL_FAST_CUDA_ON_CPU
    d["on_cpu"] = true;
    d["cuda"] = 0;
#else
    d["on_cpu"] = false;
    d["cuda"] = CUDART_VERSION;
#endif
    d["architectures"] = CL_FAST_CUDA_ARCHITECTURES;
    d["most_terms"] = kMaxTermsOnDevice;
    return d;
  });

  py::class_<Rows>(m, "Rows")
      .def(py::init([](int models, std::vector<int64_t> n, std::vector<uintptr_t> x,
                       std::vector<int> dtype) {
             Rows r;
             r.models = models;
             r.n = std::move(n);
             r.x = std::move(x);
             r.dtype = std::move(dtype);
             return r;
           }),
           py::arg("models"), py::arg("n"), py::arg("x"), py::arg("dtype"))
      .def_readwrite("base", &Rows::base)
      .def_readwrite("base_dtype", &Rows::base_dtype)
      .def_readwrite("out", &Rows::out)
      .def_readwrite("out_dtype", &Rows::out_dtype)
      .def_readwrite("denominator", &Rows::denominator)
      .def_readwrite("weight", &Rows::weight)
      .def_readwrite("scale", &Rows::scale)
      .def_readwrite("rescale", &Rows::rescale)
      .def_readwrite("key", &Rows::key)
      .def_readwrite("keep", &Rows::keep)
      .def_readwrite("offsets", &Rows::offsets)
      .def_readwrite("values", &Rows::values)
      .def_readwrite("kind", &Rows::kind);

  m.def(
      "combine",
      [](const Rows& rows, const std::string& form, bool difference, const std::string& elect,
         bool vote_weighted, const std::string& reduce, bool divide_by_weights, double lambda,
         uintptr_t codes, uintptr_t cuts, uintptr_t scales, uintptr_t rescales, uintptr_t stream) {
        CombineOnDevice c;
        c.form = one_of<DropForm>("form", form,
                                  {{"none", DropForm::None},
                                   {"trim", DropForm::Trim},
                                   {"drop", DropForm::Drop},
                                   {"packed", DropForm::Packed}});
        c.difference = difference;
        c.elect = one_of<Elect>(
            "elect", elect,
            {{"none", Elect::None}, {"mass", Elect::Mass}, {"frequency", Elect::Frequency}});
        c.vote_weighted = vote_weighted;
        c.reduce = one_of<Reduce>(
            "reduce", reduce, {{"sum", Reduce::Sum}, {"mean", Reduce::Mean}, {"max", Reduce::Max}});
        c.divide_by_weights = divide_by_weights;
        c.lambda = float(lambda);
        c.codes = at<const int32_t>(codes);
        c.cuts = at<const int64_t>(cuts);
        c.scales = at<const float>(scales);
        c.rescales = at<const float>(rescales);
        if (rows.out.size() != rows.n.size() || (difference && rows.base.size() != rows.n.size()) ||
            (c.form == DropForm::Trim && (!codes || !cuts)))
          throw py::value_error("combine: the rows lack out, base, codes or cuts");
        py::gil_scoped_release release;
        combine_on_device(rows, c, at<std::remove_pointer_t<cudaStream_t>>(stream));
      },
      py::arg("rows"), py::arg("form"), py::arg("difference"), py::arg("elect"),
      py::arg("vote_weighted"), py::arg("reduce"), py::arg("divide_by_weights"), py::arg("lam"),
      py::arg("codes") = 0, py::arg("cuts") = 0, py::arg("scales") = 0, py::arg("rescales") = 0,
      py::arg("stream") = 0);

  m.def("partial_sums", &partial_sums, py::arg("rows"));
  m.def(
      "absolute_sums",
      [](const Rows& rows, bool difference, uintptr_t codes, uintptr_t partial, uintptr_t totals,
         uintptr_t kept, uintptr_t stream) {
        py::gil_scoped_release release;
        absolute_sums_on_device(rows, difference, at<const int32_t>(codes), at<double>(partial),
                                at<double>(totals), at<double>(kept),
                                at<std::remove_pointer_t<cudaStream_t>>(stream));
      },
      py::arg("rows"), py::arg("difference"), py::arg("codes"), py::arg("partial"),
      py::arg("totals"), py::arg("kept"), py::arg("stream") = 0);

  const auto selection = [](bool difference, bool whole_model, const std::string& ties,
                            std::vector<int64_t> counts) {
    SelectOnDevice s;
    s.difference = difference;
    s.whole_model = whole_model;
    s.first_ties = one_of<bool>("ties", ties, {{"first", true}, {"all", false}, {"none", false}});
    s.all_ties = ties == "all";
    s.counts = std::move(counts);
    return s;
  };
  m.def(
      "select_workspace",
      [selection](const Rows& rows, bool whole_model, const std::string& ties) {
        return select_workspace(rows, selection(true, whole_model, ties, {}));
      },
      py::arg("rows"), py::arg("whole_model"), py::arg("ties"));
  m.def(
      "select",
      [selection](const Rows& rows, bool difference, bool whole_model, const std::string& ties,
                  std::vector<int64_t> counts, uintptr_t work, uintptr_t codes, uintptr_t cuts,
                  uintptr_t kept_ties, uintptr_t stream) {
        SelectOnDevice s = selection(difference, whole_model, ties, std::move(counts));
        s.work = at<uint8_t>(work);
        s.codes = at<int32_t>(codes);
        s.cuts = at<int64_t>(cuts);
        s.at = at<int64_t>(kept_ties);
        py::gil_scoped_release release;
        select_on_device(rows, s, at<std::remove_pointer_t<cudaStream_t>>(stream));
      },
      py::arg("rows"), py::arg("difference"), py::arg("whole_model"), py::arg("ties"),
      py::arg("counts"), py::arg("work"), py::arg("codes"), py::arg("cuts"), py::arg("kept_ties"),
      py::arg("stream") = 0);
}
