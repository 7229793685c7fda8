// What the files of this folder share: a Tensor that Python owns, and conversions.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <memory>
#include <string>
#include <utility>

#include "core/backend.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace llmc {

// A tensor, the backend whose memory it lies in, and whatever keeps that memory alive.
struct OwnedTensor {
    std::shared_ptr<Backend> backend;
    Tensor tensor;
    std::shared_ptr<void> owner;
};

// Held while a backend works: without the GIL, and by one thread at a time. A process that was made by fork has its parent's backends:
// not one in which another thread was working then, as that thread is not there to end what it began, nor one on a GPU.
class Busy {
  public:
    explicit Busy(Backend& backend) : backend_(backend) {
        const int process = process_id();
        if (process != backend.maker && backend.runs_ahead()) throw Error(kForkedFromGpu);
        for (int worker = 0; !backend.worker.compare_exchange_strong(worker, process); worker = 0) {
            if (worker != process)
                throw Error(
                    "this process was forked while another thread computed with this backend, which is "
                    "unusable here: make another one, or start processes by 'spawn'");
            backend.worker.wait(worker);
        }
    }
    ~Busy() {
        backend_.worker = 0;
        backend_.worker.notify_one();
    }
    Busy(const Busy&) = delete;
    Busy& operator=(const Busy&) = delete;

  private:
    py::gil_scoped_release release_;  // before waiting
    Backend& backend_;
};

// The same object, which other threads of Python need not wait for when it is destroyed. It may wait for the device, to free
// memory or for what is under way, and if a rank is lost, only those threads can end that.
template <class T>
std::shared_ptr<T> let_others_run(std::shared_ptr<T> object) {
    T* const raw = object.get();
    return std::shared_ptr<T>(raw, [object = std::move(object)](T*) mutable {
        if (PyGILState_Check()) {
            const py::gil_scoped_release release;
            object.reset();
        }
        object.reset();
    });
}

// A method that is bound so that its object's backend is Busy while it runs.
template <class C, class R, class... Args>
auto busy(R (C::*method)(Args...)) {
    return [method](C& self, Args... args) {
        const Busy busy(self.backend());
        return (self.*method)(args...);
    };
}
template <class C, class R, class... Args>
auto busy(R (C::*method)(Args...) const) {
    return [method](const C& self, Args... args) {
        const Busy busy(self.backend());
        return (self.*method)(args...);
    };
}

DType dtype_from_name(const std::string& name);  // "f32", "bf16", "i32", "i16"

// A NumPy array over the tensor's memory, which `base` keeps alive; bf16 as uint16. The memory must be the
// host's.
py::array host_view(const Tensor& t, py::handle base);

void bind_tensor(py::module_& m);
void bind_ops(py::module_& m);
void bind_profile(py::module_& m);
void bind_model(py::module_& m);
void bind_cache(py::module_& m);
void bind_gpt2(py::module_& m);
void bind_optim(py::module_& m);
void bind_data(py::module_& m);
void bind_comm(py::module_& m);

}  // namespace llmc
