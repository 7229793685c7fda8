#include "core/profile.h"

#include <string>
#include <tuple>
#include <vector>

#include "bindings/bindings.h"

namespace llmc {

void bind_profile(py::module_& m) {
    py::class_<Profile, std::shared_ptr<Profile>>(
        m, "Profile",
        "The time of each op that a thread calls, on the device's clock.\n\n"
        "From start() to stop(), both called by one thread, its time is cut into intervals: one for each op, "
        "which lasts until the next begins, and one for each mark().")
        .def(py::init([](std::shared_ptr<Backend> backend) {
                 return let_others_run(std::make_shared<Profile>(std::move(backend)));
             }),
             "backend"_a)
        .def("start", busy(&Profile::start), "name"_a,
             "Forget the intervals so far and begin one of that name, which is no op's.")
        .def("mark", busy(&Profile::mark), "name"_a,
             "End the last interval and begin one of that name, which is no op's.")
        .def("stop", busy(&Profile::stop), "End the last interval.")
        .def(
            "intervals",
            [](Profile& self) {
                const Busy busy(self.backend());
                std::vector<std::tuple<std::string, std::vector<std::int64_t>, double>> intervals;
                for (const Profile::Interval& i : self.intervals())
                    intervals.emplace_back(i.name, i.extents, i.seconds);
                return intervals;
            },
            "Return (name, extents of the op in the order of csrc/core/dims.h, seconds) of each. Waits.");
}

}  // namespace llmc
