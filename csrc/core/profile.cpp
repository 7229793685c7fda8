#include "core/profile.h"

#include <utility>

#include "core/backend.h"

namespace llmc {

Profile::Profile(std::shared_ptr<Backend> backend) : backend_(std::move(backend)) {}

Profile::~Profile() = default;

void Profile::start(const std::string& name) {
    LLMC_CHECK(!current_, "a profile runs in this thread already");
    LLMC_CHECK(!self_, "this profile runs in another thread");
    intervals_.clear();
    self_ = shared_from_this();
    current_ = this;
    mark(name);
}

void Profile::stop() {
    LLMC_CHECK(current_ == this, "this profile does not run in this thread");
    current_ = nullptr;
    const std::shared_ptr<Profile> self = std::move(self_);
    watches_[intervals_.size() - 1]->stop();
}

void Profile::begin(const std::string& name, std::initializer_list<std::int64_t> extents) {
    LLMC_CHECK(current_ == this, "this profile does not run in this thread");
    const std::size_t n = intervals_.size();
    if (watches_.size() == n) watches_.push_back(backend_->make_stopwatch());
    if (n > 0) watches_[n - 1]->stop();
    watches_[n]->start();
    intervals_.push_back({name, extents});
}

std::vector<Profile::Interval> Profile::intervals() {
    LLMC_CHECK(!self_, "this profile still runs");
    for (std::size_t i = 0; i < intervals_.size(); ++i) intervals_[i].seconds = watches_[i]->seconds();
    return intervals_;
}

}  // namespace llmc
