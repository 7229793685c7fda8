// Backend::repeat on a GPU, real or emulated: what comes again is recorded and launched, what cannot be recorded is
// refused and said, and a mistake in between leaves the backend usable.
//
//   cmake -S . -B build/checks -DLLMC_BUILD_CHECKS=ON -DLLMC_PYTHON=OFF -DLLMC_CUDA_EMULATION=ON   # or -DUSE_CUDA=ON
//   cmake --build build/checks --target check_recordings && build/checks/check_recordings
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "backends.h"

using namespace llmc;

namespace {

int failures = 0;

void expect(bool good, const std::string& what) {
    if (good) return;
    ++failures;
    std::fprintf(stderr, "FAILED: %s\n", what.c_str());
}
void expect_equal(double value, double wanted, const char* what) {
    expect(value == wanted, filled("{} is {}, expected {}", what, value, wanted));
}

// A device, and tensors on it that are freed with it.
struct Device {
    std::shared_ptr<Backend> backend;
    Backend& ops;
    std::vector<void*> memory;

    explicit Device(const std::string& name) : backend(make_backend(name)), ops(*backend) {}
    ~Device() {
        for (void* p : memory) ops.release(p);
    }
    Tensor tensor(DType dtype, std::initializer_list<std::int64_t> shape, float value) {
        Tensor t(nullptr, dtype, shape);
        t.data = ops.allocate(static_cast<std::size_t>(t.bytes()));
        memory.push_back(t.data);
        std::vector<float> host(static_cast<std::size_t>(t.numel()), value);
        if (dtype == DType::f32) ops.from_host(t, host.data());
        return t;
    }
    float first(const Tensor& t) {
        std::vector<float> host(static_cast<std::size_t>(t.numel()));
        ops.to_host(host.data(), t);
        return host[0];
    }
    bool has_recorded(int n) {
        return ops.info().options.find(filled("({} recorded)", n)) != std::string::npos;
    }
    void expect_recorded(int n, const char* when) {
        expect(n ? has_recorded(n) : ops.info().options.find("recorded") == std::string::npos,
               filled("{} recordings {}: {}", n, when, ops.info().options));
    }
    void expect_fallbacks(const std::string& text) {
        expect(ops.info().fallbacks == text,
               filled("fallbacks '{}', expected '{}'", ops.info().fallbacks, text));
    }
};

constexpr Phase kPhase = Phase::generation;

void check_what_makes_a_recording_stale(const std::string& name) {
    Device d(name);
    const Tensor sum = d.tensor(DType::f32, {1000}, 0), one = d.tensor(DType::f32, {1000}, 1),
                 ten = d.tensor(DType::f32, {1000}, 10);
    std::unique_ptr<Recording> kept;
    int calls = 0;
    double wanted = 0;
    const auto add = [&](const Tensor& x, std::int64_t key) {
        d.ops.repeat(kept, kPhase, {key, 7}, [&] {
            ++calls;
            d.ops.residual_forward(sum, sum, x);
        });
        wanted += key;
        expect_equal(d.first(sum), wanted, "the sum");
    };
    for (int i = 0; i < 5; ++i) add(one, 1);
    expect_equal(calls, 2, "calls of ops: one queued, one recorded");
    d.expect_recorded(1, "after five times the same");
    add(ten, 10);  // another key: other ops
    add(ten, 10);
    add(ten, 10);
    expect_equal(calls, 4, "calls of ops after another key");
    d.expect_recorded(2, "after another key");
    d.ops.set_option("tf32", "on");
    for (int i = 0; i < 3; ++i) add(ten, 10);
    expect_equal(calls, 6, "calls of ops after an option");
    d.ops.release(d.ops.allocate(100));
    for (int i = 0; i < 3; ++i) add(ten, 10);
    expect_equal(calls, 8, "calls of ops after memory was released");
    d.ops.set_option("graphs", "off");
    for (int i = 0; i < 3; ++i) add(ten, 10);
    expect_equal(calls, 11, "calls of ops without graphs");
    d.ops.set_option("graphs", "auto");
    for (int i = 0; i < 3; ++i) add(ten, 10);
    for (int i = 0; i < 3; ++i) d.ops.repeat(kept, Phase::training, {10, 7}, [&] { ++calls; });
    expect_equal(calls, 16, "calls of ops of training");
    add(ten, 10);
    kept.reset();  // while it may still run
    expect_equal(d.first(sum), wanted, "the sum");
    d.expect_fallbacks("");
}

// Scratch memory that another op makes grow, between a recording and its launch.
void check_scratch(const std::string& name) {
    Device d(name);
    const Tensor x = d.tensor(DType::f32, {40000}, 1), large = d.tensor(DType::f32, {4000000}, 2),
                 sum = d.tensor(DType::f32, {1}, 0), other = d.tensor(DType::f32, {1}, 0);
    std::unique_ptr<Recording> kept;
    const auto step = [&] { d.ops.repeat(kept, kPhase, {}, [&] { d.ops.sum(sum, x, 1.0f); }); };
    for (int i = 0; i < 3; ++i) step();
    d.ops.sum(other, large, 1.0f);
    const Tensor taken = d.tensor(DType::f32, {100}, 5);  // perhaps where the scratch memory was
    for (int i = 0; i < 3; ++i) step();
    expect_equal(d.first(sum), 6 * 40000, "the sum over scratch memory");
    expect_equal(d.first(taken), 5, "another tensor");
    d.expect_recorded(2, "after scratch memory grew");
}

void check_refusals(const std::string& name) {
    const auto refuse = [&](const std::string& what, const auto& refused) {
        Device d(name);
        const Tensor sum = d.tensor(DType::f32, {8}, 0), one = d.tensor(DType::f32, {8}, 1);
        std::unique_ptr<Recording> kept;
        int calls = 0;
        for (int i = 0; i < 5; ++i)
            d.ops.repeat(kept, kPhase, {}, [&] {
                ++calls;
                d.ops.residual_forward(sum, sum, one);
                refused(d, sum);
            });
        expect_equal(d.first(sum), 5, ("the sum with " + what).c_str());
        expect_equal(calls, 6, ("calls of ops with " + what).c_str());
        d.expect_fallbacks("1 recordings of ops failed, the first: " + what);
        d.expect_recorded(0, ("with " + what).c_str());
        for (int i = 0; i < 3; ++i)
            d.ops.repeat(kept, kPhase, {1}, [&] { d.ops.residual_forward(sum, sum, one); });
        d.expect_recorded(1, "of other ops later");
        expect_equal(d.first(sum), 8, "the sum of other ops later");
    };
    float host[8] = {};
    refuse("cuda: an allocation cannot be recorded",
           [&](Device& d, const Tensor&) { d.tensor(DType::i32, {8}, 0); });
    refuse("cuda: a copy to the host cannot be recorded",
           [&](Device& d, const Tensor& t) { d.ops.to_host(host, t); });
    refuse("cuda: a copy from the host cannot be recorded", [&](Device& d, const Tensor& t) {
        const float values[8] = {};
        d.ops.from_host(t.slice(1, 2), values);
    });
    refuse("cuda: a wait cannot be recorded", [&](Device& d, const Tensor&) { d.ops.synchronize(); });
    refuse("cuda: a stopwatch cannot be recorded",
           [&](Device& d, const Tensor&) { d.ops.make_stopwatch()->start(); });
}

// Memory that is freed among recorded ops is freed after all.
void check_release(const std::string& name) {
    Device d(name);
    const Tensor sum = d.tensor(DType::f32, {8}, 0), one = d.tensor(DType::f32, {8}, 1);
    std::unique_ptr<Recording> kept;
    void* memory = d.ops.allocate(std::size_t{64} << 20);
    const std::int64_t free = d.ops.info().free_bytes;
    for (int i = 0; i < 3; ++i)
        d.ops.repeat(kept, kPhase, {}, [&] {
            d.ops.residual_forward(sum, sum, one);
            if (i == 1) d.ops.release(memory), memory = nullptr;
        });
    expect(d.ops.info().free_bytes > free, "memory that was released among recorded ops is free");
    expect_equal(d.first(sum), 3, "the sum");
    d.expect_fallbacks("1 recordings of ops failed, the first: memory is released among them");
}

void check_mistakes(const std::string& name) {
    Device d(name);
    const Tensor sum = d.tensor(DType::f32, {8}, 0), one = d.tensor(DType::f32, {8}, 1);
    std::unique_ptr<Recording> kept;
    const auto caught = [&](const auto& mistake) {
        try {
            d.ops.repeat(kept, kPhase, {}, [&] {
                d.ops.residual_forward(sum, sum, one);
                mistake();
            });
        } catch (const std::exception&) {
            return true;
        }
        return false;
    };
    const auto nothing = [] {};
    expect(!caught(nothing), "no mistake");
    expect(caught([] { throw std::runtime_error("of the caller's"); }), "an exception while recording");
    expect(caught([&] { d.ops.zero(Tensor()); }), "an argument's error while recording");
    expect_equal(d.first(sum), 1, "the sum after mistakes, of which nothing was queued");
    for (int i = 0; i < 3; ++i) expect(!caught(nothing), "no mistake");
    expect_equal(d.first(sum), 4, "the sum");
    d.expect_recorded(1, "after mistakes");
    d.expect_fallbacks("");
    // In the first round, ops are queued until the mistake, as without recordings.
    kept.reset();
    expect(caught([] { throw std::runtime_error("of the caller's"); }), "an exception the first time");
    for (int i = 0; i < 3; ++i) expect(!caught(nothing), "no mistake");
    expect_equal(d.first(sum), 8, "the sum");
}

void check_nesting(const std::string& name) {
    Device d(name);
    const Tensor sum = d.tensor(DType::f32, {8}, 0), one = d.tensor(DType::f32, {8}, 1);
    std::unique_ptr<Recording> inner, outer;
    for (int i = 0; i < 4; ++i)
        d.ops.repeat(outer, kPhase, {}, [&] {
            d.ops.residual_forward(sum, sum, one);
            d.ops.repeat(inner, kPhase, {}, [&] { d.ops.residual_forward(sum, sum, one); });
        });
    for (int i = 0; i < 2; ++i)
        d.ops.repeat(inner, kPhase, {}, [&] { d.ops.residual_forward(sum, sum, one); });
    expect_equal(d.first(sum), 10, "the sum of nested recordings");
    d.expect_recorded(2, "one within the other, and alone");
}

}  // namespace

int main(int argc, char** argv) try {
    const std::string name = argc > 1 ? argv[1] : "cuda";
    check_what_makes_a_recording_stale(name);
    check_scratch(name);
    check_refusals(name);
    check_release(name);
    check_mistakes(name);
    check_nesting(name);
    if (failures)
        std::printf("%d failures\n", failures);
    else
        std::printf("recordings: all as expected\n");
    return failures ? 1 : 0;
} catch (const std::exception& e) {
    std::fprintf(stderr, "check_recordings: %s\n", e.what());
    return 1;
}
