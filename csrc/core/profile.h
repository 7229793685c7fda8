// Where a step's time goes. The check of operands with which every op begins (dims.h) tells the profile of its thread
// that the op has begun, and what runs until the next op begins counts as this one's. Without a profile that costs a
// look at one variable.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

namespace llmc {

class Backend;
class Stopwatch;

class Profile : public std::enable_shared_from_this<Profile> {
  public:
    struct Interval {
        std::string name;
        std::vector<std::int64_t> extents;  // of the op, in the order of its Dims in dims.h
        double seconds = 0.0;               // by the backend's stopwatch
    };

    explicit Profile(std::shared_ptr<Backend> backend);
    ~Profile();

    // From start() to stop(), both in one thread, intervals follow each other without a gap. The first is called
    // `name`; start() forgets those of before.
    void start(const std::string& name);
    void stop();
    // Ends the last interval and begins one that is no op's.
    void mark(const std::string& name) { begin(name, {}); }
    void begin(const std::string& name, std::initializer_list<std::int64_t> extents);
    std::vector<Interval> intervals();  // after stop(); waits

    Backend& backend() const { return *backend_; }

  private:
    friend void op_begins(const char* op, std::initializer_list<std::int64_t> extents);
    // The one that runs in this thread. Without a constructor to run, each op reads it in a nanosecond.
    static constinit inline thread_local Profile* current_ = nullptr;

    std::shared_ptr<Backend> backend_;
    std::shared_ptr<Profile> self_;  // while it runs
    std::vector<Interval> intervals_;
    std::vector<std::unique_ptr<Stopwatch>> watches_;  // of the intervals, and more of earlier ones
};

// For the functions of dims.h. `op` is the name of the op that was called.
inline void op_begins(const char* op, std::initializer_list<std::int64_t> extents) {
    if (Profile::current_) [[unlikely]]
        Profile::current_->begin(op, extents);
}

}  // namespace llmc
