// The two generators of llm.c. Mt19937 and normal_ follow PyTorch's CPU generator, so that a seed gives the
// same parameters as torch.nn.init (to about 4e-8: PyTorch's vectorised logarithm and cosine differ in the
// last bit).
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace llmc {

class Mt19937 {
  public:
    explicit Mt19937(std::uint32_t seed = 5489);

    std::uint32_t randint32();
    std::uint64_t randint64();
    float randfloat32();   // in [0, 1), 24 bits
    double randfloat64();  // in [0, 1), 53 bits

    // n >= 16: all uniforms first, then Box-Muller over blocks of 16, the last block drawn anew if n is not
    // a multiple of 16. n < 16: pairs, from doubles.
    void normal_(float* data, std::int64_t n, float mean, float std);

    // The state, which checkpoints keep.
    static constexpr int kSize = 624;
    std::array<std::uint32_t, kSize> state;
    int left = 1;
    std::uint32_t next = 0;

  private:
    void refill();
};

// Fisher-Yates from the end, with the draw order (and the modulo bias) of llm.c.
void random_permutation(std::vector<std::int32_t>& data, Mt19937& rng);

// xorshift*, which draws the coins for sampling.
struct XorShift {
    std::uint64_t state;
    std::uint32_t randint32();
    float randfloat32();  // in [0, 1)
};

}  // namespace llmc
