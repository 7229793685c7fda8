// Fine-tunes GPT-2 on a few batches and samples from it: llm.c's train_gpt2.c, with its data order, its
// settings and its lines. Everything is in csrc/core and csrc/model; this is the loop.
#include <chrono>
#include <cstdio>
#include <optional>

#include "apps/apps.h"
#include "core/dataloader.h"
#include "core/sampler.h"
#include "core/tokenizer.h"
#include "model/kv_cache.h"
#include "optim/adamw.h"

using namespace llmc;

namespace {

constexpr const char* kUsage =
    "usage: train_gpt2 [flag value]...\n"
    "  -e FILE   model (gpt2_124M.bin)\n"
    "  -i FILE   training tokens (tiny_shakespeare_train.bin under dev/data, else TinyStories_train.bin)\n"
    "  -j FILE   validation tokens\n"
    "  -tk FILE  tokenizer (gpt2_tokenizer.bin)\n"
    "  -o FILE   where to write the model at the end\n"
    "  -b N      rows of a batch (4)\n"
    "  -t N      tokens of a row (64)\n"
    "  -x N      steps (40)\n"
    "  -l X      learning rate (1e-4)\n"
    "  -v N      validate every N steps (10); 0: never\n"
    "  -m N      validation batches (5)\n"
    "  -s N      sample every N steps (20); 0: never\n"
    "  -g N      length of a sample (64)\n"
    "  -p TYPE   f32 or bf16 (f32)\n"
    "  -device D cpu, cuda or cuda:N (cpu)\n";

struct Batch {
    std::vector<std::int32_t> inputs, targets;
    Batch(DataLoader& loader)
        : inputs(static_cast<std::size_t>(loader.B() * loader.T())), targets(inputs.size()) {
        loader.next_batch(inputs.data(), targets.data());
    }
};

float validate(GPT2& model, DataLoader& loader, std::int64_t batches) {
    loader.reset();
    float sum = 0.0f;
    for (std::int64_t i = 0; i < batches; ++i) {
        const Batch batch(loader);
        sum += model.evaluate(batch.inputs.data(), batch.targets.data(), loader.B(), loader.T());
    }
    return sum / static_cast<float>(batches);
}

// A token's text without a lone control character, which could upset the terminal.
std::string printable(const std::string& bytes) {
    const unsigned char c = bytes.size() == 1 ? static_cast<unsigned char>(bytes[0]) : ' ';
    return (c >= 0x20 || c == '\n' || c == '\t') && c != 0x7f ? bytes : "";
}

// length - 1 tokens after end-of-text.
void write_text(GPT2& model, const std::optional<Tokenizer>& tokenizer, std::int64_t length, XorShift& rng) {
    const std::int64_t V = model.config().vocab_size;
    std::int32_t token =
        tokenizer ? tokenizer->eot_token() : static_cast<std::int32_t>(std::min<std::int64_t>(V - 1, 50256));
    KVCache cache(model, 1, length);
    std::printf("generating:\n---\n");
    for (std::int64_t t = 1; t < length; ++t) {
        const float coin = rng.randfloat32();
        cache.queue_tokens(&token, &coin, SamplerOptions{});
        cache.read_tokens(&token);
        token_of(token);  // or an Error
        if (tokenizer)    // whose vocabulary may be smaller than the model's
            std::printf("%s", token < tokenizer->vocab_size() ? printable(tokenizer->decode(token)).c_str()
                                                              : "\xef\xbf\xbd");
        else
            std::printf("%d ", token);
        std::fflush(stdout);
    }
    std::printf("\n---\n");
}

int run(const Arguments& args) {
    const std::int64_t B = args.integer("-b"), T = args.integer("-t"), steps = args.integer("-x");
    const std::int64_t val_every = args.integer("-v"), val_batches = args.integer("-m");
    const std::int64_t sample_every = args.integer("-s"), sample_length = args.integer("-g");
    LLMC_CHECK(B > 0 && T > 0 && val_batches > 0,
               "-b is {}, -t is {} and -m is {}, expected positive numbers", B, T, val_batches);
    ModelOptions model_options;
    model_options.dtype = model_options.grad_dtype = dtype_of(args.text("-p"));
    const auto model = load_model(args.path("-e"), args.text("-device"), model_options);
    const GPT2Config& config = model->config();
    LLMC_CHECK(sample_length <= config.max_seq_len, "-g is {}, the model's context {}", sample_length,
               config.max_seq_len);

    const bool shakespeare = std::filesystem::exists("dev/data/tinyshakespeare/tiny_shakespeare_train.bin");
    const auto data = [&](const char* flag, const char* split) {
        if (!args.text(flag).empty()) return args.path(flag);
        return path_of(std::string(shakespeare ? "dev/data/tinyshakespeare/tiny_shakespeare_"
                                               : "dev/data/tinystories/TinyStories_") +
                       split + ".bin");
    };
    DataLoader train({data("-i", "train")}, B, T, 0, 1, true, 42, config.vocab_size);
    DataLoader val({data("-j", "val")}, B, T, 0, 1, false, 42, config.vocab_size);
    std::printf("train dataset num_batches: %lld\n", static_cast<long long>(train.num_tokens() / (B * T)));
    std::printf("val dataset num_batches: %lld\n", static_cast<long long>(val.num_tokens() / (B * T)));
    std::optional<Tokenizer> tokenizer;
    if (std::filesystem::exists(args.path("-tk")))
        tokenizer.emplace(args.path("-tk"));
    else
        std::printf("there is no tokenizer '%s': samples are token ids\n", args.text("-tk").c_str());
    const MemoryPlan plan = GPT2::memory_plan(config, model_options, B, T, true, 0);
    std::printf("num_activations: %lld\n",
                static_cast<long long>(plan.activations / size_of(model->dtype())));

    AdamWOptions options;
    options.beta2 = 0.999f;
    options.grad_clip = 0.0f;
    AdamW optimizer(model->backend(), model->parameters(), options);
    XorShift rng{1337};
    for (std::int64_t step = 0; step <= steps; ++step) {
        if (val_every > 0 && step % val_every == 0)
            std::printf("val loss %f\n", validate(*model, val, val_batches));
        if (sample_every > 0 && step > 0 && step % sample_every == 0)
            write_text(*model, tokenizer, sample_length, rng);

        const auto start = std::chrono::steady_clock::now();
        const Batch batch(train);
        model->zero_grad();
        model->forward(batch.inputs.data(), B, T);
        model->backward(batch.targets.data());
        optimizer.step(static_cast<float>(args.number<double>("-l")));
        const float loss = model->loss();
        model->backend()->synchronize();
        const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
        std::printf("step %lld: train loss %f (took %f ms)\n", static_cast<long long>(step), loss,
                    took.count());
        std::fflush(stdout);
    }
    if (!args.text("-o").empty()) {
        save_checkpoint(*model, args.path("-o"));
        std::printf("wrote %s\n", args.text("-o").c_str());
    }
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    const CommandLine command(argc, argv);
    try {
        return run(Arguments(command.arguments, {{"-e", "gpt2_124M.bin"},
                                                 {"-i", ""},
                                                 {"-j", ""},
                                                 {"-tk", "gpt2_tokenizer.bin"},
                                                 {"-o", ""},
                                                 {"-b", "4"},
                                                 {"-t", "64"},
                                                 {"-x", "40"},
                                                 {"-l", "1e-4"},
                                                 {"-v", "10"},
                                                 {"-m", "5"},
                                                 {"-s", "20"},
                                                 {"-g", "64"},
                                                 {"-p", "f32"},
                                                 {"-device", "cpu"}}));
    } catch (const ArgumentError& e) {
        std::fprintf(stderr, "train_gpt2: %s\n%s", e.what(), kUsage);
        return 2;
    } catch (const std::exception& e) {
        std::fprintf(stderr, "train_gpt2: %s\n", e.what());
        return 1;
    }
}
