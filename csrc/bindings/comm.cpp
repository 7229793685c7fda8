#include "bindings/bindings.h"
#include "core/comm.h"
#include "cuda/make_cuda.h"

namespace llmc {

void bind_comm(py::module_& m) {
    const auto tensor = [](const OwnedTensor& t) { return t.tensor; };
    const auto release = py::call_guard<py::gil_scoped_release>();
    py::class_<Comm, std::shared_ptr<Comm>>(
        m, "Comm", "The ranks that train one model together. Meaning of each call: csrc/core/comm.h.")
        .def_property_readonly("rank", &Comm::rank)
        .def_property_readonly("size", &Comm::size)
        .def(
            "all_reduce",
            [](Comm& c, const std::vector<OwnedTensor>& xs) {
                std::vector<Tensor> tensors;
                for (const OwnedTensor& x : xs) tensors.push_back(x.tensor);
                c.all_reduce(tensors);
            },
            "xs"_a, release)
        .def(
            "reduce_scatter",
            [=](Comm& c, const OwnedTensor& shard, const OwnedTensor& full) {
                c.reduce_scatter(tensor(shard), tensor(full));
            },
            "shard"_a, "full"_a, release)
        .def(
            "all_gather",
            [=](Comm& c, const OwnedTensor& full, const OwnedTensor& shard) {
                c.all_gather(tensor(full), tensor(shard));
            },
            "full"_a, "shard"_a, release)
        .def(
            "broadcast", [=](Comm& c, const OwnedTensor& x, int root) { c.broadcast(tensor(x), root); },
            "x"_a, "root"_a = 0, release)
        .def("wait", &Comm::wait, release)
        .def(
            "sum",
            [](Comm& c, std::vector<double> x) {
                c.sum(x);
                return x;
            },
            "x"_a, release, "The sums over all ranks.")
        .def("barrier", &Comm::barrier, release);

    m.def("thread_comms", &make_thread_comms, "backends"_a,
          "A Comm per CPU backend, for as many threads of this process.");
    m.def("nccl_id", [] { return py::bytes(make_nccl_id()); }, "Made by rank 0, needed by every rank.");
    m.def("nccl_comm", &make_nccl, "backend"_a, "rank"_a, "size"_a, "id"_a, release,
          "A Comm over NCCL; returns when every rank has called it.");
}

}  // namespace llmc
