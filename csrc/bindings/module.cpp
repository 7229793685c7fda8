// The map of llmc._llmc. Bindings carry, they do not compute.
#include "bindings/bindings.h"
#include "core/check.h"
#include "cpu/caches.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"
#include "cpu/peak.h"
#include "cuda/make_cuda.h"

#define LLMC_STRING(x) #x
#define LLMC_VERSION_STRING(x) LLMC_STRING(x)

PYBIND11_MODULE(_llmc, m) {
    using namespace llmc;
    m.doc() = "The C++ core of llmc. Use it through the package llmc.";
    m.attr("__version__") = LLMC_VERSION_STRING(LLMC_VERSION);
    m.attr("compiler") = LLMC_VERSION_STRING(LLMC_COMPILER);

    static py::exception<Error> error(m, "Error", PyExc_RuntimeError);
    py::register_exception_translator([](std::exception_ptr p) {
        try {
            if (p) std::rethrow_exception(p);
        } catch (const ArgumentError& e) {
            py::set_error(PyExc_ValueError, e.what());
        } catch (const Error& e) {
            py::set_error(error, e.what());
        }
    });

    bind_tensor(m);
    bind_ops(m);
    bind_profile(m);
    bind_comm(m);
    bind_model(m);
    bind_cache(m);
    bind_gpt2(m);
    bind_optim(m);
    bind_data(m);

    m.def(
        "commit", [] { return LLMC_VERSION_STRING(LLMC_COMMIT); },
        "Return the commit of the clone that this was built from, with '-dirty' if files had changed; '' if "
        "it is not known.");
    m.def("default_threads", &default_threads,
          "Return the CPU threads used by default: OMP_NUM_THREADS, else what the process may use.");
    m.def(
        "isa",
        [] {
            const IsaChoice choice = choose_isa();
            return py::dict("used"_a = choice.kernels->isa, "usable"_a = choice.usable,
                            "built"_a = choice.built);
        },
        "Return the kernel sets: 'built' in this build, 'usable' on this CPU, and the one 'used' (LLMC_ISA "
        "forces one).");
    m.def(
        "cpu_peak_flops",
        [](const std::string& dtype, int threads) { return cpu_peak_flops(dtype_from_name(dtype), threads); },
        "dtype"_a, "threads"_a = 0, py::call_guard<py::gil_scoped_release>(),
        "Measure the FLOP/s of the kernel set in use on registers alone, in about 60 ms.\n\n"
        "dtype: 'f32' or 'bf16'. threads: 0 for as many as a backend would use.");
    m.def(
        "caches_in",
        [](const std::string& directory, const std::vector<int>& allowed) {
            const Caches c = caches_in(directory, allowed);
            std::vector<std::pair<std::int64_t, std::int64_t>> levels;
            for (const Cache& cache : {c.l1, c.l2, c.l3}) levels.emplace_back(cache.bytes, cache.shared_by);
            return levels;
        },
        "directory"_a, "allowed"_a,
        "Return (bytes, how many of the allowed CPUs share it) of the data caches L1, L2, L3.\n\n"
        "Of CPUs that differ, it is the one with the smallest share. Bytes are 0 if nobody tells.\n"
        "directory: what Linux has as /sys/devices/system/cpu.");
    m.def("cuda_built", &cuda_built, "Return whether this build has the CUDA backend.");
    m.def("set_library_directories", &set_library_directories, "directories"_a,
          "Set the directories in which NVIDIA's libraries are looked for, besides the system's places.");
    m.def("set_tune_file", &set_tune_file, "file"_a,
          "Set the file in which CUDA backends made from now on keep the algorithms that tuning chose.");
    m.def("cuda_status", &cuda_status,
          "Return the CUDA libraries and devices found, or why there are none, in words.");
}
