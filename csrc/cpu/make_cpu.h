// What backends.cpp knows of this folder.
#pragma once

#include <memory>

namespace llmc {
class Backend;
std::shared_ptr<Backend> make_cpu(int threads);
}  // namespace llmc
