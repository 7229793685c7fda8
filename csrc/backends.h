// Which backends there are.
#pragma once

#include <memory>
#include <string>

#include "core/backend.h"

namespace llmc {

// device: "cpu", "cuda" (the same as "cuda:0"), "cuda:1", ...   threads, of the CPU: 0 or less for as many as the
// process may use. Throws ArgumentError if the name is unknown, and Error with the reason if the device is not there.
std::shared_ptr<Backend> make_backend(const std::string& device, int threads = 0);

}  // namespace llmc
