// Reading llm.c's binary files: 256 little-endian int32 of header, then a payload whose size the header
// fixes. 64-bit offsets throughout; every size is checked against the file before anything of that size is
// allocated.
#pragma once

#include <array>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

namespace llmc {

using Header = std::array<std::int32_t, 256>;
inline constexpr std::int64_t kHeaderBytes = 1024;

// A path as text for messages, whatever the file system's encoding.
std::string shown(const std::filesystem::path& path);

std::ifstream open_for_reading(const std::filesystem::path& path, const char* what);
Header read_header(std::ifstream& file, const std::filesystem::path& path, const char* what);
void read_at(std::ifstream& file, const std::filesystem::path& path, std::int64_t offset, char* data,
             std::int64_t bytes);
// Throws if the file is not exactly `expected` bytes long. `because` says, for the message, what those bytes are.
void check_size(const std::filesystem::path& path, std::int64_t expected, const std::string& because);

}  // namespace llmc
