// Loops over elements and over rows of channels: everything but matmuls and attention.
#pragma once

namespace {

using llmc::AdamWKernelStep;
using llmc::MuonStep;

template <class T>
void add(T* out, const T* a, const T* b, i64 n) {
    each(n, [=](i64 i, auto m) { store(out + i, load(a + i, m) + load(b + i, m), m); });
}

template <class T>
void gelu_forward(T* out, const T* inp, i64 n) {
    each(n, [=](i64 i, auto m) { store(out + i, gelu<T>(load(inp + i, m)), m); });
}

template <class T>
void gelu_backward(T* dinp, const T* inp, const T* dout, i64 n) {
    each(n, [=](i64 i, auto m) { store(dinp + i, load(dout + i, m) * gelu_gradient(load(inp + i, m)), m); });
}

template <class T>
void accumulate(float* sum, const T* x, i64 n) {
    each(n, [=](i64 i, auto m) { store(sum + i, load(sum + i, m) + load(x + i, m), m); });
}

template <class T>
void add_into(T* x, const float* sum, i64 n) {
    each(n, [=](i64 i, auto m) { store(x + i, load(x + i, m) + load(sum + i, m), m); });
}

// Blocks of 4096 are summed in f32, and their totals in double: exact enough, and as fast as memory.
constexpr i64 kSumBlock = 4096;
template <class Term>
double sum_blocks(i64 n, Term term) {
    double total = 0.0;
    for (i64 begin = 0; begin < n; begin += kSumBlock) {
        const i64 count = n - begin < kSumBlock ? n - begin : kSumBlock;
        total += sum(reduce(count, [=](i64 i, auto m) { return term(begin + i, m); }));
    }
    return total;
}
double sum_f32(const float* x, i64 n) {
    return sum_blocks(n, [=](i64 i, auto m) { return load(x + i, m); });
}
template <class T>
double sum_squares(const T* x, i64 n) {
    return sum_blocks(n, [=](i64 i, auto m) {
        const Vec a = load(x + i, m);
        return a * a;
    });
}

template <class T>
void to_f32(float* out, const T* inp, i64 n) {
    each(n, [=](i64 i, auto m) { store(out + i, load(inp + i, m), m); });
}
template <class T>
void from_f32(T* out, const float* inp, i64 n) {
    each(n, [=](i64 i, auto m) { store(out + i, load(inp + i, m), m); });
}

template <class T>
void scale(T* out, const T* inp, float factor, i64 n) {
    const Vec f = set1(factor);
    each(n, [=](i64 i, auto m) { store(out + i, load(inp + i, m) * f, m); });
}

// The diagonal is computed apart, before out, which may be x or y, takes the place of its terms.
template <class T>
void shifted_sum(T* out, const T* x, const T* y, float a, float b, float c, i64 begin, i64 rows, i64 N) {
    const Vec va = set1(a), vb = set1(b), vc = set1(c);
    for (i64 r = begin; r < begin + rows; ++r) {
        const i64 row = r * N, diagonal = row + r;
        const Vec d = fma(vb, load(x + diagonal, 1), fma(vc, load(y + diagonal, 1), va));
        each(N, [=](i64 i, auto m) {
            store(out + row + i, fma(vb, load(x + row + i, m), vc * load(y + row + i, m)), m);
        });
        store(out + diagonal, d, 1);
    }
}

// ---- layernorm: y = (x - mean) rstd w + b ----

// Two passes, the second over a row in the cache: so the variance is computed by its definition, without
// cancellation.
template <class T>
void layernorm_row(T* out, float* mean, float* rstd, const T* x, const T* weight, const T* bias, i64 C) {
    const float mu = sum(reduce(C, [=](i64 i, auto m) { return load(x + i, m); })) / static_cast<float>(C);
    const Vec vmu = set1(mu);
    const Vec squares = reduce(C, [=](i64 i, auto m) {
        const Vec d = keep_first(load(x + i, m) - vmu, m, 0.0f);
        return d * d;
    });
    const Vec variance = set1(sum(squares) / static_cast<float>(C) + 1e-5f);
    const Vec vrs = set1(1.0f) / sqrt(variance);
    *mean = mu;
    *rstd = first_lane(vrs);
    each(C, [=](i64 i, auto m) {
        store(out + i, fma((load(x + i, m) - vmu) * vrs, load(weight + i, m), load(bias + i, m)), m);
    });
}

template <class T>
void layernorm_forward(T* out, float* mean, float* rstd, const T* inp, const T* weight, const T* bias,
                       i64 rows, i64 C) {
    for (i64 r = 0; r < rows; ++r)
        layernorm_row(out + r * C, mean + r, rstd + r, inp + r * C, weight, bias, C);
}

template <class T>
void residual_layernorm_forward(T* residual, T* out, float* mean, float* rstd, const T* a, const T* b,
                                const T* weight, const T* bias, i64 rows, i64 C) {
    for (i64 r = 0; r < rows; ++r) {
        add(residual + r * C, a + r * C, b + r * C, C);
        layernorm_row(out + r * C, mean + r, rstd + r, residual + r * C, weight, bias, C);
    }
}

// With n = (x - mean) rstd and g = dout w:  dinp += rstd (g - avg(g) - n avg(g n));  dweight += dout n; dbias
// += dout.
template <class T>
void layernorm_backward(T* dinp, float* dweight, float* dbias, const T* dout, const T* inp, const T* weight,
                        const float* mean, const float* rstd, i64 rows, i64 C) {
    const float inv_C = 1.0f / static_cast<float>(C);
    for (i64 r = 0; r < rows; ++r) {
        const T* dy = dout + r * C;
        const T* x = inp + r * C;
        T* dx = dinp + r * C;
        const Vec mu = set1(mean[r]), rs = set1(rstd[r]);
        Vec sum_gn = zero();
        const Vec sum_g = reduce(C, [&](i64 i, auto m) {
            const Vec d = load(dy + i, m);
            const Vec n = (load(x + i, m) - mu) * rs;
            const Vec g = d * load(weight + i, m);
            sum_gn = fma(g, n, sum_gn);
            store(dweight + i, fma(d, n, load(dweight + i, m)), m);
            store(dbias + i, load(dbias + i, m) + d, m);
            return g;
        });
        const Vec avg_g = set1(sum(sum_g) * inv_C), avg_gn = set1(sum(sum_gn) * inv_C);
        each(C, [=](i64 i, auto m) {
            const Vec n = (load(x + i, m) - mu) * rs;
            const Vec g = load(dy + i, m) * load(weight + i, m);
            store(dx + i, fma(rs, g - avg_g - n * avg_gn, load(dx + i, m)), m);
        });
    }
}

template <class T>
void column_sum(float* sum, const T* x, i64 rows, i64 ld, i64 cols) {
    for (i64 r = 0; r < rows; ++r) accumulate(sum, x + r * ld, cols);
}

// ---- classifier: softmax, cross-entropy, and the gradient of both ----

// First pass: the maximum. Second: the sum of exponentials. Third, unless dlogits is null: the gradient. A row of
// 50,304 logits stays in the L2 cache between them. In f32 the second leaves its exponentials in dlogits, which may be
// logits, and the third only scales them; bf16 would round them, so there they are computed again.
template <class T>
void classifier(float* losses, T* logits, T* dlogits, const std::int32_t* targets, float dloss, i64 rows,
                i64 V, i64 Vp) {
    constexpr bool exact = sizeof(T) == sizeof(float);
    for (i64 r = 0; r < rows; ++r) {
        const T* x = logits + r * Vp;
        T* const dx = dlogits ? dlogits + r * Vp : nullptr;
        const i64 target = targets[r];
        Vec vmax = set1(-3e38f);
        each(V, [&](i64 i, auto m) { vmax = max(vmax, keep_first(load(x + i, m), m, -3e38f)); });
        const float highest = max(vmax);
        const Vec shift = set1(highest), at_target = load(x + (target < 0 ? 0 : target), 1) - shift;
        const float total = sum(reduce(V, [=](i64 i, auto m) {
            const Vec e = exp(load(x + i, m) - shift);
            if (exact && dx) store(dx + i, e, m);
            return keep_first(e, m, 0.0f);
        }));
        if (losses) {
            // Not -log(p): p underflows if the loss exceeds 87.
            losses[r] = target < 0 ? 0.0f : logf(total) - first_lane(at_target);
        }
        if (dx) {
            if (target < 0) {
                each(Vp, [=](i64 i, auto m) { store(dx + i, zero(), m); });
                continue;
            }
            const Vec factor = set1(dloss / total);
            const Vec d_target = fma(exp(at_target), factor, set1(-dloss));
            each(V, [=](i64 i, auto m) {
                const Vec e = exact ? load(dx + i, m) : exp(load(x + i, m) - shift);
                store(dx + i, e * factor, m);
            });
            store(dx + target, d_target, 1);
            each(Vp - V, [=](i64 i, auto m) { store(dx + V + i, zero(), m); });
        }
    }
}

// ---- AdamW ----

// lerp of llm.c: start + weight (end - start) as fma(weight, end, fma(-weight, start, start)).
inline Vec lerp(Vec start, Vec end, Vec weight) { return fma(weight, end, fnma(weight, start, start)); }

struct AdamWConstants {
    Vec factor, beta1, beta2, inv1, inv2, eps, lr, decay;
    explicit AdamWConstants(const AdamWKernelStep& s)
        : factor(set1(s.factor)), beta1(set1(s.beta1)), beta2(set1(s.beta2)), inv1(set1(s.inv_correction1)),
          inv2(set1(s.inv_correction2)), eps(set1(s.eps)), lr(set1(s.lr)), decay(set1(s.weight_decay)) {}
};

template <class G, class Mask>
inline Vec adamw_update(Vec p, float* m, float* v, const G* grad, const AdamWConstants& c, Mask mask) {
    const Vec g = load(grad, mask) * c.factor;
    const Vec m1 = lerp(g, load(m, mask), c.beta1);
    const Vec v1 = lerp(g * g, load(v, mask), c.beta2);
    store(m, m1, mask);
    store(v, v1, mask);
    const Vec step = (m1 * c.inv1) / (sqrt(v1 * c.inv2) + c.eps);
    return fnma(c.lr, fma(c.decay, p, step), p);
}

void adamw_f32(float* p, float* m, float* v, const float* g, i64 n, const AdamWKernelStep& s) {
    const AdamWConstants c(s);
    each(n, [&](i64 i, auto mask) {
        store(p + i, adamw_update(load(p + i, mask), m + i, v + i, g + i, c, mask), mask);
    });
}

// SquirrelNoise5 (Squirrel Eiserloh, eiserloh.net/noise/SquirrelNoise5.hpp, CC BY 3.0 US): a hash of an index and a
// seed that passes for random bits.
inline std::uint32_t squirrel_noise5(std::uint32_t index, std::uint32_t seed) {
    std::uint32_t x = index * 0xd2a80a3fu + seed;
    x ^= x >> 9;
    x += 0xa884f197u;
    x ^= x >> 11;
    x *= 0x6c736f4bu;
    x ^= x >> 13;
    x += 0xb79f3abbu;
    x ^= x >> 15;
    x += 0x1b56c4f5u;
    x ^= x >> 17;
    return x;
}

// Rounds up with a probability equal to the part that is cut off. The expected value is exact, so small updates are
// not lost on average.
inline void store_stochastic(bf16* p, Vec a, std::uint32_t index, std::uint32_t seed, int n) {
    union {
        float f[Vec::W];
        std::uint32_t u[Vec::W];
    } x;
    store(x.f, a);
    for (int i = 0; i < n; ++i) {
        const std::uint32_t threshold =
            squirrel_noise5(index + static_cast<std::uint32_t>(i), seed) & 0xffffu;
        const std::uint32_t up = (x.u[i] & 0xffffu) > threshold ? 0x10000u : 0u;
        p[i].bits = static_cast<std::uint16_t>((x.u[i] + up) >> 16);
    }
}

template <class G>
void adamw_bf16(bf16* p, std::int16_t* master, float* m, float* v, const G* g, i64 begin, i64 n,
                const AdamWKernelStep& s) {
    const AdamWConstants c(s);
    if (master)
        each(n, [&](i64 i, auto mask) {
            const Vec old = join(p + i, master + i, lanes(mask));
            split(p + i, master + i, adamw_update(old, m + i, v + i, g + i, c, mask), lanes(mask));
        });
    else
        each(n, [&](i64 i, auto mask) {
            const Vec w = adamw_update(load(p + i, mask), m + i, v + i, g + i, c, mask);
            store_stochastic(p + i, w, static_cast<std::uint32_t>(begin + i), s.seed, lanes(mask));
        });
}

// ---- Muon ----

template <class T, class G>
void muon_momentum(T* out, float* m, const G* g, i64 n, float factor, float momentum, bool nesterov) {
    const Vec f = set1(factor), beta = set1(momentum);
    each(n, [=](i64 i, auto mask) {
        const Vec grad = load(g + i, mask) * f;
        const Vec m1 = lerp(grad, load(m + i, mask), beta);
        store(m + i, m1, mask);
        store(out + i, nesterov ? lerp(grad, m1, beta) : m1, mask);
    });
}

inline Vec muon_step(Vec p, Vec direction, Vec lr, Vec scale, Vec decay) {
    return fnma(lr, fma(decay, p, scale * direction), p);
}

void muon_update_f32(float* p, const float* direction, i64 n, const MuonStep& s) {
    const Vec lr = set1(s.lr), scale = set1(s.scale), decay = set1(s.weight_decay);
    each(n, [=](i64 i, auto mask) {
        store(p + i, muon_step(load(p + i, mask), load(direction + i, mask), lr, scale, decay), mask);
    });
}

void muon_update_bf16(bf16* p, std::int16_t* master, const bf16* direction, i64 begin, i64 n,
                      const MuonStep& s) {
    const Vec lr = set1(s.lr), scale = set1(s.scale), decay = set1(s.weight_decay);
    if (master)
        each(n, [=](i64 i, auto mask) {
            const Vec old = join(p + i, master + i, lanes(mask));
            split(p + i, master + i, muon_step(old, load(direction + i, mask), lr, scale, decay),
                  lanes(mask));
        });
    else
        each(n, [&](i64 i, auto mask) {
            const Vec w = muon_step(load(p + i, mask), load(direction + i, mask), lr, scale, decay);
            store_stochastic(p + i, w, static_cast<std::uint32_t>(begin + i), s.seed, lanes(mask));
        });
}

}  // namespace
