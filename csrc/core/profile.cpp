#include "core/profile.h"

#include <utility>

#include "core/backend.h"

namespace llmc {

namespace {
thread_local std::shared_ptr<Profile> current;  // the one that runs in this thread
}  // namespace

void op_begins(const char* op, std::initializer_list<std::int64_t> extents) {
    if (current) [[unlikely]]
        current->begin(op, extents);
}

Profile::Profile(std::shared_ptr<Backend> backend) : backend_(std::move(backend)) {}

Profile::~Profile() = default;

void Profile::start(const std::string& name) {
    LLMC_CHECK(!current, "a profile runs in this thread already");
    intervals_.clear();
    current = shared_from_this();
    mark(name);
}

void Profile::stop() {
    LLMC_CHECK(current.get() == this, "this profile does not run in this thread");
    current.reset();
    watches_[intervals_.size() - 1]->stop();
}

void Profile::begin(const std::string& name, std::initializer_list<std::int64_t> extents) {
    LLMC_CHECK(current.get() == this, "this profile does not run in this thread");
    const std::size_t n = intervals_.size();
    if (watches_.size() == n) watches_.push_back(backend_->make_stopwatch());
    if (n > 0) watches_[n - 1]->stop();
    watches_[n]->start();
    intervals_.push_back({name, extents});
}

std::vector<Profile::Interval> Profile::intervals() {
    LLMC_CHECK(current.get() != this, "this profile still runs");
    for (std::size_t i = 0; i < intervals_.size(); ++i) intervals_[i].seconds = watches_[i]->seconds();
    return intervals_;
}

}  // namespace llmc
