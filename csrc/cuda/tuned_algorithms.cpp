#include "cuda/tuned_algorithms.h"

#include <cstdio>
#include <fstream>
#include <optional>
#include <set>
#include <sstream>
#include <system_error>

#include "core/check.h"
#include "core/file.h"

namespace llmc {

namespace {

// cuBLASLt crashes at an algorithm that it has not made, so no line is taken on trust.
constexpr std::size_t kWordDigits = 16, kChecksumDigits = 8;

void warn(const std::string& text) { std::fprintf(stderr, "llmc: warning: %s\n", text.c_str()); }

std::string hexadecimal(std::uint64_t value, std::size_t digits) {
    std::string text(digits, '0');
    for (std::size_t i = digits; i-- > 0; value >>= 4) text[i] = "0123456789abcdef"[value & 15];
    return text;
}
std::optional<std::uint64_t> from_hexadecimal(const std::string& text) {
    std::uint64_t value = 0;
    for (const char c : text) {
        if (!(c >= '0' && c <= '9') && !(c >= 'a' && c <= 'f')) return std::nullopt;
        value = value << 4 | static_cast<std::uint64_t>(c <= '9' ? c - '0' : c - 'a' + 10);
    }
    return value;
}
std::string checksum(const std::string& text) {  // FNV-1a
    std::uint32_t hash = 2166136261u;
    for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 16777619u;
    return hexadecimal(hash, kChecksumDigits);
}

struct Entry {
    std::string device, matmul;
    TunedAlgorithm choice;
};

std::string line_of(const Entry& entry) {
    std::string line = entry.device + '\t' + entry.matmul + '\t';
    char milliseconds[32];
    std::snprintf(milliseconds, sizeof milliseconds, "%.4f\t", entry.choice.milliseconds);
    line += milliseconds;
    for (const std::uint64_t word : entry.choice.words) line += hexadecimal(word, kWordDigits);
    line += '\t';
    return line + checksum(line);
}

// Nothing if the line is not one that line_of made.
std::optional<Entry> read_line(const std::string& line) {
    if (line.size() < kChecksumDigits ||
        checksum(line.substr(0, line.size() - kChecksumDigits)) != line.substr(line.size() - kChecksumDigits))
        return std::nullopt;
    Entry entry;
    std::istringstream fields(line);
    std::string milliseconds, words;
    for (std::string* field : {&entry.device, &entry.matmul, &milliseconds, &words})
        if (!std::getline(fields, *field, '\t')) return std::nullopt;
    if (words.size() != kWordDigits * entry.choice.words.size()) return std::nullopt;
    for (std::size_t i = 0; i < entry.choice.words.size(); ++i) {
        const auto word = from_hexadecimal(words.substr(i * kWordDigits, kWordDigits));
        if (!word) return std::nullopt;
        entry.choice.words[i] = *word;
    }
    entry.choice.milliseconds = 0.0;
    std::istringstream(milliseconds) >> entry.choice.milliseconds;
    return entry;
}

// Calls take(entry) for each line that is whole. Returns the number of the first line that is not, else 0.
template <class Take>
std::int64_t read_file(const std::filesystem::path& path, Take take) {
    std::ifstream file(path, std::ios::binary);
    std::string line;
    std::int64_t damaged = 0;
    for (std::int64_t number = 1; std::getline(file, line); ++number) {
        std::optional<Entry> entry = read_line(line);
        if (entry) {
            entry->choice.line = number;
            take(*entry);
        } else if (damaged == 0) {
            damaged = number;
        }
    }
    return damaged;
}

}  // namespace

std::string matmul_in_words(const Matmul& p, bool tf32) {
    constexpr const char* kEpilogues[] = {"none", "bias", "gelu_bias", "gelu", "dgelu", "bgradb"};
    return filled("{}{} {} x {} x {}, ld {} {} {}, {}{} to {}{}, {}, aligned {} {} {} {} {}",
                  p.transpose_a ? "T" : "N", p.transpose_b ? "T" : "N", p.m, p.n, p.k, p.lda, p.ldb, p.ldd,
                  p.inputs, tf32 && p.inputs == DType::f32 ? " as tf32" : "", p.output,
                  p.accumulate ? " added" : "", kEpilogues[static_cast<int>(p.epilogue)], alignment_of(p.a),
                  alignment_of(p.b), alignment_of(p.d), alignment_of(p.aux), alignment_of(p.bias));
}

TunedAlgorithms::TunedAlgorithms(std::filesystem::path file, std::string device, bool tf32)
    : file_(std::move(file)), device_(std::move(device)), tf32_(tf32) {
    if (file_.empty()) return;
    const std::int64_t damaged = read_file(file_, [&](const Entry& entry) {
        if (entry.device == device_) choices_[entry.matmul] = entry.choice;
    });
    if (damaged == 0) return;
    warn(filled("{}, line {}: damaged, and passed over", shown(file_), damaged));
    has_warned_of_line_ = true;
}

const TunedAlgorithm* TunedAlgorithms::find(const Matmul& p) const {
    const auto found = choices_.find(matmul_in_words(p, tf32_));
    return found == choices_.end() ? nullptr : &found->second;
}

void TunedAlgorithms::add(const Matmul& p, const TunedAlgorithm& choice) {
    const std::string matmul = matmul_in_words(p, tf32_);
    choices_[matmul] = choice;
    if (file_.empty()) return;
    std::error_code error;
    std::filesystem::create_directories(file_.parent_path(), error);  // if it fails, so does opening the file
    std::ofstream file(file_, std::ios::binary | std::ios::app);
    file << line_of({device_, matmul, choice}) + '\n'
         << std::flush;  // smaller than the stream's buffer: one write
    if (file || has_warned_of_writing_) return;
    warn(filled("{}: cannot be written to, so another process will time algorithms again", shown(file_)));
    has_warned_of_writing_ = true;
}

void TunedAlgorithms::refuse(const TunedAlgorithm& choice) {
    if (choice.line == 0 || has_warned_of_line_) return;
    warn(filled("{}, line {}: cuBLASLt does not take this algorithm; it is chosen anew", shown(file_),
                choice.line));
    has_warned_of_line_ = true;
}

std::int64_t TunedAlgorithms::count(const std::filesystem::path& file) {
    std::set<std::string> choices;
    read_file(file, [&](const Entry& entry) { choices.insert(entry.device + '\t' + entry.matmul); });
    return static_cast<std::int64_t>(choices.size());
}

}  // namespace llmc
