#include <optional>

#include "bindings/bindings.h"

namespace llmc {

namespace {

const char* numpy_name(DType dtype) {
    switch (dtype) {
    case DType::f32: return "float32";
    case DType::bf16: return "uint16";
    case DType::i32: return "int32";
    case DType::i16: return "int16";
    }
    return "";
}

std::vector<py::ssize_t> shape_of(const Tensor& t) { return {t.shape.begin(), t.shape.begin() + t.rank}; }

constexpr std::int64_t kMaxElements = std::int64_t{1} << 60;

Tensor with_shape(DType dtype, const std::vector<std::int64_t>& shape) {
    LLMC_CHECK(shape.size() <= Tensor::kMaxRank, "a tensor has at most {} extents, got {}", Tensor::kMaxRank,
               shape.size());
    Tensor t(nullptr, dtype, {});
    t.rank = static_cast<int>(shape.size());
    std::int64_t numel = 1;
    for (std::size_t i = 0; i < shape.size(); ++i) {
        LLMC_CHECK(shape[i] >= 0, "extent {} of a tensor is negative ({})", i, shape[i]);
        LLMC_CHECK(shape[i] == 0 || numel <= kMaxElements / shape[i], "a tensor has at most {} elements",
                   kMaxElements);
        t.shape[i] = shape[i];
        numel *= shape[i];
    }
    return t;
}

// The array as it must lie in memory; of the same type, for a conversion in passing could only be a mistake.
py::array contiguous(const py::array& host, DType dtype) {
    const py::array a = py::array::ensure(host, py::array::c_style);
    // bf16 comes as uint16, or as the bfloat16 of ml_dtypes, which is no type of NumPy's own.
    const bool same =
        a && (a.dtype().is(py::dtype(numpy_name(dtype))) || a.dtype().equal(py::dtype(numpy_name(dtype))) ||
              (dtype == DType::bf16 && a.itemsize() == 2 && a.dtype().kind() == 'V'));
    LLMC_CHECK(same, "an array of {} does not fit a tensor of {}, which is {} in NumPy",
               a ? std::string(py::str(a.dtype())) : "objects", dtype, numpy_name(dtype));
    return a;
}

OwnedTensor new_tensor(const std::shared_ptr<Backend>& backend, const std::vector<std::int64_t>& shape,
                       const std::string& dtype) {
    OwnedTensor t{backend, with_shape(dtype_from_name(dtype), shape), nullptr};
    const Busy busy(*backend);
    t.tensor.data = backend->allocate(static_cast<std::size_t>(t.tensor.bytes()));
    t.owner =
        let_others_run(std::shared_ptr<void>(t.tensor.data, [backend](void* p) { backend->release(p); }));
    return t;
}

}  // namespace

DType dtype_from_name(const std::string& name) {
    for (const DType t : {DType::f32, DType::bf16, DType::i32, DType::i16})
        if (name == name_of(t)) return t;
    throw ArgumentError(filled("unknown dtype '{}': expected f32, bf16, i32 or i16", name));
}

py::array host_view(const Tensor& t, py::handle base) {
    return py::array(py::dtype(numpy_name(t.dtype)), shape_of(t), t.data, base);
}

void bind_tensor(py::module_& m) {
    py::class_<DeviceInfo>(m, "DeviceInfo", "A description of a backend's device.")
        .def_readonly("name", &DeviceInfo::name, "'cpu' or 'cuda:0'.")
        .def_readonly("description", &DeviceInfo::description, "The hardware, in words.")
        .def_readonly("isa", &DeviceInfo::isa, "The kernel set: 'avx512', 'sm_90'.")
        .def_readonly("threads", &DeviceInfo::threads, "The CPU threads that ops use.")
        .def_readonly("pinning", &DeviceInfo::pinning, "How the CPU threads are bound to CPUs, in words.")
        .def_readonly("bf16_arithmetic", &DeviceInfo::bf16_arithmetic,
                      "Whether bf16 is multiplied as it is; if not, it is widened to f32, which costs time.")
        .def_readonly("l1_bytes", &DeviceInfo::l1_bytes,
                      "The L1 data cache of a CPU, in bytes; 0 if unknown.")
        .def_readonly("l2_bytes", &DeviceInfo::l2_bytes,
                      "The L2 cache, which several CPUs may share, in bytes.")
        .def_readonly("l3_bytes", &DeviceInfo::l3_bytes,
                      "The L3 cache, which several CPUs may share, in bytes; 0 if there is none.")
        .def_readonly("total_bytes", &DeviceInfo::total_bytes,
                      "The memory of the device, in bytes; 0 if unknown.")
        .def_readonly("free_bytes", &DeviceInfo::free_bytes, "The memory that is free, in bytes.")
        .def_readonly("uuid", &DeviceInfo::uuid,
                      "What a GPU is known by, whichever number it has in a process; empty for others.")
        .def_readonly("multiprocessors", &DeviceInfo::multiprocessors, "The multiprocessors of a GPU.")
        .def_readonly("clock_hz", &DeviceInfo::clock_hz, "The highest clock of its multiprocessors, in Hz.")
        .def_readonly("options", &DeviceInfo::options, "What set_option() has chosen.")
        .def_readonly("fallbacks", &DeviceInfo::fallbacks,
                      "What was computed by slower means than chosen; empty if nothing was.")
        .def("__repr__", [](const DeviceInfo& info) {
            return filled("DeviceInfo({}, {}, {})", info.name, info.isa, info.description);
        });

    py::class_<OwnedTensor>(m, "Tensor", "A contiguous array in a backend's memory.")
        .def_property_readonly(
            "shape", [](const OwnedTensor& t) { return py::tuple(py::cast(shape_of(t.tensor))); },
            "The extents.")
        .def_property_readonly(
            "dtype", [](const OwnedTensor& t) { return name_of(t.tensor.dtype); },
            "'f32', 'bf16', 'i32' or 'i16'.")
        .def(
            "to_host",
            [](const OwnedTensor& t, std::optional<py::array> into) {
                py::array out =
                    into ? *into : py::array(py::dtype(numpy_name(t.tensor.dtype)), shape_of(t.tensor));
                LLMC_CHECK(out.nbytes() == t.tensor.bytes() && (out.flags() & py::array::c_style),
                           "a contiguous array of {} bytes is needed for {}, got {} bytes", t.tensor.bytes(),
                           t.tensor, out.nbytes());
                void* const data = out.mutable_data();
                const Busy busy(*t.backend);
                t.backend->to_host(data, t.tensor);
                return out;
            },
            "out"_a = py::none(),
            "Copy the elements to a NumPy array, a new one or `out`, and return it; bf16 as uint16. Waits.")
        .def(
            "from_host",
            [](const OwnedTensor& t, const py::array& host) {
                const py::array a = contiguous(host, t.tensor.dtype);
                LLMC_CHECK(a.nbytes() == t.tensor.bytes(), "an array of {} bytes does not fit {}", a.nbytes(),
                           t.tensor);
                const void* const data = a.data();
                const Busy busy(*t.backend);
                t.backend->from_host(t.tensor, data);
            },
            "host"_a,
            "Copy an array of the same number of elements and dtype in; bf16 from uint16 or "
            "ml_dtypes.bfloat16.")
        .def_property_readonly(
            "numel", [](const OwnedTensor& t) { return t.tensor.numel(); }, "The number of elements.")
        .def(
            "read",
            [](const OwnedTensor& t, std::int64_t begin, std::int64_t count) {
                const Tensor part = t.tensor.view({t.tensor.numel()}).slice(begin, begin + count);
                py::array out(py::dtype(numpy_name(part.dtype)), shape_of(part));
                void* const data = out.mutable_data();
                const Busy busy(*t.backend);
                t.backend->to_host(data, part);
                return out;
            },
            "begin"_a, "count"_a,
            "Return a copy of the elements begin .. begin+count-1 in row-major order, (count); bf16 as "
            "uint16. Waits.")
        .def(
            "write",
            [](const OwnedTensor& t, std::int64_t begin, const py::array& host) {
                const py::array a = contiguous(host, t.tensor.dtype);
                const void* const data = a.data();
                const Tensor part = t.tensor.view({t.tensor.numel()}).slice(begin, begin + a.size());
                const Busy busy(*t.backend);
                t.backend->from_host(part, data);
            },
            "begin"_a, "host"_a, "Copy an array in, to the elements from `begin` on in row-major order.")
        .def(
            "__getitem__",
            [](const OwnedTensor& t, std::int64_t i) {
                if (t.tensor.rank < 1 || i < 0 || i >= t.tensor.shape[0]) throw py::index_error();
                return OwnedTensor{t.backend, t.tensor[i], t.owner};
            },
            "i"_a, "Return row i, a tensor of one extent less in the same memory.")
        .def("__repr__", [](const OwnedTensor& t) { return filled("Tensor({})", t.tensor); });
}

void bind_allocation(py::class_<Backend, std::shared_ptr<Backend>>& backend) {
    backend.def("empty", &new_tensor, "shape"_a, "dtype"_a = "f32", "Allocate a tensor, filled with zeros.");
}

}  // namespace llmc
