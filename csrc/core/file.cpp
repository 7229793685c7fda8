#include "core/file.h"

#include <bit>
#include <system_error>

#include "core/check.h"

namespace llmc {

static_assert(std::endian::native == std::endian::little,
              "the file formats are little-endian, and read without conversion");

std::string shown(const std::filesystem::path& path) {
    const std::u8string text = path.u8string();
    return std::string(text.begin(), text.end());
}

std::ifstream open_for_reading(const std::filesystem::path& path, const char* what) {
    std::error_code error;
    const auto status = std::filesystem::status(path, error);
    if (!std::filesystem::exists(status)) throw Error(filled("{}: no such {}", shown(path), what));
    if (std::filesystem::is_directory(status))
        throw Error(filled("{}: is a directory, expected a {}", shown(path), what));
    std::ifstream file(path, std::ios::binary);
    if (!file) throw Error(filled("{}: cannot open this {} for reading", shown(path), what));
    return file;
}

Header read_header(std::ifstream& file, const std::filesystem::path& path, const char* what) {
    Header header{};
    file.seekg(0);
    file.read(reinterpret_cast<char*>(header.data()), kHeaderBytes);
    if (file.gcount() != kHeaderBytes)
        throw Error(filled("{}: too short for a {}: {} bytes, its header alone has {}", shown(path), what,
                           file.gcount(), kHeaderBytes));
    return header;
}

void read_at(std::ifstream& file, const std::filesystem::path& path, std::int64_t offset, char* data,
             std::int64_t bytes) {
    file.clear();
    file.seekg(static_cast<std::streamoff>(offset));
    file.read(data, static_cast<std::streamsize>(bytes));
    if (!file || file.gcount() != bytes)
        throw Error(filled("{}: cannot read {} bytes at {}: has the file changed or its disk gone?",
                           shown(path), bytes, offset));
}

void check_size(const std::filesystem::path& path, std::int64_t expected, const std::string& because) {
    std::error_code error;
    const auto size = std::filesystem::file_size(path, error);
    if (error) throw Error(filled("{}: cannot tell its size: {}", shown(path), error.message()));
    if (static_cast<std::int64_t>(size) != expected)
        throw Error(
            filled("{}: {} by {} bytes: the header announces {}, that is {} bytes, but the file has {}",
                   shown(path), static_cast<std::int64_t>(size) < expected ? "truncated" : "too long",
                   static_cast<std::int64_t>(size) < expected ? expected - static_cast<std::int64_t>(size)
                                                              : static_cast<std::int64_t>(size) - expected,
                   because, expected, size));
}

}  // namespace llmc
