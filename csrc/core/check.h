// Errors. One macro for what a caller got wrong, one exception type for the rest; both carry the fact as
// text. LLMC_CHECK(T <= max, "T is {}, the model's max_seq_len is {}", T, max) throws ArgumentError (Python:
// ValueError).
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace llmc {

// Python sees llmc.Error.
class Error : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// Python sees ValueError.
class ArgumentError : public Error {
  public:
    using Error::Error;
};

namespace detail {
inline void fill_into(std::ostringstream& out, std::string_view fmt) { out << fmt; }

template <class First, class... Rest>
void fill_into(std::ostringstream& out, std::string_view fmt, const First& first, const Rest&... rest) {
    const auto hole = fmt.find("{}");
    if (hole == std::string_view::npos) {
        out << fmt;
        return;
    }
    out << fmt.substr(0, hole) << first;
    fill_into(out, fmt.substr(hole + 2), rest...);
}
}  // namespace detail

// Replaces each "{}" by the next argument, printed with operator<<. (<format> is not in every compiler we
// build with.)
template <class... Args>
std::string filled(std::string_view fmt, const Args&... args) {
    std::ostringstream out;
    detail::fill_into(out, fmt, args...);
    return out.str();
}

}  // namespace llmc

#define LLMC_CHECK(condition, ...)                                                                           \
    do {                                                                                                     \
        if (!(condition)) [[unlikely]]                                                                       \
            throw ::llmc::ArgumentError(::llmc::filled(__VA_ARGS__));                                        \
    } while (0)
