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
    py::class_<Comm, std::shared_ptr<Comm>>(m, "Comm",
                                            "The ranks that train one model together: csrc/comm/comm.h.")
        .def_property_readonly("rank", &Comm::rank, "This rank, from 0 on.")
        .def_property_readonly("size", &Comm::size, "The number of ranks.")
        .def(
            "all_reduce",
            [](Comm& c, const std::vector<OwnedTensor>& xs) {
                const Busy busy(c.backend());
                std::vector<Tensor> tensors;
                for (const OwnedTensor& x : xs) tensors.push_back(of(c, x));
                c.all_reduce(tensors);
            },
            "xs"_a,
            "Replace each tensor by its sum over the ranks; all ranks pass the same shapes and dtypes.")
        .def(
            "reduce_scatter",
            [](Comm& c, const OwnedTensor& shard, const OwnedTensor& full) {
                const Busy busy(c.backend());
                c.reduce_scatter(of(c, shard), of(c, full));
            },
            "shard"_a, "full"_a,
            "Store the sum over the ranks of this rank's piece of `full` in `shard`, which is one of `size` "
            "equal pieces.")
        .def(
            "all_gather",
            [](Comm& c, const OwnedTensor& full, const OwnedTensor& shard) {
                const Busy busy(c.backend());
                c.all_gather(of(c, full), of(c, shard));
            },
            "full"_a, "shard"_a, "Gather every rank's shard in `full`, in the order of ranks.")
        .def(
            "broadcast",
            [](Comm& c, const OwnedTensor& x, int root) {
                const Busy busy(c.backend());
                c.broadcast(of(c, x), root);
            },
            "x"_a, "root"_a = 0, "Copy the tensor of rank `root` to every rank.")
        .def("wait", busy(&Comm::wait), "Let the backend's later work wait for the collectives begun so far.")
        .def(
            "sum",
            [](Comm& c, std::vector<double> x) {
                const Busy busy(c.backend());
                c.sum(x);
                return x;
            },
            "x"_a, "Return the sums over all ranks, element by element. Waits for every rank.")
        .def("barrier", busy(&Comm::barrier), "Wait until every rank has called it.");

    py::class_<GradientSink, std::shared_ptr<GradientSink>>(
        m, "GradientSink", "A taker of gradients as backward() completes them: csrc/comm/gradient_sink.h.");
    py::class_<AllReduce, GradientSink, std::shared_ptr<AllReduce>>(
        m, "AllReduce",
        "A sink that gives every rank of a Comm the sums over the ranks of all gradients and of the loss.")
        .def(py::init<std::shared_ptr<Comm>>(), py::arg("comm").none(false));

    m.def("thread_comms", &make_thread_comms, "backends"_a,
          "Make one Comm for each CPU backend, to be used by a thread of its own.");
    m.def(
        "nccl_id", [] { return py::bytes(make_nccl_id()); },
        "Make the id that rank 0 sends to the other ranks, which all pass it to nccl_comm().");
    m.def("nccl_comm", &make_nccl, "backend"_a, "rank"_a, "size"_a, "id"_a,
          py::call_guard<py::gil_scoped_release>(),
          "Make a Comm over NCCL. Waits until every rank has called it.");
}

}  // namespace llmc
