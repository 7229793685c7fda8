#include "comm/comm.h"

#include <optional>

#include "bindings/bindings.h"
#include "comm/host_comm.h"
#include "comm/reduction.h"
#include "cuda/make_cuda.h"

namespace llmc {

namespace {

using Owners = std::optional<std::vector<int>>;

// The tensors, which must be of the memory that the Comm reaches.
std::vector<Tensor> of(const Comm& comm, const std::vector<OwnedTensor>& xs) {
    std::vector<Tensor> tensors;
    for (const OwnedTensor& x : xs) {
        LLMC_CHECK(x.backend.get() == &comm.backend(), "{} belongs to another backend than the Comm",
                   x.tensor);
        tensors.push_back(x.tensor);
    }
    return tensors;
}

// Begins a collective. Its tensors must live until it is finished, and Python may forget them before that: the Comm's
// object keeps them until wait().
template <class Collective>
Comm::Ticket issue(const py::object& self, const std::vector<OwnedTensor>& xs, Collective&& collective) {
    Comm& comm = self.cast<Comm&>();
    Comm::Ticket ticket;
    {
        const Busy busy(comm.backend());
        ticket = collective(comm, of(comm, xs));
    }
    if (!py::hasattr(self, "_kept")) self.attr("_kept") = py::dict();
    self.attr("_kept")[py::int_(ticket)] = py::cast(xs);
    return ticket;
}
void await_ticket(const py::object& self, std::optional<Comm::Ticket> ticket) {
    Comm& comm = self.cast<Comm&>();
    {
        const Busy busy(comm.backend());
        ticket ? comm.wait(*ticket) : comm.wait();
    }
    if (!py::hasattr(self, "_kept")) return;
    py::dict still;
    for (const auto& [number, xs] : self.attr("_kept").cast<py::dict>())
        if (ticket && number.cast<Comm::Ticket>() > *ticket) still[number] = xs;
    self.attr("_kept") = still;
}

// A method of Comm that takes a list of tensors which are divided among ranks.
auto collective(Comm::Ticket (Comm::*method)(const std::vector<Divided>&)) {
    return [method](const py::object& self, const std::vector<OwnedTensor>& xs, const Owners& owners) {
        LLMC_CHECK(!owners || owners->size() == xs.size(), "{} owners of {} tensors", owners->size(),
                   xs.size());
        return issue(self, xs, [&](Comm& c, const std::vector<Tensor>& tensors) {
            std::vector<Divided> divided(tensors.begin(), tensors.end());
            for (std::size_t i = 0; owners && i < divided.size(); ++i) divided[i].owner = (*owners)[i];
            return (c.*method)(divided);
        });
    };
}

const char* name_of(Exchange::Kind kind) {
    switch (kind) {
    case Exchange::Kind::barrier: return "barrier";
    case Exchange::Kind::all_to_all: return "all_to_all";
    case Exchange::Kind::all_gather: return "all_gather";
    case Exchange::Kind::broadcast: return "broadcast";
    }
    return "";
}

// Of memory that the Exchanges own.
template <Staging Exchange::* member>
py::memoryview view(const Exchange& e) {
    return py::memoryview::from_memory((e.*member).data(), (e.*member).size());
}

// The transport is a thread of Python: a wait that kept the GIL, as that of a destructor does, would never end.
class HostCommOfPython final : public HostComm {
  public:
    using HostComm::HostComm;
    void wait(Ticket ticket) override {
        std::optional<py::gil_scoped_release> release;
        if (PyGILState_Check()) release.emplace();
        HostComm::wait(ticket);
    }
};

void bind_host_comm(py::module_& m) {
    py::class_<Exchange>(m, "Exchange",
                         "What a transport moves for a HostComm: csrc/comm/host_comm.h.\n\n"
                         "Parts lie in a buffer in the order of ranks, without gaps; counts are their bytes. "
                         "The buffers are valid until done().")
        .def_property_readonly(
            "kind", [](const Exchange& e) { return name_of(e.kind); },
            "'all_to_all': part r of send to rank r, into part r of receive what rank r sends. 'all_gather': "
            "this rank's "
            "part of receive to all ranks. 'broadcast': all of receive, from rank root. 'barrier': nothing.")
        .def_readonly("what", &Exchange::what, "The collective, in words.")
        .def_property_readonly("send", &view<&Exchange::send>, "What is sent.")
        .def_property_readonly("receive", &view<&Exchange::receive>, "Where what arrives goes.")
        .def_readonly("send_counts", &Exchange::send_counts, "By rank, the bytes of its part of send.")
        .def_readonly("receive_counts", &Exchange::receive_counts,
                      "By rank, the bytes of its part of receive.")
        .def_readonly("root", &Exchange::root, "The rank that broadcasts.")
        .def_readonly("has_heads", &Exchange::has_heads,
                      "Whether to gather every rank's head into heads, and check() them, first.")
        .def_property_readonly("head", &view<&Exchange::head>, "What this rank is in.")
        .def_property_readonly("heads", &view<&Exchange::heads>, "What every rank is in, by rank.");
    py::class_<Exchanges, std::shared_ptr<Exchanges>>(
        m, "Exchanges", "What a HostComm has to exchange with other ranks, for the thread that moves bytes.")
        .def("next_exchange", &Exchanges::next, py::return_value_policy::reference_internal,
             py::call_guard<py::gil_scoped_release>(),
             "Wait for an exchange and return it; None if there will be no more.")
        .def("check", &Exchanges::check, "Raise Error if the heads, which have arrived, disagree.")
        .def("done", &Exchanges::done, py::call_guard<py::gil_scoped_release>(),
             "Tell that the exchange is complete.")
        .def("fail", &Exchanges::fail, "message"_a,
             "End: what waits, and every later call of the Comm, raises Error.")
        .def_property_readonly("ended", &Exchanges::ended, "Whether no exchange is wanted any more.")
        .def_property_readonly("idle", &Exchanges::idle, "Whether all that was asked for is done.")
        .def_property_readonly("awaited", &Exchanges::awaited,
                               "Whether a thread waits for what is exchanged.")
        .def_property_readonly("bytes_sent", &Exchanges::bytes_sent,
                               "The bytes that this rank had for the other ranks so far.");
    py::class_<HostCommOfPython, Comm, std::shared_ptr<HostCommOfPython>>(
        m, "HostComm",
        "A Comm of a CPU backend whose bytes are moved by a thread that serves `exchanges`. Until then its "
        "collectives wait.")
        .def(py::init<std::shared_ptr<Backend>, int, int>(), py::arg("backend").none(false), "rank"_a,
             "size"_a)
        .def_property_readonly("exchanges", &HostCommOfPython::exchanges, "What the transport serves.");
}

}  // namespace

void bind_comm(py::module_& m) {
    m.def(
        "piece_of",
        [](std::int64_t numel, int rank, int size) {
            LLMC_CHECK(numel >= 0 && size > 0 && rank >= 0 && rank < size, "piece {} of {} of {} elements",
                       rank, size, numel);
            const Range r = piece_of(numel, rank, size);
            return std::pair(r.begin, r.end);
        },
        "numel"_a, "rank"_a, "size"_a,
        "Return [begin, end) of the elements that a rank owns of a tensor of which each of `size` ranks owns "
        "a piece.");
    py::class_<Partition, std::shared_ptr<Partition>>(
        m, "Partition", "How a model's parameters are divided among ranks: csrc/comm/partition.h.");
    py::class_<Comm, std::shared_ptr<Comm>>(m, "Comm", py::dynamic_attr(),
                                            "The ranks that train one model together: csrc/comm/comm.h.\n\n"
                                            "All ranks issue the same collectives, with tensors of the same "
                                            "shapes and dtypes. Each returns a ticket; "
                                            "the tensors must not be touched before wait().")
        .def_property_readonly("rank", &Comm::rank, "This rank, from 0 on.")
        .def_property_readonly("size", &Comm::size, "The number of ranks.")
        .def("__repr__", [](const Comm& c) { return filled("Comm(rank {} of {})", c.rank(), c.size()); })
        .def(
            "all_reduce",
            [](const py::object& self, const std::vector<OwnedTensor>& xs) {
                return issue(self, xs, [](Comm& c, const std::vector<Tensor>& tensors) {
                    return c.all_reduce(tensors);
                });
            },
            "xs"_a, "Replace each tensor by its sum over the ranks.")
        .def("reduce_scatter", collective(&Comm::reduce_scatter), "xs"_a, "owners"_a = py::none(),
             "Replace this rank's piece of each tensor by its sum over the ranks; the rest is then "
             "undefined.\n\n"
             "owners: of each tensor the rank that owns all of it, or -1 if each has its piece_of() it, as "
             "without owners.")
        .def("all_gather", collective(&Comm::all_gather), "xs"_a, "owners"_a = py::none(),
             "Fill each tensor with the pieces of it that the ranks own. owners: as in reduce_scatter().")
        .def(
            "broadcast",
            [](const py::object& self, const std::vector<OwnedTensor>& xs, int root) {
                return issue(self, xs, [root](Comm& c, const std::vector<Tensor>& tensors) {
                    return c.broadcast(tensors, root);
                });
            },
            "xs"_a, "root"_a = 0, "Copy each tensor of rank `root` to every rank.")
        .def("wait", &await_ticket, "ticket"_a = py::none(),
             "Let the backend's later work wait for a collective and those before it; by default for all so "
             "far.")
        .def(
            "sum",
            [](Comm& c, std::vector<double> x) {
                const Busy busy(c.backend());
                c.sum(x);
                return x;
            },
            "x"_a, "Return the sums over all ranks, element by element. Waits for every rank.")
        .def("give_up", busy(&Comm::give_up), "why"_a,
             "Let go of what is under way, because this rank cannot go on: every later call raises Error.")
        .def("barrier", busy(&Comm::barrier), "Wait until every rank has called it.")
        // Without the GIL: a driver may keep these waiting, and the other threads of Python must not wait with them.
        .def("check", &Comm::check, py::call_guard<py::gil_scoped_release>(),
             "Raise Error if a rank is known to be lost. Never waits; for any thread, whatever others do.")
        .def(
            "pending",
            [](Comm& c) {
                const Comm::Pending pending = c.pending();
                return std::pair(pending.seconds, pending.op);
            },
            py::call_guard<py::gil_scoped_release>(),
            "Return for how long a collective has been going on without the host, and which; 0.0 if there is "
            "none. Never "
            "waits; for any thread, whatever others do.");

    bind_host_comm(m);

    py::class_<GradientSink, std::shared_ptr<GradientSink>>(
        m, "GradientSink", "A taker of gradients as backward() completes them: csrc/comm/gradient_sink.h.");
    py::class_<Reduction, GradientSink, std::shared_ptr<Reduction>>(
        m, "Reduction",
        "A sink that sums gradients and the loss over the ranks of a Comm: csrc/comm/reduction.h.\n\n"
        "partition: the optimizer's; each rank gets the sums of what it updates (ZeRO-1). None: each gets "
        "all. notes: how many numbers travel beside the loss.")
        .def(py::init([](const std::shared_ptr<Comm>& comm,
                         std::optional<std::shared_ptr<Partition>> partition, std::int64_t notes) {
                 const Busy busy(comm->backend());
                 return let_others_run(
                     std::make_shared<Reduction>(comm, partition ? *partition : nullptr, notes));
             }),
             py::arg("comm").none(false), "partition"_a = py::none(), "notes"_a = 1)
        .def(
            "begin",
            [](Reduction& r, const std::vector<float>& notes) {
                const Busy busy(r.backend());
                r.begin(notes);
            },
            "notes"_a, "Call before an update's first forward(), with what this rank tells the others.")
        .def(
            "notes",
            [](const Reduction& r) {
                const Busy busy(r.backend());
                return r.notes();
            },
            "Return the sums over the ranks of what they told in the last update. Waits.")
        .def(
            "own_seconds",
            [](const Reduction& r) {
                const Busy busy(r.backend());
                return r.own_seconds();
            },
            "Return the time from begin() to the end of backward(), without waiting for other ranks. Waits.");

    m.def("thread_comms", &make_thread_comms, "backends"_a,
          "Make one Comm for each CPU backend, to be used by a thread of its own.");
    m.def(
        "nccl_id", [] { return py::bytes(make_nccl_id()); },
        "Make the id that rank 0 sends to the other ranks, which all pass it to nccl_comm().");
    m.def(
        "nccl_comm",
        [](std::shared_ptr<Backend> backend, int rank, int size, const py::bytes& id, double timeout) {
            const std::string bytes = id;
            const py::gil_scoped_release release;
            return let_others_run(make_nccl(std::move(backend), rank, size, bytes, timeout));
        },
        "backend"_a, "rank"_a, "size"_a, "id"_a, "timeout"_a = 600.0,
        "Make a Comm over NCCL. Waits until every rank has called it, `timeout` seconds at most, and sum() "
        "no longer "
        "than that for the others.");
}

}  // namespace llmc
