// Memory pages from the operating system. They are zero-filled, and take up no memory until they are touched.
#pragma once

#include <cstddef>

namespace llmc {

void* allocate_pages(std::size_t bytes);  // 4096-byte aligned; throws Error
void release_pages(void* memory) noexcept;
std::size_t allocated_bytes(const void* memory);  // at least as many as were asked for

}  // namespace llmc
