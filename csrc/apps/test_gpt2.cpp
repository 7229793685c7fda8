// Compares llmc with PyTorch on a debug state, as llm.c's test_gpt2: logits, loss, every gradient, ten steps
// of AdamW. Prints a line for each and `overall okay: 1`; else `overall okay: 0`, and exits with 1.
// src/llmc/test_gpt2.py is the same program and says where the tolerances come from; src/llmc/formats/debug_state.py
// describes the file.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>

#include "apps/apps.h"
#include "core/file.h"
#include "optim/adamw.h"

using namespace llmc;

namespace {

constexpr const char* kUsage =
    "usage: test_gpt2 [MODEL.bin [DEBUG_STATE.bin]] [-p f32|bf16] [-device cpu|cuda] [-r 0|1|2]\n";

constexpr float kGpt2Losses[] = {5.270009f, 4.060681f, 3.320085f, 2.717550f, 2.181066f,
                                 1.653923f, 1.168050f, 0.736873f, 0.401021f, 0.187493f};

struct Tolerances {
    float logits, loss, step, step_relative;
    float gradients[16];  // in file order
};
constexpr float kGradientRelative = 0.079f;
constexpr Tolerances kF32 = {1e-3f,
                             1e-5f,
                             1e-2f,
                             0.0f,
                             {1e-6f, 1e-6f, 1e-6f, 1e-6f, 1e-6f, 1e-6f, 1e-6f, 1e-6f, 1e-6f, 1e-6f, 1e-6f,
                              1e-6f, 1e-6f, 1e-6f, 1e-6f, 1e-6f}};
constexpr Tolerances kBf16 = {25.0f,
                              0.05f,
                              0.05f,
                              0.1f,
                              {5e-1f, 4e-3f, 1e-1f, 4e-2f, 5e-2f, 3.5e-2f, 2e-2f, 3e-2f, 5e-2f, 3e-2f, 3e-2f,
                               3e-2f, 2e-2f, 1e-2f, 1e-1f, 2e-2f}};

struct State {
    std::int64_t B, T;
    std::vector<std::int32_t> inputs, targets;
    std::vector<float> logits, gradients, losses;
    float loss;
};

State read_state(const std::filesystem::path& path, const GPT2& model) {
    std::ifstream file = open_for_reading(path, "debug state");
    const Header h = read_header(file, path, "debug state");
    if (h[0] != 20240327 || h[1] != 2)
        throw Error(filled("{}: magic {} version {}, expected a debug state (20240327 version 2)",
                           shown(path), h[0], h[1]));
    const GPT2Config& c = model.config();
    if (h[2] < 1 || h[3] < 1 || h[3] > c.max_seq_len || h[4] < 0 || h[4] > 1000)
        throw Error(filled("{}: announces {} rows of {} tokens and {} losses; the model's context is {}",
                           shown(path), h[2], h[3], h[4], c.max_seq_len));
    const std::int64_t B = h[2], T = h[3], N = B * T;
    check_size(path, kHeaderBytes + 4 * (2 * N + N * c.vocab_size + 1 + model.num_parameters() + h[4]),
               filled("B = {}, T = {} and {} losses for a model of {} parameters", B, T, h[4],
                      model.num_parameters()));
    State s{B, T, {}, {}, {}, {}, {}, 0.0f};
    std::int64_t at = kHeaderBytes;
    const auto read = [&](void* data, std::int64_t count) {
        read_at(file, path, at, static_cast<char*>(data), 4 * count);
        at += 4 * count;
    };
    const auto fill = [&](auto& values, std::int64_t count) {
        values.resize(static_cast<std::size_t>(count));
        read(values.data(), count);
    };
    fill(s.inputs, N);
    fill(s.targets, N);
    fill(s.logits, N * c.vocab_size);
    read(&s.loss, 1);
    fill(s.gradients, model.num_parameters());
    fill(s.losses, h[4]);
    return s;
}

bool check_logits(GPT2& model, const State& state, float tolerance) {
    std::vector<float> got(state.logits.size());
    model.logits(state.inputs.data(), state.B, state.T, got.data());
    if (model.dtype() == DType::bf16) {  // llm.c's 25 goes with GPT-2's logits, which reach -130
        float largest = 0.0f;
        for (const float x : state.logits) largest = std::max(largest, std::fabs(x));
        tolerance = std::min(tolerance, tolerance / 130.0f * largest);
    }
    const std::size_t V = static_cast<std::size_t>(model.config().vocab_size);
    bool ok = true;
    float maxdiff = 0.0f;
    for (std::size_t i = 0; i < got.size(); ++i) {
        if (i < 10) std::printf("%f, %f\n", state.logits[i], got[i]);
        const float difference = std::fabs(got[i] - state.logits[i]);
        maxdiff = std::max(maxdiff, difference);
        if (ok && !(difference < tolerance)) {  // true of a NaN as well
            std::printf("MISMATCH AT INDEX %zu,%zu: %f %f\n", i / V, i % V, state.logits[i], got[i]);
            ok = false;
        }
    }
    std::printf("%sOK (LOGITS), max_diff = %e\n", ok ? "" : "NOT ", maxdiff);
    return ok;
}

std::vector<float> to_host(Backend& backend, const Tensor& t) {
    std::vector<float> wide(static_cast<std::size_t>(t.numel()));
    if (t.dtype == DType::f32) {
        backend.to_host(wide.data(), t);
        return wide;
    }
    std::vector<bf16> narrow(wide.size());
    backend.to_host(narrow.data(), t);
    std::transform(narrow.begin(), narrow.end(), wide.begin(), [](bf16 x) { return to_float(x); });
    return wide;
}

bool check_tensor(const std::string& name, const std::vector<float>& got, const float* expected,
                  float tolerance) {
    std::printf("d%s\n", name.c_str());
    bool ok = true;
    float maxdiff = 0.0f;
    std::size_t worst = 0;
    for (std::size_t i = 0; i < got.size(); ++i) {
        const float difference = std::fabs(got[i] - expected[i]);
        const bool close = difference <= tolerance + kGradientRelative * std::fabs(expected[i]);
        ok = ok && close;
        if (!std::isnan(maxdiff) && !(difference <= maxdiff)) maxdiff = difference, worst = i;
        if (i < 5) std::printf("%s %f %f\n", close ? "OK" : "NOT OK", got[i], expected[i]);
    }
    std::printf("TENSOR %s, maxdiff = %e at %zu\n", ok ? "OK" : "NOT OK", maxdiff, worst);
    return ok;
}

bool check_gradients(GPT2& model, const State& state, const Tolerances& tolerances) {
    bool ok = true;
    const float* expected = state.gradients.data();
    std::size_t i = 0;
    for (const Parameter& p : model.parameters()) {
        ok &= check_tensor(p.name, to_host(*model.backend(), p.grad), expected, tolerances.gradients[i++]);
        expected += p.grad.numel();
    }
    return ok;
}

int run(const Arguments& args) {
    ModelOptions options;
    const DType dtype = options.dtype = options.grad_dtype = dtype_of(args.text("-p"));
    const std::int64_t recompute = args.integer("-r");
    LLMC_CHECK(recompute >= 0 && recompute <= 2, "-r is {}, expected 0, 1 or 2", recompute);
    options.recompute = static_cast<Recompute>(recompute);
    const auto model = load_model(args.name(0, dtype == DType::bf16 ? "gpt2_124M_bf16.bin" : "gpt2_124M.bin"),
                                  args.text("-device"), options);
    const State state = read_state(args.name(1, "gpt2_124M_debug_state.bin"), *model);
    std::printf("[State]\nbatch_size: %lld\nseq_len: %lld\n", static_cast<long long>(state.B),
                static_cast<long long>(state.T));

    const Tolerances& tolerances = dtype == DType::bf16 ? kBf16 : kF32;
    bool okay = check_logits(*model, state, tolerances.logits);
    std::vector<float> expected = state.losses;
    if (expected.empty() && std::fabs(state.loss - kGpt2Losses[0]) < 1e-3f && model->config().channels == 768)
        expected.assign(std::begin(kGpt2Losses), std::end(kGpt2Losses));
    AdamW optimizer(model->backend(), model->parameters(), AdamWOptions{});
    for (std::size_t step = 0; step < 10; ++step) {
        const auto start = std::chrono::steady_clock::now();
        model->zero_grad();
        model->forward(state.inputs.data(), state.B, state.T);
        model->backward(state.targets.data());
        const float loss = model->loss();
        const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
        if (step == 0) {
            const bool ok = std::fabs(loss - state.loss) < tolerances.loss;
            std::printf("LOSS %s: %f %f\n", ok ? "OK" : "MISMATCH", loss, state.loss);
            okay &= ok;
            okay &= check_gradients(*model, state, tolerances);
        }
        optimizer.step(1e-4f);
        if (step >= expected.size()) {
            std::printf("step %zu: loss %f (took %f ms)\n", step, loss, took.count());
            continue;
        }
        const float fallen = state.losses.empty() ? 0.0f : std::max(0.0f, expected[0] - expected[step]);
        const bool ok =
            std::fabs(loss - expected[step]) < tolerances.step + tolerances.step_relative * fallen;
        std::printf("step %zu: loss %f expected %f (took %f ms) OK = %d\n", step, loss, expected[step],
                    took.count(), ok);
        okay &= ok;
    }
    if (expected.empty())
        std::printf("the steps' losses were compared with nothing: the debug state holds none "
                    "(llmc.reference writes them)\n");
    std::printf("overall okay: %d\n", okay);
    return okay ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
    const CommandLine command(argc, argv);
    try {
        return run(Arguments(command.arguments, {{"-p", "f32"}, {"-device", "cpu"}, {"-r", "1"}}, 2));
    } catch (const ArgumentError& e) {
        std::fprintf(stderr, "test_gpt2: %s\n%s", e.what(), kUsage);
        return 2;
    } catch (const std::exception& e) {
        std::fprintf(stderr, "test_gpt2: %s\n", e.what());
        return 1;
    }
}
