#include "comm/comm.h"

#include "bindings/bindings.h"
#include "comm/all_reduce.h"
#include "cuda/make_cuda.h"

namespace llmc {

namespace {
// The tensor, which must be of the memory that the Comm reaches.
Tensor of(const Comm& comm, const OwnedTensor& t) {
    LLMC_CHECK(t.backend.get() == &comm.backend(), "{} belongs to another backend than the Comm", t.tensor);
    return t.tensor;
}
}  // namespace

void bind_comm(py::module_& m) {
    py::class_<Comm, std::shared_ptr<Comm>>(
        m, "Comm", "The ranks that train one model together. Meaning of each call: csrc/comm/comm.h.")
        .def_property_readonly("rank", &Comm::rank)
        .def_property_readonly("size", &Comm::size)
        .def(
            "all_reduce",
            [](Comm& c, const std::vector<OwnedTensor>& xs) {
                const Busy busy(c.backend());
                std::vector<Tensor> tensors;
                for (const OwnedTensor& x : xs) tensors.push_back(of(c, x));
                c.all_reduce(tensors);
            },
            "xs"_a)
        .def(
            "reduce_scatter",
            [](Comm& c, const OwnedTensor& shard, const OwnedTensor& full) {
                const Busy busy(c.backend());
                c.reduce_scatter(of(c, shard), of(c, full));
            },
            "shard"_a, "full"_a)
        .def(
            "all_gather",
            [](Comm& c, const OwnedTensor& full, const OwnedTensor& shard) {
                const Busy busy(c.backend());
                c.all_gather(of(c, full), of(c, shard));
            },
            "full"_a, "shard"_a)
        .def(
            "broadcast",
            [](Comm& c, const OwnedTensor& x, int root) {
                const Busy busy(c.backend());
                c.broadcast(of(c, x), root);
            },
            "x"_a, "root"_a = 0)
        .def("wait", busy(&Comm::wait))
        .def(
            "sum",
            [](Comm& c, std::vector<double> x) {
                const Busy busy(c.backend());
                c.sum(x);
                return x;
            },
            "x"_a, "The sums over all ranks.")
        .def("barrier", busy(&Comm::barrier));

    py::class_<GradientSink, std::shared_ptr<GradientSink>>(
        m, "GradientSink", "Takes gradients as backward() completes them: csrc/comm/gradient_sink.h.");
    py::class_<AllReduce, GradientSink, std::shared_ptr<AllReduce>>(
        m, "AllReduce", "Gives every rank of a Comm the sums of all gradients and of the loss.")
        .def(py::init<std::shared_ptr<Comm>>(), py::arg("comm").none(false));

    m.def("thread_comms", &make_thread_comms, "backends"_a,
          "A Comm per CPU backend, for as many threads of this process.");
    m.def("nccl_id", [] { return py::bytes(make_nccl_id()); }, "Made by rank 0, needed by every rank.");
    m.def("nccl_comm", &make_nccl, "backend"_a, "rank"_a, "size"_a, "id"_a,
          py::call_guard<py::gil_scoped_release>(),
          "A Comm over NCCL; returns when every rank has called it.");
}

}  // namespace llmc
